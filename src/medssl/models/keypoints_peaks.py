"""Peaks of fields over several axes: local maxima, and the top of a parabola between the voxels."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from medssl.models.keypoints_filters import extreme_on_cross, extreme_within

MOST_MOVES = 5
"""Number of times that the next voxel is tried where a parabola's top lies nearer to it."""
OWN = 0.6
"""Distance in voxels along each axis up to which a top belongs to a voxel. It is more than a half, because otherwise a
top midway in place and scale moves back and forth: of 120 random Gaussian blobs 17 are missed with 0.5, 2 with 0.6."""
SLAB_VOXELS = 2**24
"""Voxels above which a volume is processed in slabs, to save memory."""


class Peaks(NamedTuple):
    """Tops of parabolas.

    Args:
        place: Sample, then the voxel along each axis of the field.
        offset: Offset from the voxel to the top, at most `OWN` voxels along each axis where it is kept.
        value: Value at the top.
        hessian: Second derivatives at the voxel, per voxel squared.
    """

    place: Int64[Tensor, "k index"]
    offset: Float32[Tensor, "k axis"]
    value: Float32[Tensor, " k"]
    hessian: Float32[Tensor, "k axis axis"]


def local_maxima(
    field: Float32[Tensor, " b *axes"], *, reach: int, above: float, minima: bool = False, cross: bool = False
) -> Int64[Tensor, "k index"]:
    """Return sample and voxel of values `above` a bound that no neighbour up to `reach` voxels along each axis exceeds.

    Of equal neighbours the first one counts. Voxels that lack a neighbour do not count. With `minima` the maxima of
    the negated field are returned as well. With `cross` only neighbours count that differ along the first axis and at
    most one other.
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
    """Return the steps from the middle of a cube of `2 * reach + 1` voxels along each axis to all voxels, in order."""
    return list(product(range(-reach, reach + 1), repeat=dims))


def neighbours(field: Float32[Tensor, " b *axes"], place: Int64[Tensor, "k index"], *, reach: int) -> Tensor:
    """Return the cubes (k, side, ..., side) of `2 * reach + 1` values along each axis around the places."""
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
    """Return the tops of parabolas through places and their neighbours; places without a top within reach are dropped.

    Where a top does not belong to its voxel, the next voxel in its direction is tried, at most five times.

    Args:
        field: Values of the field.
        place: Sample and voxel of each place.
        lower: First voxel along each axis that a top may lie next to; it needs a neighbour before it.
        upper: Last voxel along each axis that a top may lie next to.

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
    """Return the places as they are, with their own values; the arguments are those of `refine`."""
    place = within(place, lower=lower, upper=upper)
    hessian = derivatives(neighbours(field, place, reach=1))[1]
    return Peaks(place, torch.zeros_like(hessian[:, 0]), field[tuple(place.unbind(1))], hessian)


def within(
    place: Int64[Tensor, "k index"], *, lower: Sequence[int], upper: Sequence[int]
) -> Int64[Tensor, "kept index"]:
    """Return the places whose voxels lie from `lower` to `upper` along each axis, each once."""
    low, high = place.new_tensor(lower), place.new_tensor(upper)
    return place[((place[:, 1:] >= low) & (place[:, 1:] <= high)).all(1)].unique(dim=0)


def _fitted(field: Float32[Tensor, " b *axes"], place: Int64[Tensor, "k index"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offset to the top of the parabola through each place, the value there, and its second derivatives."""
    patch = neighbours(field, place, reach=1)
    gradient, hessian = derivatives(patch)
    offset = -torch.linalg.solve_ex(hessian, gradient[..., None]).result[..., 0]
    middle = patch.flatten(1)[:, 3 ** (field.ndim - 1) // 2]
    return offset, middle + 0.5 * (gradient * offset).sum(1), hessian


def derivatives(
    patch: Float32[Tensor, " k *threes"],
) -> tuple[Float32[Tensor, "k axis"], Float32[Tensor, "k axis axis"]]:
    """Return first and second central differences in the middle of cubes of three values along each axis."""
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
    """Return whether all curvatures have one sign and the largest is less than `edge_ratio` times the smallest.

    Source: Lowe, Distinctive image features from scale-invariant keypoints, IJCV 2004, section 4.1, for any dimension.
    """
    curvature = torch.linalg.eigvalsh(hessian)  # ascending
    one_sign = curvature[:, 0] * curvature[:, -1] > 0
    size = curvature.abs()
    return one_sign & (size.amin(1) * edge_ratio > size.amax(1))


class Slab(NamedTuple):
    """A part of an octave along its first axis.

    Args:
        read: Part of that axis to read; it ends `halo` voxels beyond the slab's own voxels, or with the image.
        first: First of the slab's own voxels, numbered in the whole image.
        last: Number after the last of its own voxels.
        sides: Sides of the whole image.
    """

    read: slice
    first: int
    last: int
    sides: tuple[int, ...]

    @property
    def own(self) -> slice:
        """The slab's own voxels, numbered in what it reads."""
        return slice(self.first - self.read.start, self.last - self.read.start)

    def owns(self, voxel: Int64[Tensor, " k"]) -> Bool[Tensor, " k"]:
        """Return whether voxels are the slab's own."""
        return (voxel >= self.own.start) & (voxel < self.own.stop)

    def lower(self, border: int) -> list[int]:
        """Return the first voxels of the slab that lie inside the image's border and have a neighbour before them."""
        return [max(1, border - self.read.start), *[border] * (len(self.sides) - 1)]

    def upper(self, border: int) -> list[int]:
        """Return the last voxels of the slab that lie inside the image's border and have a neighbour after them."""
        length = self.read.stop - self.read.start
        inside = [side - 1 - border for side in self.sides]
        return [min(length - 2, inside[0] - self.read.start), *inside[1:]]

    def in_whole(self, position: Float32[Tensor, "k axis"]) -> Float32[Tensor, "k axis"]:
        """Return positions in the image for positions in the slab."""
        shift = torch.zeros_like(position[:1])
        shift[:, 0] = self.read.start
        return position + shift


def slabs(shape: Sequence[int], *, halo: int) -> Iterator[Slab]:
    """Yield slabs of a batch (b, x, ...) that own each voxel once and begin at even ones; a small batch is one slab."""
    length, sides = shape[1], tuple(shape[1:])
    plane = math.prod(shape) // length
    thick = max(2 * halo, SLAB_VOXELS // plane) // 2 * 2
    for first in range(0, length, thick):
        last = min(first + thick, length)
        yield Slab(slice(max(0, first - halo), min(length, last + halo)), first, last, sides)
