"""Attention among keypoints: packed tokens, their norm, a code of their places, one layer of message passing."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medssl.checks import choice

NORMS = ("batch", "layer")
SPAN = 0.7
"""Coordinates are divided by this share of the longest side."""


@dataclass(frozen=True)
class Packing:
    """Which of the padded rows (batch, length) are tokens.

    Args:
        rows: Their numbers in the flattened rows, in order.
        batch: Samples.
        length: Rows of each.
        keys: Which rows attention may look at; None where all are tokens. Where a sample has none, those who look at it
            get its padding, which keeps numbers finite: in cross-attention the tokens of the other view, from zeros.
    """

    rows: Int[Tensor, " token"]
    batch: int
    length: int
    keys: Bool[Tensor, "batch 1 1 length"] | None

    @classmethod
    def of(cls, valid: Bool[Tensor, "batch length"]) -> "Packing":
        """The packing whose tokens are where `valid` is set."""
        rows = valid.flatten().nonzero().squeeze(1)
        keys = None if len(rows) == valid.numel() else (valid | ~valid.any(1, keepdim=True))[:, None, None]
        batch, length = valid.shape
        return cls(rows, batch, length, keys)

    @property
    def sample(self) -> Int[Tensor, " token"]:
        """The sample of each token."""
        return self.rows // self.length

    def pack(self, padded: Float[Tensor, "batch length dim"]) -> Float[Tensor, "token dim"]:
        """The rows that are tokens."""
        flat = padded.flatten(0, 1)
        return flat if self.keys is None else flat[self.rows]

    def pad(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "batch length dim"]:
        """Tokens back in their rows, zeros in the others."""
        if self.keys is not None:
            tokens = tokens.new_zeros(self.batch * self.length, tokens.shape[1]).index_copy(0, self.rows, tokens)
        return tokens.unflatten(0, (self.batch, self.length))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over tokens; fewer than two, which have no variance, go by the running statistics and leave them."""

    def forward(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        """Zero mean and unit variance for each channel over all tokens, then scale and shift."""
        if len(tokens) > 1:
            return super().forward(tokens)
        return F.batch_norm(tokens, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class TokenLayerNorm(nn.Module):
    """Norm of each token over its channels: unbiased standard deviation, to which `eps` is added."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        """Zero mean and unit deviation for each token, then scale and shift."""
        centred = tokens - tokens.mean(1, keepdim=True)
        deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (tokens.shape[1] - 1) ** 0.5
        return self.weight * centred / (deviation + self.eps) + self.bias


def token_mlp(widths: Sequence[int], *, norm: str = "batch", momentum: float = 0.1) -> nn.Sequential:
    """Linear layers from the first width to the last, a norm and a rectifier after each but the last.

    The last layer's bias starts at 0.
    """
    layers: list[nn.Module] = []
    for before, width in pairwise(widths[:-1]):
        kind = TokenBatchNorm(width, momentum=momentum) if norm == "batch" else TokenLayerNorm(width)
        layers += [nn.Linear(before, width), kind, nn.ReLU()]
    last = nn.Linear(widths[-2], widths[-1])
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def normalised(
    voxel: Int[Tensor, "token axis"],
    size_voxel: Sequence[int],
    *,
    axis_swap: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "token axis"]:
    """Voxel numbers from the middle of the map, over 0.7 of its longest side.

    The middle is size / 2, half a voxel beyond that of the map. `axis_swap` takes the sizes of the axes in reverse
    order, as released; that differs where sides do.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/superglue.py.
    """
    sides = torch.tensor(size_voxel[::-1] if axis_swap else size_voxel, dtype=dtype, device=voxel.device)
    return (voxel - sides / 2) / (SPAN * max(size_voxel))


class PositionCode(nn.Module):
    """An MLP from normalised voxel numbers to a code that is added to the token; never in half precision.

    Args:
        spatial_dims: Axes.
        dim: Width of the code.
        widths: Widths of the hidden layers.
        norm: Norm of the hidden layers, `batch` or `layer`.
        axis_swap: See `normalised`.
    """

    def __init__(
        self, spatial_dims: int, dim: int, *, widths: Sequence[int], norm: str = "batch", axis_swap: bool = False
    ) -> None:
        super().__init__()
        self.axis_swap = axis_swap
        self.mlp = token_mlp((spatial_dims, *widths, dim), norm=norm)

    def forward(self, voxel: Int[Tensor, "token axis"], size_voxel: Sequence[int]) -> Float[Tensor, "token dim"]:
        """The code of each voxel in a map of this size."""
        dtype: torch.dtype = self.mlp[0].weight.dtype  # type: ignore[assignment]
        with torch.autocast(voxel.device.type, enabled=False):
            return self.mlp(normalised(voxel, size_voxel, axis_swap=self.axis_swap, dtype=dtype))


class MessageLayer(nn.Module):
    """What tokens gain from a source: attention, and an MLP over token and message.

    Channel d * heads + head of query, key, value and message belongs to `head`: the head runs fastest. The four
    projections start equal.

    Args:
        dim: Width of tokens and source.
        num_heads: Attention heads.
        norm: Norm of the MLP, `batch` or `layer`.
        bn_momentum: of its running statistics.

    Source: arXiv:2310.01680, arXiv:1911.11763 section 3.1.
    """

    def __init__(self, dim: int, *, num_heads: int, norm: str = "batch", bn_momentum: float = 0.1) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is no multiple of num_heads={num_heads}")
        choice("token_norm", norm, NORMS)
        self.num_heads = num_heads
        self.merge = nn.Linear(dim, dim)
        self.query, self.key, self.value = (copy.deepcopy(self.merge) for _ in range(3))
        self.mlp = token_mlp((2 * dim, 2 * dim, dim), norm=norm, momentum=bn_momentum)

    def forward(
        self, tokens: Float[Tensor, "token dim"], source: Float[Tensor, "other dim"], *, at: Packing, of: Packing
    ) -> Float[Tensor, "token dim"]:
        """The update of each token, from the tokens of the same sample in `source`, which `of` packs as `at` these."""
        query = self._heads(self.query(at.pad(tokens)))
        padded = of.pad(source)
        mixed = F.scaled_dot_product_attention(
            query, self._heads(self.key(padded)), self._heads(self.value(padded)), attn_mask=of.keys
        )  # (batch, head, length, channel)
        message = self.merge(at.pack(mixed.permute(0, 2, 3, 1).flatten(2)))
        return self.mlp(torch.cat([tokens, message], dim=1))

    def _heads(self, padded: Tensor) -> Tensor:
        # contiguous: compiled for a CPU, attention reads a strided last axis wrongly (torch 2.13)
        return padded.unflatten(2, (-1, self.num_heads)).permute(0, 3, 1, 2).contiguous()
