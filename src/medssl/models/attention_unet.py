"""The decoder of the attention U-Net: the up-sampled map decides where each skip passes."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.conv_blocks import CONVOLUTIONS, initialise, norm_layer
from medssl.models.skip_decoder import SkipDecoder


class AttentionGate(nn.Module):
    """Gate that multiplies each voxel of a skip by a weight from 0 to 1, computed from skip and up-sampled map.

    Both maps are projected to half the channels by a 1x1 convolution with norm. Their rectified sum is projected to
    one channel with norm, and the logistic function of that is the weight.

    Args:
        channels: Channels of both maps.
        spatial_dims: Number of spatial axes, 2 or 3.
        norm: Norm after each convolution: `batch`, `instance` or `group`.

    Source: arXiv:1804.03999, eq. 1 and 2, with the gating signal at the resolution of the skip.
    """

    def __init__(self, channels: int, *, spatial_dims: int, norm: str) -> None:
        super().__init__()
        inner = max(1, channels // 2)

        def projection(before: int, after: int) -> nn.Sequential:
            conv = CONVOLUTIONS[spatial_dims](before, after, 1)
            layer = norm_layer(after, spatial_dims=spatial_dims, norm=norm)
            return nn.Sequential(OrderedDict(conv=conv, norm=layer))

        self.from_up, self.from_skip = projection(channels, inner), projection(channels, inner)
        self.to_weight = projection(inner, 1)

    def forward(
        self, up: Float[Tensor, "batch channel *spatial"], skip: Float[Tensor, "batch channel *spatial"]
    ) -> Float[Tensor, "batch channel *spatial"]:
        """Return the skip, weighted voxel by voxel."""
        return skip * torch.sigmoid(self.to_weight(torch.relu(self.from_up(up) + self.from_skip(skip))))


class AttentionUNetDecoder(SkipDecoder):
    """The decoder of MACL's U-Net with an `AttentionGate` at each skip; the encoder is a `MACLUNetEncoder`.

    Gates of blocks that are not run are not trained either.

    Source: arXiv:1804.03999; one of the backbones of arXiv:2309.11876, fig. 6.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[int | Sequence[int]],
        norm: str = "batch",
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            encoder_channels=encoder_channels,
            encoder_strides=encoder_strides,
            norm=norm,
            checkpoint_activations=checkpoint_activations,
        )
        self.gates = nn.ModuleList(
            AttentionGate(width, spatial_dims=self.spatial_dims, norm=norm) for width in self.channels
        )
        self.gates.apply(initialise)

    def skip(
        self, level: int, up: Float[Tensor, "batch channel *spatial"], encoded: Float[Tensor, "batch channel *spatial"]
    ) -> Float[Tensor, "batch channel *spatial"]:
        """Return the encoder's map after the gate of that level."""
        return self.gates[level](up, encoded)
