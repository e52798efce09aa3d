"""The blocks of nnFormer: attention inside windows of a volume, over tokens (batch, i, j, k, width)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.transformer_blocks import Mlp, drop_path
from medssl.ops.patches import Triple
from medssl.ops.window_attention import WindowMask, window_attention

RELATIVE_INDICES = ("published", "correct")


def relative_index(window: Triple, *, rule: str = "published") -> Int64[Tensor, "token token"]:
    """Return the row of the bias table for each pair of tokens of a window, given by the offset between them.

    `correct` gives every offset a row of its own. `published` is what nnFormer's code computes and its weights were
    trained with: the factor of the first axis is too small, so that offsets share rows and others are never reached
    (115 of 343 rows are, for windows of 4).

    Raises:
        ValueError: The rule is not known.
    """
    choice("relative_index", rule, RELATIVE_INDICES)
    places = torch.cartesian_prod(*(torch.arange(side) for side in window)).reshape(-1, 3)
    offset = places[:, None] - places[None] + torch.tensor(window) - 1  # from 0 to 2 * side - 2
    _, b, c = (2 * side - 1 for side in window)
    first = b * c if rule == "correct" else min(3 * window[1] - 1, b * c)
    return (offset * torch.tensor([first, c, 1])).sum(-1)


def blocked_pairs(window: Triple) -> Bool[Tensor, "pattern token token"]:
    """Return pairs of tokens that a roll by half a window brought together from opposite ends of the grid.

    Such pairs occur in the last windows along an axis. The eight patterns are for windows that are last along none of
    the axes, the third, the second, the second and third, and so on.
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in window)).reshape(-1, 3)
    wrapped = places >= torch.tensor([side - side // 2 for side in window])
    differs = wrapped[:, None] != wrapped[None]  # (token, token, axis)
    last = torch.cartesian_prod(*(torch.tensor([False, True]),) * 3)
    return (differs & last[:, None, None]).any(-1)


def pattern_numbers(counts: Triple, shift: Triple, *, device: torch.device) -> Int64[Tensor, " window"]:
    """Return the number of the pattern of `blocked_pairs` of each window; there are `counts` windows along the axes."""
    i, j, k = (
        (torch.arange(count, device=device) == count - 1) * (factor if step else 0)
        for count, step, factor in zip(counts, shift, (4, 2, 1), strict=True)
    )
    return (i[:, None, None] + j[:, None] + k).flatten()


def to_windows(
    tokens: Float[Tensor, "batch i j k width"], window: Triple, *, num_heads: int, num_entries: int
) -> Float[Tensor, "entry batch window head token channel"]:
    """Return the tokens as (entry, batch, window, head, token, channel); sides must be multiples of the window's.

    The width holds the entries (query, key, value), each of them the heads, each of them its channels.
    """
    a, b, c = window
    cut = tokens.unflatten(4, (num_entries, num_heads, -1))
    cut = cut.unflatten(3, (-1, c)).unflatten(2, (-1, b)).unflatten(1, (-1, a))
    cut = cut.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)  # entry, batch, windows, head, tokens, channel
    return cut.flatten(6, 8).flatten(2, 4)


def from_windows(
    windows: Float[Tensor, "batch window head token channel"], window: Triple, *, grid: Triple
) -> Float[Tensor, "batch i j k width"]:
    """Return the tokens of one entry on their grid: the inverse of `to_windows`."""
    counts = [side // step for side, step in zip(grid, window, strict=True)]
    cut = windows.unflatten(3, window).unflatten(1, counts)  # batch, windows, head, tokens, channel
    return cut.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).flatten(7, 8).flatten(5, 6).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window, with a learnt bias for each offset between two of them.

    A grid that is no multiple of the window is padded with zeros at its far sides, as for published weights.
    """

    index: Int64[Tensor, "token token"]

    def __init__(self, dim: int, num_heads: int, *, window: Triple, rule: str) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split over {num_heads} attention heads; choose a divisor")
        self.num_heads, self.window = num_heads, window
        num_offsets = math.prod(2 * side - 1 for side in window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index", relative_index(window, rule=rule), persistent=False)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> Float[Tensor, "head token token"]:
        """Return the bias that is added to the score of each pair of tokens."""
        rows = F.embedding(self.index.flatten(), self.relative_position_bias_table)
        return rows.T.unflatten(1, self.index.shape)

    def padded(self, tokens: Tensor) -> Tensor:
        """Return the tokens on a grid of whole windows."""
        missing = [-side % step for side, step in zip(tokens.shape[1:4], self.window, strict=True)]
        return F.pad(tokens, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else tokens

    def mix(self, entries: Sequence[Tensor], *, grid: Triple, mask: WindowMask | None = None) -> Tensor:
        """Attend from windows of queries to those of keys and values, and return the tokens on the whole grid."""
        query, key, value = entries
        return from_windows(window_attention(query, key, value, self.bias(), mask), self.window, grid=grid)


class SelfAttention(WindowAttention):
    """Attention of tokens to those of their own window; windows may be shifted by half their side.

    An axis that one window spans is not shifted.
    """

    blocked: Bool[Tensor, "pattern token token"] | None

    def __init__(self, dim: int, num_heads: int, *, window: Triple, rule: str, shifted: bool) -> None:
        super().__init__(dim, num_heads, window=window, rule=rule)
        self.qkv, self.shifted = nn.Linear(dim, 3 * dim), shifted
        self.register_buffer("blocked", blocked_pairs(window) if shifted else None, persistent=False)

    def forward(self, tokens: Float[Tensor, "batch i j k width"]) -> Float[Tensor, "batch i j k width"]:
        """Return the mixed tokens."""
        size, tokens = _grid(tokens), self.padded(tokens)
        grid = _grid(tokens)
        i, j, k = (w // 2 if self.shifted and n > w else 0 for n, w in zip(size, self.window, strict=True))
        if not (i or j or k):
            entries = to_windows(self.qkv(tokens), self.window, num_heads=self.num_heads, num_entries=3)
            return self.proj(_cropped(self.mix(entries.unbind(0), grid=grid), size))
        assert self.blocked is not None
        a, b, c = (side // step for side, step in zip(grid, self.window, strict=True))
        mask = WindowMask(self.blocked, pattern_numbers((a, b, c), (i, j, k), device=tokens.device))
        rolled = tokens.roll((-i, -j, -k), (1, 2, 3))
        entries = to_windows(self.qkv(rolled), self.window, num_heads=self.num_heads, num_entries=3)
        mixed = self.mix(entries.unbind(0), grid=grid, mask=mask)
        return self.proj(_cropped(mixed.roll((i, j, k), (1, 2, 3)), size))


class SkipAttention(WindowAttention):
    """Attention of decoder tokens, as they are, to keys and values made of the encoder's tokens in their window."""

    def __init__(self, dim: int, num_heads: int, *, window: Triple, rule: str) -> None:
        super().__init__(dim, num_heads, window=window, rule=rule)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(
        self, tokens: Float[Tensor, "batch i j k width"], skip: Float[Tensor, "batch i j k width"]
    ) -> Float[Tensor, "batch i j k width"]:
        """Return the mixed tokens."""
        size, tokens = _grid(tokens), self.padded(tokens)
        grid = _grid(tokens)
        query = to_windows(tokens, self.window, num_heads=self.num_heads, num_entries=1)
        entries = to_windows(self.kv(self.padded(skip)), self.window, num_heads=self.num_heads, num_entries=2)
        return self.proj(_cropped(self.mix((*query.unbind(0), *entries.unbind(0)), grid=grid), size))


class WindowBlock(nn.Module):
    """A pre-norm transformer block over windows; residual branches are dropped at the rate `drop_path`."""

    def __init__(self, attn: WindowAttention, *, drop_path: float, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        dim = attn.proj.out_features
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, tokens: Float[Tensor, "batch i j k width"]) -> Float[Tensor, "batch i j k width"]:
        """Apply attention, then the MLP, each added to its input."""
        return self._after(tokens, self.attn(self.norm1(tokens)))

    def _after(self, tokens: Tensor, mixed: Tensor) -> Tensor:
        tokens = tokens + self._dropped(mixed)
        return tokens + self._dropped(self.mlp(self.norm2(tokens)))

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, training=self.training)


class SkipBlock(WindowBlock):
    """A block whose attention goes from upsampled tokens to those of the skip, both normed by the same layer."""

    def forward(  # type: ignore[override]
        self, up: Float[Tensor, "batch i j k width"], skip: Float[Tensor, "batch i j k width"]
    ) -> Float[Tensor, "batch i j k width"]:
        """Apply attention, added to the sum of both inputs, then the MLP, added to its input."""
        return self._after(up + skip, self.attn(self.norm1(up), self.norm1(skip)))


def initialise(network: nn.Module) -> None:
    """Draw truncated normal weights (0.02) for the linear layers and set their biases to 0, as in Swin."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _cropped(tokens: Tensor, size: Triple) -> Tensor:
    return tokens[:, : size[0], : size[1], : size[2]]


def _grid(tokens: Tensor) -> Triple:
    _, i, j, k, _ = tokens.shape
    return i, j, k
