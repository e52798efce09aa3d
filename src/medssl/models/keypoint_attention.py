"""Attention among keypoints: packed tokens, their norm, a code of their places, and a layer of message passing."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medssl.checks import choice

NORMS = ("batch", "layer")
SPAN = 0.7
"""Share of the longest side by which coordinates are divided."""


@dataclass(frozen=True)
class Packing:
    """The padded rows (batch, length) that are tokens.

    Args:
        rows: Numbers of the tokens in the flattened rows, in order.
        batch: Number of samples.
        length: Number of rows of each sample.
        keys: Which rows attention may look at; None where all are tokens. Where a sample has no tokens, its padding is
            the key, which keeps numbers finite: in cross-attention the other view then attends to zeros.
    """

    rows: Int[Tensor, " token"]
    batch: int
    length: int
    keys: Bool[Tensor, "batch 1 1 length"] | None

    @classmethod
    def of(cls, valid: Bool[Tensor, "batch length"]) -> "Packing":
        """Return the packing whose tokens are where `valid` is set."""
        rows = valid.flatten().nonzero().squeeze(1)
        keys = None if len(rows) == valid.numel() else (valid | ~valid.any(1, keepdim=True))[:, None, None]
        batch, length = valid.shape
        return cls(rows, batch, length, keys)

    @property
    def sample(self) -> Int[Tensor, " token"]:
        """The sample of each token."""
        return self.rows // self.length

    def pack(self, padded: Float[Tensor, "batch length dim"]) -> Float[Tensor, "token dim"]:
        """Return the rows that are tokens."""
        flat = padded.flatten(0, 1)
        return flat if self.keys is None else flat[self.rows]

    def pad(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "batch length dim"]:
        """Return the padded rows: tokens in their rows, zeros in the others."""
        if self.keys is not None:
            tokens = tokens.new_zeros(self.batch * self.length, tokens.shape[1]).index_copy(0, self.rows, tokens)
        return tokens.unflatten(0, (self.batch, self.length))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over tokens; fewer than two, which have no variance, use the running statistics unchanged."""

    def forward(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        """Normalise each channel over all tokens to mean 0 and variance 1, then scale and shift it."""
        if len(tokens) > 1:
            return super().forward(tokens)
        return F.batch_norm(tokens, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class TokenLayerNorm(nn.Module):
    """Norm of each token over its channels: unbiased standard deviation, to which `eps` is added."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, tokens: Float[Tensor, "token dim"]) -> Float[Tensor, "token dim"]:
        """Normalise each token to mean 0 and deviation 1, then scale and shift it."""
        centred = tokens - tokens.mean(1, keepdim=True)
        deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (tokens.shape[1] - 1) ** 0.5
        return self.weight * centred / (deviation + self.eps) + self.bias


def token_mlp(widths: Sequence[int], *, norm: str = "batch", momentum: float = 0.1) -> nn.Sequential:
    """Build linear layers from the first width to the last, with a norm and a rectifier after each but the last.

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
    """Return voxel numbers relative to the middle of the map, divided by 0.7 of its longest side.

    The middle is size / 2, half a voxel beyond that of the map. `axis_swap` takes the sizes of the axes in reverse
    order, as released; that matters where sides differ.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/superglue.py.
    """
    sides = torch.tensor(size_voxel[::-1] if axis_swap else size_voxel, dtype=dtype, device=voxel.device)
    return (voxel - sides / 2) / (SPAN * max(size_voxel))


class PositionCode(nn.Module):
    """An MLP from normalised voxel numbers to a code that is added to the token; never in half precision.

    Args:
        spatial_dims: Number of spatial axes.
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
        """Return the code of each voxel in a map of this size."""
        dtype: torch.dtype = self.mlp[0].weight.dtype  # type: ignore[assignment]
        with torch.autocast(voxel.device.type, enabled=False):
            return self.mlp(normalised(voxel, size_voxel, axis_swap=self.axis_swap, dtype=dtype))


def fit_code(tensors: Mapping[str, Tensor], name: str, spatial_dims: int) -> dict[str, Tensor]:
    """Return the weights, with a weight of zero for the third axis where the `PositionCode` `name` is of slices."""
    key, fitted = f"{name}.mlp.0.weight", dict(tensors)
    if key in fitted and fitted[key].shape[1] == 2 and spatial_dims == 3:
        fitted[key] = F.pad(fitted[key], (0, 1))
    return fitted


class MessageLayer(nn.Module):
    """Layer of message passing from a source to tokens: attention, and an MLP over token and message.

    Channel d * heads + head of query, key, value and message belongs to `head`: the head runs fastest. The four
    projections start equal.

    Args:
        dim: Width of tokens and source.
        num_heads: Number of attention heads.
        norm: Norm of the MLP, `batch` or `layer`.
        bn_momentum: Momentum of the running statistics of that norm.

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
        """Return the update of each token from the tokens of the same sample in `source`.

        `at` is the packing of `tokens`, `of` that of `source`.
        """
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
