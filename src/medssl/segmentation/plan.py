"""What a segmentation run takes from its data: classes, spacing, crop size, overlap with pre-training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.splits import CaseSplit
from medssl.data.store import VolumeStore

LARGEST_CROP_VOXEL = 96
CROP_STEP_VOXEL = 16
"""Fitted crops are multiples of it: what four halvings or patches of 16 voxels need."""


def find_classes(store: VolumeStore, split: CaseSplit, *, wanted: Any) -> dict[int, str]:
    """Label values and their names, the background first: all that the labelled cases of the split hold, or `wanted`.

    Raises: ValueError: a wanted value is in no case, or there is no value at all.
    """
    cases = (*split.training, *split.validation, *split.test)
    found = sorted({value for case in cases for value in store.record(case).labels})
    if not found:
        raise ValueError(f"the labels of {store.root} hold nothing but background; nothing can be learnt from them")
    if wanted is not None and (isinstance(wanted, str) or not isinstance(wanted, Sequence)):
        raise ValueError(f"data.classes={wanted}: give a list of label values, for instance [1,2]")
    values = found if wanted is None else sorted(set(wanted) - {0})
    if missing := sorted(set(values) - set(found)) or ([] if values else [0]):
        raise ValueError(
            f"data.classes: value {missing[0]} is in no label; the labels hold {', '.join(map(str, found))}"
        )
    names = store.label_names
    return {0: "background", **{value: names.get(value, f"label {value}") for value in values}}


def find_spacing(store: VolumeStore, cases: Sequence[int], working_spacing_mm: Any) -> str | list[float]:
    """The spacing crops are drawn at: `native`, three millimetre numbers, or the median over `cases`, axis by axis.

    Raises: ValueError: something else is asked for.
    """
    if working_spacing_mm == "native":
        return "native"
    if working_spacing_mm == "median":
        spacings = np.array([store.record(case).spacing_mm for case in cases])
        return [round(float(value), 4) for value in np.median(spacings, axis=0)]
    values = working_spacing_mm if isinstance(working_spacing_mm, Sequence) else [working_spacing_mm] * 3
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    if isinstance(values, str) or len(values) != 3 or len(numbers) != 3:
        raise ValueError(
            f"working_spacing_mm={working_spacing_mm}: give native, median, or one or three numbers above 0"
        )
    return [float(value) for value in numbers]


def find_crop(
    store: VolumeStore, cases: Sequence[int], *, crop_voxel: Any, spacing_mm: str | Sequence[float]
) -> list[int]:
    """The sides of a crop: those given, else 96, or about those of the median volume where that is smaller.

    Raises: ValueError: what is given are not three whole numbers above 0.
    """
    if crop_voxel is not None:
        sides = list(crop_voxel) if isinstance(crop_voxel, Sequence) else [crop_voxel]
        if len(sides) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides):
            raise ValueError(f"crop_voxel={sides}: give three whole numbers above 0, [x, y, z]")
        return sides
    records = [store.record(case) for case in cases]
    shapes = np.array([record.shape for record in records], dtype=float)
    if not isinstance(spacing_mm, str):
        shapes *= np.array([record.spacing_mm for record in records]) / np.array(spacing_mm)
    steps = np.maximum(1, np.rint(np.median(shapes, axis=0) / CROP_STEP_VOXEL))  # the nearest: larger ones cost padding
    return [int(side) for side in np.minimum(steps * CROP_STEP_VOXEL, LARGEST_CROP_VOXEL)]


def unlearnable(store: VolumeStore, cases: Sequence[int], classes: Mapping[int, str]) -> list[str]:
    """Names of the classes that no training label holds."""
    held = {value for case in cases for value in store.record(case).labels}
    return [name for value, name in classes.items() if value and value not in held]


def other_reading(card: Mapping[str, Any] | None, reading: Mapping[str, Any]) -> list[str]:
    """In which the images of this run are read otherwise than those of pre-training, a line each.

    Where `reading` has one modality, the range that `ByModality` has for others does not count.
    """
    groups = (card or {}).get("reading", {}).get("views", {}).get("groups", {})
    names = ("Window", "Percentiles", "ZScore", "ByModality", "MinMax", "Standardise")
    modality = reading.get("modality")
    idle = modality and ("percentiles" if modality == "ct" else "window_hu")

    def counted(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in step.items() if key != idle} for step in steps]

    lines = []
    for key in ("spacing_mm", "outside", "normalise"):
        here, before = counted(reading[key] or ()) if key == "normalise" else reading[key], []
        for group in groups.values():
            steps = [step for step in group.get("augment", ()) if str(step["_target_"]).rpartition(".")[2] in names]
            default = {"spacing_mm": "native"}.get(key, "minimum")
            before.append(counted(steps) if key == "normalise" else group.get(key, default))
        if before and all(value != here for value in before):
            lines.append(f"{key}: {_short(before[0])} in pre-training, {_short(here)} here")
    return lines


def _short(value: Any) -> str:
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return str(value)
    steps = [{"": str(step["_target_"]).rpartition(".")[2], **step} for step in value]
    return "; ".join(" ".join(f"{k}={v}" if k else v for k, v in step.items() if k != "_target_") for step in steps)


def check_resumed(earlier: Path, split: CaseSplit, subset_hash: str, classes: Mapping[int, str]) -> None:
    """Raises: ValueError: the run whose `split.json` is `earlier` has other cases, labels or classes."""
    if not earlier.is_file():
        return
    then = json.loads(earlier.read_text())
    now = {"hash": split.hash, "labelled": subset_hash, "classes": sorted(classes)}
    what = {"hash": "data.split or data.fold", "labelled": "data.labelled or its seed", "classes": "data.classes"}
    for key, value in now.items():
        if then.get(key, value) != value:
            raise ValueError(
                f"resume: {what[key]} was another ({then[key]} then, {value} now); give the settings of that run"
            )


def check_grid(store: VolumeStore) -> None:
    """Raises: ValueError: the volumes of the store were resampled, so that their own grid is lost."""
    if (spacing_mm := store.recipe.get("spacing_mm")) is not None:
        raise ValueError(
            f"{store.root} was resampled to {spacing_mm} mm while it was prepared, but numbers are those of the files'"
            " own grid; prepare with data.spacing_mm=null and give working_spacing_mm"
        )


def find_overlap(
    card: Mapping[str, Any] | None, store: VolumeStore, split: CaseSplit, *, path: Path | None, allowed: bool
) -> dict[str, Any]:
    """How many volumes of the evaluation cases the pre-training saw: by the first digits of their voxels' hash.

    `checked` is False where the file carries no fingerprint of its data.

    Raises: ValueError: it saw some, and that is not allowed.
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
