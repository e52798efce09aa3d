"""Drawing of views from stored voxels: a box to read, then one interpolation, or a slice where voxels stay voxels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer, Shaped
from torch import Tensor

from medssl.data.augment.base import Pose
from medssl.data.augment.filters import apply_axis_matrices
from medssl.data.geometry import Frame
from medssl.data.interpolation import Places, linear_at, nearest_at
from medssl.data.resampling import SINC_RATIO, resampling_matrix, support_voxel
from medssl.data.store import Record, VolumeStore
from medssl.data.views import PlacedView

PREFILTER_RATIO = 1.2
"""An oblique view this much coarser than its level is low-passed first: trilinear weights alone would alias."""


@dataclass(frozen=True)
class ReadBox:
    """The box of one stored level that a view is drawn from.

    Args:
        level: Number of the stored level.
        lower: First voxel of the box in the level, (3,) int.
        upper: One past the last voxel of the box, (3,) int.
        frame: Map from view voxels to voxels of the box.
    """

    level: int
    lower: np.ndarray
    upper: np.ndarray
    frame: Frame


def box_of(record: Record, pose: Pose, *, crop: Frame | None = None, finest: bool = False) -> ReadBox:
    """Return the box that covers a view, in the coarsest level as fine as its grid (`finest`: in level 0).

    Voxels beyond `crop` are left out; None stands for the whole volume.
    """
    frame, displacement = pose
    level = 0
    if not finest:
        factors = np.array(record.level_factors)
        level = int(np.flatnonzero(np.all(factors <= np.maximum(frame.step_voxel, 1) + 1e-9, axis=1)).max(initial=0))
    factor = np.array(record.level_factors[level], dtype=np.float64)
    to_level = np.diag([*(1 / factor), 1.0])
    to_level[:3, 3] = 0.5 / factor - 0.5
    moved = frame.moved(to_level)
    low, high = moved.bounds(0.0 if displacement is None else displacement.bound_voxel)
    if moved.is_aligned and displacement is None:
        lower, upper = np.rint(low), np.rint(high) + 1
    else:
        oblique = moved.axes is None or displacement is not None
        margin = np.array([support_voxel(ratio) for ratio in _filter_ratios(moved, pose, oblique=oblique)])
        lower, upper = np.floor(low - margin), np.ceil(high + margin) + 1
    first, last = _allowed(record, crop, factor)
    lower = np.clip(lower, first, last - 1).astype(np.int64)
    upper = np.clip(upper, lower + 1, last).astype(np.int64)
    shift = np.eye(4)
    shift[:3, 3] = -lower
    return ReadBox(level, lower, upper, moved.moved(shift))


def _filter_ratios(frame: Frame, pose: Pose, *, oblique: bool) -> Float64[np.ndarray, "3"]:
    """Return the `ratio` to filter by for each axis of the box: 1 (linear) unless the view is coarser."""
    step = frame.step_voxel
    if oblique:
        return np.where(step > PREFILTER_RATIO, step, 1.0)
    return np.where(pose.frame.step_voxel > 1 + 1e-6, np.maximum(step, SINC_RATIO), 1.0)


def _allowed(record: Record, crop: Frame | None, factor: Float64[np.ndarray, "3"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and one-past-last voxel of the level that the view may see."""
    last = -(-np.array(record.shape) // factor.astype(int))
    if crop is None:
        return np.zeros(3, dtype=np.int64), last
    low, high = crop.bounds(0.5)
    low, high = ((edge + 0.5) / factor for edge in (low, high))
    first = np.clip(np.rint(low), 0, last - 1).astype(np.int64)
    return first, np.clip(np.rint(high), first + 1, last).astype(np.int64)


def cut_regions(store: VolumeStore, view: PlacedView, name: str) -> tuple[ReadBox, Int64[Tensor, "one bx by bz"]]:
    """Return the part of a derived map of regions that covers the view, and its box; the map is not cached."""
    with np.load(store.derived_file(name, view.case)) as table:
        regions, to_volume = table["regions"], table["to_volume"]
    frame, displacement = view.pose
    moved = frame.moved(np.linalg.inv(to_volume))
    low, high = moved.bounds(0.0 if displacement is None else displacement.bound_voxel)
    shape = np.array(regions.shape)
    lower = np.clip(np.floor(low) - 1, 0, shape - 1).astype(np.int64)
    upper = np.clip(np.ceil(high) + 2, lower + 1, shape).astype(np.int64)
    shift = np.eye(4)
    shift[:3, 3] = -lower
    cut = regions[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))]
    return ReadBox(0, lower, upper, moved.moved(shift)), torch.from_numpy(cut[None].astype(np.int64))


