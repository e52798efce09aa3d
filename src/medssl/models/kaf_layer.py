"""The keypoint-augmented fusion layer: features at keypoints, attention among them, and a map of the result."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medssl.checks import choice
from medssl.models.conv_blocks import BATCH_NORMS, CONVOLUTIONS
from medssl.models.keypoint_attention import MessageLayer, Packing, PositionCode
from medssl.ops.sparse_convolution import SCATTERS, convolve_points, place, voxel_number, voxel_share

GATHERS = ("nearest", "trilinear")


class Keypoints(NamedTuple):
    """The keypoints of a batch of images, packed."""

    points: Float[Tensor, "token axis"]  # in voxels of the image, whole numbers are centres
    packing: Packing

    def voxel(self, stride: Sequence[int]) -> Int[Tensor, "token axis"]:
        """Return the voxel of each keypoint in a map of this stride: the one that holds the image's nearest voxel."""
        nearest = nearest_voxel(self.points).long()
        return nearest.div(nearest.new_tensor(stride), rounding_mode="floor")


def nearest_voxel(points: Float[Tensor, "*row axis"]) -> Float[Tensor, "*row axis"]:
    """Return the voxel that holds each point, as a whole number."""
    return (points + 0.5).floor()


def find_tokens(
    points: Float[Tensor, "batch n axis"], valid: Bool[Tensor, "batch n"], *, size_voxel: Sequence[int]
) -> tuple[Keypoints, Bool[Tensor, "batch n"]]:
    """Return the valid keypoints whose nearest voxel lies in an image of this size, and which rows they are."""
    points = points.float()  # first: rounding may move a point into the next voxel
    nearest, sides = nearest_voxel(points), torch.tensor(size_voxel, device=points.device)
    valid = valid & ((nearest >= 0) & (nearest < sides)).all(-1)  # not a number compares false
    packing = Packing.of(valid)
    return Keypoints(packing.pack(points), packing), valid


