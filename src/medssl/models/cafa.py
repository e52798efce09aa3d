"""Conditional anatomical feature alignment: tokens of one map, rewritten in terms of the tokens of another."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CAFA(nn.Module):
    """One cross-attention layer: attention, residual, norm; two linear layers, residual, norm.

    It takes no positions, so the order of the context does not matter. The released code calls it CASA.

    Args:
        dim: Width of queries and context.
        hidden_dim: Width between the two linear layers.
        num_heads: Number of attention heads.
        head_dim: Width of one head.
        dropout: Dropout rate of attention weights and of both residual branches.

    Source: arXiv:2302.05615; repository alibaba-damo-academy/alice, CASA/CASA_Module.py.
    """

    def __init__(
        self,
        *,
        dim: int = 512,
        hidden_dim: int = 2048,
        num_heads: int = 8,
        head_dim: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(
        self, queries: Float[Tensor, "batch token dim"], context: Float[Tensor, "batch source dim"]
    ) -> Float[Tensor, "batch token dim"]:
        """Return the queries after attending to the context, normed."""
        query, key, value = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (batch head token head_dim)
            for layer, tokens in ((self.query, queries), (self.key, context), (self.value, context))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        attended = self.norm1(queries + self._dropped(self.output(mixed.transpose(1, 2).flatten(2))))
        return self.norm2(attended + self._dropped(self.fc2(F.relu(self.fc1(attended)))))

    def _dropped(self, tokens: Tensor) -> Tensor:
        return F.dropout(tokens, self.dropout, self.training)
