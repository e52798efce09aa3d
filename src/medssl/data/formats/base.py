"""What every format says of a file: its header, a function that loads its voxels, or why it cannot be used."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".hdr", ".mgz", ".mgh")
"""Endings of files that are images; the .img of a pair belongs to its .hdr."""
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
ARCHIVES = (".7z", ".rar", ".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tgz", ".zip")
OTHER_KINDS = (
    ".bval", ".bvec", ".csv", ".htm", ".html", ".ini", ".json", ".log", ".md", ".npy", ".npz", ".pdf", ".pkl", ".pt",
    ".py", ".rst", ".sh", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".yaml", ".yml", *PICTURES, *ARCHIVES,
)  # fmt: skip
"""Endings of files that stand beside images."""
END_OF_AXIS = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
NO_SPACING = "the header states no spacing; data.assume_spacing_mm=[x,y,z] lets it in"


class ReadError(ValueError):
    """An image cannot be used: `path` names it, and `reason` says why.

    `lasting` is False where the same file may be read at another time: memory was short, or a permission is missing.
    """

    def __init__(self, path: Path, reason: str, lasting: bool = True) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.lasting = lasting

    def __reduce__(self) -> tuple[type["ReadError"], tuple[Path, str, bool]]:
        return type(self), (self.path, self.reason, self.lasting)


@dataclass(frozen=True, eq=False)
class Header:
    """The header of a file.

    Args:
        shape: Sides as stored.
        num_channels: Values of a voxel.
        affine: Map from voxel index to RAS mm.
        voxel_bytes: Bytes of a value.
        integer: Whether all values are whole numbers.
        modality: "ct", "mr", "pet" or "us" where the header says so.
        left_out: Files beside the image that are not read, and why.
        spacing_is_assumed: Whether the file states no spacing along an axis.
        series: UID of the DICOM series, "" for other files.
        doubts: Sentences on what the header says in two ways, or in an unusual one.
    """

    shape: tuple[int, ...]
    num_channels: int
    affine: Float[np.ndarray, "4 4"]
    voxel_bytes: int
    integer: bool
    modality: str | None = None
    left_out: tuple[tuple[str, str], ...] = ()
    spacing_is_assumed: bool = False
    series: str = ""
    doubts: tuple[str, ...] = ()


Spacing = Sequence[float]
"""Millimetres along the three axes of a file."""
Load = Callable[[int | None], Shaped[np.ndarray, "x y z c"]]
"""A function that reads one channel, or all for None, in the order of the file."""


def has_image_suffix(path: Path) -> bool:
    """Return whether the name ends like an image file that can be read."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def is_other_kind(path: Path) -> bool:
    """Return whether the name is that of a table, a text, a picture or an archive, compressed or not."""
    return path.name.lower().endswith(OTHER_KINDS) or path.name.lower().removesuffix(".gz").endswith(OTHER_KINDS)


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


def stated_or_assumed(
    path: Path, stated: Sequence[float | None], assumed: Spacing | None
) -> tuple[float, float, float]:
    """Return the spacing that a header states, with the assumed one along axes where it states none.

    Raises:
        ReadError: An axis has no spacing, and none is assumed.
    """
    x, y, z = (a if s is None else s for s, a in zip(stated, assumed or (None, None, None), strict=True))
    if x is None or y is None or z is None:
        raise ReadError(path, NO_SPACING)
    return float(x), float(y), float(z)


def directions_assumed(why: str, affine: Float[np.ndarray, "4 4"]) -> str:
    """Return the doubt about a header that states no directions, with those that its axes are taken to have."""
    from nibabel.orientations import aff2axcodes

    taken = ", ".join(END_OF_AXIS[str(code)] for code in aff2axcodes(affine))
    return f"the header states no directions ({why}); its axes are taken to run to {taken}"


def size_text(shape: Sequence[int]) -> str:
    """Return the sides as text: 24 x 24 x 21."""
    return " x ".join(map(str, shape))
