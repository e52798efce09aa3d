"""The blocks of the vision transformer: attention and MLP, each a residual branch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.checks import number, share


def path_rates(largest: float, depth: int) -> list[float]:
    """Return the rates at which the residual branches of `depth` blocks are dropped, from 0 evenly up to `largest`.

    Raises:
        ValueError: `largest` is no share, or drops every branch of the last block.

    Source: arXiv:1603.09382.
    """
    if share("drop_path", largest) == 1:
        raise ValueError("drop_path=1 drops every branch of the last block; choose a rate below 1")
    return [largest * block / max(1, depth - 1) for block in range(depth)]


def drop_path(branch: Tensor, rate: float, *, training: bool) -> Tensor:
    """Return a residual branch (batch, ...) of which whole samples are 0 at the rate `rate`, the others scaled up.

    Outside of training nothing is dropped. The draw is that of torch's global generator, as for dropout.

    Source: arXiv:1603.09382.
    """
    if not training or rate == 0:
        return branch
    keep = 1 - rate
    return branch * (branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(keep) / keep)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} cannot be split over {num_heads} attention heads; choose a divisor")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the tokens `(batch, token, dim)` of each sample."""
        heads = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, head, token, channel)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Transform each token on its own."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch.

    Source: arXiv:2103.17239.
    """

    def __init__(self, dim: int, *, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(number("layer_scale", value, above=0))))

    def forward(self, branch: Tensor) -> Tensor:
        """Scale the channels of a branch `(batch, token, dim)`."""
        return branch * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        dim: Width of the tokens.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP as a multiple of `dim`.
        dropout: Rate of the dropout in both branches.
        layer_scale: First value of the `LayerScale` of each branch; None for none.
        drop_path: Rate at which each branch of a sample is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout=dropout)
        scales = [nn.Identity() if layer_scale is None else LayerScale(dim, value=layer_scale) for _ in range(2)]
        self.ls1, self.ls2 = scales
        self.drop_path = drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply attention, then the MLP, each added to its input."""
        tokens = tokens + self._dropped(self.ls1(self.attn(self.norm1(tokens))))
        return tokens + self._dropped(self.ls2(self.mlp(self.norm2(tokens))))

    def _dropped(self, branch: Tensor) -> Tensor:
        return drop_path(branch, self.drop_path, training=self.training)
