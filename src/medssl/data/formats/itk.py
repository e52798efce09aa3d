"""NRRD and MetaImage files: SimpleITK decodes what a look at the text header has found to be sound."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from medssl.data.formats.base import (
    Header,
    Load,
    ReadError,
    Spacing,
    directions_assumed,
    sides_and_channels,
    stated_or_assumed,
)
from medssl.data.formats.claims import check_claim
from medssl.data.formats.metaimage import metaimage_header
from medssl.data.formats.nrrd import nrrd_header
from medssl.data.formats.silence import silenced
from medssl.data.formats.text_header import check_coded, check_data, unpacked


def open_itk(path: Path, *, assumed: Spacing | None = None) -> tuple[Header, Load]:
    """Return the header of an NRRD or MetaImage file, and the function that loads its voxels.

    Raises:
        ReadError: An entry of the header cannot be read, the data are missing, cut or too long, or no spacing is
            stated and none assumed.
    """
    stated = (nrrd_header if path.name.lower().endswith((".nrrd", ".nhdr")) else metaimage_header)(path)
    reader = _reader(path)
    size = (*reader.GetSize(), 1)[:3] if reader.GetDimension() == 2 else reader.GetSize()
    shape, num_channels = sides_and_channels(path, (*size, reader.GetNumberOfComponents()))
    affine = _affine_from_lps(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
    affine[:3] *= stated.unit_mm
    doubts = (directions_assumed(stated.no_directions, affine),) if stated.no_directions else ()
    header = Header(shape, num_channels, affine, *_itk_type(path, reader.GetPixelID()), doubts=doubts)
    num_values = math.prod(shape) * num_channels
    num_bytes = num_values * header.voxel_bytes
    data = stated.data
    held = data.path.stat().st_size if data.coding != "raw" and data.path.is_file() else None
    check_claim(path, header, held_in=held)
    check_data(path, data, num_bytes, num_values=num_values)
    if not stated.states_spacing:  # SimpleITK takes 1 then
        affine[:3, :3] *= np.array(stated_or_assumed(path, (None, None, None), assumed)) / stated.unit_mm

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        import SimpleITK as sitk

        if data.coding == "zlib":
            values = unpacked(path, data, np.dtype(f"{data.kind}{header.voxel_bytes}"), num_values)
            array = values.astype(values.dtype.newbyteorder("="), copy=False)
            array = array.reshape(*reversed(shape), num_channels).transpose(2, 1, 0, 3)
            return array if channel is None else array[..., channel : channel + 1]
        check_coded(path, data, num_bytes, num_values=num_values)
        with silenced():
            image = reader.Execute()
        array = sitk.GetArrayFromImage(image)  # (..., z, y, x[, component])
        num = image.GetDimension()
        array = array.transpose([*reversed(range(num)), *range(num, array.ndim)]).reshape(*shape, -1)
        return array if channel is None else array[..., channel : channel + 1]

    return header, load


def _reader(file: Path) -> Any:
    """Return SimpleITK's reader of one file, with the header read."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if file.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO")
    reader.SetFileName(str(file))
    with silenced():
        reader.ReadImageInformation()
    return reader


def _itk_type(path: Path, pixel_id: int) -> tuple[int, bool]:
    """Return the bytes of a voxel of a type of SimpleITK, and whether voxels are whole numbers."""
    import SimpleITK as sitk

    name = sitk.GetPixelIDValueAsString(pixel_id)
    if "complex" in name:
        raise ReadError(path, "the voxels are complex numbers; grey values are needed")
    bits = re.search(r"(\d+)-bit", name)
    return int(bits[1]) // 8 if bits else 8, "integer" in name


def _affine_from_lps(
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
