"""Random masks over a token sequence and over the blocks of a volume, and images without what a mask hides."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medssl.checks import choice, is_number
from medssl.ops.patches import Triple

BLOCK_SHAPES = ("column", "cube")
FILLS = ("zero", "mean")


class TokenMask(NamedTuple):
    """The tokens of a sequence that stay visible, and those that are removed.

    `keep` holds the indices of the visible tokens. `masked` is true where a token was removed. `restore` undoes the
    shuffle (visible tokens first, then the removed ones).
    """

    keep: Int[Tensor, "batch kept"]
    masked: Bool[Tensor, "batch token"]
    restore: Int[Tensor, "batch token"]


def num_kept(num_tokens: int, ratio: float) -> int:
    """Return how many of `num_tokens` stay visible: at least one, and not all unless `ratio` is 0.

    Raises:
        ValueError: The ratio leaves nothing to see or nothing to predict.
    """
    kept = int(num_tokens * (1 - ratio))
    if not 0 <= ratio < 1 or kept < 1 or (ratio > 0 and kept > num_tokens - 1):
        raise ValueError(
            f"a mask ratio of {ratio} keeps {kept} of {num_tokens} tokens; choose one in [0, 1) that keeps at "
            "least one token and, above 0, masks at least one"
        )
    return kept


def random_mask(noise: Float[Tensor, "batch token"], *, ratio: float) -> TokenMask:
    """Keep, per sample, the `int(tokens * (1 - ratio))` tokens with the smallest noise.

    The caller draws `noise` (uniform in [0, 1)). Ties go to the earlier token.

    Source: arXiv:2111.06377.
    """
    kept = num_kept(noise.shape[1], ratio)
    shuffle = noise.argsort(dim=1, stable=True)
    keep = shuffle[:, :kept]
    masked = torch.ones_like(noise, dtype=torch.bool).scatter(1, keep, False)
    return TokenMask(keep, masked, shuffle.argsort(dim=1))


def num_blocks(grid: Triple, *, shape: str) -> int:
    """Return how many blocks a mask over `grid` is drawn from: the cells (`cube`), or the rows along z (`column`).

    Raises:
        ValueError: The shape is not known.
    """
    choice("the shape of a mask", shape, BLOCK_SHAPES)
    return grid[0] * grid[1] * (grid[2] if shape == "cube" else 1)


def block_mask(
    noise: Float[Tensor, "batch block"], *, grid: Triple, ratio: float, shape: str = "column"
) -> Bool[Tensor, "batch 1 i j k"]:
    """Return true where a cell of `grid` is masked: the blocks with the largest noise, rounded up in number.

    The caller draws `noise` for the `num_blocks` of this shape. A masked column covers all cells along z.

    Source: repository alibaba-damo-academy/alice, utils.py (columns).
    """
    expected = num_blocks(grid, shape=shape)
    if noise.shape[1] != expected:
        raise ValueError(f"a {shape} mask over {grid} has {expected} blocks, the noise is for {noise.shape[1]}")
    masked = random_mask(noise, ratio=ratio).masked
    cells = masked.unflatten(1, grid) if shape == "cube" else masked.unflatten(1, (*grid[:2], 1))
    return cells[:, None].expand(-1, -1, -1, -1, grid[2])


def ratio_range(name: str, ratio: float | Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest mask ratio of a setting: one number, or two.

    Raises:
        ValueError: `ratio` is neither a number in (0, 1) nor two such numbers in rising order.
    """
    ends = list(ratio) if isinstance(ratio, Sequence) else [ratio, ratio]
    if len(ends) != 2 or not all(is_number(end) and 0 < end < 1 for end in ends) or ends[0] > ends[1]:
        raise ValueError(f"{name}={ratio} must lie between 0 and 1: a number, or [low, high] to draw one for each step")
    return ends[0], ends[1]


def drawn_ratio(ends: tuple[float, float], generator: torch.Generator) -> float:
    """Return a ratio drawn evenly between both ends on the CPU; nothing is drawn where they are equal."""
    low, high = ends
    return low if low == high else low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def voxel_mask(cells: Bool[Tensor, "batch 1 i j k"], size_voxel: Sequence[int]) -> Bool[Tensor, "batch 1 x y z"]:
    """Return the mask of the voxels of an image: each cell is repeated along every axis.

    Raises:
        ValueError: A side of the image is no multiple of the number of cells.
    """
    grid = cells.shape[2:]
    if any(side % number for side, number in zip(size_voxel, grid, strict=True)):
        raise ValueError(f"an image of {tuple(size_voxel)} voxels does not consist of {tuple(grid)} equal cells")
    for axis, (side, number) in enumerate(zip(size_voxel, grid, strict=True), start=2):
        cells = cells.repeat_interleave(side // number, dim=axis)
    return cells


def without_hidden(
    image: Float[Tensor, "batch channel x y z"], hidden: Bool[Tensor, "batch 1 x y z"], *, fill: str = "zero"
) -> Float[Tensor, "batch channel x y z"]:
    """Return the image with its hidden voxels set to 0 or, for `fill="mean"`, to the mean of the visible ones.

    The mean is that of each sample and channel. The hidden voxels do not enter it.

    Raises:
        ValueError: The fill is not known.
    """
    if choice("fill", fill, FILLS) == "zero":
        return image.masked_fill(hidden, 0.0)
    exact = torch.promote_types(image.dtype, torch.float32)  # half precision is too coarse for sums over a crop
    total = image.masked_fill(hidden, 0.0).sum((2, 3, 4), keepdim=True, dtype=exact)
    mean = total / (~hidden).sum((2, 3, 4), keepdim=True).clamp(min=1)
    return torch.where(hidden, mean.to(image.dtype), image)
