"""Splits: the training, held-out and labelled cases, by rule or from a file, with a hash of the choice.

The hash depends on the names of the cases alone: equal lists of two stores have equal hashes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.atomic import write_text
from medssl.data.randomness import counter_generator
from medssl.data.split_names import split_file
from medssl.data.store import VolumeStore

PARTS = ("train", "validation", "test")
NUM_FOLDS = 5
FOLD_SEED = 12345
"""Seed of nnU-Net's default folds: the same case names give the same folds as in nnU-Net."""


@dataclass(frozen=True)
class CaseSplit:
    """The case numbers of a store, by their use.

    Args:
        name: Name of the split: "btcv_24_6", "5fold-0", "source", or the stem of a file.
        training: Numbers of the cases to train on.
        validation: Numbers of the cases to validate on during training.
        test: Numbers of the cases to report on.
        hash: Twelve hexadecimal digits that stand for the lists of names.
    """

    name: str
    training: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    hash: str

    @property
    def evaluation(self) -> tuple[str, tuple[int, ...]]:
        """Name and cases of the part that results are reported on: test, or validation where there is no test case."""
        return ("test", self.test) if self.test else ("validation", self.validation)


@dataclass(frozen=True)
class LabelledSubset:
    """The labelled training cases that are used.

    Args:
        cases: Case numbers in ascending order.
        requested: Requested size: a count, a share, or None for all.
        seed: Seed of the draw.
        hash: Twelve hexadecimal digits that stand for the sorted names.
    """

    cases: tuple[int, ...]
    requested: int | float | None
    seed: int
    hash: str


def resolve_split(store: VolumeStore, *, split: str = "auto", fold: int = 0, labelled: bool = True) -> CaseSplit:
    """Return the split that a configuration means, in case numbers of the store.

    Args:
        store: Store of the prepared cases.
        split: `source` (the split that the source states), `5fold` (the folds of nnU-Net), `auto` (`source` where the
            source names cases to evaluate on, else `5fold`), a name of the registry, or the path of a JSON file.
        fold: Number of the held-out fold, where the split has folds.
        labelled: Whether every case needs a label map, as for fine-tuning. False is for pre-training.

    Raises:
        ValueError: There is no such split or fold; a case is missing from the store, lacks its label or stands in two
            lists; or no case is left to train on or, with `labelled`, to evaluate on.
    """
    if split == "auto":
        named = [n for n, (_, part) in enumerate(store.cohorts) if part in ("validation", "test")]
        split = "source" if any(store.has_label(n) or not labelled for n in named) else "5fold"
    if split == "source":
        name, lists = "source", _source_lists(store, labelled=labelled)
    elif split == "5fold":
        name, lists = f"5fold-{fold}", _fold_lists(store, fold, labelled=labelled)
    else:
        path = split_file(split)
        name, lists = read_split(path, fold=fold)
        _check_names(store, path, lists, labelled=labelled)
    if split == "source" and fold:
        raise ValueError(f"data.split=source has no folds; leave data.fold at 0, got {fold}")
    _check_uses(store, name, lists, labelled=labelled)
    number = {case: n for n, case in enumerate(store.names)}
    training, validation, test = (tuple(sorted(number[case] for case in lists[part])) for part in PARTS)
    return CaseSplit(name, training, validation, test, split_hash(lists))


def split_hash(lists: Mapping[str, Sequence[str]]) -> str:
    """Return twelve hexadecimal digits that stand for the names in the lists train, validation, test, in any order."""
    return _hash({part: sorted(lists[part]) for part in PARTS})


