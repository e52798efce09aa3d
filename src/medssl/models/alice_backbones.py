"""The backbone of Alice: a network that gives tokens of a masked crop at two depths and reconstructs the crop."""

import inspect
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.segmenter import build_usual_decoder, channels_read, complete_recipe, levels, output_layer

MASK_MODES = ("zero", "token")


class BackboneOutput(NamedTuple):
    """Mean bottleneck token, bottleneck, first (coarsest) decoded map and reconstruction of a batch of crops."""

    pooled: Float[Tensor, "batch cb"]
    bottleneck: Float[Tensor, "batch cb i j k"]
    decoded: Float[Tensor, "batch cd l m n"]
    reconstruction: Float[Tensor, "batch channel x y z"]


class Backbone(nn.Module):
    """Encoder and decoder, as a segmenter takes them, and one convolution that reconstructs the image.

    Args:
        encoder: Network of maps described by its `channels` and `strides`; the last map is the bottleneck.
        decoder: Network of decoded maps, fine to coarse; the coarsest is the first that it computes. None is
            the encoder's usual one.
        mask_mode: `zero` sets masked voxels to 0. `token` also replaces masked tokens by the encoder's mask token, for
            encoders that take `masked`.

    The attributes `bottleneck_channels` and `decoded_channels` hold the widths of the two token maps.

    Source: arXiv:2302.05615.
    """

    complete_recipe = staticmethod(complete_recipe)

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, *, mask_mode: str = "zero") -> None:
        super().__init__()
        choice("mask_mode", mask_mode, MASK_MODES)
        if mask_mode == "token" and "masked" not in inspect.signature(encoder.forward).parameters:
            raise ValueError(f"{type(encoder).__name__} has no mask token; use mask_mode=zero or nnFormer")
        decoder = decoder or build_usual_decoder(encoder)
        self.encoder, self.decoder, self.mask_mode = encoder, decoder, mask_mode
        self.in_channels = channels_read(encoder)
        self.bottleneck_channels = levels(encoder)[0][-1]
        widths, strides = levels(decoder)
        self.decoded_channels = widths[-1]
        self.reconstruction = output_layer(widths[0], self.in_channels, step=strides[0])
        if mask_mode == "token":
            nn.init.trunc_normal_(encoder.mask_token.requires_grad_(True), std=0.02)  # type: ignore[union-attr, arg-type, operator]

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        mask: Bool[Tensor, "#batch 1 i j k"] | Float[Tensor, "#batch 1 i j k"] | None = None,
    ) -> BackboneOutput:
        """Run the crops without the voxels that `mask` covers (1 or true = masked, on any grid that divides the crop).

        Raises:
            ValueError: The crop is no multiple of the grid of the mask, or does not fit the encoder.
        """
        options: dict[str, Tensor] = {}
        if mask is not None:
            size = tuple(image.shape[2:])
            if any(side % step for side, step in zip(size, mask.shape[2:], strict=True)):
                raise ValueError(
                    f"a mask of {tuple(mask.shape[2:])} entries does not divide a crop of {size} voxels; give one "
                    "entry for each patch"
                )
            image = image * F.interpolate(1 - mask.to(image), size=size, mode="nearest")
            if self.mask_mode == "token":
                grid = [side // step for side, step in zip(size, levels(self.encoder)[1][0], strict=True)]
                options["masked"] = F.interpolate(mask.float(), size=grid, mode="nearest") > 0
        maps = self.encoder(image, **options)
        decoded = self.decoder(image, maps)
        bottleneck = maps[-1]
        return BackboneOutput(bottleneck.mean((2, 3, 4)), bottleneck, decoded[-1], self.reconstruction(decoded[0]))

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks that a file holds, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder, "reconstruction": self.reconstruction}
