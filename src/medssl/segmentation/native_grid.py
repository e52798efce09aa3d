"""The way of class probabilities from the working grid back to the image's own grid, slice by slice."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from medssl.data.resampling import resampling_matrix
from medssl.inference.working_grid import WorkingGrid

COPIED_SLICES = 8
"""Slices copied out of a slab at once: along its last axis they lie apart in memory."""
SAFETY = 0.99


def planes(
    slabs: Iterable[tuple[int, Tensor]], positions: Float64[np.ndarray, " slice"]
) -> Iterator[Float32[Tensor, "k x y"]]:
    """Yield the probabilities at ascending positions along the last axis, linear between the two nearest slices.

    Args:
        slabs: Pairs of the number of the first slice and the slab (k x y height), from the first slice without a gap.
        positions: Positions within the slices of the slabs.
    """
    lower = np.floor(positions).astype(int)
    weights = positions - lower
    number, previous = 0, None
    for first, slab in slabs:
        for start in range(0, slab.shape[-1], COPIED_SLICES):
            chunk = slab[..., start : start + COPIED_SLICES].movedim(-1, 0).contiguous()
            begin = first + start
            while number < len(positions) and np.ceil(positions[number]) < begin + len(chunk):
                at = lower[number] - begin
                here = previous if at < 0 else chunk[at]
                assert here is not None
                weight = float(weights[number])
                yield here if weight == 0 else torch.lerp(here, chunk[at + 1], weight)
                number += 1
            previous = chunk[-1]
    assert number == len(positions)


@dataclass(frozen=True)
class _Axis:
    """The map from an axis of the working grid to that of the volume: a matrix, or a cut where voxels are the same."""

    cut: slice
    matrix: Float32[Tensor, "voxel working"] | None

    @classmethod
    def of(cls, grid: WorkingGrid, axis: int, device: torch.device) -> "_Axis":
        side, first = grid.frame.shape[axis], grid.before[axis]
        if grid.frame.matrix[axis, axis] == 1:
            return cls(slice(first, first + grid.shape[axis]), None)
        matrix = resampling_matrix(grid.positions(axis), side, ratio=1, border=True)
        return cls(slice(0, side), torch.from_numpy(matrix).to(device))


class NativePlane:
    """Brings planes (k x y) of a working grid to the x and y of the volume.

    Args:
        grid: The working grid.
        device: Device of the planes.
    """

    def __init__(self, grid: WorkingGrid, device: torch.device) -> None:
        self.x, self.y = (_Axis.of(grid, axis, device) for axis in (0, 1))

    def __call__(self, plane: Float32[Tensor, "k x y"]) -> Float32[Tensor, "k x2 y2"]:
        """Return the plane on the volume's grid, interpolated linearly."""
        plane = plane[:, self.x.cut, self.y.cut]
        if self.y.matrix is not None:
            plane = torch.matmul(plane, self.y.matrix.mT)
        return plane if self.x.matrix is None else torch.matmul(self.x.matrix, plane)


def mean_plane(
    found: Sequence[Float32[Tensor, "k _ _"]], natives: Sequence[NativePlane], weights: Sequence[float]
) -> Float32[Tensor, "k x y"]:
    """Return the weighted mean of one slice as several networks see it, each on a working grid of its own."""
    (first, *others), (native, *other_natives), (weight, *other_weights) = found, natives, weights
    mean = native(first) * weight if others else native(first)
    for plane, to_native, share in zip(others, other_natives, other_weights, strict=True):
        mean.add_(to_native(plane), alpha=share)
    return mean


def most_probable(
    found: Sequence[Float32[Tensor, "k _ _"]], natives: Sequence[NativePlane], weights: Sequence[float]
) -> Int64[Tensor, "x y"]:
    """Return the most probable class of `mean_plane`, the first of those that tie.

    Classes that stay below 1 / k everywhere cannot be the most probable ones, for probabilities sum to one and
    interpolation gives no larger values. They are left out of the computation.
    """
    tops = [plane.amax((1, 2)) * weight for plane, weight in zip(found, weights, strict=True)]
    candidates = torch.stack(tops).sum(0).ge(SAFETY / len(found[0])).nonzero()[:, 0]
    if len(candidates) == len(found[0]):
        return mean_plane(found, natives, weights).max(0).indices
    return candidates[mean_plane([plane[candidates] for plane in found], natives, weights).max(0).indices]
