import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hydra.utils import instantiate

from medssl.config import compose
from medssl.data.datasets import LEFT_OUT, Amos, Btcv
from medssl.data.prepare import prepare_store
from medssl.data.recipes import locate_store
from medssl.data.sources import SourceMissingError
from medssl.data.split_names import REGISTRY
from medssl.data.splits import read_split, resolve_split
from medssl.data.store import VolumeStore


def scan_file(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-500, 500, (10, 11, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def label_file(path, value=13):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((10, 11, 12), np.uint8)
    array[2:5, 2:5, 2:5] = value
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


def btcv(root, *numbers):
    for number in numbers:
        scan_file(root / "Training" / "img" / f"img{number:04d}.nii.gz", number)
        label_file(root / "Training" / "label" / f"label{number:04d}.nii.gz")
    scan_file(root / "Testing" / "img" / "img0061.nii.gz", 61)


def amos(root):
    for folder, number in (("Tr", 1), ("Tr", 507), ("Va", 2), ("Va", 530), ("Ts", 3)):
        scan_file(root / f"images{folder}" / f"amos_{number:04d}.nii.gz", number)
        if folder != "Ts":
            label_file(root / f"labels{folder}" / f"amos_{number:04d}.nii.gz")


def table(scan):
    return [(c.case, c.group, c.split, c.modality, c.label and c.label.name) for c in scan.checked().cases]


@pytest.mark.parametrize(("above", "root"), [("", ""), ("RawData", ""), ("Abdomen/RawData", ""), ("", "Training")])
def test_btcv_is_found_as_synapse_packs_it(tmp_path, above, root):
    btcv(tmp_path / above, 1, 35)
    assert table(Btcv(root=tmp_path / root).scan()) == [
        ("img0001", "btcv", "train", "ct", "label0001.nii.gz"),
        ("img0035", "btcv", "train", "ct", "label0035.nii.gz"),
        ("img0061", "btcv", "test", "ct", None),
    ]


@pytest.mark.parametrize("prefix", ["label", "img"])
def test_btcv_is_found_in_folders_imagestr_and_labelstr(tmp_path, prefix):
    scan_file(tmp_path / "imagesTr" / "img0021.nii.gz")
    label_file(tmp_path / "labelsTr" / f"{prefix}0021.nii.gz")
    assert table(Btcv(root=tmp_path).scan()) == [("img0021", "btcv", "train", "ct", f"{prefix}0021.nii.gz")]


def test_a_wrong_layout_says_what_is_there_and_what_is_expected(tmp_path):
    for source in (Btcv, Amos):
        with pytest.raises(SourceMissingError, match=r"found an empty folder; expected is .*imagesTr/"):
            source(root=tmp_path).scan()
    for number in range(8):
        (tmp_path / f"case{number}").mkdir()
    with pytest.raises(
        SourceMissingError, match=r"holds no BTCV: found case0/, case1/, .*case5/, \.\.\.; expected is T"
    ):
        Btcv(root=tmp_path).scan()
    scan_file(tmp_path / "imagesTr" / "img0001.nii.gz")
    with pytest.raises(
        SourceMissingError, match=r"img0001\.nii\.gz: there is no label for it in .*labelsTr\); expected"
    ):
        Btcv(root=tmp_path).scan()
    with pytest.raises(
        SourceMissingError, match=r"the name is not of the kind amos_0001\.nii\.gz\); expected is imagesTr"
    ):
        Amos(root=tmp_path).scan()
    with pytest.raises(SourceMissingError, match="found a file"):
        Btcv(root=tmp_path / "imagesTr" / "img0001.nii.gz").scan()
    with pytest.raises(SourceMissingError, match=r"data\.root=.*nowhere does not exist"):
        Amos(root=tmp_path / "nowhere").scan()


def test_what_does_not_belong_into_the_folders_is_a_problem_with_a_reason(tmp_path):
    btcv(tmp_path, 1, 2, 3)
    training = tmp_path / "Training"
    (training / "label" / "label0002.nii.gz").unlink()
    label_file(training / "label" / "label0009.nii.gz")
    label_file(training / "label" / "img0003.nii.gz")
    scan_file(training / "img" / "avg.nii.gz")
    scan_file(training / "img" / "._img0001.nii.gz")
    scan = Btcv(root=tmp_path).scan()
    assert [case.case for case in scan.cases] == ["img0001", "img0003", "img0061"]
    assert sorted((Path(row["file"]).name, row["reason"]) for row in scan.problems) == [
        ("avg.nii.gz", "the name is not of the kind img0001.nii.gz"),
        ("img0002.nii.gz", f"there is no label for it in {training / 'label'}"),
        ("label0003.nii.gz", "img0003.nii.gz lies beside it; drop one of the two"),
        ("label0009.nii.gz", "a label without an image"),
    ]


@pytest.mark.parametrize("above", ["", "amos22"])
def test_amos_keeps_its_official_split_and_tells_ct_from_mr_by_number(tmp_path, above):
    amos(tmp_path / above)
    ct = [
        ("amos_0001", "ct", "train", "ct", "amos_0001.nii.gz"),
        ("amos_0002", "ct", "validation", "ct", "amos_0002.nii.gz"),
        ("amos_0003", "ct", "test", "ct", None),
    ]
    mr = [
        ("amos_0507", "mr", "train", "mr", "amos_0507.nii.gz"),
        ("amos_0530", "mr", "validation", "mr", "amos_0530.nii.gz"),
    ]
    for modality, expected in (("ct", ct), ("mr", mr), ("both", sorted(ct + mr))):
        scan = Amos(root=tmp_path, modality=modality).scan()
        assert sorted(table(scan)) == expected
        assert scan.problems == []
        left_out = {Path(row["file"]).name for row in scan.skipped if row["reason"] == LEFT_OUT}
        assert left_out == {row[4] or f"{row[0]}.nii.gz" for row in sorted(ct + mr) if row not in expected}


def test_an_amos_modality_that_is_not_there_is_told(tmp_path):
    scan_file(tmp_path / "imagesTr" / "amos_0001.nii.gz")
    with pytest.raises(
        SourceMissingError, match=r"holds no AMOS images of data\.modality=mr: found imagesTr/; expected"
    ):
        Amos(root=tmp_path, modality="mr").scan()
    with pytest.raises(ValueError, match=r"data\.modality must be ct, mr or both, got 'pet'"):
        Amos(root=tmp_path, modality="pet").scan()


def test_the_organs_are_numbered_as_they_were_published():
    btcv, amos = Btcv(root="x").label_names(), Amos(root="x").label_names()
    assert (len(btcv), len(amos)) == (13, 15)
    assert [btcv[n] for n in (1, 6, 9, 10, 11, 13)] == [
        "spleen",
        "liver",
        "inferior vena cava",
        "portal and splenic veins",
        "pancreas",
        "left adrenal gland",
    ]
    assert [amos[n] for n in (1, 6, 10, 13, 14, 15)] == [
        "spleen",
        "liver",
        "pancreas",
        "duodenum",
        "bladder",
        "prostate or uterus",
    ]


def test_the_splits_of_btcv_name_the_cases_of_its_training_folder(tmp_path):
    btcv(tmp_path, *range(1, 11), *range(21, 41))
    config = compose("prepare", ["data=btcv", f"data.root={tmp_path}"])
    source = instantiate(config.data.source, _convert_="all")
    named = [case.case for case in source.scan().cases if case.split == "train"]
    for name in (config.data.split, "btcv_18_12", "btcv_5fold"):
        _, lists = read_split(REGISTRY / f"{name}.json")
        assert sorted(case for cases in lists.values() for case in cases) == named


def test_amos_is_prepared_with_its_names_and_evaluated_on_its_official_split(tmp_path):
    amos(tmp_path / "a")
    config = compose("prepare", ["data=amos", f"data.root={tmp_path / 'a'}"])
    prepare_store(instantiate(config.data.source, _convert_="all"), tmp_path / "s", num_workers=0, progress=False)
    assert locate_store(config.data, tmp_path / "s") == tmp_path / "s"
    store = VolumeStore(tmp_path / "s")
    found = resolve_split(store, split=config.data.split)
    assert (found.name, found.evaluation) == ("source", ("validation", (1, 4)))
    assert [store.record(case).modality for case in range(5)] == [("ct",), ("ct",), ("ct",), ("mr",), ("mr",)]
    assert store.label_names[15] == "prostate or uterus"
    known = json.loads((tmp_path / "s" / "labels.json").read_text())
    assert (list(known["names"]), known["ignore"]) == ([str(n) for n in range(1, 16)], None)


@pytest.mark.parametrize("name", ["btcv", "amos"])
def test_both_state_window_and_working_spacing(name):
    config = compose("prepare", [f"data={name}", "data.root=x"])
    assert (config.data.window_hu, config.data.working_spacing_mm) == ([-175, 250], [1.5, 1.5, 2.0])
