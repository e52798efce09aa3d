"""The backbone of MACL: an encoder with the first blocks of a decoder, and the law of crop size, strides and blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from medssl.models.segmenter import build_usual_decoder, channels_read, complete_recipe, levels, names_of_blocks
from medssl.models.shape_trial import try_shape

DEPTHS = range(2, 7)
"""Numbers of levels that an error proposes."""


@dataclass(frozen=True)
class ScaleLaw:
    """Law of how much smaller an image must be for its decoded map to be as large as the full image's bottleneck.

    Along each axis the sides are scaled by the stride of the decoded map over that of the bottleneck, a quarter for two
    blocks that double. Both bottlenecks have whole sizes if a crop is a multiple of `multiple_voxel`.

    Args:
        bottleneck: Stride of the encoder's last map, in voxels.
        decoded: Strides of the decoder's maps, fine to coarse.
        num_blocks: Number of decoder blocks that run, from the coarsest.

    Source: arXiv:2309.11876, table IV; the factors of single axes are ours.
    """

    bottleneck: tuple[int, ...]
    decoded: tuple[tuple[int, ...], ...]
    num_blocks: int

    def __post_init__(self) -> None:
        """Check the number of blocks."""
        if not 1 <= self.num_blocks <= len(self.decoded):
            raise ValueError(f"num_blocks is {self.num_blocks}, this decoder has blocks 1 to {len(self.decoded)}")

    @property
    def factor(self) -> tuple[int, ...]:
        """How many times smaller the image is, along each axis."""
        return tuple(whole // part for whole, part in zip(self.bottleneck, self.decoded[-self.num_blocks], strict=True))

    @property
    def multiple_voxel(self) -> tuple[int, ...]:
        """The sides of which those of a crop must be multiples, in voxels."""
        return tuple(stride * times for stride, times in zip(self.bottleneck, self.factor, strict=True))

    def reduced(self, size_voxel: Sequence[int], *, setting: str = "the crop") -> tuple[int, ...]:
        """Return the size of the small image for a crop of `size_voxel`; `setting` names the crop in an error.

        Raises:
            ValueError: A side is no multiple of `multiple_voxel`; the message lists what fits.
        """
        sides = tuple(int(side) for side in size_voxel)
        if len(sides) != len(self.bottleneck):
            raise ValueError(f"{setting} has {len(sides)} axes, the network takes {len(self.bottleneck)}")
        if not self._fits(sides):
            raise ValueError(self._advice(sides, setting))
        return tuple(side // times for side, times in zip(sides, self.factor, strict=True))

    def _fits(self, sides: tuple[int, ...]) -> bool:
        return all(side >= step and side % step == 0 for side, step in zip(sides, self.multiple_voxel, strict=True))

    def _advice(self, sides: tuple[int, ...], setting: str) -> str:
        larger = [-(-side // step) * step for side, step in zip(sides, self.multiple_voxel, strict=True)]
        proposal = ",".join(map(str, _with_slices(larger)))
        every = range(1, len(self.decoded) + 1)
        others = [blocks for blocks in every if ScaleLaw(self.bottleneck, self.decoded, blocks)._fits(sides)]
        halving = [
            f"({depth}, {blocks})"
            for depth in DEPTHS
            for blocks in range(1, depth + 1)
            if all(side % 2 ** (depth + blocks) == 0 for side in sides)
        ]
        ways = [f"{setting}=[{proposal}]"]
        ways += [f"method.backbone.num_blocks={' or '.join(map(str, others))} with this network"] if others else []
        pair = "(model.encoder.num_levels, method.backbone.num_blocks)"
        ways += [f"model=macl_unet with {pair} {' or '.join(halving)}"] if halving else []
        return (
            f"{setting}={_with_slices(sides)} does not fit num_blocks={self.num_blocks} and a bottleneck of stride "
            f"{list(self.bottleneck)}: sides must be multiples of {list(self.multiple_voxel)}, so that both the crop "
            f"and the one that is {list(self.factor)} times smaller have whole bottlenecks. What fits: "
            f"{'; '.join(ways)}"
        )


class PartialUNet(nn.Module):
    """Encoder and decoder, of which only the first `num_blocks` blocks run and train.

    The other blocks keep their first weights. They stay in the state, so that a segmenter can start from it.

    Args:
        encoder: Network of maps, fine to coarse, described by its `channels` and `strides`.
        decoder: Network of decoded maps, described in the same way; its `forward` takes `num_blocks`. None is
            the encoder's usual one.
        num_blocks: Number of decoder blocks that run, from the coarsest.

    The attributes `bottleneck_channels` and `decoded_channels` hold the widths of the two maps that it returns.
    """

    complete_recipe = staticmethod(complete_recipe)

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, *, num_blocks: int = 2) -> None:
        super().__init__()
        decoder = decoder or build_usual_decoder(encoder)
        (widths, strides), (decoded_widths, decoded) = levels(encoder), levels(decoder)
        self.law = ScaleLaw(strides[-1], tuple(decoded), num_blocks)
        self.encoder, self.decoder, self.num_blocks = encoder, decoder, num_blocks
        self.spatial_dims = len(strides[-1])
        self.bottleneck_channels, self.decoded_channels = widths[-1], decoded_widths[-num_blocks]
        run = names_of_blocks(decoder, num_blocks)
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in run)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bottleneck and the map after the last block that runs."""
        maps = self.encoder(image)
        return maps[-1], self.decoder(image, maps, num_blocks=self.num_blocks)[0]

    def check_crop(self, size_voxel: Sequence[int], *, setting: str = "the crop") -> None:
        """Try the shapes of a crop's small image without computing values; `setting` names the crop in an error.

        Raises:
            ValueError: The crop does not fit, or a network refuses the small image, as instance norm a single voxel.
        """
        small = self.law.reduced(size_voxel, setting=setting)
        try:
            try_shape(self, small, in_channels=channels_read(self.encoder))
        except ValueError as error:
            raise ValueError(
                f"{setting}={_with_slices(size_voxel)} is {list(small)} where it is made smaller, which the "
                f"network refuses: {error}"
            ) from error


def _with_slices(sides: Sequence[int]) -> list[int]:
    """Return the sides as in the settings, x, y, z: slices are one voxel thick."""
    return [int(side) for side in (*sides, 1)[:3]]
