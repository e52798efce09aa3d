"""Notes on doubtful settings of views in a store."""

from collections.abc import Sequence

import numpy as np

from medssl.data.augment.base import Augmentation
from medssl.data.augment.normalise import ByModality, Window
from medssl.data.placements import GridCrop, ViewSpec
from medssl.data.store import VolumeStore

LARGEST_RATIO = 1.5
"""Largest ratio between the sides of a crop and those of the patches that its locations were found with."""


def other_size(spec: GridCrop, store: VolumeStore) -> str | None:
    """Return a note on crops with sides unlike the patches of their table; None if alike or unknown.

    Crops are measured in the first case.
    """
    patch_mm = None if spec.table is None else store.derived(spec.table, 0).get("patch_mm")
    if patch_mm is None:
        return None
    record = store.record(0)
    crop_mm = np.array(spec.size) * spec.step_voxel(record) * record.spacing_mm
    if np.abs(np.log(crop_mm / patch_mm)).max() <= np.log(LARGEST_RATIO):
        return None
    crop, patch = (" x ".join(f"{side:.3g}" for side in sides) for sides in (crop_mm, patch_mm))
    return (
        f"crops of {crop} mm show locations of the table {spec.table!r}, whose patches have {patch} mm; change size or "
        "spacing_mm of the crops, or derive with another what.patch_voxel and what.spacing_mm"
    )


def other_window(spec: ViewSpec, store: VolumeStore) -> str | None:
    """Return a note on views that show CT in another window than the one in which their points were found.

    None where the windows are equal, where one is unknown, and where the store has no CT.
    """
    pointer = None if spec.points is None else store.pointer(spec.points)
    if pointer is None:
        return None
    found_in = pointer.get("recipe", {}).get("window_hu")
    shown_in = next((window for augmentation in spec.augment if (window := _window_hu(augmentation))), None)
    if found_in is None or shown_in is None or list(found_in) == list(shown_in):
        return None
    if all("ct" not in record.modality for record in store.records()):
        return None
    found, shown = (f"[{low:g},{high:g}]" for low, high in (found_in, shown_in))
    return (
        f"views show CT in the window {shown} HU, but the points of the table {spec.points!r} were found in {found}: "
        f"the views do not look like what the points mark; give them window_hu={found}, or derive the table with "
        f"what.window_hu={shown}"
    )


def _window_hu(augmentation: Augmentation) -> Sequence[float] | None:
    """Return the window for CT, where the augmentation states one."""
    if isinstance(augmentation, Window):
        return augmentation.low_hu, augmentation.high_hu
    return augmentation.window_hu if isinstance(augmentation, ByModality) else None
