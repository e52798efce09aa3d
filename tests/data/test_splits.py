import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from medssl.data.split_names import REGISTRY
from medssl.data.splits import (
    PARTS,
    few_labels,
    folds_of,
    pretraining_cases,
    read_split,
    resolve_split,
    write_split,
)
from medssl.data.store import VolumeStore
from medssl.data.store_writer import write_index

BTCV = [f"img{n:04d}" for n in (*range(1, 11), *range(21, 41))]
TRANSUNET_TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)


@pytest.fixture
def store_of(make_store):
    """A store of tiny cases with the given splits; `labelled` says which have a label map."""

    def make(splits, labelled=None):
        ramp = np.arange(216, dtype=np.int16).reshape(1, 6, 6, 6)
        cube = np.zeros((6, 6, 6), int)
        cube[2:4, 2:4, 2:4] = 1
        has = [True] * len(splits) if labelled is None else labelled
        labels = [cube if one else None for one in has]
        return make_store(*[ramp + n for n in range(len(splits))], labels=labels, splits=tuple(splits))

    return make


@pytest.fixture
def named_store(store_of):
    """The labelled cases of BTCV by name; an index is all that a split reads."""
    store = store_of(["train"])
    write_index(store.root, [replace(store.record(0), case=name) for name in BTCV])
    return VolumeStore(store.root)


def names_of(store, cases):
    return [store.names[case] for case in cases]


def written(path, **lists):
    path.write_text(json.dumps(lists))
    return str(path)


def test_the_held_out_cases_are_fixed_and_never_trained_on(noise_store):
    options = {"split": None, "fold": 0}
    training, validation = pretraining_cases(noise_store, **options, validation_fraction=0.25)
    assert len(validation) == 1
    assert sorted(training + validation) == [0, 1, 2, 3]
    assert pretraining_cases(noise_store, **options, validation_fraction=0.25) == (training, validation)
    assert pretraining_cases(noise_store, **options, validation_fraction=0.0) == ([0, 1, 2, 3], [])


def test_a_source_that_names_validation_and_test_cases_is_obeyed(store_of):
    store = store_of(("train", "validation", "test", "train"))
    assert pretraining_cases(store, split=None, fold=0, validation_fraction=0.1) == ([0, 3], [1])
    found = resolve_split(store, split="auto")
    assert (found.name, found.training, found.validation, found.test) == ("source", (0, 3), (1,), (2,))
    assert found.evaluation == ("test", (2,))


def test_the_registry_is_frozen():
    found = {file.stem: [] for file in sorted(REGISTRY.glob("*.json"))}
    for name, hashes in found.items():
        for fold in range(5 if "fold" in name else 1):
            _, lists = read_split(REGISTRY / f"{name}.json", fold=fold)
            hashes.append((*(len(lists[part]) for part in PARTS), sha256_of(lists)))
    assert found == {
        "btcv_18_12": [(18, 0, 12, "5895c17f6c96")],
        "btcv_24_6": [(24, 6, 0, "efafb37d4a1f")],
        "btcv_5fold": [
            (24, 6, 0, "b325d67de3dd"),
            (24, 6, 0, "d5b1f36fa843"),
            (24, 6, 0, "b0c175363fdf"),
            (24, 6, 0, "d98f12e6a72a"),
            (24, 6, 0, "a3818f1d1456"),
        ],
    }


def sha256_of(lists):
    """The hash as a reader of the docs would make it: JSON with sorted keys, no spaces, sorted names."""
    text = ",".join(
        f'"{part}":[' + ",".join(f'"{case}"' for case in sorted(lists[part])) + "]" for part in sorted(PARTS)
    )
    return hashlib.sha256(f"{{{text}}}".encode()).hexdigest()[:12]


