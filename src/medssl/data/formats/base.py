"""What every format says of a file: its header, a function that loads its voxels, or why it cannot be used."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

NIFTI_SUFFIXES = (".nii.gz", ".nii")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")


class ReadError(ValueError):
    """An image cannot be used: `path` names it, and `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["ReadError"], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True, eq=False)
class Header:
    """The header of a file: sides as stored, map from voxel index to RAS mm, and whether voxels are whole numbers."""

    shape: tuple[int, ...]
    num_channels: int
    affine: Float[np.ndarray, "4 4"]
    voxel_bytes: int
    integer: bool


Load = Callable[[int | None], Shaped[np.ndarray, "x y z c"]]
"""A function that reads one channel, or all for None, in the order of the file."""


def has_image_suffix(path: Path) -> bool:
    """Return whether the name ends like an image file that can be read."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def stem(path: Path) -> str:
    """Return the file name without its image suffix."""
    return next((path.name[: -len(s)] for s in IMAGE_SUFFIXES if path.name.lower().endswith(s)), path.name)


def three_sides(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the first three sides; those that are missing are one voxel long."""
    x, y, z = (int(n) for n in (*shape, 1, 1)[:3])
    return x, y, z


def sides_and_channels(path: Path, shape: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    """Return the three sides of an image, and the product of the sides behind them: its channels.

    Raises:
        ReadError: Two or more sides are left for the channels.
    """
    channels = [int(n) for n in shape[3:] if n != 1]
    if len(channels) > 1:
        raise ReadError(path, f"the image is {size_text(shape)}: three sides and channels can be read, no more")
    return three_sides(shape), math.prod(channels)


def size_text(shape: Sequence[int]) -> str:
    """Return the sides as text: 24 x 24 x 21."""
    return " x ".join(map(str, shape))
