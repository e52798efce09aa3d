"""What the `dataset.json` of a data set states: cases, channels, the ignored label, regions."""

import json
from pathlib import Path

import numpy as np
import pytest
from volume_files import image, label, names, reasons

from medssl.data.dataset_json import DatasetJson
from medssl.data.prepare import prepare_store
from medssl.data.sources import Decathlon, NnUnet
from medssl.data.store import VolumeStore

PAIR = {"image": "i.nii.gz", "label": "l.nii.gz"}


def write(root, **content):
    """Write a `dataset.json`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def nnunet(root, *, cases=5, **content):
    """Write images of one channel with label maps of the values 1 and 2, and a `dataset.json`."""
    for number in range(cases):
        image(root / "imagesTr" / f"c{number}_0000.nii.gz", seed=number)
        array = label(root / "labelsTr" / f"c{number}.nii.gz")
        array[6:8] = 2
        image(root / "labelsTr" / f"c{number}.nii.gz", array)
    return write(root, **content)


def skipped(scan):
    return {(Path(row["file"]).name, row["reason"]) for row in scan.skipped}


@pytest.mark.parametrize(
    ("labels", "ignored", "known"),
    [
        ({"background": 0, "liver": 1, "ignore": 2}, 2, {1: "liver"}),
        ({"0": "background", "1": "liver", "2": "Ignore"}, 2, {1: "liver"}),
        ({"background": 0, "liver": [1], "ignore": [9]}, 9, {1: "liver"}),
        ({"background": 0, "liver": 1, "ignored vessels": 2}, None, {1: "liver", 2: "ignored vessels"}),
    ],
)
def test_the_ignored_label_is_found_in_both_directions_and_is_no_class(tmp_path, labels, ignored, known):
    image(tmp_path / "imagesTr" / "a_0000.nii.gz")
    write(tmp_path, labels=labels, training=[{"image": "imagesTr/a_0000.nii.gz"}])
    for source in (NnUnet(root=tmp_path), Decathlon(root=tmp_path)):
        assert (source.ignored_label(), source.label_names()) == (ignored, known)


@pytest.mark.parametrize("labels", [{"ignore": 0, "liver": 1}, {"2": "ignore", "3": "ignore"}])
def test_an_ignored_label_that_is_the_background_or_two_values_is_refused(tmp_path, labels):
    with pytest.raises(ValueError, match=r"dataset\.json: labels: 'ignore' is .*; give it one value of its own"):
        DatasetJson.read(write(tmp_path, labels=labels)).ignored_label()


def test_the_ignored_value_reaches_the_store_and_leaves_it_with_the_list(tmp_path):
    root = nnunet(tmp_path / "in", labels={"background": 0, "liver": 1, "ignore": 2})
    options = {"channels": "all", "num_workers": 0, "progress": False}
    prepare_store(NnUnet(root=root), tmp_path / "s", **options)
    store = VolumeStore(tmp_path / "s")
    assert (store.ignored_label, store.label_names, store.record(0).labels) == (2, {1: "liver"}, (1, 2))
    write(root, labels={"background": 0, "liver": 1, "tumour": 2})
    assert not prepare_store(NnUnet(root=root), tmp_path / "s", **options).has_changed
    store = VolumeStore(tmp_path / "s")
    assert (store.ignored_label, store.label_names) == (None, {1: "liver", 2: "tumour"})


def test_regions_are_refused_in_one_line_before_anything_is_prepared(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "organ": 2}
    root = nnunet(tmp_path / "in", labels=labels, regions_class_order=[1, 2], training=[PAIR])
    for source in (NnUnet(root=root), Decathlon(root=root)):
        with pytest.raises(
            ValueError, match="'whole' is a region of the values 1, 2, and regions are not learnt; give"
        ):
            prepare_store(source, tmp_path / "s", num_workers=0)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("stated", [{"channel_names": {"0": "CT"}}, {"modality": {"0": "CT"}}, {"modality": ["CT"]}])
def test_a_stray_second_channel_is_left_out_by_its_name_where_the_list_states_one(tmp_path, stated):
    root = nnunet(tmp_path, **stated)
    image(root / "imagesTr" / "c3_0001.nii.gz", seed=9)
    scan = NnUnet(root=root).scan().checked()
    assert names(scan) == [f"c{n}" for n in range(5)]
    assert all(case.more_channels == () for case in scan.cases)
    reason = "channel 0001 is one too many: dataset.json states 1 channel, numbered from 0000"
    assert (skipped(scan), scan.problems) == ({("c3_0001.nii.gz", reason)}, [])


def test_without_a_list_a_second_channel_of_one_case_makes_all_others_lack_it(tmp_path):
    root = nnunet(tmp_path)
    image(root / "imagesTr" / "c3_0001.nii.gz", seed=9)
    scan = NnUnet(root=root).scan()
    assert names(scan) == ["c3"]
    assert len(scan.problems) == 4


def test_a_channel_that_the_list_states_is_missing_even_where_no_case_has_it(tmp_path):
    root = nnunet(tmp_path, cases=2, channel_names={"0": "CT", "1": "PET"})
    image(root / "imagesTr" / "c1_0001.nii.gz", seed=9)
    image(root / "imagesTr" / "d_0001.nii.gz", seed=9)
    scan = NnUnet(root=root).scan()
    assert names(scan) == ["c1"]
    assert reasons(scan) == {
        ("c0_0000.nii.gz", "channel 0001 is missing"),
        ("d_0001.nii.gz", "channel 0000 is missing"),
    }


def test_channels_are_named_in_the_order_of_their_numbers(tmp_path):
    for stated, expected in (
        ({"channel_names": {"1": "PET", "0": "CT"}, "modality": {"0": "MR"}}, ("CT", "PET")),
        ({"modality": "MRI"}, ("MRI",)),
        ({}, ()),
    ):
        assert DatasetJson.read(write(tmp_path, **stated)).channel_names() == expected
    with pytest.raises(ValueError, match=r"modality names the channels 1, 2; number them from 0"):
        DatasetJson.read(write(tmp_path, modality={"1": "T1", "2": "T2"})).channel_names()


def test_a_channel_or_label_map_that_comes_twice_is_a_problem(tmp_path):
    root = nnunet(tmp_path, cases=1)
    image(root / "imagesTr" / "c0_0000.nii")
    label(root / "labelsTr" / "c0.nii")
    scan = NnUnet(root=root).scan()
    assert reasons(scan) == {
        ("c0_0000.nii.gz", "c0_0000.nii is the same channel; drop one of the two"),
        ("c0.nii.gz", "c0.nii is a label map of the same case; drop one"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([PAIR], r"dataset\.json holds a list; expected is \{\"training\": \[entries\], \.\.\.\}"),
        ("cases", r'dataset\.json holds "cases"; expected'),
        ({"training": PAIR}, r"training is \{.*\}; expected is a list"),
        (
            {"training": [PAIR, ["i.nii.gz", "l.nii.gz"]]},
            r'entry 2 is \["i\.nii\.gz", "l\.nii\.gz"\]; an entry',
        ),
        ({"training": [{"image": "i.nii.gz", "label": ["l.nii.gz"]}]}, r'entry 1 has the label \["l\.nii\.gz"\]'),
        ({"validation": [{"image": {"ct": "i.nii.gz"}}]}, r'validation, entry 1 has the image \{"ct": "i\.nii\.gz"\}'),
        ({"training": [{"image": ["i.nii.gz", 5]}]}, r'entry 1 has the image \["i\.nii\.gz", 5\]'),
        ({"training": [None]}, "training, entry 1 is null"),
        ({"test": [2024]}, "test, entry 1 is 2024"),
        ({"training": []}, "lists no image; it needs the key training, validation, test or testing"),
        ({"test": "all"}, 'test is "all"; expected is a list'),
    ],
)
def test_lists_that_cannot_be_meant_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as refusal:
        Decathlon(root=tmp_path).scan()
    assert "\n" not in str(refusal.value)


def test_names_of_images_and_lists_of_channels_are_read(tmp_path):
    first, second = (image(tmp_path / f"{name}.nii.gz", seed=seed) for seed, name in enumerate(("a", "b")))
    write(
        tmp_path,
        training=[{"image": ["a.nii.gz", "b.nii.gz"], "label": "", "fold": 0}],
        validation=["./b.nii.gz"],
        test=None,
    )
    scan = Decathlon(root=tmp_path).scan().checked()
    assert [(case.case, case.split) for case in scan.cases] == [("a", "train"), ("b", "validation")]
    volume, truth = scan.cases[0].read(channels="all", min_side_voxel=8)
    assert np.array_equal(volume.array, np.stack([first, second]))
    assert truth is None
    assert "the key fold of 1 entries is not read: data.split chooses the parts" in {r["reason"] for r in scan.skipped}


def test_a_list_that_is_no_utf_8_is_said_to_be(tmp_path):
    (tmp_path / "dataset.json").write_bytes('{"name": "höhe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"dataset\.json is not valid JSON: 'utf-8' codec can't decode"):
        Decathlon(root=tmp_path).scan()


def test_the_key_testing_of_monai_lists_test_cases(tmp_path):
    (tmp_path / "t.nii.gz").touch()
    write(tmp_path, training=["a.nii.gz"], testing=[{"image": "t.nii.gz"}])
    assert {(case.case, case.split) for case in Decathlon(root=tmp_path).scan().cases} == {
        ("a", "train"),
        ("t", "test"),
    }


@pytest.mark.parametrize("seed", range(50))
def test_channels_are_sorted_out_as_the_list_states_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    stated = int(rng.integers(1, 4))
    held = {f"c{n}": {int(c) for c in range(4) if rng.random() < 0.7} or {0} for n in range(4)}
    (tmp_path / "imagesTr").mkdir()
    for case, channels in held.items():
        for channel in channels:
            (tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
    key = rng.choice(["channel_names", "modality"])
    scan = NnUnet(root=write(tmp_path, **{key: {str(n): f"x{n}" for n in rng.permutation(stated)}})).scan()
    needed = set(range(stated))
    files = {case.case: [int(file.name[3:7]) for file in (case.image, *case.more_channels)] for case in scan.cases}
    assert files == {case: sorted(needed) for case, channels in held.items() if needed <= channels}
    lacking = {case for case, channels in held.items() if needed & channels and not needed <= channels}
    assert {row["case"] for row in scan.problems} == lacking
    stray = {f"{case}_{channel:04d}.nii.gz" for case, channels in held.items() for channel in channels - needed}
    beside = {  # the first file of a case that lacks a channel is the problem
        f"{case}_{channel:04d}.nii.gz" for case in lacking for channel in sorted(needed & held[case])[1:]
    }
    assert {name for name, _ in skipped(scan)} == stray | beside


@pytest.mark.parametrize("seed", range(50))
def test_whatever_stands_in_the_list_is_read_or_refused_in_one_line(tmp_path, seed):
    rng = np.random.default_rng(seed)
    whole = {
        "name": "x",
        "labels": {"background": 0, "liver": 1, "ignore": 2},
        "modality": {"0": "CT"},
        "training": [{"image": "i.nii.gz", "label": "l.nii.gz"}, "i.nii.gz"],
        "test": ["i.nii.gz"],
    }
    odd = [None, True, 5, 1e300, -1, "", "ü", [], {}, [[]], [{}], {"0": None}, ["i.nii.gz", 3], [None, "i.nii.gz"]]

    def mutated(node, chance):
        if rng.random() < chance:
            return odd[rng.integers(len(odd))]
        if isinstance(node, dict):
            return {key: mutated(value, chance) for key, value in node.items()}
        return [mutated(value, chance) for value in node] if isinstance(node, list) else node

    refusals = []
    for _ in range(20):
        (tmp_path / "dataset.json").write_text(json.dumps(mutated(whole, 0.15)))
        for source in (Decathlon(root=tmp_path), NnUnet(root=tmp_path)):
            for act in (source.scan, source.label_names, source.ignored_label):
                try:
                    act()
                except ValueError as error:
                    refusals.append(str(error))
    assert refusals
    assert all(str(tmp_path) in line and "\n" not in line for line in refusals)
