import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import nibabel
import numpy as np
import pytest

from medssl.data.prepare import prepare_store
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.phantoms.source import Phantoms
from medssl.phantoms.torso import LABELS
from medssl.tables import derived as derived_module
from medssl.tables.derived import Body, Derivation, derive, table_of

NUM_CASES = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("derived") / "store"
    prepare_store(Phantoms(num_cases=NUM_CASES, size_voxel=48, spacing_mm=8.0), root, num_workers=0, progress=False)
    return root


def tree(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_a_derived_table_is_reached_by_its_name_and_does_not_depend_on_the_number_of_workers(store, capfd):
    body = Body()
    assert isinstance(body, Derivation)
    first = derive(store, body, num_workers=0, progress=False)
    assert capfd.readouterr() == ("", "")
    assert (first.num_cases, first.num_new) == (NUM_CASES, NUM_CASES)
    alone = tree(first.folder)
    for file in first.folder.iterdir():
        file.unlink()
    derive(store, body, num_workers=2)
    assert tree(first.folder) == alone
    table = VolumeStore(store).derived("body", 0)
    assert set(table) == {"lower_voxel", "upper_voxel", "fill", "volume_ml"}


def test_the_derived_body_is_the_one_that_was_measured_while_preparing(store):
    derive(store, Body(), num_workers=0, progress=False)
    opened = VolumeStore(store)
    for number, record in enumerate(opened.records()):
        table = opened.derived("body", number)
        assert table["lower_voxel"] == pytest.approx(record.body.lower, abs=1.01)
        assert table["upper_voxel"] == pytest.approx(record.body.upper, abs=1.01)
        label = opened.read_label(number, [0] * 3, [48] * 3).result()[0]
        assert LABELS["body"] in label
        assert float(table["volume_ml"]) == pytest.approx((label > 0).sum() * 0.512, rel=0.06)
        assert 0.3 < float(table["fill"]) < 0.9


def test_finished_tables_are_kept_missing_ones_are_made_and_half_written_ones_are_cleared(store):
    folder = derive(store, Body(), num_workers=0, progress=False).folder
    straight = tree(folder)
    kept = folder / "phantom_0001.npz"
    before = kept.stat().st_mtime_ns
    (folder / "phantom_0002.npz").unlink()
    (folder / ".phantom_0002.npz.1.partial").write_bytes(b"half")
    (folder / "quality.csv").unlink()
    assert derive(store, Body(), num_workers=0, progress=False).num_new == 1
    assert kept.stat().st_mtime_ns == before
    assert tree(folder) == straight


def test_a_killed_run_goes_on_and_ends_in_the_same_tables(store):
    command = [
        sys.executable,
        "-m",
        "medssl.derive",
        "what=body",
        "what.threshold_hu=-300",
        f"store={store}",
        "num_workers=1",
    ]
    straight = derive(store, Body(threshold_hu=-300), num_workers=0, progress=False).folder
    expected = tree(straight)
    for file in straight.iterdir():
        file.unlink()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(straight.glob("*.npz"))) < 2 and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{NUM_CASES} tables" in done.stdout
    assert tree(straight) == expected


