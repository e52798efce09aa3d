"""The grid of DICOM slices: their order along the normal, and the map from voxel index to the patient's space."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from medssl.data.formats.base import ReadError, Spacing, size_text, stated_or_assumed
from medssl.data.formats.dicom_frames import DicomSlice

SAME_PLACE_MM = 1e-3
SAME_DIRECTION = 1e-3
"""Headers round directions; so much is 0.06 degrees."""
SAME_SPACING = 1e-3
MAX_UNEVEN = 0.1
"""Share of a step by which one step may differ from the usual one."""


def sorted_frames(path: Path, frames: Sequence[DicomSlice]) -> list[DicomSlice]:
    """Return the frames in the order of their positions along the normal.

    Raises:
        ReadError: Frames differ in size, orientation or spacing, have no place, or share one.
    """
    _check_alike(path, frames)
    if frames[0].orientation is None:
        return list(frames)
    normal = np.cross(*frames[0].orientation)
    places = [float(normal @ frame.position) for frame in frames if frame.position is not None]
    order = np.argsort(places, kind="stable")
    steps = np.diff(np.array(places)[order])
    if len(steps) and steps.min() < SAME_PLACE_MM:
        _refuse_repeats(path, [frames[i] for i in order], steps)
    return [frames[i] for i in order]


def affine_of(
    path: Path, frames: Sequence[DicomSlice], *, assumed: Spacing | None = None
) -> Float64[np.ndarray, "4 4"]:
    """Return the map from index (column, row, slice) to RAS mm of sorted frames.

    Slices may be shifted against each other along a straight line, as those of a tilted gantry are.

    Raises:
        ReadError: Slices are missing, or the header states no spacing and none is assumed.
    """
    first = frames[0]
    if first.orientation is None or first.position is None:
        raise AssertionError("the frames were not sorted")
    step = _step(path, frames) if len(frames) > 1 else None
    lengths = [*(first.spacing or (None, None)), first.thickness if step is None else float(np.linalg.norm(step))]
    spacing = stated_or_assumed(path, lengths, assumed)
    if step is None:
        step = np.cross(*first.orientation) * spacing[2]
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[0] * spacing[0]
    affine[:3, 1] = first.orientation[1] * spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine[:2] *= -1  # LPS to RAS
    return affine


def _check_alike(path: Path, frames: Sequence[DicomSlice]) -> None:
    sizes = {(frame.pixels.columns, frame.pixels.rows) for frame in frames}
    if len(sizes) > 1:
        raise ReadError(path, f"the slices differ in size: {', '.join(sorted(size_text(s) for s in sizes))}")
    for name, entry in (("ImagePositionPatient", "position"), ("ImageOrientationPatient", "orientation")):
        without = [frame.name for frame in frames if getattr(frame, entry) is None]
        if without:
            share = f"{len(without)} of {len(frames)} slices, such as {without[0]}"
            raise ReadError(path, f"no {name} in {share}: they have no place in space")
    directions = [np.ravel(f.orientation) for f in frames if f.orientation is not None]
    if num := _num_kinds(directions, SAME_DIRECTION):
        raise ReadError(path, f"slices of {num} orientations in one series")
    spacings = [np.array(f.spacing or (0.0, 0.0)) for f in frames]
    if num := _num_kinds(spacings, SAME_SPACING * max(1.0, float(spacings[0].max()))):
        raise ReadError(path, f"slices of {num} pixel spacings in one series")


def _num_kinds(rows: Sequence[Float64[np.ndarray, " n"]], tolerance: float) -> str:
    """Return how many kinds of rows there are, "" where all are alike."""
    kinds: list[np.ndarray] = []
    for row in rows:
        if not any(np.abs(row - kind).max() <= tolerance for kind in kinds):
            kinds.append(row)
    return {1: "", 2: "two"}.get(len(kinds), str(len(kinds)))


def _refuse_repeats(path: Path, frames: Sequence[DicomSlice], steps: Float64[np.ndarray, " n"]) -> None:
    """Raise the ReadError of sorted frames that share places."""
    place = np.concatenate([[0], (steps >= SAME_PLACE_MM).cumsum()])
    times = Counter(place.tolist())
    where = "file" if frames[0].pixels.num_frames > 1 else "series"
    often = times[0]
    if set(times.values()) == {often} and len(times) > 1:
        scans, each = ("two", "twice") if often == 2 else (str(often), f"{often} times")
        raise ReadError(path, f"{scans} scans ({len(times)} positions, each {each}) in one {where}; split them")
    index = next(i for i, step in enumerate(steps) if step < SAME_PLACE_MM)
    pair = f"{frames[index].name} and {frames[index + 1].name}"
    num = sum(n > 1 for n in times.values())
    count = "one position twice" if num == 1 else f"{num} positions twice"
    raise ReadError(path, f"{count} ({pair} lie at the same place); remove what does not belong to the scan")


def _step(path: Path, frames: Sequence[DicomSlice]) -> Float64[np.ndarray, "3"]:
    """Return the step from slice to slice, after a check that all steps are alike."""
    positions = np.array([frame.position for frame in frames])
    steps = np.diff(positions, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    usual = np.median(steps, axis=0)
    if np.linalg.norm(steps - usual, axis=1).max() > MAX_UNEVEN * np.median(lengths):
        gaps = f"{lengths.min():.3g} to {lengths.max():.3g} mm apart"
        raise ReadError(path, f"the slices are not evenly spaced ({gaps}): some are missing")
    return (positions[-1] - positions[0]) / len(steps)
