import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import volume_files
from omegaconf import OmegaConf
from volume_files import tree

from medssl.data.formats import ReadError
from medssl.data.prepare import PrepareError, prepare_store
from medssl.data.recipes import locate_store, recipe_hash, store_recipe
from medssl.data.sources import Csv, Folder, NnUnet
from medssl.data.store import VolumeStore
from medssl.data.volume import BODY_RECIPE, voxel_hash
from medssl.phantoms.source import Phantoms

SMALL = {"size_voxel": 24, "spacing_mm": 16.0}
image = partial(volume_files.image, shape=(12, 12, 12))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_store_does_not_depend_on_the_number_of_workers(tmp_path, capfd):
    source = Phantoms(num_cases=5, **SMALL)
    alone = prepare_store(source, tmp_path / "alone", num_workers=0, progress=False)
    assert capfd.readouterr() == ("", "")
    prepare_store(source, tmp_path / "two", num_workers=2)
    assert tree(tmp_path / "alone") == tree(tmp_path / "two")
    assert (alone.num_cases, alone.num_new, alone.num_rejected) == (5, 5, 0)
    bar = capfd.readouterr().err
    assert "5/5" in bar
    assert "volume/s" in bar
    store = VolumeStore(tmp_path / "two")
    assert len(store) == 5
    assert store.recipe == store_recipe(source)
    record = store.record(0)
    volume, label = source.scan().cases[0].read(channels=None, min_side_voxel=8)
    assert record.voxel_hash == voxel_hash(volume.array)
    assert np.array_equal(store.read(0, 0, [0] * 3, [24] * 3).result(), volume.array)
    assert np.array_equal(store.read_label(0, [0] * 3, [24] * 3).result()[0], label)
    assert record.modality == ("ct",)


