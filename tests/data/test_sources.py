import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from omegaconf import OmegaConf
from volume_files import image, label, names, reasons

from medssl.config import compose
from medssl.data import image_tree
from medssl.data.cases import Case
from medssl.data.fingerprints import Contents
from medssl.data.formats import ReadError
from medssl.data.reading import LabelMapError
from medssl.data.recipes import preparation
from medssl.data.sources import Decathlon, Folder, NnUnet
from medssl.phantoms.source import Phantoms


def case_label(scan):
    return {c.case: (c.split, c.label and c.label.parent.name) for c in scan.cases}


def test_a_folder_gives_each_image_its_own_safe_name_and_skips_label_maps(tmp_path):
    for name in (
        "a/scan.nii.gz",
        "b/scan.nii.gz",
        "b/deep er/scan (1).nii",
        "top.nii.gz",
        ".hidden.nii.gz",
        "x.zarr/0.nii",
    ):
        image(tmp_path / name)
    for name in ("labelsTr/scan.nii.gz", "a/scan_seg.nii.gz", "a/scan_organs.nii.gz", "b/Scan_Label.nii.gz"):
        label(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    scan = Folder(root=tmp_path).scan()
    assert sorted(names(scan)) == ["a__scan", "b__deep_er__scan_1_-c5229573", "b__scan", "top"]
    assert {c.case: c.group for c in scan.cases}["b__scan"] == "b"
    assert {(Path(s["file"]).name, s["reason"]) for s in scan.skipped} == {
        ("scan.nii.gz", "lies in labelsTr/: a label map"),
        ("scan_seg.nii.gz", "the name ends in _seg: a label map"),
        ("scan_organs.nii.gz", "the name ends in _organs: a label map"),
        ("Scan_Label.nii.gz", "the name ends in _Label: a label map"),
        (tmp_path.name, "1 hidden images or folders are left out (.hidden.nii.gz)"),
        (tmp_path.name, "1 folders .zarr are not read (x.zarr)"),
    }
    assert scan.problems == []
    assert len(Folder(root=tmp_path, include_labels=True).scan().cases) == 8


def test_names_that_agree_but_for_letters_a_file_system_dislikes_are_told_apart_by_a_hash(tmp_path):
    for name in ("a b.nii.gz", "a_b.nii.gz", "A_B.nrrd.nii", "c.nii", "c.nii.gz", "d" * 200 + ".nii.gz"):
        image(tmp_path / name)
    found = names(Folder(root=tmp_path).scan())
    assert len({n.lower() for n in found}) == len(found) == 6
    assert max(map(len, found)) <= 130
    assert found == names(Folder(root=tmp_path).scan())


def test_a_label_map_without_a_telling_name_is_told_when_it_is_read(tmp_path):
    image(tmp_path / "image.nii.gz")
    label(tmp_path / "unnamed.nii.gz")
    by_name = {c.case: c for c in Folder(root=tmp_path).scan().cases}
    by_name["image"].read(channels=None, min_side_voxel=8)
    with pytest.raises(LabelMapError, match="few whole values in pieces"):
        by_name["unnamed"].read(channels=None, min_side_voxel=8)
    kept = {c.case: c for c in Folder(root=tmp_path, include_labels=True).scan().cases}
    assert kept["unnamed"].read(channels=None, min_side_voxel=8)[0].array.max() == 1


def test_the_real_folder_has_all_kinds_of_images_and_its_dicom_series_once(real_data):
    scan = Folder(root=real_data).scan()
    found = set(names(scan))
    assert {"ct_dicom", "ct_abdomen__ct_torso_3mm", "mr_abdomen__mr_slab_3mm", "faulty__good"} <= found
    assert len(found) == 160 + 1 + 2 + 1 + 14
    assert len(scan.skipped) == 160 + 3


def test_links_that_lead_in_circles_do_not_trap_the_walk(tmp_path):
    image(tmp_path / "data" / "one.nii.gz")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data", target_is_directory=True)
    outside = tmp_path / "outside"
    image(outside / "two.nii.gz")
    (tmp_path / "data" / "linked").symlink_to(outside, target_is_directory=True)
    assert sorted(names(Folder(root=tmp_path / "data").scan())) == ["linked__two", "one"]


def test_a_scan_looks_once_into_files_of_unknown_kind_and_into_no_image(tmp_path, monkeypatch):
    for folder in range(3):
        (tmp_path / f"patient{folder:03d}").mkdir()
        for number in range(100):
            name = f"{number}.nii.gz" if number < 30 else f"{number}.json" if number < 60 else f"{number}.dat"
            os.mknod(tmp_path / f"patient{folder:03d}" / name)
    looked = []
    monkeypatch.setattr(image_tree, "dicom_class", lambda file: looked.append(file))
    assert len(Folder(root=tmp_path).scan().cases) == 90
    assert len(looked) == len(set(looked)) == 120
    assert {file.suffix for file in looked} == {".dat"}


def test_an_empty_or_missing_folder_is_said_so(tmp_path):
    with pytest.raises(ValueError, match="no image below"):
        Folder(root=tmp_path).scan()
    with pytest.raises(ValueError, match="does not exist"):
        Folder(root=tmp_path / "nowhere").scan()
    image(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="data=folder takes a folder"):
        Folder(root=tmp_path / "a.nii.gz").scan()


def test_decathlon_lists_train_and_test_and_all_its_problems_at_once(tmp_path):
    for name in ("a", "b", "c", "d"):
        image(tmp_path / "imagesTr" / f"{name}.nii.gz")
    image(tmp_path / "imagesTs" / "t.nii.gz")
    truth = label(tmp_path / "labelsTr" / "a.nii.gz")
    label(tmp_path / "labelsTr" / "b.nii.gz", (10, 11, 9))
    label(tmp_path / "labelsTr" / "c.nii.gz", value=0.5, dtype=np.float32)
    pairs = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in ("a", "b", "c", "d", "gone")
    ]
    listed = {"name": "Task", "training": [*pairs, {"label": "./labelsTr/a.nii.gz"}], "test": ["./imagesTs/t.nii.gz"]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    scan = Decathlon(root=tmp_path).scan().checked()
    assert [(c.case, c.split, c.group) for c in scan.cases] == [("a", "train", "Task"), ("t", "test", "Task")]
    assert reasons(scan) == {
        ("b.nii.gz", "label of the wrong shape: 10 x 11 x 9, its image is 10 x 11 x 12"),
        ("c.nii.gz", "fractional labels: 27 voxels are no whole numbers (such as 0.5)"),
        ("d.nii.gz", "the label file does not exist"),
        ("gone.nii.gz", "the image file does not exist"),
        ("a.nii.gz", "training: a label without an image"),
    }
    assert np.array_equal(scan.cases[0].read(channels="all", min_side_voxel=8)[1], truth)
    (tmp_path / "dataset.json").write_text("{broken")
    with pytest.raises(ValueError, match="is not valid JSON"):
        Decathlon(root=tmp_path).scan()
    with pytest.raises(ValueError, match=r"is data\.root the right folder"):
        Decathlon(root=tmp_path / "imagesTr").scan()


def test_the_real_decathlon_task_has_no_problem(real_data):
    scan = Decathlon(root=real_data / "Task04_Hippocampus").scan().checked()
    assert len(scan.cases) == 160
    assert scan.problems == []


def test_nnunet_channels_are_stacked_and_gaps_are_problems(tmp_path):
    first = image(tmp_path / "imagesTr" / "x_0000.nii.gz", seed=1)
    second = image(tmp_path / "imagesTr" / "x_0001.nii.gz", seed=2)
    image(tmp_path / "imagesTr" / "y_0000.nii.gz")
    image(tmp_path / "imagesTr" / "odd.nii.gz")
    for channel in range(2):
        image(tmp_path / "imagesTs" / f"z_000{channel}.nii.gz", affine=np.diag([1.0 + channel, 1, 1, 1]))
    label(tmp_path / "labelsTr" / "x.nii.gz")
    label(tmp_path / "labelsTr" / "alone.nii.gz")
    scan = NnUnet(root=tmp_path).scan().checked()
    assert [(c.case, c.split) for c in scan.cases] == [("x", "train"), ("z", "test")]
    assert reasons(scan) == {
        ("y_0000.nii.gz", "channel 0001 is missing"),
        ("odd.nii.gz", "the name does not end in a channel number such as _0000"),
        ("alone.nii.gz", "a label without an image"),
    }
    volume, truth = scan.cases[0].read(channels="all", min_side_voxel=8)
    assert np.array_equal(volume.array, np.stack([first, second]))
    assert truth.sum() == 27
    assert np.array_equal(scan.cases[0].read(channels=1, min_side_voxel=8)[0].array, second[None])
    with pytest.raises(ReadError, match="the case has channels 0 to 1"):
        scan.cases[0].read(channels=2, min_side_voxel=8)
    with pytest.raises(ReadError, match="another grid"):
        scan.cases[1].read(channels="all", min_side_voxel=8)


def test_phantoms_are_numbered_travel_between_processes_and_their_recipe_is_json(tmp_path):
    source = Phantoms(num_cases=3, size_voxel=[16, 16, 12], spacing_mm=20.0, seed=5)
    scan = source.scan()
    assert names(scan) == ["phantom_0000", "phantom_0001", "phantom_0002"]
    case = pickle.loads(pickle.dumps(scan.cases[1]))
    volume, organs = case.read(channels=None, min_side_voxel=8)
    assert volume.shape == organs.shape == (16, 16, 12)
    assert json.loads(json.dumps(source.recipe())) == source.recipe()
    assert source.recipe() != Phantoms(num_cases=3, size_voxel=16, spacing_mm=20.0, seed=5).recipe()
    with pytest.raises(ValueError, match="three sides of 8 voxels or more"):
        Phantoms(size_voxel=4).scan()


def test_names_from_any_alphabet_stay_apart_and_no_name_is_empty(tmp_path):
    for name in ("头.nii.gz", "ß.nii.gz", "-.nii.gz", "..nii.gz"):
        image(tmp_path / "imagesTr" / name.replace(".nii", "_0000.nii"))
        image(tmp_path / "plain" / name)
    for found in (names(NnUnet(root=tmp_path).scan()), names(Folder(root=tmp_path / "plain").scan())):
        assert len({*found}) == len(found)
        assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in found), found
    assert names(NnUnet(root=tmp_path).scan().checked()) == names(NnUnet(root=tmp_path).scan())


