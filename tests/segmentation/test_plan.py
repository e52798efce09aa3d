"""What a segmentation run takes from its data, on small stores of noise."""

import numpy as np
import pytest

from medssl.data.splits import resolve_split
from medssl.segmentation.plan import find_classes, find_copies, find_crop, find_overlap, find_spacing

SPLITS = ("train", "train", "validation", "test")


@pytest.fixture
def store(make_store):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1000, 1000, (1, 40, 72, 24 + n)).astype(np.int16) for n in range(4)]
    labels = [(array[0] > 0) * 5 + (array[0] > 500) * 112 * (n == 3) for n, array in enumerate(arrays)]
    return make_store(*arrays, labels=labels, affine=np.diag([1.0, 0.5, 2.0, 1.0]), splits=SPLITS)


def test_classes_are_the_values_of_all_labelled_cases_in_order(store):
    split = resolve_split(store, split="source")
    assert find_classes(store, split, wanted=None) == {0: "background", 5: "label 5", 117: "label 117"}
    assert list(find_classes(store, split, wanted=[117])) == [0, 117]


def test_a_class_that_no_label_holds_is_named(store):
    with pytest.raises(ValueError, match="value 7 is in no label; the labels hold 5, 117"):
        find_classes(store, resolve_split(store, split="source"), wanted=[5, 7])


def test_spacing_is_native_the_median_or_what_is_given(store):
    assert find_spacing(store, [0, 1], "native") == "native"
    assert find_spacing(store, [0, 1], "median") == [1.0, 0.5, 2.0]
    assert find_spacing(store, [0, 1], [1.5, 1.5, 2]) == [1.5, 1.5, 2.0]
    assert find_spacing(store, [0, 1], 2) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("wrong", ["mean", [1, 2], [1, 0, 1], [1, True, 1], -1])
def test_a_wrong_spacing_is_refused(store, wrong):
    with pytest.raises(ValueError, match="give native, median, or one or three numbers"):
        find_spacing(store, [0], wrong)


def test_a_crop_follows_the_median_volume_up_to_96_voxels(store):
    assert find_crop(store, [0, 1], crop_voxel=None, spacing_mm="native") == [32, 64, 32]  # of 40 x 72 x 24.5 voxels
    assert find_crop(store, [0, 1], crop_voxel=None, spacing_mm=[1.0, 0.25, 2.0]) == [32, 96, 32]
    assert find_crop(store, [0, 1], crop_voxel=[8, 16, 24], spacing_mm="native") == [8, 16, 24]


@pytest.mark.parametrize("wrong", [[16, 16], [16, 0, 16], [16, 16.5, 16]])
def test_a_wrong_crop_is_refused(store, wrong):
    with pytest.raises(ValueError, match="three whole numbers above 0"):
        find_crop(store, [0], crop_voxel=wrong, spacing_mm="native")


def test_evaluation_cases_that_pre_training_saw_stop_the_run(store, tmp_path):
    split = resolve_split(store, split="source")
    card = {"data": {"voxel_hashes": [store.record(n).voxel_hash[:16] for n in (0, 3)]}}
    with pytest.raises(ValueError, match=r"1 of 1 test cases were seen .* \(case_003\).*allow_leakage=true"):
        find_overlap(card, store, split, path=tmp_path, allowed=False)
    assert find_overlap(card, store, split, path=tmp_path, allowed=True)["overlap"] == 1
    card["data"]["voxel_hashes"].pop()
    assert find_overlap(card, store, split, path=tmp_path, allowed=False) == {
        "checked": True,
        "overlap": 0,
        "allowed": False,
    }


def test_a_file_without_a_fingerprint_cannot_be_checked(store, tmp_path):
    split = resolve_split(store, split="source")
    assert find_overlap({"method": "glmae"}, store, split, path=tmp_path, allowed=False)["checked"] is False
    assert find_overlap(None, store, split, path=None, allowed=False)["checked"] is True


@pytest.mark.parametrize(
    ("parts", "copies"),
    [
        ("tttv", []),  # two training cases may be equal
        ("tvtt", ["case_001 (validation) and case_000 (training) hold the same voxels"]),
        ("ttte", []),
        ("tett", ["case_001 (test) and case_000 (training) hold the same voxels"]),
        ("vett", ["case_001 (test) and case_000 (validation) hold the same voxels"]),
        ("evtt", ["case_000 (test) and case_001 (validation) hold the same voxels"]),
    ],
)
def test_a_held_out_case_with_the_voxels_of_a_training_case_stops_the_run_or_marks_it(make_store, parts, copies):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-1000, 1000, (1, 16, 16, 16)).astype(np.int16) for _ in range(3)]
    arrays.insert(1, arrays[0].astype(np.float32))  # of another type, which the hash does not see
    splits = tuple({"t": "train", "v": "validation", "e": "test"}[part] for part in parts)
    store = make_store(*arrays, labels=[(a[0] > 0).astype(np.int16) for a in arrays], splits=splits)
    split = resolve_split(store, split="source")
    assert find_copies(store, split, split.training, allowed=True) == copies
    if copies:
        with pytest.raises(ValueError, match=r"hold the same voxels: .*allow_leakage=true") as refusal:
            find_copies(store, split, split.training, allowed=False)
        assert str(refusal.value).startswith(copies[0])
    else:
        assert find_copies(store, split, split.training, allowed=False) == []


@pytest.mark.parametrize("seed", range(50))
def test_a_copy_is_found_in_any_type_that_holds_its_values_and_a_changed_voxel_is_none(make_store, seed):
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 1000, (1, 9, 8, 10)).astype(np.int16)
    copy = array.astype(rng.choice([np.int16, np.int32, np.float32, np.float64, ">i2"]))
    if changed := bool(rng.integers(2)):
        copy[tuple(rng.integers(copy.shape))] += 1
    part, other = rng.choice(["validation", "test"], 2)
    store = make_store(copy, array, array + 5, labels=[(array[0] > 0) * 1] * 3, splits=(part, "train", other))
    split = resolve_split(store, split="source")
    assert bool(find_copies(store, split, split.training, allowed=True)) is not changed


def test_a_copy_of_a_training_case_whose_label_is_not_used_is_no_leakage(make_store):
    array = np.random.default_rng(0).integers(-1000, 1000, (1, 16, 16, 16)).astype(np.int16)
    store = make_store(array, array + 1, array, labels=[(array[0] > 0) * 1] * 3, splits=("train", "train", "test"))
    split = resolve_split(store, split="source")
    assert find_copies(store, split, [1], allowed=False) == []