def few_labels(
    store: VolumeStore, training: Sequence[int], *, labelled: int | float | None, seed: int = 0
) -> LabelledSubset:
    """Return the first `labelled` training cases by SHA-256("SEED/CASE"): a smaller subset lies in a larger one.

    Args:
        store: Store that knows the names of the cases.
        training: Case numbers to choose from.
        labelled: A count, or a share in (0, 1] that is rounded to at least one case, or None for all.
        seed: Seed of the order; another seed gives other subsets.

    Raises:
        ValueError: The count or share is out of range.
    """
    is_count = isinstance(labelled, int) and not isinstance(labelled, bool)
    if labelled is None:
        count = len(training)
    elif is_count and 1 <= labelled <= len(training):
        count = int(labelled)
    elif isinstance(labelled, float) and 0 < labelled <= 1:
        count = max(1, int(labelled * len(training) + 0.5))
    else:
        raise ValueError(
            f"data.labelled={labelled}: give a count from 1 to {len(training)} (the training cases of the split), "
            "a share above 0.0 and up to 1.0, or null for all"
        )
    names = {case: store.names[case] for case in training}
    order = sorted(training, key=lambda case: hashlib.sha256(f"{seed}/{names[case]}".encode()).hexdigest())
    cases = tuple(sorted(order[:count]))
    return LabelledSubset(cases, labelled, seed, _hash(sorted(names[case] for case in cases)))


def pretraining_cases(
    store: VolumeStore, *, split: str | None, fold: int, validation_fraction: float
) -> tuple[list[int], list[int]]:
    """Return case numbers for training without labels and for its validation, independent of the seed.

    A split gives its training and validation cases. Without a split, the cases that the source calls "validation" are
    held out. Where there are none, a share of all is held out (at least one case if it is positive and there are two).
    Cases called "test" are never used. A share of 0 turns validation off.

    Raises:
        ValueError: The share is not in [0, 1), the split cannot be resolved, or no case is left to train on.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"data.validation_fraction must lie in [0, 1), got {validation_fraction}")
    if split is not None:
        found = resolve_split(store, split=split, fold=fold, labelled=False)
        return list(found.training), list(found.validation) if validation_fraction else []
    splits = [part for _, part in store.cohorts]
    training = [number for number, part in enumerate(splits) if part not in ("validation", "test")]
    held_out = [number for number, part in enumerate(splits) if part == "validation"]
    if validation_fraction and not held_out and len(training) > 1:
        count = max(1, round(validation_fraction * len(training)))
        chosen = counter_generator("validation", len(training)).permutation(len(training))[:count]
        held_out = sorted(training[n] for n in chosen)
        training = sorted(set(training).difference(held_out))
    if not training:
        raise ValueError(
            f"{store.root} has no case to train on: all {len(splits)} are called validation or test by their source"
        )
    return training, held_out if validation_fraction else []


def write_split(path: Path, store: VolumeStore, split: CaseSplit, **notes: Any) -> None:
    """Write a split with its name, its hash and `notes`; the file can be given again as `data.split=PATH`."""
    cases = {"train": split.training, "validation": split.validation, "test": split.test}
    lists = {part: sorted(store.names[n] for n in numbers) for part, numbers in cases.items()}
    write_text(path, json.dumps({"name": split.name, "hash": split.hash, **lists, **notes}, indent=1) + "\n")


def read_split(path: Path, *, fold: int = 0) -> tuple[str, dict[str, list[str]]]:
    """Return name and lists of a split file: {"train": [], "validation": [], "test": []} or {"folds": [[], ...]}.

    Of `folds`, the list with number `fold` is held out and the others train. nnU-Net's `splits_final.json` can be read
    too.

    Raises:
        ValueError: The file is not a split, was changed after its hash was written, or has no such fold.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"data.split={path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"data.split={path} is not valid JSON: {error}") from error
    folds = content.get("folds") if isinstance(content, dict) else content
    if folds is None:
        if fold:
            raise ValueError(f"data.split={path} has no folds; leave data.fold at 0, got {fold}")
        lists = _lists(path, content)
        if content.get("hash", split_hash(lists)) != split_hash(lists):
            raise ValueError(
                f"data.split={path} was changed: its lists have the hash {split_hash(lists)}, it says "
                f"{content['hash']}; remove `name` and `hash` to use it as a split of its own"
            )
        return content.get("name", path.stem), lists
    if not isinstance(folds, list) or not 0 <= fold < len(folds):
        number = len(folds) if isinstance(folds, list) else 0
        raise ValueError(f"data.fold={fold} is not one of the {number} folds of data.split={path}, counted from 0")
    name = f"{path.stem}-{fold}"
    if isinstance(folds[fold], dict):
        return name, _lists(path, folds[fold])
    train = [case for number, cases in enumerate(folds) if number != fold for case in cases]
    return name, _lists(path, {"train": train, "validation": folds[fold]})


