"""The command line, from a saved segmenter to NIfTI files."""

import errno
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from medssl.config import main
from medssl.data.reading import read_volume
from medssl.inference.reading import Reading
from medssl.inference.record import record_of
from medssl.models.segmenter import build_segmenter
from medssl.predict import run
from medssl.segmentation import predict as predicting
from medssl.segmentation.ensemble import Ensemble
from medssl.segmentation.segment import Averaged, segment_volume
from medssl.weights import load_segmenter, read_card, save_weights

CLASSES = [{"value": 0, "name": "background"}, {"value": 5, "name": "liver"}, {"value": 117, "name": "ribs"}]


@pytest.fixture
def save(tmp_path):
    """Write a tiny segmenter with random weights; what differs from the default may be given."""

    def saved(name="segmenter", *, seed=0, classes=CLASSES, channels=1, **reading):
        torch.manual_seed(seed)
        encoder = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8], "strides": [1, 2]}
        network, recipe = build_segmenter(encoder, None, num_classes=len(classes), in_channels=channels)
        normalise = [{"_target_": "medssl.data.augment.ByModality", "window_hu": [-200.0, 300.0]}]
        card = {
            "kind": "segmenter",
            **recipe,
            "classes": classes,
            "reading": {
                "channels": None if channels == 1 else "all",
                "spacing_mm": [4.0, 4.0, 5.0],
                "crop_voxel": [16, 16, 16],
                "outside": "minimum",
                "normalise": normalise,
                **reading,
            },
        }
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, network.parts(), card)
        return path

    return saved


@pytest.fixture
def scan(tmp_path):
    """A grey-value image of 20 x 18 x 16 voxels in LPS order."""

    def written(name="scan.nii.gz", *, seed=0, channels=1):
        array = np.random.default_rng(seed).normal(0, 200, (20, 18, 16, channels)).astype(np.float32)
        path = tmp_path / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.squeeze(), np.diag([-3.0, -3.0, 4.0, 1.0])), path)
        return path

    return written


def predict(**keys):
    """Run the command; its exit code."""
    try:
        main("predict", run, arguments=[f"{key.replace('__', '.')}={value}" for key, value in keys.items()])
    except SystemExit as stop:
        return stop.code
    return 0


