"""Sparse maps in two or three dimensions: zero except at a few points, and convolved without building the map."""

from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

SCATTERS = ("mean", "overwrite")


def voxel_number(
    voxel: Int[Tensor, "token axis"], sample: Int[Tensor, " token"], *, size_voxel: Sequence[int]
) -> Int[Tensor, " token"]:
    """Return the number of each token's voxel in the whole batch, the last axis fastest and the samples slowest."""
    number = sample
    for axis, side in enumerate(size_voxel):
        number = number * side + voxel[:, axis]
    return number


def voxel_share(
    number: Int[Tensor, " token"], *, num_voxels: int, scatter: str, dtype: torch.dtype
) -> Float[Tensor, " token"]:
    """Return the share of each token in its voxel, given by `voxel_number`; the shares of a voxel sum to 1.

    With `mean`, the tokens of one voxel share it equally. With `overwrite` the last of them has all of it and is the
    only one that gets a gradient.
    """
    if scatter == "mean":
        counts = torch.zeros(num_voxels, dtype=torch.int32, device=number.device)
        counts.index_add_(0, number, torch.ones_like(number, dtype=torch.int32))
        return counts[number].to(dtype).reciprocal()
    order = torch.arange(len(number), device=number.device)
    last = torch.full((num_voxels,), -1, device=number.device).scatter_reduce_(0, number, order, "amax")
    return (last[number] == order).to(dtype)


def place(
    values: Float[Tensor, "token dim"], number: Int[Tensor, " token"], *, batch: int, size_voxel: Sequence[int]
) -> Float[Tensor, "batch dim *spatial"]:
    """Return a map with the sum of the values of each voxel, given by `voxel_number`, and zero elsewhere."""
    num_voxels = batch * _count(size_voxel)
    rows = values.new_zeros(num_voxels, values.shape[1]).index_add(0, number, values)
    return rows.unflatten(0, (batch, *size_voxel)).movedim(-1, 1).contiguous()


def convolve_points(
    values: Float[Tensor, "token dim"],
    voxel: Int[Tensor, "token axis"],
    sample: Int[Tensor, " token"],
    *,
    weight: Float[Tensor, "width dim *kernel"],
    bias: Float[Tensor, " width"],
    batch: int,
    size_voxel: Sequence[int],
) -> Float[Tensor, "batch width *spatial"]:
    """Return the convolution (side 3, padding 1 with zeros) of the map of `place`, without building that map.

    Every value times every tap of the kernel is added to the voxel that the tap reaches, where that is inside the map.
    Memory holds the result and 3^axes products for each token.
    """
    width, dim, *kernel = weight.shape
    assert kernel == [3] * len(size_voxel), "kernels have a side of 3 along every axis"
    taps = torch.tensor(list(product((1, 0, -1), repeat=len(size_voxel))), device=voxel.device)  # from kernel 0, 1, 2
    products = values @ weight.flatten(2).permute(1, 2, 0).reshape(dim, -1)  # (token, tap * width)
    target = voxel[:, None] + taps  # (token, tap, axis)
    inside = ((target >= 0) & (target < torch.tensor(size_voxel, device=voxel.device))).all(-1).flatten()
    reached = inside.nonzero().squeeze(1)
    number = voxel_number(target.flatten(0, 1), sample.repeat_interleave(len(taps)), size_voxel=size_voxel)[reached]
    num_voxels = _count(size_voxel)
    rows = products.unflatten(1, (-1, width)).flatten(0, 1)[reached]  # (reached, width)
    first = number // num_voxels * (width * num_voxels) + number % num_voxels  # of channel 0 in (batch, width, voxel)
    entries = first[:, None] + num_voxels * torch.arange(width, device=number.device)
    empty = bias.to(rows.dtype).view(1, -1, 1).expand(batch, -1, num_voxels)
    flat = empty.clone(memory_format=torch.contiguous_format).flatten()
    return flat.index_add_(0, entries.flatten(), rows.flatten()).view(batch, width, *size_voxel)


def _count(size_voxel: Sequence[int]) -> int:
    return int(torch.Size(size_voxel).numel())