def children(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
def test_killed_at_any_moment_and_started_again_it_ends_in_the_same_store_and_redoes_no_finished_case(tmp_path):
    options = [
        "data=phantoms",
        "data.num_cases=11",
        "data.size_voxel=40",
        "data.phantom_spacing_mm=10",
        "num_workers=2",
    ]
    command = [sys.executable, "-m", "medssl.prepare", *options]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*command, f"store={straight}"], check=True, capture_output=True)

    def finished():
        return {f.name: f.stat().st_mtime_ns for f in killed.glob("*.zarr")}

    def half_written():
        return [f for f in killed.glob(".*.partial") if f.is_dir()]

    moments = (
        lambda: (killed / "store.json").exists(),
        half_written,
        lambda: len(finished()) >= 3,
        lambda: len(finished()) >= 7 and half_written(),
    )
    before = {}
    for moment in moments:
        process = subprocess.Popen([*command, f"store={killed}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not moment() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(is_alive, workers)), "workers outlive their parent"
        assert not (killed / "index.jsonl").exists()
        assert before.items() <= finished().items(), "a finished case was made again"
        before = finished()
    assert len(before) >= 7
    done = subprocess.run([*command, f"store={killed}"], check=True, capture_output=True, text=True)
    assert f"11 cases ({11 - len(before)} new)" in done.stdout
    assert before.items() <= finished().items()
    assert tree(killed) == tree(straight)


def test_bad_files_are_set_aside_with_reasons_and_stop_the_run_only_above_their_share(tmp_path, capfd):
    for number in range(6):
        image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    image(tmp_path / "in" / "flat.nii.gz", np.zeros((12, 12, 12), np.int16))
    (tmp_path / "in" / "text.nii.gz").write_text("no image")
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[4:8, 4:8, 4:8] = 1
    image(tmp_path / "in" / "unnamed.nii.gz", mask)
    image(tmp_path / "in" / "1_seg.nii.gz", mask)
    source = Folder(root=tmp_path / "in")
    with pytest.raises(PrepareError) as caught:
        prepare_store(source, tmp_path / "s", num_workers=0, progress=False)
    message = str(caught.value)
    assert message.startswith("2 of 8 cases are rejected, more than max_rejected_fraction=0.2\n")
    assert f"{tmp_path / 'in' / 'flat.nii.gz'}: all voxels have the same value (0): the image is constant" in message
    assert not (tmp_path / "s" / "index.jsonl").exists()
    summary = prepare_store(source, tmp_path / "s", num_workers=0, max_rejected_fraction=0.25)
    assert (summary.num_cases, summary.num_new, summary.num_rejected, summary.num_skipped) == (6, 0, 2, 2)
    assert "flat.nii.gz: all voxels" in capfd.readouterr().err
    assert [r["case"] for r in rows(tmp_path / "s" / "rejected.jsonl")] == ["flat", "text"]
    skipped = {Path(r["file"]).name for r in rows(tmp_path / "s" / "skipped.jsonl")}
    assert skipped == {"1_seg.nii.gz", "unnamed.nii.gz"}
    assert "6 cases (0 new), 2 rejected (see rejected.jsonl), 2 files skipped" in str(summary)
    image(tmp_path / "in" / "flat.nii.gz", seed=9)  # mended
    mended = prepare_store(source, tmp_path / "s", num_workers=0, progress=False)
    assert (mended.num_cases, mended.num_new) == (7, 1)
    (tmp_path / "in" / "text.nii.gz").unlink()
    prepare_store(source, tmp_path / "s", num_workers=0, progress=False)
    assert not (tmp_path / "s" / "rejected.jsonl").exists()


def test_problems_are_listed_before_work_starts_and_stop_it_where_they_are_too_many(tmp_path, capfd):
    image(tmp_path / "a.nii.gz")
    (tmp_path / "t.csv").write_text("image,label\na.nii.gz,\nb.nii.gz,\nc.nii.gz,\n")
    with pytest.raises(PrepareError, match="2 of 3 cases are rejected"):
        prepare_store(Csv(root=tmp_path / "t.csv"), tmp_path / "s", num_workers=0)
    assert capfd.readouterr().err.startswith("2 of 3 cases cannot be used:\n")
    assert not list((tmp_path / "s").glob("*.zarr"))


def test_a_source_without_a_usable_image_is_an_error_even_when_all_may_be_rejected(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.nii.gz").write_text("no image")
    with pytest.raises(PrepareError, match="no usable image"):
        prepare_store(
            Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0, max_rejected_fraction=1, progress=False
        )


def test_the_faulty_files_of_the_real_data_are_rejected_and_the_good_one_is_stored(real_data, tmp_path):
    summary = prepare_store(
        Folder(root=real_data / "faulty"), tmp_path / "s", num_workers=0, max_rejected_fraction=1, progress=False
    )
    assert [r.case for r in VolumeStore(tmp_path / "s").records()] == ["good"]
    assert summary.num_rejected == len({r["reason"] for r in summary.rejected}) == 12
    assert summary.num_skipped == 1  # a label map that is zero throughout


def test_a_truncated_label_is_one_message_and_exit_code_two(tmp_path):
    image(tmp_path / "a.nii.gz")
    mask = np.random.default_rng(0).integers(0, 9, (12, 12, 12)).astype(np.float32)
    image(tmp_path / "l.nii.gz", mask)
    (tmp_path / "l.nii.gz").write_bytes((tmp_path / "l.nii.gz").read_bytes()[:900])
    (tmp_path / "t.csv").write_text("image,label\na.nii.gz,l.nii.gz\n")
    done = subprocess.run(
        [sys.executable, "-m", "medssl.prepare", "data=csv", f"data.root={tmp_path / 't.csv'}", f"store={tmp_path}/s"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "l.nii.gz: the file is truncated: the voxels end early" in done.stderr


def test_resampling_while_preparing_keeps_channels_labels_and_the_hash_of_what_was_read(tmp_path):
    voxels = [image(tmp_path / "imagesTr" / f"a_000{c}.nii.gz", shape=(32, 32, 32), seed=c) for c in range(2)]
    label = np.zeros((32, 32, 32), np.uint8)
    label[8:24, 8:24, 8:24] = 5
    image(tmp_path / "labelsTr" / "a.nii.gz", label)
    prepare_store(NnUnet(root=tmp_path), tmp_path / "s", channels="all", spacing_mm=2.0, num_workers=0, progress=False)
    store = VolumeStore(tmp_path / "s")
    record = store.record(0)
    assert (record.shape, record.channels, record.labels) == ((16, 16, 16), 2, (5,))
    assert record.spacing_mm == pytest.approx((2, 2, 2))
    assert record.voxel_hash == voxel_hash(np.stack(voxels))
    assert (store.read_label(0, [0] * 3, [16] * 3).result()[0] == 5).sum() == 8**3
    values = set(store.points(0)[:, 3].tolist())
    assert values == {-1, 5}
    with pytest.raises(PrepareError, match="a side of 4 voxels"):
        prepare_store(NnUnet(root=tmp_path), tmp_path / "t", channels=0, spacing_mm=8.0, num_workers=0, progress=False)


def test_cases_with_an_unusual_number_of_channels_are_rejected(tmp_path):
    for number in range(5):
        image(tmp_path / "in" / f"{number}.nii.gz", shape=(10, 10, 10, 2 if number == 3 else 1), seed=number)
    summary = prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", channels="all", num_workers=0, progress=False)
    assert summary.num_cases == 4
    assert summary.rejected[0]["reason"].startswith("2 channels; most cases of the source have 1")
    one = prepare_store(Folder(root=tmp_path / "in"), tmp_path / "t", channels=0, num_workers=0, progress=False)
    assert one.num_cases == 5


def test_two_that_prepare_one_store_at_once_wait_for_each_other(tmp_path):
    command = [sys.executable, "-m", "medssl.prepare", "data=phantoms", "data.num_cases=3", "data.size_voxel=24",
               "data.phantom_spacing_mm=16", f"store={tmp_path / 's'}", "num_workers=1"]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum("3 cases (3 new)" in out for out, _ in printed) == 1
    assert sum("3 cases (0 new)" in out for out, _ in printed) == 1


def test_a_store_is_found_by_its_recipe_by_its_name_or_alone(tmp_path):
    data = OmegaConf.create({
        "name": "phantoms", "root": None, "channels": None, "spacing_mm": None, "min_side_voxel": 8,
        "source": {"_target_": "medssl.phantoms.source.Phantoms", "num_cases": 1, "size_voxel": 24, "spacing_mm": 16.0},
    })  # fmt: skip
    recipe = store_recipe(Phantoms(num_cases=1, **SMALL))
    assert recipe["body"] == BODY_RECIPE
    assert locate_store(data, None) == Path("stores") / f"phantoms-{recipe_hash(recipe)}"
    prepare_store(Phantoms(num_cases=1, **SMALL), tmp_path / "s", num_workers=0, progress=False)
    assert locate_store(data, str(tmp_path / "s")) == tmp_path / "s"
    data.source.num_cases = 2
    with pytest.raises(ValueError, match="another recipe"):
        locate_store(data, str(tmp_path / "s"))
    alone = OmegaConf.create({"name": "store", "root": "${store}", "validation_fraction": 0.1})
    assert locate_store(alone, tmp_path / "s") == tmp_path / "s"
    with pytest.raises(ValueError, match="give store=PATH"):
        locate_store(OmegaConf.create({"name": "store", "root": None}), None)
    with pytest.raises(ValueError, match=r"data=folder needs data\.root=PATH"):
        locate_store(OmegaConf.create({"name": "folder", "root": "???", "source": {"_target_": "x"}}), None)


@pytest.mark.parametrize("name", ["folder", "decathlon", "nnunet", "csv", "btcv", "amos", "phantoms", "store"])
def test_every_data_configuration_composes_and_makes_its_source(name, tmp_path):
    from hydra.utils import instantiate

    from medssl.config import compose

    (tmp_path / "t.csv").write_text("image\n")
    store = [] if name == "store" else [f"store={tmp_path / 's'}"]
    config = compose("prepare", [f"data={name}", f"data.root={tmp_path}", *store])
    assert config.data.name == name
    assert config.data.validation_fraction == 0.1
    if name != "store":
        source = instantiate(config.data.source, _convert_="all")
        assert source.recipe()["kind"] == name
    assert locate_store(config.data, config.store) == (tmp_path if name == "store" else tmp_path / "s")


def test_the_command_answers_mistakes_in_one_line(tmp_path):
    for arguments, message in (
        (["data=folder"], "error: data=folder needs data.root=PATH"),
        (["data=folder", f"data.root={tmp_path}"], "error: no image below"),
        (["data=store", f"store={tmp_path}"], "error: data=store is a finished store"),
        (["num_workers=-1"], "error: num_workers must be a whole number from 0 up, or null for one a core; got -1"),
        (["data.channels=first"], "error: channels takes all, null or the number of a channel (from 0), got 'first'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "medssl.prepare", *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(message)
        assert len(done.stderr.splitlines()) == 1


def test_read_errors_of_a_case_are_outcomes_of_worker_processes_too(tmp_path):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"")
    summary = prepare_store(
        Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=2, max_rejected_fraction=0.5, progress=False
    )
    assert summary.rejected == [
        {"case": "bad", "file": str(tmp_path / "in" / "bad.nii.gz"), "reason": "the file is empty (0 bytes)"}
    ]
    assert issubclass(ReadError, ValueError)