def test_the_quality_table_has_a_row_a_case_and_its_means_are_told(store):
    summary = derive(store, Body(), num_workers=0, progress=False)
    with (summary.folder / "quality.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["case"] for row in rows] == [f"phantom_{n:04d}" for n in range(NUM_CASES)]
    fills = [float(row["fill"]) for row in rows]
    assert summary.mean_quality["fill"] == pytest.approx(np.mean(fills))
    assert "mean quality: fill 0." in str(summary)


def test_another_recipe_lies_beside_and_the_pointer_names_the_last_one(store):
    one = derive(store, Body(), num_workers=0, progress=False).folder
    two = derive(store, Body(threshold_hu=-200.0), num_workers=0, progress=False).folder
    assert one != two
    assert one.is_dir()
    pointer = VolumeStore(store).pointer("body")
    assert pointer == {"folder": two.name, "recipe": {"copy_spacing_mm": 4.0, "threshold_hu": -200.0}}
    derive(store, Body(), num_workers=0, progress=False)
    assert json.loads((store / "derived" / "body.json").read_text())["folder"] == one.name


def test_a_derivation_from_outside_the_package_is_found_in_the_config_folder(store, tmp_path):
    (tmp_path / "what").mkdir()
    (tmp_path / "what" / "size.yaml").write_text("# @package what\n_target_: size_of_cases.Size\n")
    (tmp_path / "size_of_cases.py").write_text(
        "class Size:\n"
        "    name = 'size'\n"
        "    def recipe(self): return {}\n"
        "    def __call__(self, store, case): return {'size': store.record(case).shape}\n"
        "    def quality(self, table): return {'longest': float(max(table['size']))}\n"
    )
    command = [sys.executable, "-m", "medssl.derive", "--config-dir", str(tmp_path), "what=size", f"store={store}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mean quality: longest 48" in done.stdout
    assert VolumeStore(store).derived("size", 3)["size"].tolist() == [48, 48, 48]


def test_a_folder_that_is_no_store_and_a_damaged_table_are_said_so(store, tmp_path):
    with pytest.raises(ValueError, match="is not a medssl store"):
        derive(tmp_path, Body())
    folder = derive(store, Body(), num_workers=0, progress=False).folder
    (folder / "phantom_0000.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"phantom_0000\.npz is damaged .* delete it and derive again"):
        derive(store, Body(), num_workers=0, progress=False)
    (folder / "phantom_0000.npz").unlink()


def test_the_table_of_a_case_that_was_made_anew_is_made_anew(tmp_path):
    def image(name, seed):
        array = np.random.default_rng(seed).integers(-900, 900, (16, 16, 16)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")

    def derived():
        prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0, progress=False)
        summary = derive(tmp_path / "s", Body(), num_workers=0, progress=False)
        return summary.num_new, tree(summary.folder)

    (tmp_path / "in").mkdir()
    image("a", 0)
    image("b", 1)
    assert derived()[0] == 2
    assert derived()[0] == 0
    image("a", 2)
    new, tables = derived()
    assert new == 1
    shutil.rmtree(tmp_path / "s")
    assert derived()[1] == tables


@dataclass(frozen=True)
class Twice:
    """Twice the fill of the body, which another table holds, and the name of the case before."""

    factor: float = 2.0
    name = "twice"

    def recipe(self):
        return {"factor": self.factor}

    def needs(self):
        return [Body()]

    def rests_on(self, store, case):
        return [case - 1] if case else []

    def __call__(self, store, case):
        before = store.record(case - 1).voxel_hash if case else ""
        return {"fill": self.factor * table_of(store, Body(), case)["fill"], "before": np.array(before)}

    def quality(self, table):
        return {"fill": float(table["fill"])}


def test_what_a_derivation_needs_is_derived_first_and_a_table_falls_with_the_cases_that_it_rests_on(make_store):
    arrays = [np.random.default_rng(n).integers(-900, 900, (1, 16, 16, 16)).astype(np.int16) for n in range(4)]
    root = make_store(*arrays).root
    summary = derive(root, Twice(), num_workers=0, progress=False)
    assert summary.num_new == 4
    store = VolumeStore(root)
    assert float(store.derived("twice", 3)["fill"]) == 2 * float(store.derived("body", 3)["fill"])
    assert derive(root, Twice(), num_workers=0, progress=False).num_new == 0
    arrays[1] = arrays[1][:, ::-1].copy()
    make_store(*arrays)
    derived_module._opened.cache_clear()  # as a new process
    again = derive(root, Twice(), num_workers=0, progress=False)
    assert again.num_new == 2, "the case and the one after it"
    assert str(VolumeStore(root).derived("twice", 2)["before"]) == VolumeStore(root).record(1).voxel_hash
