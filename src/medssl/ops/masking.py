"""Random masks over a token sequence and over the blocks of a volume."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medssl.checks import choice
from medssl.ops.patches import Triple

BLOCK_SHAPES = ("column", "cube")


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