def test_a_file_name_that_is_no_utf_8_is_a_case_like_others(tmp_path):
    image(tmp_path / "a.nii.gz")
    odd = os.fsencode(tmp_path) + b"/caf\xe9.nii.gz"
    try:
        (tmp_path / "a.nii.gz").rename(os.fsdecode(odd))
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    (case,) = Folder(root=tmp_path).scan().cases
    assert re.fullmatch(r"caf_-[0-9a-f]{8}", case.case)
    assert case.read(channels=None, min_side_voxel=8)[0].shape == (10, 11, 12)
    assert len(case.fingerprint(Contents())) == 32


def test_nnunet_cases_of_one_name_in_train_and_test_keep_their_own_labels(tmp_path):
    for part in ("Tr", "Ts"):
        image(tmp_path / f"images{part}" / "x_0000.nii.gz")
        label(tmp_path / f"labels{part}" / "x.nii.gz")
    scan = NnUnet(root=tmp_path).scan().checked()
    assert scan.problems == []
    assert case_label(scan) == {"x": ("train", "labelsTr"), "x-test": ("test", "labelsTs")}


def dicom(path, kind="1.2.840.10008.5.1.4.1.1.481.3"):
    """Write the least that is a DICOM object: the meta information with its class, and a patient's name."""

    def element(number, vr, value):
        value += b"\0" * (len(value) % 2)
        return b"\x02\0" + number.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value

    meta = element(2, b"UI", kind.encode()) + element(3, b"UI", b"1.2.3")
    meta += element(0x10, b"UI", b"1.2.840.10008.1.2.1")
    length = b"\x02\0\0\0UL\x04\0" + len(meta).to_bytes(4, "little")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + length + meta + b"\x10\0\x10\0PN\x04\0A^B ")


