"""MACL's U-Net for slices and volumes, first used by PCL: encoder, and decoder that is trained with it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.conv_blocks import (
    CONVOLUTIONS,
    check_image,
    conv_block,
    fit_axes,
    initialise,
    pooled,
    steps_of,
    strides_of,
    with_axes,
)
from medssl.models.skip_decoder import SkipDecoder
from medssl.models.stem import fit_stem
from medssl.models.unet import run


class MACLUNetEncoder(nn.Module):
    """Encoder of levels of two convolutions with norm, each pooled, and a bottleneck of two convolutions without norm.

    Level l of L has `base_channels * 2^l` channels. The L + 1 maps are those before pooling and the bottleneck, whose
    values are rectified, so never negative.

    Args:
        spatial_dims: Number of spatial axes: 2 for slices, 3 for volumes.
        in_channels: Channels of the image.
        base_channels: Channels of the first level.
        num_levels: Number of levels that are pooled.
        norm: Norm of the levels, `batch`, `instance` or `group`.
        strides: Step to each map, one number or one for each axis, the first is 1; null is 1, then 2.
        checkpoint_activations: Recompute activations in the backward pass; batch statistics count once.

    The attributes `channels` and `strides` describe the maps, `usual_decoder` is a recipe.

    Source: arXiv:2309.11876; repository stevezs315/MACL, network/unet2d.py.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        base_channels: int = 32,
        num_levels: int = 4,
        norm: str = "batch",
        strides: Sequence[int | Sequence[int]] | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        choice("spatial_dims", spatial_dims, (2, 3))
        if num_levels < 1:
            raise ValueError(f"num_levels is {num_levels}; a U-Net needs one level or more")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.checkpoint_activations = checkpoint_activations
        self.usual_decoder = {"_target_": "medssl.models.macl_unet.MACLUNetDecoder", "norm": norm}
        self.channels = tuple(base_channels << level for level in range(num_levels + 1))
        self.steps = steps_of(strides, num_maps=num_levels + 1, spatial_dims=spatial_dims)
        self.strides = strides_of(self.steps)
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_block(before, width, spatial_dims=spatial_dims, norm=norm),
                conv_block(width, width, spatial_dims=spatial_dims, norm=norm),
            )
            for before, width in pairwise((in_channels, *self.channels[:-1]))
        )
        conv, (width, bottleneck) = CONVOLUTIONS[spatial_dims], self.channels[-2:]
        self.center = nn.Sequential(
            *(conv(width, bottleneck, 3, padding=1), nn.ReLU(inplace=True)),
            *(conv(bottleneck, bottleneck, 3, padding=1), nn.ReLU(inplace=True)),
        )
        self.apply(initialise)

    @classmethod
    def segmentation_recipe(
        cls, recipe: Mapping[str, Any], decoder: type | None, *, spatial_dims: int | None = None
    ) -> dict[str, Any]:
        """Return the recipe of this network for images of `spatial_dims` axes."""
        return with_axes(recipe, spatial_dims)

    def forward(
        self, image: Float[Tensor, "batch channel *spatial"], coordinate: Tensor | None = None
    ) -> list[Float[Tensor, "batch _ *_"]]:
        """Return the maps, fine to coarse; `coordinate` is accepted and not used.

        Raises:
            ValueError: A side is no multiple of the coarsest stride.
        """
        check_image(image, self.strides[-1])
        maps = [image]
        for stage, step in zip((*self.stages, self.center), self.steps, strict=True):
            x = maps[-1] if len(maps) == 1 else pooled(maps[-1], step)
            maps.append(run(stage, x, checkpointed=self.checkpoint_activations))
        return maps[1:]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights fitted to this network's input channels, and those of slices to volumes.

        Kernels of slices stand in the middle plane of the last axis.
        """
        return fit_stem(fit_axes(tensors, self), "stages.0.0.conv.weight", self.in_channels)


class MACLUNetDecoder(SkipDecoder):
    """The decoder of MACL's U-Net, a `SkipDecoder` whose first blocks MACL trains; a 1x1 convolution follows it.

    Source: arXiv:2309.11876; repository stevezs315/MACL, network/unet2d.py.
    """
