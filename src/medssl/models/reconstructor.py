"""A network that predicts every voxel of its image: encoder, decoder and one output layer."""

from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.segmenter import build_usual_decoder, complete_recipe, levels, output_layer

OUTPUTS = ("linear", "sigmoid")


class Reconstructor(nn.Module):
    """Encoder, decoder with all its skips, and a layer to full resolution.

    Args:
        encoder: Network of maps, fine to coarse, described by its `channels` and `strides`.
        decoder: Network of decoded maps, described in the same way; None is the encoder's usual one.
        out_channels: Channels of the prediction: those of the image, or classes.
        output: `linear`, or `sigmoid` for images in [0, 1].

    Source: arXiv:1908.06912; arXiv:2410.23132.
    """

    complete_recipe = staticmethod(complete_recipe)

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module | None, *, out_channels: int = 1, output: str = "linear"
    ) -> None:
        super().__init__()
        self.output = choice("method.network.output", output, OUTPUTS)
        decoder = decoder or build_usual_decoder(encoder)
        widths, strides = levels(decoder)
        self.encoder, self.decoder = encoder, decoder
        self.head = output_layer(widths[0], out_channels, step=strides[0])

    def forward(self, image: Float[Tensor, "batch channel x y z"]) -> Float[Tensor, "batch out x y z"]:
        """Return the prediction at full resolution.

        Raises:
            ValueError: The image does not fit the networks.
        """
        predicted = self.head(self.decoder(image, self.encoder(image))[0])
        return predicted.sigmoid() if self.output == "sigmoid" else predicted
