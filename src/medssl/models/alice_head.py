"""The projection head of Alice: one MLP for whole crops, bottleneck tokens and decoder tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.heads import ProjectionHead, PrototypeLayer
from medssl.ops.ema import frozen_copy, update_ema


class HeadOutput(NamedTuple):
    """Cosines with the prototypes, for the crop and for the tokens of two maps."""

    pooled: Float[Tensor, "batch prototype"]
    bottleneck: Float[Tensor, "batch token prototype"]
    decoded: Float[Tensor, "batch source prototype"]


class AliceHead(nn.Module):
    """Head that projects the pooled vector, the bottleneck and the first decoder map of a backbone onto prototypes.

    Tokens first go through a linear layer of their map; then all vectors go through one MLP and a normalisation.
    Tokens are compared with prototypes of their own, `token_layer`, or with those of the crop where `shared` is set.

    Args:
        bottleneck_channels: Channels of the bottleneck and of the pooled vector.
        decoded_channels: Channels of the first decoder map.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width of the vectors that are compared with prototypes.
        num_prototypes: Number of prototypes in each set.
        init_std: Standard deviation of the MLP's first weights; narrow heads need 0.1 (see `ProjectionHead`).
        shared: Whether crops and tokens share one set of prototypes.

    Source: repository alibaba-damo-academy/alice, models/head.py.
    """

    def __init__(
        self,
        *,
        bottleneck_channels: int,
        decoded_channels: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_prototypes: int = 512,
        init_std: float = 0.02,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.bottleneck_layer = nn.Linear(bottleneck_channels, bottleneck_channels)
        self.decoded_layer = nn.Linear(decoded_channels, bottleneck_channels)
        self.projector = ProjectionHead(
            in_dim=bottleneck_channels,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
            init_std=init_std,
        )
        self.token_layer = None if shared else PrototypeLayer(bottleneck_dim, num_prototypes)

    def forward(
        self,
        pooled: Float[Tensor, "batch channel"],
        bottleneck: Float[Tensor, "batch channel i j k"],
        decoded: Float[Tensor, "batch width p q r"],
    ) -> HeadOutput:
        """Return logits between -1 and 1."""
        maps = [bottleneck.flatten(2).mT, decoded.flatten(2).mT]  # (batch token channel)
        tokens = [layer(x) for layer, x in zip((self.bottleneck_layer, self.decoded_layer), maps, strict=True)]
        crops = self.projector(pooled)
        counts = [x.shape[1] for x in tokens]
        embedded = self.projector.embed(torch.cat(tokens, dim=1).flatten(0, 1))
        prototypes = self.projector.last_layer if self.token_layer is None else self.token_layer
        return HeadOutput(crops, *prototypes(embedded).unflatten(0, (len(pooled), -1)).split(counts, dim=1))

    def last_layers(self) -> list[nn.Module]:
        """Return the layers that hold prototypes."""
        return [layer for layer in (self.projector.last_layer, self.token_layer) if layer is not None]

    def teacher(self, *, shared: bool) -> "AliceHead":
        """Return a frozen copy; with `shared` it has one set of prototypes, which starts as that of the tokens.

        The released code does the same: its teacher takes the token prototypes on loading, and the moving average then
        moves them towards those of the crops.
        """
        copy = frozen_copy(self)
        if shared and copy.token_layer is not None:
            copy.projector.last_layer, copy.token_layer = copy.token_layer, None
        return copy

    def follow(self, student: "AliceHead", *, momentum: float) -> None:
        """Move this teacher towards `student`; shared prototypes follow those of the crops."""
        for name, module in self.named_children():
            update_ema(module, student.get_submodule(name), momentum=momentum)
