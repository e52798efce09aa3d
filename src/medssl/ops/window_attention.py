"""Attention inside windows with a learnt bias, by PyTorch's fused kernel and, on the CPU, a chunked backward pass."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BLOCKED = -1000.0
"""Added to the scores of blocked pairs. Published code adds -100, whose exponential is a denormal number and slow."""
CHUNK = 1 << 18
"""Scores that are held at once in the backward pass on the CPU, chosen to fit its caches."""


class WindowMask(NamedTuple):
    """The patterns of blocked pairs that occur, and the number of the pattern of each window."""

    patterns: Bool[Tensor, "pattern token token"]
    number: Int64[Tensor, " window"]


def window_attention(
    query: Float[Tensor, "batch window head token channel"],
    key: Float[Tensor, "batch window head token channel"],
    value: Float[Tensor, "batch window head token channel"],
    bias: Float[Tensor, "head token token"],
    mask: WindowMask | None = None,
) -> Float[Tensor, "batch window head token channel"]:
    """Return softmax attention inside each window: scores over the root of the channels, plus `bias` and `mask`.

    PyTorch's fused kernel is used where it can be. On the CPU it gives no gradient of the bias: there the forward pass
    is fused, and the backward pass recomputes the scores in chunks that fit the caches.
    """
    query, bias = (
        query.to(value.dtype),
        bias.to(value.dtype),
    )  # under autocast norms and tables stay in single precision
    learns = torch.is_grad_enabled() and any(entry.requires_grad for entry in (query, key, value, bias))
    if query.device.type == "cpu" and learns:
        return _Recomputed.apply(query, key, value, bias, mask)  # type: ignore[no-untyped-call]
    return _fused(query, key, value, bias, mask)


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: WindowMask | None) -> Tensor:
    bias = bias if torch.is_grad_enabled() else bias.detach()  # a bias that needs gradients is never fused on the CPU
    if mask is None:
        q, k, v = (entry.flatten(0, 1) for entry in (query, key, value))
        added = bias[None]
    else:
        q, k, v = (entry.flatten(1, 2) for entry in (query, key, value))
        added = (bias + BLOCKED * mask.patterns[:, None])[mask.number].flatten(0, 1)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added.to(query.dtype)).reshape(query.shape)


class _Recomputed(torch.autograd.Function):
    """`_fused` with gradients for all inputs that are computed chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: WindowMask | None) -> Tensor:
        mixed = _fused(query, key, value, bias, mask)
        ctx.save_for_backward(query, key, value, bias, mixed)
        ctx.mask = mask
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, bias, mixed = ctx.saved_tensors
        (gradient,) = gradients
        scale = query.shape[-1] ** -0.5
        entries = (query * scale, key, value, gradient, (gradient * mixed).sum(-1, keepdim=True))
        moved = [torch.empty_like(query) for _ in range(3)]
        bias_gradient = torch.zeros_like(bias)
        for chosen, added in _alike(bias, ctx.mask):
            rows = [entry[:, chosen].flatten(0, 1) for entry in entries]  # (window, head, token, channel)
            results = [torch.empty_like(rows[0]) for _ in range(3)]
            for part, heads in _chunks(*rows[0].shape[:3]):
                q, k, v, g, inner = (row[part, heads] for row in rows)
                share = (q @ k.mT).add_(added[heads]).softmax(-1)
                score_gradient = (g @ v.mT).sub_(inner).mul_(share)
                bias_gradient[heads] += score_gradient.sum(0)
                results[0][part, heads] = score_gradient @ k
                results[1][part, heads] = score_gradient.mT @ q
                results[2][part, heads] = share.mT @ g
            for whole, result in zip(moved, results, strict=True):
                whole[:, chosen] = result.unflatten(0, (len(query), -1))
        return moved[0].mul_(scale), moved[1], moved[2], bias_gradient, None


def _alike(bias: Tensor, mask: WindowMask | None) -> Iterator[tuple[Any, Tensor]]:
    """Yield windows that share what is added to their scores, with that addend."""
    if mask is None:
        yield slice(None), bias
        return
    for number, pattern in enumerate(mask.patterns):
        yield (mask.number == number).nonzero()[:, 0], bias + BLOCKED * pattern


def _chunks(num_windows: int, num_heads: int, num_tokens: int) -> Iterator[tuple[slice, slice]]:
    heads = max(1, min(num_heads, CHUNK // num_tokens**2))
    windows = max(1, CHUNK // (heads * num_tokens**2))
    for first in range(0, num_windows, windows):
        for head in range(0, num_heads, heads):
            yield slice(first, first + windows), slice(head, head + heads)