def draw_image(
    voxels: Shaped[Tensor, "channel bx by bz"],
    box: ReadBox,
    record: Record,
    pose: Pose,
    *,
    outside: str | float,
    out: Float32[Tensor, "channel x y z"],
) -> None:
    """Draw the view's grey values, in file units, into `out`, on the device where both lie."""
    displacement, frame = pose.displacement, box.frame
    if displacement is None and frame.is_aligned and _covers(box):
        out.copy_(_turned(voxels, frame))
        _scale(out, record)
        return
    values = voxels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _scale(values, record)
    fill = None if outside == "border" else _fill(record, outside, voxels.device)
    if displacement is None and frame.axes is not None:
        ratios = _filter_ratios(frame, pose, oblique=False)
        out.copy_(_drawn_by_axis(values, frame, ratios=ratios, fill=fill))
        return
    ratios = _filter_ratios(frame, pose, oblique=True)
    if np.any(ratios > 1):
        low_pass = [_low_pass(n, ratio).to(values.device) for n, ratio in zip(values.shape[1:], ratios, strict=True)]
        values = apply_axis_matrices(values[None], low_pass)[0]
    if values.device.type == "cpu":
        linear_at(values, places_of(box, pose, values.device), fill=fill, out=out)
    else:
        grid_sampled(values, sampling_grid(box, pose, values.device), fill=fill, out=out)


def grid_sampled(
    values: Float32[Tensor, "channel bx by bz"],
    grid: Float32[Tensor, "one x y z 3"],
    *,
    fill: Float32[Tensor, "channel 1 1 1"] | None,
    out: Float32[Tensor, "channel x y z"],
) -> None:
    """Do the same as `linear_at` in one kernel: fastest on a GPU, half as fast on a CPU. It changes `values`."""
    if fill is not None:
        values.sub_(fill)  # beyond the box the sampler sees zeros
    padding = "border" if fill is None else "zeros"
    out.copy_(F.grid_sample(values[None], grid, mode="bilinear", padding_mode=padding, align_corners=False)[0])
    if fill is not None:
        out.add_(fill)


def _fill(record: Record, outside: str | float, device: torch.device) -> Float32[Tensor, "channel 1 1 1"]:
    kept = record.statistics
    values = [k["minimum"] if isinstance(outside, str) else float(outside) for k in kept]
    return torch.tensor(values, device=device)[:, None, None, None]


def _scale(values: Tensor, record: Record) -> None:
    """Turn stored integers into file units, in place."""
    slope, intercept = record.slope, record.intercept
    if set(slope) != {1.0} or set(intercept) != {0.0}:
        factor, shift = (torch.tensor(v, device=values.device)[:, None, None, None] for v in (slope, intercept))
        values.mul_(factor).add_(shift)


def draw_label(
    voxels: Integer[Tensor, "one bx by bz"], box: ReadBox, pose: Pose, *, out: Int64[Tensor, "one x y z"]
) -> None:
    """Draw the view's labels into `out`: nearest neighbour, 0 outside; `voxels` are those of the box."""
    frame = box.frame
    if pose.displacement is None and frame.is_aligned and _covers(box):
        out.copy_(_turned(voxels, frame))
    elif pose.displacement is None and frame.axes is not None:
        out.copy_(_picked_by_axis(voxels, frame))
    else:
        nearest_at(voxels, places_of(box, pose, voxels.device), out=out)


def draw_valid(record: Record, pose: Pose, device: torch.device) -> Bool[Tensor, "one x y z"]:
    """Return which voxels of the view lie inside the volume."""
    whole = ReadBox(0, np.zeros(3, dtype=int), np.array(record.shape), pose.frame)
    grid = sampling_grid(whole, pose, device)[0]
    return torch.all(grid.abs() <= 1, dim=-1)[None]


def places_of(box: ReadBox, pose: Pose, device: torch.device) -> Places:
    """Return where the view's voxels lie in the box, displacement included."""
    displacement = pose.displacement
    if displacement is None:
        return Places(box.frame)
    return Places(box.frame, displacement_field(pose, device), displacement.bound_voxel)


def displacement_field(pose: Pose, device: torch.device) -> Float32[Tensor, "3 x y z"]:
    """Return the displacement of every view voxel, in view voxels; zero where the view is not bent."""
    displacement = pose.displacement
    shape = pose.frame.shape
    if displacement is None:
        return torch.zeros(3, *shape, device=device)
    weights = [torch.from_numpy(displacement.weights(axis, side)).to(device) for axis, side in enumerate(shape)]
    return apply_axis_matrices(torch.from_numpy(displacement.nodes).to(device)[None], weights)[0]