def folds_of(names: Sequence[str]) -> list[list[str]]:
    """Return five lists that share out the names: sorted, shuffled with a fixed seed, cut into contiguous parts.

    Source: nnU-Net's default folds, which are those of scikit-learn's KFold(5, shuffle=True, random_state=12345).
    """
    order = np.arange(len(names))
    np.random.RandomState(FOLD_SEED).shuffle(order)  # the random stream of nnU-Net's folds
    ordered = sorted(names)
    return [sorted(ordered[n] for n in part) for part in np.array_split(order, NUM_FOLDS)]


def _lists(path: Path, content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the three lists, also where one is missing or `val` stands for validation."""
    lists = {part: content.get(part, []) for part in PARTS}
    lists["validation"] = lists["validation"] or content.get("val", [])
    if not lists["train"] or not all(isinstance(case, str) for cases in lists.values() for case in cases):
        raise ValueError(
            f'data.split={path} is no split; expected is {{"train": [case names], "validation": [...], "test": [...]}}'
        )
    return lists


def _source_lists(store: VolumeStore, *, labelled: bool) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, (case, (_, part)) in enumerate(zip(store.names, store.cohorts, strict=True)):
        if store.has_label(number) or not labelled:
            lists[part or "train"].append(case)
    return lists


def _fold_lists(store: VolumeStore, fold: int, *, labelled: bool) -> dict[str, list[str]]:
    """Return the folds of the cases with labels; where labels are not needed, the other cases join the training.

    A case that fine-tuning holds out is therefore also held out by pre-training with the same fold.
    """
    if not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"data.fold={fold} is not one of the {NUM_FOLDS} folds of data.split=5fold, counted from 0")
    usable = [number for number, (_, part) in enumerate(store.cohorts) if part != "test"]
    shared = [number for number in usable if store.has_label(number)]
    if not labelled and not shared:
        shared = usable
    folds = folds_of([store.names[number] for number in shared])
    held_out = set(folds[fold])
    rest = shared if labelled else usable
    train = [store.names[number] for number in rest if store.names[number] not in held_out]
    return {"train": train, "validation": folds[fold], "test": []}


def _check_names(store: VolumeStore, path: Path, lists: Mapping[str, Sequence[str]], *, labelled: bool) -> None:
    count = Counter(case for cases in lists.values() for case in cases)
    if twice := sorted(case for case, times in count.items() if times > 1):
        raise ValueError(f"data.split={path} lists {_some(twice)} more than once; a case has one use")
    number = {case: n for n, case in enumerate(store.names)}
    if lacking := sorted(count.keys() - number.keys()):
        raise ValueError(
            f"data.split={path} names {_some(lacking)}, which {store.root} lacks; it has {_some(store.names)} "
            "(what could not be read stands in its rejected.jsonl)"
        )
    if labelled and (bare := sorted(case for case in count if not store.has_label(number[case]))):
        raise ValueError(f"data.split={path}: no label map in {store.root} for {_some(bare)}; add it or drop the case")


def _check_uses(store: VolumeStore, name: str, lists: Mapping[str, Sequence[str]], *, labelled: bool) -> None:
    kind = "cases with a label map" if labelled else "cases"
    ways = "choose another data.split (source, 5fold, or the path of a .json file)"
    if not lists["train"]:
        raise ValueError(f"data.split={name} leaves no case to train on: {store.root} has too few {kind}; {ways}")
    if labelled and not lists["validation"] and not lists["test"]:
        raise ValueError(f"data.split={name} leaves no case to evaluate on: {store.root} has no such {kind}; {ways}")


def _some(names: Sequence[str]) -> str:
    """Return a few of the names, and how many there are."""
    more = f", ... ({len(names)} cases)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
