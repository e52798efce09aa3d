"""The frames of a DICOM file: where each lies, and how its stored values become grey values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from medssl.data.formats.base import ReadError
from medssl.data.formats.dicom_files import UNDEFINED, DicomFile

MODALITIES = {"CT": "ct", "MR": "mr", "PT": "pet", "US": "us"}
GREY = ("MONOCHROME1", "MONOCHROME2")
"""MONOCHROME1 says that low values are shown bright: a rule of display. Values are read as they are stored."""
NEEDED = ("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored",
          "PixelRepresentation")  # fmt: skip
"""Entries without which no decoder knows what the voxels are."""
MAX_BEHIND = 8
"""Bytes that may lie behind the voxels of a DICOM file, which are filled up to an even number."""


@dataclass(frozen=True)
class Pixels:
    """How a file stores its values.

    Args:
        rows: Rows of a frame.
        columns: Columns of a frame.
        num_frames: Frames of the file.
        bits_allocated: Bits that a value takes.
        bits_stored: Bits of these that it uses.
        high_bit: Number of the highest of these.
        signed: Whether values are in two's complement.
        low_is_bright: Whether the header says MONOCHROME1.
    """

    rows: int
    columns: int
    num_frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    low_is_bright: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all frames, uncoded."""
        return self.rows * self.columns * self.num_frames * self.bits_allocated // 8

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest value that can be stored."""
        half = 2 ** (self.bits_stored - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)


@dataclass(frozen=True, eq=False)
class DicomSlice:
    """One slice: a frame of a file, in the patient's space (LPS, mm).

    Args:
        file: Its file.
        pixels: How the file stores values.
        number: Number of the frame in its file, from 0.
        position: Place of the first voxel; None where it is not stated.
        orientation: Directions along a row and along a column; None where they are not stated.
        spacing: Distances between columns and between rows; None where they are not stated.
        thickness: Distance to a next slice, as far as one slice states it.
        slope: Factor of the stored values.
        intercept: What is added to them.
        scaled: Whether the header states slope or intercept.
    """

    file: DicomFile
    pixels: Pixels
    number: int
    position: Float64[np.ndarray, "3"] | None
    orientation: Float64[np.ndarray, "2 3"] | None
    spacing: tuple[float, float] | None
    thickness: float | None
    slope: float
    intercept: float
    scaled: bool

    @property
    def name(self) -> str:
        """The file's name, with the frame's number where there are several."""
        return self.file.path.name + (f", frame {self.number + 1}" if self.pixels.num_frames > 1 else "")


def frames_of(file: DicomFile) -> list[DicomSlice]:
    """Return the frames of a file in its order.

    Raises:
        ReadError: The voxels are colours, are cut, or an entry of the header cannot be read; the reason says which.
    """
    pixels = _pixels(file)
    if file.coding == "":
        _check_length(file, pixels)
    groups = _functional_groups(file, pixels)
    return [_frame(file, pixels, number, holders) for number, holders in enumerate(groups)]


def _pixels(file: DicomFile) -> Pixels:
    path, dataset = file.path, file.dataset
    for name in NEEDED:
        if _value(path, dataset, name) in (None, ""):
            raise ReadError(path, f"the header lacks {name}: it is damaged or no image")
    samples = _whole(path, dataset, "SamplesPerPixel", 1)
    photometric = _text(path, dataset, "PhotometricInterpretation", "")
    if samples != 1 or photometric not in GREY:
        raise ReadError(path, f"the voxels are colours ({photometric}); grey values are needed")
    names = ("Rows", "Columns", "BitsAllocated")
    rows, columns, allocated = (_whole(path, dataset, name, 0) for name in names)
    stored = _whole(path, dataset, "BitsStored", allocated)
    high = _whole(path, dataset, "HighBit", stored - 1)
    num_frames = num_frames_of(file)
    if min(rows, columns, num_frames) < 1:
        raise ReadError(path, f"the header claims a side without voxels ({columns} x {rows}, {num_frames} frames)")
    if allocated not in (8, 16, 32) or not 1 <= stored <= high + 1 <= allocated:
        raise ReadError(path, f"{stored} of {allocated} bits a voxel, up to bit {high}, cannot be read")
    signed = _whole(path, dataset, "PixelRepresentation", 0)
    if signed not in (0, 1):
        raise ReadError(path, f"PixelRepresentation is {signed}; it says 0 (unsigned) or 1 (signed)")
    if _value(path, dataset, "ModalityLUTSequence"):
        raise ReadError(path, "grey values are stated by a table (ModalityLUTSequence), which is not read")
    return Pixels(rows, columns, num_frames, allocated, stored, high, signed == 1, photometric == GREY[0])


def _check_length(file: DicomFile, pixels: Pixels) -> None:
    if file.length == UNDEFINED or file.length - pixels.num_bytes > MAX_BEHIND:
        share = "" if file.length == UNDEFINED else f": {pixels.num_bytes:,} bytes of {file.length:,}"
        raise ReadError(file.path, f"the pixel data go on behind the voxels that the header states{share}")
    zipped = file.path.name.lower().endswith(".gz")
    found = file.length if zipped else min(file.length, file.path.stat().st_size - file.offset)
    if found < pixels.num_bytes:
        raise ReadError(file.path, f"the file is cut: its voxels need {pixels.num_bytes:,} bytes, it has {found:,}")


def _functional_groups(file: DicomFile, pixels: Pixels) -> list[tuple[Any, ...]]:
    """Return for each frame the parts of the header that may state its entries, the nearest first."""
    path, dataset = file.path, file.dataset
    shared = _value(path, dataset, "SharedFunctionalGroupsSequence") or []
    own = _value(path, dataset, "PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != pixels.num_frames:
        raise ReadError(path, f"the header describes {len(own)} frames and states {pixels.num_frames}")
    if pixels.num_frames > 1 and not own:
        raise ReadError(path, f"no ImagePositionPatient: the places of its {pixels.num_frames} frames are not stated")
    if not own:
        return [(*shared, dataset)]
    return [(group, *shared) for group in own]


def _frame(file: DicomFile, pixels: Pixels, number: int, holders: Sequence[Any]) -> DicomSlice:
    path = file.path

    def entry(group: str, name: str, count: int) -> tuple[float, ...] | None:
        for holder in holders:
            inner = [holder] if holder is file.dataset else _value(path, holder, group) or []
            if inner and (found := _numbers(path, inner[0], name, count)) is not None:
                return found
        return None

    position = entry("PlanePositionSequence", "ImagePositionPatient", 3)
    orientation = entry("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    spacing = entry("PixelMeasuresSequence", "PixelSpacing", 2)
    thickness = entry("PixelMeasuresSequence", "SpacingBetweenSlices", 1)
    thickness = thickness or entry("PixelMeasuresSequence", "SliceThickness", 1)
    slope = entry("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercept = entry("PixelValueTransformationSequence", "RescaleIntercept", 1)
    if slope is None and intercept is None and holders[-1] is not file.dataset:  # the whole file may be scaled at once
        slope, intercept = (_numbers(path, file.dataset, name, 1) for name in ("RescaleSlope", "RescaleIntercept"))
    if (slope is None) != (intercept is None):
        raise ReadError(path, "the header states only one of RescaleSlope and RescaleIntercept")
    if slope is not None and slope[0] == 0:
        raise ReadError(path, "RescaleSlope is 0: no grey values are left")
    return DicomSlice(
        file=file,
        pixels=pixels,
        number=number,
        position=None if position is None else np.array(position),
        orientation=None if orientation is None else _directions(path, orientation),
        spacing=None if spacing is None or min(spacing) == 0 else (spacing[1], spacing[0]),
        thickness=None if thickness is None or thickness[0] == 0 else abs(thickness[0]),
        slope=1.0 if slope is None else slope[0],
        intercept=0.0 if intercept is None else intercept[0],
        scaled=slope is not None or intercept is not None,
    )


def _directions(path: Path, orientation: Sequence[float]) -> Float64[np.ndarray, "2 3"]:
    """Return both directions with a length of exactly one; headers round them."""
    directions = np.reshape(orientation, (2, 3)).astype(np.float64)
    lengths = np.linalg.norm(directions, axis=1)
    if abs(lengths - 1).max() > 0.01 or abs(directions[0] @ directions[1]) > 0.01:
        shown = ", ".join(f"{value:g}" for value in orientation)
        raise ReadError(path, f"ImageOrientationPatient ({shown}) is no pair of directions at right angles")
    return directions / lengths[:, None]


def modality_of(file: DicomFile) -> str | None:
    """Return "ct", "mr", "pet" or "us" where the header says so."""
    return MODALITIES.get(_text(file.path, file.dataset, "Modality", ""))


def num_frames_of(file: DicomFile) -> int:
    """Return how many frames the header states."""
    return _whole(file.path, file.dataset, "NumberOfFrames", 1)


def series_of(file: DicomFile) -> str:
    """Return the UID of the file's series, "" where it is missing."""
    return _text(file.path, file.dataset, "SeriesInstanceUID", "")


def _value(path: Path, dataset: Any, name: str) -> Any:
    try:
        return dataset.get(name)
    except Exception as error:  # pydicom raises many kinds for a damaged value
        raise ReadError(path, f"{name} cannot be read: the header is damaged") from error


def _text(path: Path, dataset: Any, name: str, default: str) -> str:
    return str(_value(path, dataset, name) or default).strip()


def _whole(path: Path, dataset: Any, name: str, default: int) -> int:
    numbers = _numbers(path, dataset, name, 1)
    if numbers is None:
        return default
    if not numbers[0].is_integer():
        raise ReadError(path, f"{name} is {numbers[0]:g}; a whole number is needed")
    return int(numbers[0])


def _numbers(path: Path, dataset: Any, name: str, count: int) -> tuple[float, ...] | None:
    """Return so many finite numbers, None where the entry is missing or empty."""
    value = _value(path, dataset, name)
    if value is None or value == "" or (isinstance(value, Sequence) and not len(value)):
        return None
    try:
        numbers = tuple(float(v) for v in ([value] if count == 1 else value))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(n) for n in numbers):
        raise ReadError(path, f"{name} is {str(value)[:60]!r}; {count} numbers are needed")
    return numbers