class KAFLayer(nn.Module):
    """Fusion layer that makes tokens from a map and its keypoints, and a map of the same width from the tokens.

    Features at the keypoints are embedded, get a code of their place, and pass `2 * num_layers` layers of
    self-attention. The tokens are written into zeros and spread by two convolutions with a batch norm between.

    Args:
        channels: Channels of the map.
        spatial_dims: Number of spatial axes, 2 or 3.
        dim: Width of the tokens.
        num_heads: Heads of the attention.
        num_layers: Pairs of attention layers.
        hidden: Channels between the two convolutions.
        position_widths: Widths of the hidden layers of the position code.
        gather: Feature at a keypoint: of the `nearest` voxel, or `trilinear` (in two dimensions bilinear).
        scatter: Value of a voxel with several tokens: their `mean`, or the last one by `overwrite`.
        sparse_first_conv: Convolve tokens instead of a map of them; the result is the same.
        token_norm: Norm of the MLPs over tokens, `batch` or `layer`.
        bn_momentum: Momentum of the batch norms in the attention layers. 0.19 equals two updates with 0.1, as in the
            released code.
        axis_swap: See `medssl.models.keypoint_attention.normalised`.

    Source: arXiv:2310.01680; repository zshyang/kaf, network/dynamic_graph_unet2d.py.
    """

    def __init__(
        self,
        channels: int,
        *,
        spatial_dims: int,
        dim: int = 256,
        num_heads: int = 4,
        num_layers: int = 6,
        hidden: int = 64,
        position_widths: Sequence[int] = (32, 64, 128, 256),
        gather: str = "nearest",
        scatter: str = "mean",
        sparse_first_conv: bool = True,
        token_norm: str = "batch",
        bn_momentum: float = 0.1,
        axis_swap: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("gather", gather, GATHERS), ("scatter", scatter, SCATTERS)):
            choice(name, value, allowed)
        self.dim, self.gather, self.scatter, self.sparse_first_conv = dim, gather, scatter, sparse_first_conv
        self.embed = nn.Linear(channels, dim)
        self.position = PositionCode(spatial_dims, dim, widths=position_widths, norm=token_norm, axis_swap=axis_swap)
        self.attention = nn.ModuleList(
            MessageLayer(dim, num_heads=num_heads, norm=token_norm, bn_momentum=bn_momentum)
            for _ in range(2 * num_layers)
        )
        conv = CONVOLUTIONS[spatial_dims]
        self.spread, self.norm = conv(dim, hidden, 3, padding=1), BATCH_NORMS[spatial_dims](hidden)
        self.restore = conv(hidden, channels, 3, padding=1)

    def forward(
        self, features: Float[Tensor, "batch channel *spatial"], keypoints: Keypoints, *, stride: Sequence[int]
    ) -> tuple[Float[Tensor, "batch channel *spatial"], Float[Tensor, "token dim"]]:
        """Return the map of the keypoints and their tokens; `stride` is that of `features`, in voxels of the image."""
        size, packing = features.shape[2:], keypoints.packing
        voxel = keypoints.voxel(stride)
        if self.gather == "nearest":
            gathered = features.flatten(2)[packing.sample, :, _number(voxel, size)]
        else:
            gathered = interpolate(features, _level_points(keypoints.points, stride), packing.sample)
        tokens = self.embed(gathered) + self.position(voxel, size)
        for layer in self.attention:
            tokens = tokens + layer(tokens, tokens, at=packing, of=packing)
        spread = self.diffuse(tokens, voxel, packing.sample, batch=len(features), size_voxel=size)
        return self.restore(torch.relu(self.norm(spread))), tokens

    def diffuse(
        self,
        tokens: Float[Tensor, "token dim"],
        voxel: Int[Tensor, "token axis"],
        sample: Int[Tensor, " token"],
        *,
        batch: int,
        size_voxel: Sequence[int],
    ) -> Float[Tensor, "batch hidden *spatial"]:
        """Apply the first convolution to the map that holds the tokens at their voxels and is zero elsewhere."""
        number = voxel_number(voxel, sample, size_voxel=size_voxel)
        num_voxels = batch * int(torch.Size(size_voxel).numel())
        share = voxel_share(number, num_voxels=num_voxels, scatter=self.scatter, dtype=tokens.dtype)
        shared = tokens * share[:, None]
        if not self.sparse_first_conv:
            return self.spread(place(shared, number, batch=batch, size_voxel=size_voxel))
        kernel = {"weight": self.spread.get_parameter("weight"), "bias": self.spread.get_parameter("bias")}
        return convolve_points(shared, voxel, sample, **kernel, batch=batch, size_voxel=size_voxel)


def interpolate(
    features: Float[Tensor, "batch channel *spatial"],
    points: Float[Tensor, "token axis"],
    sample: Int[Tensor, " token"],
) -> Float[Tensor, "token channel"]:
    """Return features at points (in voxels of the map), linear along every axis; outside, the edge is repeated."""
    flat, size = features.flatten(2), features.shape[2:]
    last = torch.tensor(size, device=points.device) - 1
    low = points.floor()
    total = torch.zeros((), dtype=features.dtype, device=features.device)
    for corner in product((0, 1), repeat=len(size)):
        offset = points.new_tensor(corner)
        part = (1 - (points - low - offset).abs()).prod(1).to(features.dtype)
        voxel = (low + offset).long().clamp(min=torch.zeros_like(last), max=last)
        total = total + part[:, None] * flat[sample, :, _number(voxel, size)]
    return total


def _number(voxel: Tensor, size_voxel: Sequence[int]) -> Tensor:
    return voxel_number(voxel, torch.zeros_like(voxel[:, 0]), size_voxel=size_voxel)


def _level_points(points: Tensor, stride: Sequence[int]) -> Tensor:
    """Return points in voxels of a map of this stride, each of which covers a cell of image voxels."""
    return (points + 0.5) / points.new_tensor(stride) - 0.5
