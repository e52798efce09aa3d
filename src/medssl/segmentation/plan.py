"""The plan of a segmentation run, found from its settings, its data and its file before anything is trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from medssl.checks import choice, triple
from medssl.data.splits import CaseSplit, LabelledSubset, few_labels, resolve_split
from medssl.data.store import VolumeStore
from medssl.segmentation.finetune_settings import FinetuneSettings
from medssl.segmentation.initial_weights import Initial
from medssl.segmentation.reading_differences import other_reading

REPORTS = ("auto", "best", "last")

LARGEST_CROP_VOXEL = 96
CROP_STEP_VOXEL = 16
"""Step of fitted crops: four halvings, or patches of 16 voxels, need multiples of it."""


@dataclass(frozen=True)
class Plan:
    """The decisions of a segmentation run.

    Args:
        settings: The settings of the run, resolved.
        initial: The file that the run starts from.
        split: The split of the cases.
        subset: The training cases whose labels are used.
        classes: Label values and their names, the background first.
        ignored_label: The label value of voxels whose class is unknown; None for none.
        spacing_mm: Spacing of the grid that crops are drawn on; `native` for each image's own.
        crop_voxel: Sides of a crop, and of a window of predictions.
        modality: The modality of each channel of all training cases; None if they differ.
        leakage: The comparison of the evaluation cases with those of pre-training and of training.
        choice: The weights that are evaluated, `best` or `last`.
        unlearnable: Classes that no training label holds.
        other_reading: Differences in how images were read in pre-training, a line each.
    """

    settings: FinetuneSettings
    initial: Initial
    split: CaseSplit
    subset: LabelledSubset
    classes: Mapping[int, str]
    ignored_label: int | None
    spacing_mm: str | list[float]
    crop_voxel: list[int]
    modality: tuple[str, ...] | None
    leakage: Mapping[str, Any]
    choice: str
    unlearnable: Sequence[str]
    other_reading: Sequence[str]

    @classmethod
    def of(cls, config: DictConfig, store: VolumeStore, initial: Initial, *, earlier: Path | None = None) -> "Plan":
        """Make the plan of a run, or of the rest of one whose `split.json` is `earlier`.

        Raises:
            ValueError: The settings, the data and the file do not go together.
        """
        check_grid(store)
        split = resolve_split(store, split=config.data.split, fold=config.data.fold)
        subset = few_labels(store, split.training, labelled=config.data.labelled, seed=config.data.labelled_seed)
        leakage = {
            **find_overlap(initial.card, store, split, path=initial.path, allowed=config.allow_leakage),
            "same_voxels": find_copies(store, split, subset.cases, allowed=config.allow_leakage),
        }
        classes = find_classes(store, split, wanted=_plain(config.data.classes))
        if earlier is not None:
            check_resumed(earlier, split, subset.hash, classes, store.ignored_label)
        spacing_mm = find_spacing(store, split.training, _plain(config.working_spacing_mm))
        crop_voxel = find_crop(store, split.training, crop_voxel=_plain(config.crop_voxel), spacing_mm=spacing_mm)
        facts = {
            "num_cases": len(subset.cases),
            "num_channels": store.record(split.training[0]).channels,
            "num_classes": len(classes),
            "num_locations": 0,
            "steps_per_epoch": len(subset.cases) / config.batch_size,
            "spacing_mm": spacing_mm,
            "crop_voxel": crop_voxel,
        }
        settings = FinetuneSettings.of(initial.completed(config), facts)
        plan = cls(
            settings=settings,
            initial=initial,
            split=split,
            subset=subset,
            classes=classes,
            ignored_label=store.ignored_label,
            spacing_mm=spacing_mm,
            crop_voxel=crop_voxel,
            modality=modality(store, subset.cases),
            leakage=leakage,
            choice=weights_to_report(settings.report, split, validates=bool(settings.validate_every)),
            unlearnable=unlearnable(store, subset.cases, classes),
            other_reading=(),
        )
        return replace(plan, other_reading=other_reading(initial.card, plan.reading))

    def fitted(self, multiple_voxel: Sequence[int]) -> "Plan":
        """Return the plan for a network whose crops are multiples of `multiple_voxel`; a crop that is not given grows.

        Raises:
            ValueError: A crop that is given does not fit.
        """
        sides, values = self.crop_voxel, self.settings.values
        fitting = [-(-side // step) * step for side, step in zip(sides, multiple_voxel, strict=True)]
        if self.settings.crop_voxel is not None and fitting != sides:
            raise ValueError(
                f"crop_voxel={sides} does not fit the network, whose crops are multiples of {list(multiple_voxel)};"
                f" give {fitting}, or null"
            )
        values = {**values, "facts": {**values["facts"], "crop_voxel": fitting}}
        return replace(self, crop_voxel=fitting, settings=replace(self.settings, values=values))

    @property
    def validates(self) -> bool:
        """Whether validation cases are predicted while training."""
        return bool(self.settings.validate_every and self.split.validation)

    @property
    def class_names(self) -> list[str]:
        """The names of the foreground classes."""
        return list(self.classes.values())[1:]

    @property
    def reading(self) -> dict[str, Any]:
        """Return how images are read, as the card of the network says it."""
        settings = self.settings
        return {
            "channels": settings.data.get("channels"),
            "spacing_mm": self.spacing_mm,
            "crop_voxel": self.crop_voxel,
            "outside": settings.outside,
            "normalise": settings.normalise,
            "modality": None if self.modality is None else list(self.modality),
        }


def weights_to_report(report: str, split: CaseSplit, *, validates: bool) -> str:
    """Return `best` or `last`: which weights are evaluated.

    `auto` takes the best on validation cases where these are not the ones that are evaluated.

    Raises:
        ValueError: There is no such choice, or nothing to select the best by.
    """
    validates = validates and bool(split.validation)
    if choice("report", report, REPORTS) == "best" and not validates:
        raise ValueError("report=best needs validation cases in the split and validate_every; give report=last")
    if report == "auto":
        return "best" if validates and split.evaluation[0] == "test" else "last"
    return report


def modality(store: VolumeStore, cases: Sequence[int]) -> tuple[str, ...] | None:
    """Return the modality of each channel of all cases; None where they differ."""
    found = {store.record(case).modality for case in cases}
    return found.pop() if len(found) == 1 else None


def format_plan(plan: Plan, store: VolumeStore, *, model: str) -> list[str]:
    """Return a description of the run in lines: cases, classes, crops, and warnings.

    Args:
        plan: The plan of the run.
        store: The store of its cases.
        model: The network in words.
    """
    split, subset, names = plan.split, plan.subset, plan.class_names
    where, cases = split.evaluation
    spacing = plan.spacing_mm
    lines = [
        f"split: {split.name} [{split.hash}], {len(split.training)} training, {len(split.validation)} validation,"
        f" {len(split.test)} test cases; numbers come from the {len(cases)} {where} cases",
        f"labelled: {len(subset.cases)} cases [{subset.hash}]"
        + (f": {', '.join(store.record(case).case for case in subset.cases)}" if len(subset.cases) <= 10 else ""),
        f"classes: {len(names)} ({', '.join(names[:15])}{', ...' if names[15:] else ''})",
        f"crops: {' x '.join(map(str, plan.crop_voxel))} voxels at "
        + (spacing if isinstance(spacing, str) else f"{' x '.join(f'{s:g}' for s in spacing)} mm"),
        f"model: {model}",
    ]
    if plan.ignored_label is not None:
        lines.append(f"ignored: label value {plan.ignored_label}; its voxels enter neither the loss nor the scores")
    lines += [f"reading: {line}" for line in plan.other_reading]
    if plan.unlearnable:
        lines.append(f"classes: {', '.join(plan.unlearnable)}: in no label that is trained on, cannot be learnt")
    if not plan.leakage["checked"]:
        lines.append("leakage: the file does not say which volumes it was trained on; overlap cannot be checked")
    if plan.leakage["overlap"]:
        lines.append(f"leakage: {plan.leakage['overlap']} of the {where} cases were seen in pre-training (allowed)")
    lines += [f"leakage: {copies} (allowed)" for copies in plan.leakage["same_voxels"]]
    if plan.settings.freeze == "all_but_head" and plan.initial.path is not None:
        lines.append("freeze: decoder layers that no file filled stay as they were drawn")
    return lines


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def find_classes(store: VolumeStore, split: CaseSplit, *, wanted: Any) -> dict[int, str]:
    """Return label values and their names, the background first: all in the labelled cases of the split, or `wanted`.

    The ignored label of the data is no class.

    Raises:
        ValueError: A value of `wanted` is in no case or ignored, or there is no value at all.
    """
    cases = (*split.training, *split.validation, *split.test)
    ignored = store.ignored_label
    found = sorted({value for case in cases for value in store.record(case).labels} - {ignored})
    if not found:
        raise ValueError(f"the labels of {store.root} hold nothing but background; nothing can be learnt from them")
    if wanted is not None and (isinstance(wanted, str) or not isinstance(wanted, Sequence)):
        raise ValueError(f"data.classes={wanted}: give a list of label values, for instance [1,2]")
    values = found if wanted is None else sorted(set(wanted) - {0})
    held = f"the labels hold {', '.join(map(str, found))}"
    if ignored is not None and ignored in values:
        raise ValueError(f"data.classes: value {ignored} is the ignored label of the data, which is no class; {held}")
    if missing := sorted(set(values) - set(found)) or ([] if values else [0]):
        raise ValueError(f"data.classes: value {missing[0]} is in no label; {held}")
    names = store.label_names
    return {0: "background", **{value: names.get(value, f"label {value}") for value in values}}


def find_spacing(store: VolumeStore, cases: Sequence[int], working_spacing_mm: Any) -> str | list[float]:
    """Return the spacing of crops: `native`, three numbers in millimetres, or the median over `cases`, axis by axis.

    Raises:
        ValueError: `working_spacing_mm` is something else.
    """
    if working_spacing_mm == "native":
        return "native"
    if working_spacing_mm == "median":
        spacings = np.array([store.record(case).spacing_mm for case in cases])
        return [round(float(value), 4) for value in np.median(spacings, axis=0)]
    try:
        return list(triple("working_spacing_mm", working_spacing_mm, kind=float))
    except ValueError:
        raise ValueError(
            f"working_spacing_mm={working_spacing_mm}: give native, median, or one or three numbers above 0"
        ) from None


def find_crop(
    store: VolumeStore, cases: Sequence[int], *, crop_voxel: Any, spacing_mm: str | Sequence[float]
) -> list[int]:
    """Return the sides of a crop: those given, else 96, or about those of the median volume if that is smaller.

    Raises:
        ValueError: `crop_voxel` is not three whole numbers above 0.
    """
    if crop_voxel is not None:
        return list(triple("crop_voxel", crop_voxel if isinstance(crop_voxel, Sequence) else [crop_voxel]))
    records = [store.record(case) for case in cases]
    shapes = np.array([record.shape for record in records], dtype=float)
    if not isinstance(spacing_mm, str):
        shapes *= np.array([record.spacing_mm for record in records]) / np.array(spacing_mm)
    steps = np.maximum(1, np.rint(np.median(shapes, axis=0) / CROP_STEP_VOXEL))  # the nearest: larger ones cost padding
    return [int(side) for side in np.minimum(steps * CROP_STEP_VOXEL, LARGEST_CROP_VOXEL)]


def unlearnable(store: VolumeStore, cases: Sequence[int], classes: Mapping[int, str]) -> list[str]:
    """Return the names of the classes that no training label holds."""
    held = {value for case in cases for value in store.record(case).labels}
    return [name for value, name in classes.items() if value and value not in held]


def check_resumed(
    earlier: Path, split: CaseSplit, subset_hash: str, classes: Mapping[int, str], ignored_label: int | None
) -> None:
    """Check that the run that wrote `earlier`, its `split.json`, has the same cases, labels, classes and ignored label.

    Raises:
        ValueError: The run has other cases, labels or classes, or ignores another label.
    """
    if not earlier.is_file():
        return
    then = json.loads(earlier.read_text(encoding="utf-8"))
    now = {"hash": split.hash, "labelled": subset_hash, "classes": sorted(classes), "ignored_label": ignored_label}
    what = {"hash": "data.split or data.fold", "labelled": "data.labelled or its seed", "classes": "data.classes"}
    what["ignored_label"] = "the ignored label of the data"
    for key, value in now.items():
        if then.get(key, value) != value:
            raise ValueError(
                f"resume: {what[key]} was another ({then[key]} then, {value} now); give the settings of that run"
            )


def check_grid(store: VolumeStore) -> None:
    """Check that the volumes of the store are on their own grid.

    Raises:
        ValueError: The volumes were resampled, so that their own grid is lost.
    """
    if (spacing_mm := store.recipe.get("spacing_mm")) is not None:
        raise ValueError(
            f"{store.root} was resampled to {spacing_mm} mm while it was prepared, but numbers are those of the files'"
            " own grid; prepare with data.spacing_mm=null and give working_spacing_mm"
        )


def find_overlap(
    card: Mapping[str, Any] | None, store: VolumeStore, split: CaseSplit, *, path: Path | None, allowed: bool
) -> dict[str, Any]:
    """Return the number of evaluation cases that the pre-training saw, by the first digits of the hash of their voxels.

    `checked` is False if the file carries no fingerprint of its data.

    Raises:
        ValueError: The pre-training saw some, and that is not allowed.
    """
    if path is None:
        return {"checked": True, "overlap": 0, "allowed": allowed}
    hashes = None if card is None else card.get("data", {}).get("voxel_hashes")
    if hashes is None:
        return {"checked": False, "overlap": 0, "allowed": allowed}
    name, cases = split.evaluation
    seen = [store.record(case).case for case in cases if store.record(case).voxel_hash[:16] in set(hashes)]
    if seen and not allowed:
        shown = ", ".join(seen[:5]) + (", ..." if seen[5:] else "")
        raise ValueError(
            f"{len(seen)} of {len(cases)} {name} cases were seen in the pre-training of {path} ({shown}); pre-train on"
            f" the training cases alone (data.split={split.name.partition('-')[0]} there too), choose another split, or"
            " go on with allow_leakage=true, which marks every result"
        )
    return {"checked": True, "overlap": len(seen), "allowed": allowed}


def find_copies(store: VolumeStore, split: CaseSplit, training: Sequence[int], *, allowed: bool) -> list[str]:
    """Return which cases that are held out hold the very voxels of a training case, or validation those of a test case.

    Args:
        store: The store of the cases.
        split: The split of the cases.
        training: The training cases that are used.
        allowed: Whether such cases may be used all the same.

    Raises:
        ValueError: There are some, and that is not allowed.
    """
    first: dict[str, tuple[str, str]] = {}
    copies = []
    for part, cases in (("training", training), ("validation", split.validation), ("test", split.test)):
        for record in map(store.record, cases):
            name, where = first.setdefault(record.voxel_hash, (record.case, part))
            if where != part:
                copies.append(f"{record.case} ({part}) and {name} ({where}) hold the same voxels")
    if copies and not allowed:
        more = f" ({len(copies)} such pairs)" if copies[1:] else ""
        raise ValueError(
            f"{copies[0]}{more}: results would be those of images that the network was trained on or selected by; drop"
            " one of the two from the data or from the split, or go on with allow_leakage=true, which marks every"
            " result"
        )
    return copies