def load(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image


def test_the_mri_slab_comes_back_in_lps_with_the_values_of_the_training_set(real_data, tmp_path, save, capsys):
    source = real_data / "mr_abdomen" / "mr_slab_3mm.nii.gz"
    assert predict(weights=save(), input=source, output_dir=tmp_path / "o") == 0
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["mr_slab_3mm.nii.gz"]
    voxels, found = load(tmp_path / "o" / "mr_slab_3mm.nii.gz")
    given = nibabel.load(source)
    assert nibabel.aff2axcodes(found.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(found.affine, given.affine)
    for field in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b"):
        np.testing.assert_array_equal(found.header[field], given.header[field])
    assert voxels.dtype == np.uint8
    assert set(np.unique(voxels)) <= {0, 5, 117}
    assert len(np.unique(voxels)) > 1
    out = capsys.readouterr().out
    assert "1 network, 3 classes, windows of 16 x 16 x 16 voxels at 4 x 4 x 5 mm, on cpu; 1 image ->" in out
    assert "mr_slab_3mm: 117 x 91 x 20 voxels" in out


def test_the_result_is_what_the_library_predicts_turned_to_the_order_of_the_file(tmp_path, save, scan):
    weights, source = save(), scan()
    assert predict(weights=weights, input=source, output_dir=tmp_path / "o") == 0
    network, card = load_segmenter(weights)
    volume = read_volume(source)
    reading = Reading.from_card(card["reading"])
    classes = segment_volume(Averaged([network]), volume.array, record_of(volume), reading, num_classes=3)
    expected = np.array([0, 5, 117])[classes][::-1, ::-1]
    np.testing.assert_array_equal(load(tmp_path / "o" / "scan.nii.gz")[0], expected)


def test_a_folder_is_predicted_but_for_what_is_broken_or_a_label_map(real_data, tmp_path, save, capsys):
    assert predict(weights=save(), input=real_data / "faulty", output_dir=tmp_path / "o") == 1
    captured = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["good.nii.gz", "smaller_than_crop.nii.gz"]
    assert load(tmp_path / "o" / "smaller_than_crop.nii.gz")[0].shape == (7, 9, 5)
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 11
    assert any("nan_voxels.nii.gz: 1,728 of 13,824 voxels are NaN" in line for line in errors)
    assert any("four_d.nii.gz: a 4-D image with 2 channels; choose with data.channels" in line for line in errors)
    assert "label_wrong_shape.nii.gz: skipped, few whole values in pieces" in captured.out
    assert captured.out.splitlines()[-1] == "2 predicted, 1 skipped, 11 failed"


def test_a_dicom_folder_is_one_image(real_data, tmp_path, save):
    assert predict(weights=save(), input=real_data / "ct_dicom", output_dir=tmp_path / "o", overlap=0.1) == 0
    voxels, found = load(tmp_path / "o" / "ct_dicom.nii.gz")
    assert voxels.shape == (512, 512, 20)
    np.testing.assert_allclose(found.header.get_zooms(), (0.9765625, 0.9765625, 2.0), atol=1e-4)


def test_results_that_are_there_are_kept_unless_they_are_to_be_overwritten(tmp_path, save, scan, capsys):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    common = {"weights": save(), "input": tmp_path / "scans", "output_dir": tmp_path / "o"}
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "a.nii.gz").write_bytes(b"earlier")
    assert predict(**common) == 0
    assert (tmp_path / "o" / "a.nii.gz").read_bytes() == b"earlier"
    out = capsys.readouterr().out
    assert "a: skipped" in out
    assert "overwrite=true" in out
    assert out.splitlines()[-1] == "1 predicted, 1 skipped"
    assert predict(**common, overwrite="true") == 0
    assert load(tmp_path / "o" / "a.nii.gz")[0].shape == (20, 18, 16)


def test_probabilities_lie_on_the_same_grid_and_name_their_classes(tmp_path, save, scan):
    assert predict(weights=save(), input=scan(), output_dir=tmp_path / "o", probabilities="true") == 0
    voxels, image = load(tmp_path / "o" / "scan.nii.gz")
    found, four = load(tmp_path / "o" / "scan_probabilities.nii.gz")
    assert found.shape == (20, 18, 16, 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(four.affine, image.affine)
    np.testing.assert_allclose(found.sum(-1), 1, atol=2e-3)
    assert (np.array([0, 5, 117])[found.argmax(-1)] == voxels).mean() > 0.99
    assert json.loads((tmp_path / "o" / "scan_probabilities.json").read_text())["classes"] == CLASSES
    assert not [p for p in (tmp_path / "o").iterdir() if p.name.startswith(".")]


def test_several_files_are_averaged_and_those_of_one_reading_share_its_grid(tmp_path, save, scan):
    first, second = save("a"), save("b", seed=1)
    third = save("c", seed=2, spacing_mm="native", normalise=[{"_target_": "medssl.data.augment.ZScore"}])
    ensemble = Ensemble.load([first, second, third, second], flips=(0,), device=torch.device("cpu"))
    assert [(len(m.predict.networks), len(m.predict.flips), m.weight) for m in ensemble.members] == [
        (3, 2, 3.0),
        (1, 2, 1.0),
    ]
    source, results = scan(), {}
    for name, weights in {"one": first, "three": f"[{first},{second},{third}]"}.items():
        out = tmp_path / name
        assert predict(weights=weights, input=source, output_dir=out, flips="true", probabilities="true") == 0
        results[name] = load(out / "scan_probabilities.nii.gz")[0]
    alone = [results["one"]]
    for weights in (second, third):
        out = tmp_path / weights.stem
        assert predict(weights=weights, input=source, output_dir=out, flips="true", probabilities="true") == 0
        alone.append(load(out / "scan_probabilities.nii.gz")[0])
    np.testing.assert_allclose(results["three"], np.mean(alone, axis=0), atol=2e-3)


def test_large_label_values_get_the_smallest_type_that_holds_them(tmp_path, save, scan):
    for value, kind in ((255, np.uint8), (256, np.int16), (40000, np.int32)):
        weights = save(f"to_{value}", classes=[CLASSES[0], {"value": value, "name": "x"}])
        assert predict(weights=weights, input=scan(), output_dir=tmp_path / f"o{value}") == 0
        voxels, image = load(tmp_path / f"o{value}" / "scan.nii.gz")
        assert image.get_data_dtype() == kind
        assert set(np.unique(voxels)) <= {0, value}


def test_channels_must_be_those_the_network_reads(tmp_path, save, scan, capsys):
    both, single = scan("both.nii.gz", channels=2), scan("one.nii.gz")
    weights = save("two", channels=2)
    assert predict(weights=weights, input=both.parent, output_dir=tmp_path / "o") == 1
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["both.nii.gz"]
    assert f"{single}: the image has 1 channels, the network reads 2" in capsys.readouterr().err
    assert load(tmp_path / "o" / "both.nii.gz")[0].shape == (20, 18, 16)
    assert predict(weights=save("grey"), input=both, output_dir=tmp_path / "p", data__channels=1) == 0
    assert predict(weights=save("grey"), input=both, output_dir=tmp_path / "q", data__channels="all") == 1
    assert "the image has 2 channels, the network reads 1; data.channels=N picks one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "null"}, "weights is missing"),
        ({"weights": "none.safetensors"}, "there is no weight file none.safetensors"),
        ({"input": "none"}, "input=none does not exist"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
        ({"flips": 3}, "flips=3 is not understood"),
        ({"flips": "[0,0]"}, "is not understood"),
        ({"overlap": 1}, r"overlap must lie in \[0, 1\), got 1"),
        ({"overlap": "half"}, "overlap must lie"),
        ({"window_batch": 0}, "window_batch must be a whole number"),
        ({"probabilities": "maybe"}, "probabilities must be true or false"),
        ({"data__modality": "pet"}, "ct, mr or null"),
        ({"data__channels": -1}, "channels takes all, null or the number"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2(tmp_path, save, scan, capsys, keys, message):
    given = {"weights": save(), "input": scan(), "output_dir": tmp_path / "o", **keys}
    assert predict(**given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "o").exists()


def test_networks_of_other_classes_or_channels_are_not_averaged(tmp_path, save, scan, capsys):
    other = save("other", classes=[CLASSES[0], {"value": 6, "name": "spleen"}, CLASSES[2]])
    two = save("two", channels=2)
    for weights, message in ((other, "classes differ: 0 background, 6 spleen, 117 ribs and"), (two, "channels differ")):
        assert predict(weights=f"[{save()},{weights}]", input=scan(), output_dir=tmp_path / "o") == 2
        assert message in capsys.readouterr().err


def test_a_folder_without_an_image_is_refused(tmp_path, save, scan, capsys):
    scan("only_seg.nii.gz")
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o") == 2
    assert "none of its files is an image" in capsys.readouterr().err


def test_a_result_never_replaces_its_image(tmp_path, save, scan, capsys):
    source = scan("a.nii.gz")
    before = source.read_bytes()
    assert predict(weights=save(), input=source, output_dir=source.parent, overwrite="true") == 1
    assert source.read_bytes() == before
    assert "would replace the image" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_finished_results_and_no_half_ones(tmp_path, save, scan, monkeypatch, capsys, number):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    written, write = [], predicting.write_nifti

    def interrupted(path, planes, **options):
        def cut():
            for z, plane in enumerate(planes):
                if written and z == 3:
                    signal.raise_signal(number)
                yield plane

        write(path, cut(), **options)
        written.append(path.name)

    monkeypatch.setattr(predicting, "write_nifti", interrupted)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o") == 130
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["a.nii.gz"]
    assert "the same command goes on" in capsys.readouterr().err


def test_an_image_too_large_for_the_memory_is_reported_and_the_rest_is_done(tmp_path, save, scan, monkeypatch, capsys):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    segment = predicting.segment

    def limited(members, fetch, record, **options):
        if record.case == "a":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return segment(members, fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", limited)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o") == 1
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["b.nii.gz"]
    assert "does not fit into the memory of the cpu; window_batch=1 needs less" in capsys.readouterr().err


@pytest.mark.parametrize("probabilities", ["false", "true"])
def test_an_image_that_the_network_gives_nan_for_is_reported_and_the_rest_is_done(
    tmp_path, save, scan, monkeypatch, capsys, probabilities
):
    broken = scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    segment = predicting.segment

    def diverged(members, fetch, record, **options):
        predict = members[0].predict
        nan = torch.nan if record.case == "a" else 0
        return segment([replace(members[0], predict=lambda w: predict(w) + nan)], fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", diverged)
    common = {"weights": save(), "input": broken.parent, "output_dir": tmp_path / "o"}
    assert predict(**common, probabilities=probabilities) == 1
    assert {p.name[0] for p in (tmp_path / "o").iterdir()} == {"b"}
    captured = capsys.readouterr()
    assert f"error: {broken}: the network's output is not finite" in captured.err
    assert captured.out.splitlines()[-1] == "1 predicted, 1 failed"


def test_weights_that_diverged_are_an_error_for_each_image(tmp_path, save, scan, capsys):
    weights = save()
    network, card = load_segmenter(weights)
    with torch.no_grad():
        next(network.decoder.parameters()).fill_(torch.nan)
    save_weights(weights, network.parts(), card)
    assert predict(weights=weights, input=scan(), output_dir=tmp_path / "o") == 1
    assert "its training diverged" in capsys.readouterr().err
    assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    ("card", "given", "expected", "note"),
    [
        (None, None, "ct", ", taken for CT by its values,"),
        (None, "mr", "mr", "voxels, "),
        ("ct", None, "ct", "voxels, "),
        ("mr", None, "mr", ", read as MR as in training though its values look like CT,"),
        ("mr", "ct", "ct", "voxels, "),
    ],
)
def test_the_modality_is_the_given_one_or_that_of_the_training_or_a_guess_that_is_told(
    tmp_path, save, scan, monkeypatch, capsys, card, given, expected, note
):
    seen, segment = [], predicting.segment

    def spy(members, fetch, record, **options):
        seen.append(record.modality)
        return segment(members, fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", spy)
    weights = save(modality=card)
    keys = {"weights": weights, "input": scan(), "output_dir": tmp_path / "o"}
    assert predict(**keys, data__modality=given or "null") == 0
    assert seen == [expected]
    out = capsys.readouterr().out
    assert note in out
    assert ("by its values" in out or "look like" in out) == (note != "voxels, ")


def test_networks_of_two_modalities_share_a_grid_and_say_one_modality_only_where_they_agree(save):
    ct, mr, mixed = save("ct", modality="ct"), save("mr", modality="mr"), save("mixed")
    assert "modality" not in read_card(mixed)["reading"]
    for paths, modality in (([ct, mixed], "ct"), ([ct, mr], None), ([mixed, mixed], None), ([mr, mr], "mr")):
        ensemble = Ensemble.load(paths, device=torch.device("cpu"))
        assert ensemble.modality == modality
        assert [member.weight for member in ensemble.members] == [2.0]


def test_a_result_that_cannot_be_written_is_reported_and_the_rest_is_done(tmp_path, save, scan, monkeypatch, capsys):
    for seed, name in enumerate(("a.nii.gz", "b.nii.gz", "c.nii.gz")):
        scan(name, seed=seed)
    (tmp_path / "o" / "a.nii.gz").mkdir(parents=True)
    write = predicting.write_nifti

    def refused(path, planes, **options):
        if path.name == "b.nii.gz":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write(path, planes, **options)

    monkeypatch.setattr(predicting, "write_nifti", refused)
    assert predict(weights=save(), input=tmp_path / "scans", output_dir=tmp_path / "o", overwrite="true") == 1
    captured = capsys.readouterr()
    assert re.search(r"error: .*scans/a.nii.gz: .*o/a.nii.gz is a folder; remove it", captured.err)
    assert re.search(r"error: .*scans/b.nii.gz: .*Permission denied: .*o/b.nii.gz\n", captured.err)
    assert load(tmp_path / "o" / "c.nii.gz")[0].shape == (20, 18, 16)
    assert captured.out.splitlines()[-1] == "1 predicted, 2 failed"


@pytest.mark.parametrize("where", ["write_nifti", "os.posix_fallocate"])
def test_a_full_disk_ends_it_at_once(tmp_path, save, scan, monkeypatch, capsys, where):
    scan("a.nii.gz")
    scan("b.nii.gz", seed=1)
    tried = []

    def full(*arguments, **options):
        tried.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"medssl.segmentation.predict.{where}", full)
    keys = {"weights": save(), "input": tmp_path / "scans", "output_dir": tmp_path / "o", "probabilities": "true"}
    assert predict(**keys) == 2
    assert len(tried) == 1
    assert "o: the disk is full at a; finished results are kept; make room" in capsys.readouterr().err


def test_probabilities_are_added_to_results_that_are_there_which_are_kept(tmp_path, save, scan, capsys):
    common = {"weights": save(), "input": scan(), "output_dir": tmp_path / "o"}
    target, added = tmp_path / "o" / "scan.nii.gz", tmp_path / "o" / "scan_probabilities.nii.gz"
    assert predict(**common) == 0
    labels = re.search(r"\d of 2 labels found", capsys.readouterr().out)[0]
    target.write_bytes(b"corrected by hand")
    assert predict(**common, probabilities="true") == 0
    out = capsys.readouterr().out
    assert f"{labels}, " in out
    assert f"-> {added} ({target} was there already and is kept)" in out
    assert target.read_bytes() == b"corrected by hand"
    assert load(added)[0].shape == (20, 18, 16, 3)
    before = added.stat().st_mtime_ns
    target.unlink()
    assert predict(**common, probabilities="true") == 0
    assert load(target)[0].shape == (20, 18, 16)
    assert added.stat().st_mtime_ns == before
    capsys.readouterr()
    assert predict(**common, probabilities="true") == 0
    assert "scan: skipped" in capsys.readouterr().out


def test_two_images_with_results_of_one_name_are_refused_before_anything_is_done(tmp_path, save, scan, capsys):
    first, second = scan("x.nii.gz"), scan("X_probabilities.nii.gz", seed=1)
    common = {"weights": save(), "input": first.parent, "output_dir": tmp_path / "o"}
    assert predict(**common, probabilities="true") == 2
    error = capsys.readouterr().err
    assert str(first) in error
    assert str(second) in error
    assert "would both be written to" in error
    assert not (tmp_path / "o").exists()
    assert predict(**common) == 0


def test_help_names_the_keys_without_importing_torch():
    code = (
        "import sys, runpy; sys.argv = ['predict', '--help']\n"
        "try: runpy.run_module('medssl.predict', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'lightning', 'monai', 'SimpleITK', 'nibabel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("weights", "input", "output_dir", "flips", "overlap", "window_batch", "probabilities", "overwrite"):
        assert f"  {name}" in done.stdout, done.stdout