def test_btcv_splits_hold_the_published_cases(named_store):
    found = resolve_split(named_store, split="btcv_24_6")
    assert names_of(named_store, found.validation) == [f"img{n:04d}" for n in range(35, 41)]
    assert found.hash == "efafb37d4a1f"
    assert found.evaluation == ("validation", found.validation)
    transunet = resolve_split(named_store, split="btcv_18_12")
    assert names_of(named_store, transunet.test) == [f"img{n:04d}" for n in TRANSUNET_TEST]
    for one in (found, transunet):
        assert sorted(one.training + one.validation + one.test) == list(range(30))
    folds = [resolve_split(named_store, split="btcv_5fold", fold=fold) for fold in range(5)]
    assert [fold.name for fold in folds] == [f"btcv_5fold-{k}" for k in range(5)]
    rule = [resolve_split(named_store, split="5fold", fold=fold) for fold in range(5)]
    assert [fold.hash for fold in folds] == [fold.hash for fold in rule]
    assert sorted(case for fold in folds for case in fold.validation) == list(range(30))


def test_folds_are_those_of_a_shuffled_kfold():
    """Goldens of scikit-learn 1.9: KFold(5, shuffle=True, random_state=12345) over seven and twelve sorted names."""
    seven, twelve = ([f"c{n:02d}" for n in range(count)] for count in (7, 12))
    assert folds_of(seven[::-1]) == [["c03", "c06"], ["c00", "c04"], ["c01"], ["c05"], ["c02"]]
    assert [len(fold) for fold in folds_of(twelve)] == [3, 3, 2, 2, 2]
    assert folds_of(twelve)[:3] == [["c00", "c03", "c08"], ["c07", "c10", "c11"], ["c06", "c09"]]
    assert [len(fold) for fold in folds_of(["a", "b"])] == [1, 1, 0, 0, 0]


def test_folds_leave_test_cases_and_cases_without_label_out(store_of):
    splits = ["", "test", "", "", "validation", "", "", ""]
    store = store_of(splits, labelled=[True, True, True, False, True, True, True, True])
    folds = [resolve_split(store, split="5fold", fold=fold) for fold in range(5)]
    assert sorted(case for fold in folds for case in fold.validation) == [0, 2, 4, 5, 6, 7]
    for fold, part in enumerate(folds):
        assert sorted(part.training + part.validation) == [0, 2, 4, 5, 6, 7]
        training, validation = pretraining_cases(store, split="5fold", fold=fold, validation_fraction=0.1)
        assert tuple(validation) == part.validation
        assert sorted(training) == sorted((*part.training, 3))  # what has no label is trained on without


def test_folds_of_a_store_without_labels_hold_some_cases_out_too(store_of):
    store = store_of([""] * 6, labelled=[False] * 6)
    training, validation = pretraining_cases(store, split="5fold", fold=0, validation_fraction=0.1)
    assert (len(training), len(validation)) == (4, 2)
    with pytest.raises(ValueError, match=r"data\.split=5fold-0 leaves no case to train on: .* too few cases with a"):
        resolve_split(store, split="5fold")


def test_auto_takes_folds_where_the_source_names_no_labelled_case_to_evaluate_on(store_of):
    store = store_of(["train"] * 5 + ["test"], labelled=[True] * 5 + [False])
    found = resolve_split(store)
    assert found.name == "5fold-0"
    assert sorted(found.training + found.validation) == [0, 1, 2, 3, 4]
    assert resolve_split(store, labelled=False).test == (5,)
    with pytest.raises(
        ValueError, match=r"data\.split=source leaves no case to evaluate on.*choose another data\.split"
    ):
        resolve_split(store, split="source")


def test_a_written_split_is_read_again_and_noticed_when_changed(store_of, tmp_path):
    store = store_of([""] * 6)
    split, path = resolve_split(store, split="5fold", fold=2), tmp_path / "split.json"
    write_split(path, store, split)
    assert resolve_split(store, split=str(path)) == split
    content = json.loads(path.read_text())
    content["train"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"was changed: its lists have the hash [0-9a-f]{12}, it says"):
        resolve_split(store, split=str(path))
    own = written(tmp_path / "own.json", **{part: content[part] for part in PARTS})
    assert resolve_split(store, split=own).name == "own"