def test_folders_that_may_hold_images_or_cannot_be_read_are_listed(tmp_path, monkeypatch):
    image(tmp_path / "a.nii.gz")
    for number in range(300):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "blobs" / f"{number:03d}.dat").write_bytes(b"no DICOM")
    dicom(tmp_path / "structures" / "rs.dcm")
    for number in range(20):
        (tmp_path / "late" / "x").parent.mkdir(exist_ok=True)
        (tmp_path / "late" / f"{number:03d}.log2").write_bytes(b"no DICOM")
    dicom(tmp_path / "late" / "z.dcm", "1.2.840.10008.5.1.4.1.1.2")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    scan = Folder(root=tmp_path).scan()
    assert names(scan) == ["a", "late"]
    assert reasons(scan) == {("closed", "the folder cannot be read (Permission denied)")}
    assert {(Path(s["file"]).name, s["reason"]) for s in scan.skipped} == {
        ("blobs", "none of 256 files looked into is DICOM; 44 more were not opened"),
        ("structures", "DICOM objects, none of them an image (structures, plans, reports, ...)"),
    }


def test_label_maps_that_are_constant_one_hot_or_marked_by_minus_one_are_skipped(tmp_path):
    one_hot = np.zeros((10, 11, 12, 3), np.float32)
    one_hot[2:6, 2:6, 2:6, 1] = 1
    one_hot[..., 0] = 1 - one_hot[..., 1]
    ignored = np.zeros((10, 11, 12), np.int16)
    ignored[:3], ignored[6:] = -1, 4
    for name, array in (("zero", np.zeros((10, 11, 12), np.uint8)), ("hot", one_hot), ("ignored", ignored)):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    for case in Folder(root=tmp_path).scan().cases:
        for channels in (None, "all"):
            with pytest.raises(LabelMapError):
                case.read(channels=channels, min_side_voxel=8)
    noise = np.random.default_rng(0).integers(0, 900, (10, 11, 12, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(noise, np.eye(4)), tmp_path / "image.nii.gz")
    by_name = {c.case: c for c in Folder(root=tmp_path).scan().cases}
    assert by_name["image"].read(channels="all", min_side_voxel=8)[0].num_channels == 3
    with pytest.raises(ReadError, match="a 4-D image with 3 channels"):
        by_name["image"].read(channels=None, min_side_voxel=8)


def test_a_fingerprint_follows_content_size_label_and_modality_but_not_time_or_group(tmp_path):
    for name in ("a", "b"):
        image(tmp_path / f"{name}.nii.gz")
    label(tmp_path / "l.nii.gz")
    label(tmp_path / "m.nii.gz", value=2)
    case = Case("x", tmp_path / "a.nii.gz")
    first = case.fingerprint(Contents())
    os.utime(tmp_path / "a.nii.gz", (0, 0))
    assert replace(case, group="g", split="test").fingerprint(Contents()) == first
    others = {
        replace(case, label=tmp_path / "l.nii.gz").fingerprint(Contents()),
        replace(case, label=tmp_path / "m.nii.gz").fingerprint(Contents()),
        replace(case, modality="mr").fingerprint(Contents()),
        replace(case, more_channels=(tmp_path / "b.nii.gz",)).fingerprint(Contents()),
        replace(case, image=tmp_path).fingerprint(Contents()),
        replace(case, image=tmp_path / "none.nii.gz").fingerprint(Contents()),
    }
    image(tmp_path / "a.nii.gz", seed=1)
    assert len({first, case.fingerprint(Contents()), *others}) == 8


def test_names_of_labels_are_read_in_both_directions_of_dataset_json(tmp_path):
    image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    listed = {"training": [{"image": "imagesTr/a_0000.nii.gz"}]}
    assert NnUnet(root=tmp_path).label_names() == {}
    for labels, expected in (
        ({"0": "background", "1": "Anterior", "20": "Posterior"}, {1: "Anterior", 20: "Posterior"}),
        ({"background": 0, "liver": 1, "tumour": [2], "ignore": 3}, {1: "liver", 2: "tumour"}),
        (["liver"], {}),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({**listed, "labels": labels}))
        assert Decathlon(root=tmp_path).label_names() == NnUnet(root=tmp_path).label_names() == expected
    assert Phantoms().label_names()[7] == "liver"


def test_a_source_of_ones_own_need_not_say_how_images_are_prepared():
    data = OmegaConf.create({"name": "mine", "source": {"_target_": "mine.Source"}})
    OmegaConf.set_struct(data, True)
    assert preparation(data) == {
        "channels": None,
        "spacing_mm": None,
        "min_side_voxel": 8,
        "modality": None,
        "checksums": False,
    }
    for name in ("folder", "csv", "phantoms"):
        assert preparation(compose("prepare", [f"data={name}"]).data) == preparation(data)
