"""Downsampling of images and maps to a coarser grid of the same extent."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from medssl.checks import choice

SHRINKINGS = ("linear", "area")
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def shrunk(image: Tensor, size: Sequence[int], *, how: str = "linear") -> Tensor:
    """Return the map on a grid of `size` voxels; with `linear` the end voxels of both grids are at the same places.

    Args:
        image: Map (b c *spatial) of one, two or three spatial axes.
        size: Voxels of the result along each axis.
        how: `linear` interpolates between the two nearest voxels of each axis, without a filter. `area` takes means of
            boxes. With both, an axis that is reduced to one voxel becomes its mean.

    Source: repository stevezs315/MACL, pretrain_MACL.py (`align_corners=True`).
    """
    if choice("how", how, SHRINKINGS) == "linear":
        for axis, side in enumerate(size, start=2):
            image = image.mean(axis, keepdim=True) if side == 1 else image
        return F.interpolate(image, size=tuple(size), mode=LINEAR[image.ndim - 2], align_corners=True)
    return F.interpolate(image, size=tuple(size), mode="area")