def sampling_grid(box: ReadBox, pose: Pose, device: torch.device) -> Float32[Tensor, "one x y z 3"]:
    """Return where view voxels lie in the box, as `grid_sample` counts: -1 and 1 are the faces, last axis first."""
    sides = box.upper - box.lower
    linear = box.frame.linear * (2 / sides)[:, None]  # box voxel -> (2 i + 1) / n - 1
    start = (2 * box.frame.matrix[:3, 3] + 1) / sides - 1
    columns, origin = (torch.from_numpy(a[::-1].copy()).to(device) for a in (linear, start))
    axes = [
        torch.arange(n, dtype=torch.float64, device=device)[:, None] * columns[:, axis]
        for axis, n in enumerate(box.frame.shape)
    ]
    plane = (axes[0][:, None] + axes[1][None] + origin).float()  # (x, y, 3)
    grid = plane[:, :, None] + axes[2].float()
    if pose.displacement is not None:
        field = displacement_field(pose, device)
        grid += torch.einsum("kd,dxyz->xyzk", columns.float(), field)
    return grid[None]


def _covers(box: ReadBox) -> bool:
    """Return whether the box holds every voxel of an aligned view."""
    low, high = box.frame.bounds()
    return bool(np.all(np.rint(low) >= 0) and np.all(np.rint(high) < box.upper - box.lower))


def _turned(voxels: Tensor, frame: Frame) -> Tensor:
    """Cut an aligned view from its box: slice, then flip and permute to the view's axes."""
    low, high = (np.rint(edge).astype(int) for edge in frame.bounds())
    cut = voxels[:, low[0] : high[0] + 1, low[1] : high[1] + 1, low[2] : high[2] + 1]
    axes = frame.axes
    assert axes is not None
    flipped = [1 + axis for view_axis, axis in enumerate(axes) if frame.linear[axis, view_axis] < 0]
    cut = cut.flip(flipped) if flipped else cut
    return cut if axes == (0, 1, 2) else cut.permute(0, *(1 + axis for axis in axes))


def _drawn_by_axis(
    values: Float32[Tensor, "channel bx by bz"], frame: Frame, *, ratios: Float64[np.ndarray, "3"], fill: Tensor | None
) -> Float32[Tensor, "channel x y z"]:
    """Draw an axis-parallel view: one matrix per axis, then its order of axes. `fill` None repeats the border."""
    axes = frame.axes
    assert axes is not None
    matrices: list[np.ndarray] = [np.empty(0)] * 3
    for view_axis, axis in enumerate(axes):
        positions = frame.matrix[axis, 3] + frame.linear[axis, view_axis] * np.arange(frame.shape[view_axis])
        side, ratio = values.shape[1 + axis], float(ratios[axis])
        matrices[axis] = resampling_matrix(positions, side, ratio=ratio, border=fill is None)
    drawn = apply_axis_matrices(values[None], [torch.from_numpy(m).to(values.device) for m in matrices])[0]
    covered = [m.sum(axis=1) for m in matrices]  # below 1 where the filter reaches beyond the volume
    if fill is not None and any(np.any(np.abs(c - 1) > 1e-5) for c in covered):
        x, y, z = (torch.from_numpy(c).to(values.device) for c in covered)
        drawn += fill * (1 - x[:, None, None] * y[None, :, None] * z[None, None, :])
    return drawn if axes == (0, 1, 2) else drawn.permute(0, *(1 + axis for axis in axes))


def _picked_by_axis(voxels: Integer[Tensor, "one bx by bz"], frame: Frame) -> Integer[Tensor, "one x y z"]:
    """Return the nearest voxels of an axis-parallel view, 0 outside the box."""
    axes = frame.axes
    assert axes is not None
    for view_axis, axis in enumerate(axes):
        nearest = np.rint(frame.matrix[axis, 3] + frame.linear[axis, view_axis] * np.arange(frame.shape[view_axis]))
        inside = (nearest >= 0) & (nearest < voxels.shape[1 + axis])
        number = torch.from_numpy(np.where(inside, nearest, 0).astype(np.int64)).to(voxels.device)
        voxels = voxels.index_select(1 + axis, number)
        if not inside.all():
            voxels.index_fill_(1 + axis, torch.from_numpy(np.flatnonzero(~inside)).to(voxels.device), 0)
    return voxels if axes == (0, 1, 2) else voxels.permute(0, *(1 + axis for axis in axes))


def _low_pass(side: int, ratio: float) -> Float[Tensor, "side side"]:
    """Return the filter for an output `ratio` times as coarse, on the input's grid; the identity for a ratio of 1."""
    return torch.from_numpy(resampling_matrix(np.arange(side, dtype=np.float64), side, ratio=float(ratio), border=True))
