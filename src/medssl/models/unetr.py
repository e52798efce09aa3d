"""The decoder of UNETR: skips from a transformer whose maps all lie on the patch grid."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from monai.networks.blocks.dynunet_block import UnetResBlock, get_conv_layer
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from medssl.models.unet import blocks_to_run, cumulative, halvings, run
from medssl.ops.patches import Triple, triple


class Projection(UnetrPrUpBlock):
    """MONAI's block with the same keys and a step of its own for each transposed convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, steps: Sequence[Triple]) -> None:
        options = {"kernel_size": 3, "stride": 1, "norm_name": "instance"}
        super().__init__(3, in_channels, out_channels, 0, upsample_kernel_size=steps[0], **options)  # type: ignore[arg-type]
        for step in steps[1:]:
            up = get_conv_layer(3, out_channels, out_channels, kernel_size=step, stride=step, is_transposed=True)
            self.blocks.append(nn.Sequential(up, UnetResBlock(3, out_channels, out_channels, **options)))  # type: ignore[arg-type]


class UNETRDecoder(nn.Module):
    """Decoder that projects the maps of a transformer to falling strides and up-samples along them, as UNETR does.

    Patches of 16 voxels take four steps: the last map is the bottleneck, the three before it are skips at strides 8, 4
    and 2, and two convolutions over the image are the skip at full resolution. Other patches (powers of two, axis by
    axis) take as many steps as their longest side has halvings and use as many of the last maps. The blocks are those
    of MONAI's `UNETR` with `conv_block=True, res_block=True`: `projections.0`, `.1`, `.2` are its `encoder2`, `3`, `4`,
    `ups.0` to `ups.3` its `decoder2` to `5`, `image_level` its `encoder1`.

    Args:
        in_channels: Channels of the image.
        encoder_channels: Channels of the encoder's maps, shallow to deep.
        encoder_strides: Strides of the encoder's maps, in voxels, all equal.
        feature_size: Channels at full resolution; they double with each step.
        checkpoint_activations: Recompute activations in the backward pass.

    Source: arXiv:2103.10504.
    """

    takes_patch_grid = True

    def __init__(
        self,
        *,
        in_channels: int,
        encoder_channels: Sequence[int],
        encoder_strides: Sequence[int | Sequence[int]],
        feature_size: int = 48,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        strides = {triple(stride) for stride in encoder_strides}
        if len(strides) != 1:
            raise ValueError(
                f"a UNETR decoder takes maps of one stride, these have {sorted(strides)}; take "
                "medssl.models.unet.UNetDecoder"
            )
        steps = halvings(strides.pop())
        if not 1 <= len(steps) <= len(encoder_channels):
            raise ValueError(
                f"a UNETR decoder for patches of {encoder_strides[0]} voxels uses {len(steps)} maps of the encoder, it "
                f"gives {len(encoder_channels)}; choose its feature_depths accordingly (patches of 2 voxels and more)"
            )
        self.in_channels, self.checkpoint_activations = in_channels, checkpoint_activations
        self.channels = tuple(feature_size << level for level in range(len(steps)))
        self.strides = ((1, 1, 1), *cumulative(steps[:-1]))
        used = list(encoder_channels)[-len(steps) :]
        self.image_level = UnetrBasicBlock(3, in_channels, feature_size, 3, 1, "instance", res_block=True)
        self.projections = nn.ModuleList(
            Projection(used[level - 1], self.channels[level], steps=steps[: level - 1 : -1])
            for level in range(1, len(steps))
        )
        self.ups = nn.ModuleList(
            UnetrUpBlock(3, coarse, fine, 3, step, "instance", res_block=True)
            for (fine, coarse), step in zip(pairwise((*self.channels, used[-1])), steps, strict=True)
        )

    def forward(
        self,
        image: Float[Tensor, "batch channel x y z"],
        features: Sequence[Float[Tensor, "batch _ _ _ _"]],
        *,
        num_blocks: int | None = None,
    ) -> list[Float[Tensor, "batch width i j k"]]:
        """Return decoded maps, full resolution first; with `num_blocks` only those of the first (coarsest) blocks.

        Raises:
            ValueError: The decoder has fewer blocks than `num_blocks`.
        """
        used = features[len(features) - len(self.ups) :]
        current, decoded = used[-1], []
        for level in reversed(range(len(self.ups))[-blocks_to_run(num_blocks, len(self.ups)) :]):
            source, skip = (used[level - 1], self.projections[level - 1]) if level else (image, self.image_level)
            between = run(skip, source, checkpointed=self.checkpoint_activations)
            current = run(self.ups[level], current, between, checkpointed=self.checkpoint_activations)
            decoded.append(current)
        return decoded[::-1]
