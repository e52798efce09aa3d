"""Interpolation at the places of an oblique or bent view, by slabs that fit into a CPU's cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int32, Integer, Shaped
from torch import Tensor

from medssl.data.geometry import Frame

CACHED_VOXELS = 65_536
ROUNDING_VOXEL = 1e-3
"""Bound on the rounding error of places in single precision."""


@dataclass(frozen=True)
class Places:
    """Where the voxels of a view lie in a box.

    Args:
        frame: Map from view voxels to voxels of the box.
        field: Displacement of every view voxel, in view voxels.
        bound_voxel: Largest absolute component that the field can have, in view voxels.
    """

    frame: Frame
    field: Float32[Tensor, "3 x y z"] | None = None
    bound_voxel: float = 0.0

    def lie_within(self, lowest: float, highest: np.ndarray) -> bool:
        """Return whether no place is below `lowest` or above `highest` (3), rounding included."""
        low, high = self.frame.bounds(self.bound_voxel)
        return bool(np.all(low >= lowest + ROUNDING_VOXEL) and np.all(high <= highest - ROUNDING_VOXEL))

    def slabs(
        self, device: torch.device, *, padded: Sequence[int] | None
    ) -> Iterator[tuple[slice, Float32[Tensor, "3 slab y z"]]]:
        """Yield slices of the view's first axis and the places of their voxels; a GPU gets all of them at once.

        `padded` gives the sides of the box before one more voxel was added below and above. The places then count in
        the padded box, and those further out are moved onto the added voxels.
        """
        x, y, z = self.frame.shape
        columns, origin = torch.from_numpy(self.frame.linear.copy()), torch.from_numpy(self.frame.matrix[:3, 3].copy())
        along_x, along_y, along_z = (
            columns[:, axis, None] * torch.arange(side, dtype=torch.float64)
            for axis, side in enumerate(self.frame.shape)
        )  # (3, side)
        origin = origin if padded is None else origin + 1
        planes = (along_x[:, :, None] + along_y[:, None] + origin[:, None, None]).float().to(device)
        rows = along_z.float().to(device)[:, None, None]
        step = max(1, CACHED_VOXELS // (y * z)) if device.type == "cpu" else x
        for start in range(0, x, step):
            part = slice(start, min(start + step, x))
            places = planes[:, part, :, None] + rows
            if self.field is not None:
                places += torch.einsum("kd,dxyz->kxyz", columns.float().to(device), self.field[:, part])
            for axis, side in enumerate(padded or ()):
                places[axis].clamp_(0, side + 1)
            yield part, places


def linear_at(
    values: Float32[Tensor, "channel bx by bz"],
    places: Places,
    *,
    fill: Float32[Tensor, "channel 1 1 1"] | None,
    out: Float32[Tensor, "channel x y z"],
) -> None:
    """Interpolate trilinearly into `out`; beyond the box lies `fill`, or the nearest voxel where it is None."""
    padded = None
    if not places.lie_within(0, np.array(values.shape[1:]) - 1):
        padded = values.shape[1:]
        values = F.pad(values[None], (1, 2) * 3, mode="replicate")[0] if fill is None else _framed(values, fill, 2)
    _, _, sy, sz = values.shape
    corners = [a * sy * sz + b * sz + c for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    for part, at in places.slabs(values.device, padded=padded):
        lower = at.floor()
        number = _flat_index(lower, (sy, sz))
        x, y, z = at.sub_(lower).flatten(1)
        for channel, drawn in zip(values.flatten(1), out[:, part], strict=True):
            v = [channel[first:].index_select(0, number) for first in corners]
            for near in (0, 2, 4, 6):
                v[near].lerp_(v[near + 1], z)
            v[0].lerp_(v[2], y)
            v[4].lerp_(v[6], y)
            drawn.copy_(v[0].lerp_(v[4], x).view(drawn.shape))


def nearest_at(voxels: Integer[Tensor, "one bx by bz"], places: Places, *, out: Integer[Tensor, "one x y z"]) -> None:
    """Pick the nearest voxels into `out`; beyond the box lies 0."""
    padded = None
    if not places.lie_within(-0.5, np.array(voxels.shape[1:]) - 0.5):
        padded = voxels.shape[1:]
        voxels = _framed(voxels, 0, 1)
    flat = voxels.flatten()
    for part, at in places.slabs(voxels.device, padded=padded):
        number = _flat_index(at.round_(), voxels.shape[2:])
        out[:, part] = flat.index_select(0, number).view(1, *at.shape[1:])


def _framed(voxels: Shaped[Tensor, "channel bx by bz"], fill: Tensor | int, above: int) -> Tensor:
    """Return the box in a frame of `fill`, one voxel wide below and `above` wide above."""
    channels, x, y, z = voxels.shape
    framed = voxels.new_empty(channels, x + 1 + above, y + 1 + above, z + 1 + above)
    framed[:] = fill
    framed[:, 1 : x + 1, 1 : y + 1, 1 : z + 1] = voxels
    return framed


def _flat_index(index: Float32[Tensor, "3 slab y z"], last_sides: Sequence[int]) -> Int32[Tensor, " voxel"]:
    """Return the numbers of voxels in a flattened box that has the given last two sides."""
    x, y, z = index.to(torch.int32)
    return x.mul_(last_sides[0]).add_(y).mul_(last_sides[1]).add_(z).flatten()
