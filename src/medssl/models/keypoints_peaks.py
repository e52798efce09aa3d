"""Local maxima of fields over several axes, and where between the voxels a parabola through them has its top."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from medssl.models.keypoints_filters import extreme_on_cross, extreme_within

MOST_MOVES = 5
"""A parabola's top may lie nearer to another voxel; so many times that voxel is tried."""
OWN = 0.6
"""Voxels along each axis up to which a top belongs to a voxel. More than half, for else a top that is midway in place
and scale is tossed to and fro: of 120 Gaussian blobs at random 17 are missed with 0.5, 2 with 0.6."""
SLAB_VOXELS = 2**24
"""Larger volumes are worked on in slabs, for less memory."""


class Peaks(NamedTuple):
    """Tops of parabolas.

    Args:
        place: Sample, then the voxel along each axis of the field.
        offset: from the voxel to the top, at most `OWN` voxels along each axis where it is kept.
        value: at the top.
        hessian: Second derivatives at the voxel, per voxel squared.
    """

    place: Int64[Tensor, "k index"]
    offset: Float32[Tensor, "k axis"]
    value: Float32[Tensor, " k"]
    hessian: Float32[Tensor, "k axis axis"]


def local_maxima(
    field: Float32[Tensor, " b *axes"], *, reach: int, above: float, minima: bool = False, cross: bool = False
) -> Int64[Tensor, "k index"]:
    """Sample and voxel of values `above` a bound that no neighbour up to `reach` voxels along each axis exceeds.

    Of equal neighbours the first one counts. Voxels without all neighbours do not. With `minima` also the maxima of the
    negated field. With `cross` only neighbours count that differ along the first axis and one other at most.
    """
    if min(field.shape[1:]) <= 2 * reach:
        return torch.empty(0, field.ndim, dtype=torch.int64, device=field.device)
    inner = field[(slice(None), *(slice(reach, side - reach) for side in field.shape[1:]))]
    extreme_of = extreme_on_cross if cross else extreme_within
    is_peak = (inner >= extreme_of(field, reach, torch.maximum)) & (inner > above)
    if minima:
        is_peak |= (inner <= extreme_of(field, reach, torch.minimum)) & (inner < -above)
    place = is_peak.nonzero()
    place[:, 1:] += reach
    patch = neighbours(field, place, reach=reach).flatten(1)
    middle = patch.shape[1] // 2
    value, earlier = patch[:, middle, None], torch.arange(middle, device=field.device)
    if cross:
        earlier = earlier[[sum(map(bool, step[1:])) <= 1 for step in steps(field.ndim - 1, reach)[:middle]]]
    return place[(patch[:, earlier] * value.sign() < value.abs()).all(1)]


def steps(dims: int, reach: int) -> list[tuple[int, ...]]:
    """Those from the middle of a cube of `2 * reach + 1` voxels along each axis to all of its voxels, in order."""
    return list(product(range(-reach, reach + 1), repeat=dims))


def neighbours(field: Float32[Tensor, " b *axes"], place: Int64[Tensor, "k index"], *, reach: int) -> Tensor:
    """The cubes (k, side, ..., side) of `2 * reach + 1` values along each axis about places."""
    field = field.contiguous()
    strides = torch.tensor(field.stride(), device=field.device)
    shifts = torch.tensor(steps(field.ndim - 1, reach), device=field.device)
    flat = (place * strides).sum(1, keepdim=True) + (shifts * strides[1:]).sum(1)
    return field.flatten()[flat].unflatten(1, (2 * reach + 1,) * (field.ndim - 1))


def refine(
    field: Float32[Tensor, " b *axes"],
    place: Int64[Tensor, "k index"],
    *,
    lower: Sequence[int],
    upper: Sequence[int],
) -> Peaks:
    """The tops of parabolas through places and their neighbours; a place that has none within reach is dropped.

    Where a top is not a voxel's own, the next voxel in its direction is tried, at most five times.

    Args:
        field: Values.
        place: Sample and voxel.
        lower: First voxel along each axis that a top may lie next to; it needs a neighbour before it.
        upper: Last such voxel.

    Source: Brown and Lowe, Invariant features from interest point groups, BMVC 2002.
    """
    settled, place = [], within(place, lower=lower, upper=upper)
    for _ in range(1 + MOST_MOVES):
        offset = _fitted(field, place)[0]
        known = offset.isfinite().all(1)
        place, offset = place[known], offset[known]
        move = torch.where(offset.abs() > OWN, offset.sign(), 0.0).long()
        rests = (move == 0).all(1)
        settled.append(place[rests])
        place = within(torch.cat([place[:, :1], place[:, 1:] + move], dim=1)[~rests], lower=lower, upper=upper)
    place = torch.cat(settled).unique(dim=0)
    return Peaks(place, *_fitted(field, place))


