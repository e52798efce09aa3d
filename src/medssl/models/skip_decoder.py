"""The decoder of the pooled U-Nets: transposed convolutions, each joined with a skip, and two convolutions."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medssl.models.conv_blocks import UPSAMPLINGS, conv_block, fit_axes, initialise
from medssl.models.unet import blocks_to_run, run
from medssl.ops.patches import axes_of


class SkipDecoder(nn.Module):
    """Blocks of one transposed convolution and two convolutions over its output joined with the encoder's map.

    Args:
        in_channels: Channels of the image, which is not used.
        encoder_channels: Channels of the encoder's maps, fine to coarse.
        encoder_strides: Strides of the encoder's maps, in voxels, two or three axes; the first is full resolution.
        norm: Norm of the convolutions, `batch`, `instance` or `group`.
        checkpoint_activations: Recompute activations in the backward pass.

    The decoded maps have the channels of the encoder's.
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
        super().__init__()
        strides = [axes_of(stride) for stride in encoder_strides]
        dims = len(strides[0])
        steps = [tuple(b // a for a, b in zip(fine, coarse, strict=True)) for fine, coarse in pairwise(strides)]
        if set(strides[0]) != {1} or any(min(step) < 1 or max(step) == 1 for step in steps):
            raise ValueError(
                f"encoder maps of strides {strides} do not fit: the first must have full resolution and each be "
                "coarser than the one before (for other encoders take medssl.models.unet.UNetDecoder)"
            )
        self.in_channels, self.spatial_dims = in_channels, dims
        self.checkpoint_activations = checkpoint_activations
        self.channels, self.strides = tuple(encoder_channels[:-1]), tuple(strides[:-1])
        self.ups = nn.ModuleList(
            UPSAMPLINGS[dims](coarse, fine, step, stride=step)
            for (fine, coarse), step in zip(pairwise(encoder_channels), steps, strict=True)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_block(2 * width, width, spatial_dims=dims, norm=norm),
                conv_block(width, width, spatial_dims=dims, norm=norm),
            )
            for width in self.channels
        )
        self.apply(initialise)

    def forward(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        features: Sequence[Tensor],
        *,
        num_blocks: int | None = None,
    ) -> list[Tensor]:
        """Return decoded maps, the finest first; with `num_blocks` only those of the first (coarsest) blocks.

        Raises:
            ValueError: The decoder has fewer blocks than `num_blocks`.
        """
        current, decoded = features[-1], []
        for level in reversed(range(len(self.ups))[-blocks_to_run(num_blocks, len(self.ups)) :]):
            up = self.ups[level](current)
            joined = torch.cat([up, self.skip(level, up, features[level])], dim=1)
            current = run(self.stages[level], joined, checkpointed=self.checkpoint_activations)
            decoded.append(current)
        return decoded[::-1]

    def skip(
        self, level: int, up: Float[Tensor, "batch channel *spatial"], encoded: Float[Tensor, "batch channel *spatial"]
    ) -> Float[Tensor, "batch channel *spatial"]:
        """Return the map that is joined to the up-sampled map at `level`: the encoder's map as it is."""
        return encoded

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights, those of slices fitted to volumes.

        Kernels of slices stand in the middle plane of the last axis; those of transposed convolutions in all planes.
        """
        return fit_axes(tensors, self)
