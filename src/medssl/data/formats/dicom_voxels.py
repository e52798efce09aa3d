"""The voxels of DICOM frames: stored values, each frame scaled by its own slope and intercept."""

import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from medssl.data.formats.base import ReadError
from medssl.data.formats.dicom_files import DicomFile, opened, quiet
from medssl.data.formats.dicom_frames import DicomSlice, Pixels
from medssl.data.formats.silence import silenced

WHOLE = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""A class whose values no decoder scales."""


def grey_type(frames: Sequence[DicomSlice]) -> np.dtype[Any]:
    """Return the type of the grey values: one of whole numbers that holds all that can be stored, or float32.

    It is float32 where a slope or an intercept has a fraction.
    """
    ends = [end * f.slope + f.intercept for f in frames for end in f.pixels.limits]
    if all(f.slope.is_integer() and f.intercept.is_integer() for f in frames):
        for kind in WHOLE:
            if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max:
                return np.dtype(kind)
    return np.dtype(np.float32)


def grey_values(frames: Sequence[DicomSlice]) -> Shaped[np.ndarray, "x y z"]:
    """Return the voxels of sorted frames along column, row and frame.

    Raises:
        ReadError: The voxels of a file cannot be decoded; the reason names the file.
    """
    kind = grey_type(frames)
    first = frames[0].pixels
    grey = np.empty((len(frames), first.rows, first.columns), kind)
    of_file: tuple[DicomFile, Any] | None = None
    for plane, frame in zip(grey, frames, strict=True):
        if of_file is None or of_file[0] is not frame.file:
            of_file = frame.file, stored_values(frame.file, frame.pixels)
        stored = of_file[1][frame.number]
        if frame.slope == 1 and frame.intercept == 0:
            plane[:] = stored
        elif kind.kind in "iu":
            plane[:] = stored.astype(np.int64) * int(frame.slope) + int(frame.intercept)
        else:
            plane[:] = stored * frame.slope + frame.intercept  # in float64, rounded once
    return grey.transpose(2, 1, 0)


def stored_values(file: DicomFile, pixels: Pixels) -> Integer[np.ndarray, "frame row column"]:
    """Return the values of a file as they are stored, without any scale.

    Raises:
        ReadError: They are cut or cannot be decoded.
    """
    if file.coding:
        return _decoded(file, pixels)
    order = "<" if file.little_endian else ">"
    if file.path.name.lower().endswith(".gz"):
        data = _unzipped(file, pixels.num_bytes)
    else:
        with file.path.open("rb") as stream:
            stream.seek(file.offset)
            data = stream.read(pixels.num_bytes)
    if len(data) < pixels.num_bytes:
        raise ReadError(file.path, f"the file is cut: its voxels need {pixels.num_bytes:,} bytes, it has {len(data):,}")
    width = pixels.bits_allocated // 8
    if width == 1 and not file.little_endian:
        raise ReadError(file.path, "voxels of 8 bits in big-endian order are not read; save the file in little-endian")
    stored = np.frombuffer(data, np.dtype(f"{order}u{width}")).astype(f"u{width}", copy=False)
    above = pixels.bits_allocated - 1 - pixels.high_bit  # bits above and below the value may hold anything
    below = pixels.high_bit + 1 - pixels.bits_stored
    if pixels.signed:
        stored = stored.view(f"i{width}")
    if above or below:
        kept = (stored << above) >> (above + below)  # the sign goes along
        if not np.array_equal(kept, stored):
            where = f"the {pixels.bits_stored} bits up to bit {pixels.high_bit} that the header states"
            raise ReadError(file.path, f"values lie beyond {where}: an overlay lies in them, or the header is damaged")
        stored = kept
    return stored.reshape(pixels.num_frames, pixels.rows, pixels.columns)


def _unzipped(file: DicomFile, num_bytes: int) -> bytes:
    with gzip.open(file.path) as stream:
        stream.seek(file.offset)
        data = stream.read(num_bytes)
        rest = stream.read(2**20)  # what else the file holds is little, and the checksum stands behind it
        if len(rest) == 2**20:
            raise ReadError(file.path, "the compressed file has data far behind its voxels")
    return data


def _decoded(file: DicomFile, pixels: Pixels) -> Integer[np.ndarray, "frame row column"]:
    """Return coded values by SimpleITK, from a copy that states nothing but how they are coded."""
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "coded.dcm"
        _write_copy(file, pixels, copy)
        try:
            with silenced():
                array = sitk.GetArrayFromImage(sitk.ReadImage(str(copy)))
        except RuntimeError as error:
            raise ReadError(file.path, "the voxels cannot be decoded: the file is damaged") from error
    expected = (pixels.num_frames, pixels.rows, pixels.columns)
    if array.dtype.kind not in "iu" or array.size != np.prod(expected):
        found = " x ".join(map(str, array.shape[::-1]))
        raise ReadError(file.path, f"the coded voxels are {found}, not what the header states")
    array = array.reshape(expected)
    low, high = pixels.limits
    if array.min() < low or array.max() > high:
        raise ReadError(file.path, f"coded voxels lie beyond the {pixels.bits_stored} bits that the header states")
    return array


def _write_copy(file: DicomFile, pixels: Pixels, path: Path) -> None:
    """Write the coded voxels of a file with what their decoder needs to know, and no more."""
    from pydicom import dcmread
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, generate_uid

    with quiet():
        with opened(file.path) as stream:
            source = dcmread(stream, force=True)
        meta, copy = FileMetaDataset(), Dataset()
        meta.TransferSyntaxUID = UID(file.coding)
        meta.MediaStorageSOPClassUID = copy.SOPClassUID = UID(SECONDARY_CAPTURE)
        meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID = generate_uid()
        copy.file_meta = meta
        copy.SamplesPerPixel, copy.PhotometricInterpretation = 1, "MONOCHROME2"
        copy.Rows, copy.Columns, copy.NumberOfFrames = pixels.rows, pixels.columns, pixels.num_frames
        copy.BitsAllocated, copy.BitsStored = pixels.bits_allocated, pixels.bits_stored
        copy.HighBit, copy.PixelRepresentation = pixels.high_bit, int(pixels.signed)
        copy.PixelData = source.PixelData
        copy["PixelData"].is_undefined_length = True
        copy["PixelData"].VR = "OB"
        copy.save_as(path, enforce_file_format=True)
