"""Images by SimpleITK: NRRD and MetaImage files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from medssl.data.formats.base import Header, Load, ReadError, sides_and_channels
from medssl.data.formats.claims import check_claim
from medssl.data.formats.silence import silenced


def open_itk(path: Path) -> tuple[Header, Load]:
    """Return the header of an NRRD or MetaImage file, and the function that loads its voxels."""
    reader = itk_reader(path)
    size = (*reader.GetSize(), 1)[:3] if reader.GetDimension() == 2 else reader.GetSize()
    shape, num_channels = sides_and_channels(path, (*size, reader.GetNumberOfComponents()))
    affine = affine_from_lps(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
    header = Header(shape, num_channels, affine, *itk_type(path, reader.GetPixelID()))
    detached = path.name.lower().endswith((".nhdr", ".mhd"))
    check_claim(path, header, held_in=None if detached else path.stat().st_size)
    return header, itk_loader(reader, shape)


def itk_reader(file: Path) -> Any:
    """Return SimpleITK's reader of one file, with the header read."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    with silenced():
        reader.ReadImageInformation()
    return reader


def itk_type(path: Path, pixel_id: int) -> tuple[int, bool]:
    """Return the bytes of a voxel of a type of SimpleITK, and whether voxels are whole numbers."""
    import SimpleITK as sitk

    name = sitk.GetPixelIDValueAsString(pixel_id)
    if "complex" in name:
        raise ReadError(path, "the voxels are complex numbers; grey values are needed")
    bits = re.search(r"(\d+)-bit", name)
    return int(bits[1]) // 8 if bits else 8, "integer" in name


def itk_loader(reader: Any, shape: Sequence[int]) -> Load:
    """Return the function that loads the voxels of a reader of SimpleITK."""

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        import SimpleITK as sitk

        with silenced():
            image = reader.Execute()
        array = sitk.GetArrayFromImage(image)  # (..., z, y, x[, component])
        num = image.GetDimension()
        array = array.transpose([*reversed(range(num)), *range(num, array.ndim)]).reshape(*shape, -1)
        return array if channel is None else array[..., channel : channel + 1]

    return load


def affine_from_lps(
    direction: Sequence[float], spacing: Sequence[float], origin: Sequence[float]
) -> Float[np.ndarray, "4 4"]:
    """Return the RAS affine of SimpleITK's LPS space; x and y change their sign here and nowhere else."""
    num = len(spacing)
    affine = np.eye(4)
    side = min(num, 3)
    affine[:side, :side] = (np.reshape(direction, (num, num)) * spacing)[:side, :side]
    affine[:side, 3] = origin[:side]
    affine[:2] *= -1
    return affine