def unrefined(
    field: Float32[Tensor, " b *axes"],
    place: Int64[Tensor, "k index"],
    *,
    lower: Sequence[int],
    upper: Sequence[int],
) -> Peaks:
    """The places as they are, with their own values; arguments as of `refine`."""
    place = within(place, lower=lower, upper=upper)
    hessian = derivatives(neighbours(field, place, reach=1))[1]
    return Peaks(place, torch.zeros_like(hessian[:, 0]), field[tuple(place.unbind(1))], hessian)


def within(
    place: Int64[Tensor, "k index"], *, lower: Sequence[int], upper: Sequence[int]
) -> Int64[Tensor, "kept index"]:
    """Places whose voxels lie from `lower` to `upper` along each axis, each once."""
    low, high = place.new_tensor(lower), place.new_tensor(upper)
    return place[((place[:, 1:] >= low) & (place[:, 1:] <= high)).all(1)].unique(dim=0)


def _fitted(field: Float32[Tensor, " b *axes"], place: Int64[Tensor, "k index"]) -> tuple[Tensor, Tensor, Tensor]:
    """Offset to the top of the parabola through each place, its value there, and its second derivatives."""
    patch = neighbours(field, place, reach=1)
    gradient, hessian = derivatives(patch)
    offset = -torch.linalg.solve_ex(hessian, gradient[..., None]).result[..., 0]
    middle = patch.flatten(1)[:, 3 ** (field.ndim - 1) // 2]
    return offset, middle + 0.5 * (gradient * offset).sum(1), hessian


def derivatives(
    patch: Float32[Tensor, " k *threes"],
) -> tuple[Float32[Tensor, "k axis"], Float32[Tensor, "k axis axis"]]:
    """First and second central differences in the middle of cubes of three values along each axis."""
    dims = patch.ndim - 1

    def at(*moves: tuple[int, int]) -> Tensor:
        place = dict(moves)
        found = patch
        for axis in range(dims):  # one axis after the other is taken away
            found = found.select(1, 1 + place.get(axis, 0))
        return found

    gradient, hessian = patch.new_empty(len(patch), dims), patch.new_empty(len(patch), dims, dims)
    for axis in range(dims):
        before, after = at((axis, -1)), at((axis, 1))
        gradient[:, axis] = (after - before) / 2
        hessian[:, axis, axis] = after - 2 * at() + before
    for a, b in combinations(range(dims), 2):
        mixed = at((a, 1), (b, 1)) - at((a, 1), (b, -1)) - at((a, -1), (b, 1)) + at((a, -1), (b, -1))
        hessian[:, a, b] = hessian[:, b, a] = mixed / 4
    return gradient, hessian


def is_blob(hessian: Float32[Tensor, "k axis axis"], *, edge_ratio: float) -> Bool[Tensor, " k"]:
    """Whether the curvature has one sign along all directions and is nowhere `edge_ratio` times that elsewhere.

    Source: Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004, section 4.1, for any dimension.
    """
    curvature = torch.linalg.eigvalsh(hessian)  # ascending
    one_sign = curvature[:, 0] * curvature[:, -1] > 0
    size = curvature.abs()
    return one_sign & (size.amin(1) * edge_ratio > size.amax(1))


class Slab(NamedTuple):
    """A part of an octave along its first axis.

    Args:
        read: What to read of that axis; it ends `halo` voxels beyond what the slab answers for, or with the image.
        first: Voxel of the whole image.
        last: One past the last.
        sides: Sides of the whole image.
    """

    read: slice
    first: int
    last: int
    sides: tuple[int, ...]

    @property
    def own(self) -> slice:
        """Voxels of the slab that it answers for."""
        return slice(self.first - self.read.start, self.last - self.read.start)

    def owns(self, voxel: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        """Whether it answers for its voxels."""
        return (voxel >= self.own.start) & (voxel < self.own.stop)

    def lower(self, border: int) -> list[int]:
        """First voxels of the slab that lie inside the border of the image and have a neighbour before them."""
        return [max(1, border - self.read.start), *[border] * (len(self.sides) - 1)]

    def upper(self, border: int) -> list[int]:
        """Last voxels likewise."""
        length = self.read.stop - self.read.start
        inside = [side - 1 - border for side in self.sides]
        return [min(length - 2, inside[0] - self.read.start), *inside[1:]]

    def in_whole(self, position: Float32[Tensor, "k axis"]) -> Float32[Tensor, "k axis"]:
        """Positions in the slab as positions in the image."""
        shift = torch.zeros_like(position[:1])
        shift[:, 0] = self.read.start
        return position + shift


def slabs(shape: Sequence[int], *, halo: int) -> Iterator[Slab]:
    """Slabs of a batch (b, x, ...), which answer for each voxel once and begin at even ones; small ones are whole."""
    length, sides = shape[1], tuple(shape[1:])
    plane = math.prod(shape) // length
    thick = max(2 * halo, SLAB_VOXELS // plane) // 2 * 2
    for first in range(0, length, thick):
        last = min(first + thick, length)
        yield Slab(slice(max(0, first - halo), min(length, last + halo)), first, last, sides)
