"""Random subsets of a token sequence."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TokenMask(NamedTuple):
    """Which tokens of a sequence stay visible.

    `keep` holds the indices of the visible tokens, `masked` is true where a token was removed, `restore` undoes the
    shuffle (visible tokens first, then the removed ones).
    """

    keep: Int[Tensor, "batch kept"]
    masked: Bool[Tensor, "batch token"]
    restore: Int[Tensor, "batch token"]


def num_kept(num_tokens: int, ratio: float) -> int:
    """How many of `num_tokens` stay visible: at least one, and not all unless `ratio` is 0.

    Raises:
        ValueError: the ratio leaves nothing to see or nothing to predict.
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
