"""Projection heads: prototypes of self-distillation, and the MLP of contrastive methods."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PrototypeLayer(nn.Module):
    """A linear layer without bias whose rows have unit length: each output is a dot product with a prototype.

    `weight_g` holds the fixed row lengths (ones) and `weight_v` the trained directions, the two names under which
    published weights keep them.
    """

    def __init__(self, in_dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim))
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch prototype"]:
        """Return logits, one for each prototype."""
        return F.linear(features, self.weight_g * F.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """The head of self-distillation: MLP, L2-normalisation and prototypes, without batch statistics.

    Narrow heads need `init_std=0.1`: at 0.02 the bottleneck before the normalisation is so short that the first
    gradients explode.

    Source: arXiv:2104.14294.
    """

    def __init__(
        self,
        *,
        in_dim: int = 768,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_prototypes: int = 65536,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, num_prototypes)

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch prototype"]:
        """Return logits, one for each prototype."""
        return self.last_layer(self.embed(features))

    def embed(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch bottleneck"]:
        """Return vectors of unit length, which are compared with the prototypes."""
        bottleneck = self.mlp(features)
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12  # 1e-12 is zero in half precision
        return F.normalize(bottleneck, dim=1, eps=eps)


class MLPHead(nn.Module):
    """Two linear layers with a ReLU between them, under the names of published weights (`fc.0`, `fc.2`).

    Source: repository batmanlab/DrasCLR, models/builder.py.
    """

    def __init__(self, *, in_dim: int = 128, hidden_dim: int = 128, out_dim: int = 128) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))

    def forward(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch out"]:
        """Return vectors that are not normalised."""
        return self.fc(features)
