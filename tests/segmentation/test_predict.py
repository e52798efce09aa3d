"""The command line, from a saved segmenter to NIfTI files."""

import json
import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from tiny_segmenter import CLASSES, load, predict

from medssl.data.reading import read_volume
from medssl.inference.reading import Reading
from medssl.inference.record import record_of
from medssl.segmentation import predict as predicting
from medssl.segmentation.ensemble import Ensemble
from medssl.segmentation.segment import Averaged, segment_volume
from medssl.weights import load_segmenter, read_card


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
        ({"input": "none"}, "input: there is no image or folder none"),
        ({"device": "tpu"}, "device is 'tpu', allowed are auto, cpu, cuda"),
        ({"flips": 3}, "flips=3 is not understood"),
        ({"flips": "[0,0]"}, "is not understood"),
        ({"overlap": 1}, r"overlap must lie in \[0, 1\), got 1"),
        ({"overlap": "half"}, "overlap must lie"),
        ({"window_batch": 0}, "window_batch must be a whole number"),
        ({"probabilities": "maybe"}, "probabilities must be true or false"),
        (
            {"data__modality": "xray"},
            "data.modality: 'xray' is no modality; allowed are ct, mr, pet, us, unknown",
        ),
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


@pytest.mark.parametrize(
    ("card", "given", "expected", "note"),
    [
        (None, None, "mr", ", taken for MR by its values,"),
        (None, "ct", "ct", "voxels, "),
        ("mr", None, "mr", "voxels, "),
        ("ct", None, "ct", ", read as CT as in training though its values look like MR,"),
        ("ct", "mr", "mr", "voxels, "),
    ],
)
def test_the_modality_is_the_given_one_or_that_of_the_training_or_a_guess_that_is_told(
    tmp_path, save, scan, monkeypatch, capsys, card, given, expected, note
):
    seen, segment = [], predicting.segment

    def spy(members, fetch, record, **options):
        seen.append(*record.modality)
        return segment(members, fetch, record, **options)

    monkeypatch.setattr(predicting, "segment", spy)
    weights = save(modality=card)
    keys = {"weights": weights, "input": scan(), "output_dir": tmp_path / "o"}
    assert predict(**keys, data__modality=given or "null") == 0
    assert seen == [expected]
    out = capsys.readouterr().out
    assert note in out
    assert ("by its values" in out or "look like" in out) == (note != "voxels, ")


def test_one_of_several_stated_modalities_is_that_of_the_channel_that_is_read(tmp_path, save, scan, capsys):
    keys = {"weights": save(), "input": scan(channels=2), "output_dir": tmp_path / "o", "data__modality": "[ct,pet]"}
    assert predict(**keys, data__channels=1) == 0
    assert "by its values" not in capsys.readouterr().out
    assert predict(**{**keys, "output_dir": tmp_path / "p"}, data__channels="all") == 1
    assert "the image has 2 channels, the network reads 1" in capsys.readouterr().err


def test_networks_of_two_modalities_share_a_grid_and_say_one_modality_only_where_they_agree(save):
    ct, mr, mixed = save("ct", modality="ct"), save("mr", modality="mr"), save("mixed")
    assert "modality" not in read_card(mixed)["reading"]
    for paths, modality in (([ct, mixed], ("ct",)), ([ct, mr], None), ([mixed, mixed], None), ([mr, mr], ("mr",))):
        ensemble = Ensemble.load(paths, device=torch.device("cpu"))
        assert ensemble.modality == modality
        assert [member.weight for member in ensemble.members] == [2.0]


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
