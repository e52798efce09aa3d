"""KAF's U-Net, whose levels use keypoints: encoder, and decoder for segmentation."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.conv_blocks import (
    CONVOLUTIONS,
    check_image,
    conv_block,
    inflated,
    initialise,
    pooled,
    steps_of,
    strides_of,
    with_axes,
)
from medssl.models.kaf_layer import KAFLayer, Keypoints, find_tokens
from medssl.models.keypoint_attention import fit_code
from medssl.models.keypoints import Detector, DifferenceOfGaussians, detect
from medssl.models.skip_decoder import SkipDecoder
from medssl.models.stem import fit_stem

MODES = ("use", "duplicate", "zero")
NORMS = ("batch", "instance")


class KAFOutput(NamedTuple):
    """Maps of a batch, the stacked tokens of all levels (0 where there is no keypoint), and where tokens are."""

    bottleneck: Float[Tensor, "batch channel *coarsest"]
    skips: list[Tensor]
    tokens: Float[Tensor, "batch token_channel n"]
    valid: Bool[Tensor, "batch n"]


class KAFEncoder(nn.Module):
    """Encoder of L levels, each two convolutions joined with the map of a `KAFLayer` and pooled, and a bottleneck.

    Level l has `base_channels * 2^l` channels before and twice as many after the joining. The bottleneck is two
    convolutions. The L + 1 maps (five by default) are those after joining and the bottleneck.

    Args:
        spatial_dims: Axes of image and keypoints, 2 or 3.
        in_channels: Channels of the image.
        base_channels: Channels of the first level.
        dim: Width of the tokens.
        num_heads: Heads of the attention.
        num_layers: Pairs of attention layers at each level.
        hidden: Channels between the two convolutions that spread tokens.
        levels: Whether each level has a `KAFLayer`; where not, zeros are joined.
        strides: Step to each map, one number or one for each axis, the first is 1; null is 1, then 2.
        position_widths: Widths of the hidden layers of the position codes.
        detector: Detector of keypoints where none are given; null is `DifferenceOfGaussians` with its defaults.
        max_points: Largest number of keypoints in an image.
        mode: `use` keypoints, or for comparison join a `duplicate` of the map or `zero` and have no `KAFLayer`.
        gather: See `KAFLayer`.
        scatter: See `KAFLayer`.
        sparse_first_conv: See `KAFLayer`.
        token_norm: See `KAFLayer`.
        bn_momentum: See `KAFLayer`.
        axis_swap: See `KAFLayer`.
        norm: Norm of the convolutions at the levels, `batch` or `instance`.
        max_channels: Limit for the channels of the maps.

    The attributes `channels` and `strides` describe the maps, `bottleneck_channels` the last of them, `token_channels`
    the tokens; `usual_decoder` is a recipe.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/dynamic_graph_unet2d.py.
    """

    takes_points = True

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        base_channels: int = 16,
        dim: int = 256,
        num_heads: int = 4,
        num_layers: int = 6,
        hidden: int = 64,
        levels: Sequence[int] = (1, 1, 1, 1),
        strides: Sequence[int | Sequence[int]] | None = None,
        position_widths: Sequence[int] = (32, 64, 128, 256),
        detector: Detector | None = None,
        max_points: int = 512,
        mode: str = "use",
        gather: str = "nearest",
        scatter: str = "mean",
        sparse_first_conv: bool = True,
        token_norm: str = "batch",
        bn_momentum: float = 0.1,
        axis_swap: bool = False,
        norm: str = "batch",
        max_channels: int | None = None,
    ) -> None:
        super().__init__()
        choice("spatial_dims", spatial_dims, (2, 3))
        choice("mode", mode, MODES)
        choice("norm", norm, NORMS)
        self.spatial_dims, self.in_channels, self.mode = spatial_dims, in_channels, mode
        self.detector, self.max_points = detector or DifferenceOfGaussians(), max_points
        self.usual_decoder = {"_target_": "medssl.models.kaf_unet.KAFDecoder", "norm": norm}
        limit = max_channels or 2 * base_channels << len(levels)
        widths = [min(base_channels << level, limit // 2) for level in range(len(levels))]
        bottleneck = min(2 * base_channels << len(levels), limit)
        self.channels, self.bottleneck_channels = (*(2 * width for width in widths), bottleneck), bottleneck
        self.steps = steps_of(strides, num_maps=len(levels) + 1, spatial_dims=spatial_dims)
        self.strides = strides_of(self.steps)
        conv = CONVOLUTIONS[spatial_dims]
        self.stages = nn.ModuleList(
            nn.Sequential(*(conv_block(a, b, spatial_dims=spatial_dims, norm=norm) for a, b in pairwise(inner)))
            for inner in zip((in_channels, *self.channels[:-2]), widths, widths, strict=True)
        )
        self.center = nn.Sequential(
            *(conv(self.channels[-2], bottleneck, 3, padding=1), nn.ReLU(inplace=True)),
            *(conv(bottleneck, bottleneck, 3, padding=1), nn.ReLU(inplace=True)),
        )
        self.kaf = nn.ModuleDict(
            {
                str(level): KAFLayer(
                    widths[level],
                    spatial_dims=spatial_dims,
                    dim=dim,
                    num_heads=num_heads,
                    num_layers=num_layers,
                    hidden=hidden,
                    position_widths=position_widths,
                    gather=gather,
                    scatter=scatter,
                    sparse_first_conv=sparse_first_conv,
                    token_norm=token_norm,
                    bn_momentum=bn_momentum,
                    axis_swap=axis_swap,
                )
                for level, switch in enumerate(levels)
                if switch and mode == "use"
            }
        )
        self.token_channels = dim * len(self.kaf)
        self.apply(initialise)

    @classmethod
    def segmentation_recipe(
        cls,
        recipe: Mapping[str, Any],
        decoder: type | None,
        *,
        spatial_dims: int | None = None,
        keypoints: str | None = None,
    ) -> dict[str, Any]:
        """Return the recipe of this network for images of `spatial_dims` axes, with `keypoints` as its `mode`."""
        return {**with_axes(recipe, spatial_dims), **({"mode": keypoints} if keypoints is not None else {})}

    def forward(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        coordinate: Tensor | None = None,
        *,
        points: Float[Tensor, "batch n axis"] | None = None,
        valid: Bool[Tensor, "batch n"] | None = None,
    ) -> list[Tensor]:
        """Return the maps, fine to coarse; `coordinate` is accepted and not used.

        Args:
            image: Image whose sides are multiples of the coarsest stride.
            coordinate: Accepted and not used.
            points: Keypoints in voxels of the image; without them the detector finds some in the image as it is.
            valid: Which of the points count; null is all. Points that are no numbers or lie outside never count.

        Raises:
            ValueError: The image has the wrong number of axes, or sides that are no multiples of the coarsest stride.
        """
        if points is None:
            points, valid = self.find(image)
        output = self.encode(image, points, valid)
        return [*output.skips, output.bottleneck]

    def encode(
        self,
        image: Float[Tensor, "batch channel *spatial"],
        points: Float[Tensor, "batch n axis"],
        valid: Bool[Tensor, "batch n"] | None = None,
    ) -> KAFOutput:
        """Return maps and tokens; the arguments are those of `forward`."""
        check_image(image, self.strides[-1])
        size = tuple(image.shape[2:])
        known = torch.ones(points.shape[:2], dtype=torch.bool, device=points.device) if valid is None else valid
        keypoints, known = find_tokens(*_one_row_at_least(points, known), size_voxel=size)
        skips, tokens, x = [], [], image
        for level, stage in enumerate(self.stages):
            x = stage(x if level == 0 else pooled(x, self.steps[level]))
            joined, learnt = self._joined(x, level, keypoints)
            x = torch.cat([x, joined], dim=1)
            skips.append(x)
            tokens += learnt
        stacked = torch.cat(tokens, dim=1) if tokens else image.new_zeros(len(keypoints.packing.rows), 0)
        padded = keypoints.packing.pad(stacked).mT[:, :, : points.shape[1]]
        bottleneck = self.center(pooled(x, self.steps[-1]))
        return KAFOutput(bottleneck, skips, padded, known[:, : points.shape[1]])

    @torch.compiler.disable  # its many small steps take minutes to compile and gain little
    def find(self, image: Float[Tensor, "batch channel *spatial"]) -> tuple[Tensor, Tensor]:
        """Return keypoints of images and which of them count; none where the network does not use them."""
        if not len(self.kaf):
            nothing = image.new_zeros(len(image), 0, self.spatial_dims)
            return nothing, torch.zeros(len(image), 0, dtype=torch.bool, device=image.device)
        found = detect(image, max_points=self.max_points, detector=self.detector)
        return found.points, found.valid

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights fitted to this network, without those of levels that have no `KAFLayer` here.

        Input channels are fitted, and weights of two dimensions are extended to three: kernels stand in the middle
        plane of the last axis, and its coordinate has a weight of zero.
        """
        fitted = {
            key: inflated(tensor) if self.spatial_dims == 3 and tensor.ndim == 4 else tensor
            for key, tensor in tensors.items()
            if not key.startswith("kaf.") or key.split(".")[1] in self.kaf
        }
        for level in self.kaf:
            fitted = fit_code(fitted, f"kaf.{level}.position", self.spatial_dims)
        return fit_stem(fitted, "stages.0.0.conv.weight", self.in_channels)

    def _joined(self, x: Tensor, level: int, keypoints: Keypoints) -> tuple[Tensor, list[Tensor]]:
        """Return the map that is joined to that of a level, and the tokens if there are any."""
        if str(level) in self.kaf:
            joined, tokens = self.kaf[str(level)](x, keypoints, stride=self.strides[level])
            return joined.to(x.dtype), [tokens]
        return x if self.mode == "duplicate" else torch.zeros_like(x), []


class KAFDecoder(SkipDecoder):
    """The decoder of KAF's U-Net: a `SkipDecoder`, without attention and without heads.

    With a final 1x1x1 convolution without bias it is the decoder of the paper; a `Segmenter` has one with bias.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/dynamic_graph_unet2d.py.
    """


def _one_row_at_least(points: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of keypoints, or a single invalid row where there are none: attention needs a key."""
    if points.shape[1]:
        return points, valid
    return points.new_zeros(len(points), 1, points.shape[2]), valid.new_zeros(len(points), 1)
