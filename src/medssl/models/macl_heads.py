"""The heads of MACL: embeddings of an image from both branches, and of each place of their maps."""

from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.conv_blocks import conv_block, initialise
from medssl.models.heads import MLPHead


class MACLHeads(nn.Module):
    """Two heads over means of maps, and convolutions that make a bottleneck comparable with a decoded map.

    The decoded map of the dominant branch is compared as it is, unless `dominant_pixel` adds convolutions to it.

    Args:
        bottleneck_channels: Channels of the encoder's last map.
        decoded_channels: Channels of the decoded map.
        spatial_dims: Axes of the maps, 2 or 3.
        hidden_dim: Width of the heads over means, four times the base channels of the U-Net.
        proj_dim: Width of the embeddings.
        norm: Norm of the convolutions, `batch`, `instance` or `group`.
        dominant_pixel: Whether the decoded map of the dominant branch goes through convolutions.
        global_from: Map whose mean embeds the dominant branch: the decoded map (`decoder`) or the bottleneck
            (`encoder`).

    Source: arXiv:2309.11876; repository stevezs315/MACL, network/unet2d.py.
    """

    def __init__(
        self,
        *,
        bottleneck_channels: int,
        decoded_channels: int,
        spatial_dims: int,
        hidden_dim: int = 128,
        proj_dim: int = 128,
        norm: str = "batch",
        dominant_pixel: bool = False,
        global_from: str = "decoder",
    ) -> None:
        super().__init__()
        choice("global_from", global_from, ("decoder", "encoder"))
        self.global_from = global_from
        pooled = decoded_channels if global_from == "decoder" else bottleneck_channels
        self.auxiliary = MLPHead(in_dim=bottleneck_channels, hidden_dim=hidden_dim, out_dim=proj_dim)
        self.dominant = MLPHead(in_dim=pooled, hidden_dim=hidden_dim, out_dim=proj_dim)

        def pixel(channels: int) -> nn.Sequential:
            options = {"spatial_dims": spatial_dims, "norm": norm}
            first = conv_block(channels, decoded_channels, **options)  # type: ignore[arg-type]
            return nn.Sequential(first, conv_block(decoded_channels, decoded_channels, **options))  # type: ignore[arg-type]

        self.auxiliary_pixel = pixel(bottleneck_channels)
        self.dominant_pixel: nn.Module = pixel(decoded_channels) if dominant_pixel else nn.Identity()
        for module in (self.auxiliary_pixel, self.dominant_pixel):
            module.apply(initialise)

    def images(
        self,
        auxiliary: Float[Tensor, "b cb *large"],
        dominant: Float[Tensor, "b cb *small"],
        decoded: Float[Tensor, "b cd *large"],
    ) -> tuple[Float[Tensor, "b dim"], Float[Tensor, "b dim"]]:
        """Return embeddings of images, auxiliary and dominant, not normalised, from means over the maps."""
        pooled = decoded if self.global_from == "decoder" else dominant
        return self.auxiliary(auxiliary.flatten(2).mean(2)), self.dominant(pooled.flatten(2).mean(2))

    def places(
        self, auxiliary: Float[Tensor, "b cb *large"], decoded: Float[Tensor, "b cd *large"]
    ) -> tuple[Float[Tensor, "b cd *large"], Float[Tensor, "b cd *large"]]:
        """Return the maps whose places are compared, auxiliary and dominant."""
        return self.auxiliary_pixel(auxiliary), self.dominant_pixel(decoded)