def test_the_folds_of_nnunet_can_be_given(store_of, tmp_path):
    store, path = store_of([""] * 3), tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["case_000", "case_001"], "val": ["case_002"]}]))
    found = resolve_split(store, split=str(path))
    assert (found.name, found.training, found.validation) == ("splits_final-0", (0, 1), (2,))


def test_a_split_that_does_not_fit_the_store_says_what_does_not(store_of, tmp_path):
    store, path = store_of([""] * 4, labelled=[True, True, True, False]), tmp_path / "mine.json"
    wrong = {
        r"is not known; there are auto, source, 5fold, btcv_18_12, btcv_24_6, btcv_5fold, or the path": "btcv",
        r"names img0001, img0002, img0003, ... \(30 cases\), which .* lacks; it has case_000, case_001": "btcv_24_6",
        r"missing.json cannot be read \(No such file": str(tmp_path / "missing.json"),
    }
    for message, split in wrong.items():
        with pytest.raises(ValueError, match=message):
            resolve_split(store, split=split)
    twice = {"train": ["case_000", "case_001"], "validation": ["case_001"]}
    for message, lists in {
        "lists case_001 more than once": twice,
        "no label map in .* for case_003": {"train": ["case_000"], "test": ["case_003"]},
        "no case to evaluate on": {"train": ["case_000"]},
        "is no split; expected is": {"training": ["case_000"]},
    }.items():
        with pytest.raises(ValueError, match=message):
            resolve_split(store, split=written(path, **lists))
    path.write_text("[")
    with pytest.raises(ValueError, match="is not valid JSON"):
        resolve_split(store, split=str(path))


def test_a_fold_that_there_is_not_is_refused(store_of, named_store, tmp_path):
    store = store_of(["train", "train", "test"])
    with pytest.raises(ValueError, match=r"data\.fold=5 is not one of the 5 folds of data\.split=5fold"):
        resolve_split(store, split="5fold", fold=5)
    with pytest.raises(ValueError, match=r"data\.fold=-1 is not one of the 5 folds of data\.split=.*btcv_5fold\.json"):
        resolve_split(named_store, split="btcv_5fold", fold=-1)
    for split in ("source", written(tmp_path / "plain.json", train=["case_000"], test=["case_001"])):
        with pytest.raises(ValueError, match=r"has no folds; leave data\.fold at 0, got 1"):
            resolve_split(store, split=split, fold=1)
    with pytest.raises(ValueError, match=r"5fold-3 leaves no case to evaluate on"):  # two cases fill two folds
        resolve_split(store, split="5fold", fold=3)


def test_few_label_subsets_are_nested_and_follow_the_rule(named_store):
    training = resolve_split(named_store, split="btcv_24_6").training
    subsets = [few_labels(named_store, training, labelled=n, seed=3) for n in (1, 3, 5, 0.5, 24, None)]
    assert [len(subset.cases) for subset in subsets] == [1, 3, 5, 12, 24, 24]
    for small, large in pairwise(subsets):
        assert set(small.cases) <= set(large.cases) <= set(training)
    assert subsets[-1].cases == training
    assert subsets[-2].hash == subsets[-1].hash != subsets[0].hash
    assert names_of(named_store, subsets[0].cases) == ["img0003"]  # SHA-256 of "3/img0003" is the lowest
    assert few_labels(named_store, training, labelled=3, seed=4).cases != subsets[1].cases
    assert (
        few_labels(named_store, training, labelled=0.001).cases == few_labels(named_store, training, labelled=1).cases
    )


@pytest.mark.parametrize("labelled", [0, -1, 25, 0.0, 1.5, -0.1, True])
def test_a_count_or_share_of_labels_that_cannot_be_had_is_refused(named_store, labelled):
    training = resolve_split(named_store, split="btcv_24_6").training
    with pytest.raises(ValueError, match=rf"data\.labelled={labelled}: give a count from 1 to 24"):
        few_labels(named_store, training, labelled=labelled)
