"""DICOM series."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from medssl.data.formats.base import Header, Load, ReadError, size_text, three_sides
from medssl.data.formats.claims import check_claim
from medssl.data.formats.itk import affine_from_lps, itk_loader, itk_reader, itk_type, silenced

MAX_SCOUT_SLICES = 7
"""A series this short beside a longer one in its folder is a scout view or a report, not a second scan."""
IMAGE_CLASSES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(([1-35-7]|12|13|14|20|77|128|130)(\.|$)|4($|\.[134]($|\.))|481\.1$)"
)
"""Storage classes of images: radiography, CT, US, MR (no spectra), NM, secondary capture, PET, RT images and others.

Source: DICOM PS3.4, table B.5-1.
"""


def open_series(folder: Path) -> tuple[Header, Load]:
    """Return the header of the DICOM series in a folder, and the function that loads its voxels."""
    import SimpleITK as sitk

    with silenced():
        listed = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        series = [sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), name) for name in listed]
    found = {Path(file).name for files in series for file in files}
    unlisted = (dicom_class(file) for file in folder.iterdir() if file.name not in found)
    damaged = sum(kind is not None and is_image_class(kind) for kind in unlisted)
    if damaged:
        raise ReadError(folder, f"{damaged} DICOM files of the folder are damaged and cannot be read")
    whole = series if len(series) == 1 else [files for files in series if len(files) > MAX_SCOUT_SLICES]
    if len(whole) != 1:
        counts = ", ".join(str(len(files)) for files in whole)
        held = f"{len(whole)} DICOM series of {counts} slices" if whole else "no DICOM series"
        raise ReadError(folder, f"the folder holds {held}; each series needs a folder of its own")
    slices = [itk_reader(Path(file)) for file in whole[0]]
    if len(sizes := {s.GetSize() for s in slices}) > 1:
        raise ReadError(folder, f"the slices differ in size: {', '.join(sorted(size_text(s[:2]) for s in sizes))}")
    first = reader = slices[0]
    shape = three_sides(first.GetSize())
    affine = affine_from_lps(first.GetDirection(), first.GetSpacing(), first.GetOrigin())
    if len(slices) > 1:
        shape = (*shape[:2], len(slices))
        affine[:3, 2] = _slice_step(folder, slices)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(whole[0])
    header = Header(shape, first.GetNumberOfComponents(), affine, *itk_type(folder, first.GetPixelID()))
    check_claim(folder, header)
    return header, itk_loader(reader, shape)


def _slice_step(folder: Path, slices: Sequence[Any]) -> Float[np.ndarray, "3"]:
    """Return the step from slice to slice in RAS mm, after a check that all steps are alike."""
    origins = np.array([s.GetOrigin()[:3] for s in slices]) * [-1, -1, 1]
    steps = np.diff(origins, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    if lengths.min() < 1e-3:
        at = int(lengths.argmin()) + 1
        raise ReadError(folder, f"slices {at} and {at + 1} lie at the same place: two scans in one series")
    if np.linalg.norm(steps - np.median(steps, axis=0), axis=1).max() > 0.1 * np.median(lengths):
        gaps = f"{lengths.min():.3g} to {lengths.max():.3g} mm apart"
        raise ReadError(folder, f"the slices are not evenly spaced ({gaps}): some are missing")
    return (origins[-1] - origins[0]) / len(steps)


def is_dicom(file: Path) -> bool:
    """Return whether the file begins as DICOM files do (the letters DICM at byte 128)."""
    return dicom_class(file) is not None


def dicom_class(file: Path) -> str | None:
    """Return the class of a DICOM object (media storage SOP class UID), "" if it is missing; None for other files.

    Source: DICOM PS3.10, 7.1 (the meta information is in explicit VR, little endian).
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(2048)
    except OSError:
        return None
    if head[128:132] != b"DICM":
        return None
    at = 132
    while head[at : at + 2] == b"\x02\x00":  # group 0002
        long = head[at + 4 : at + 6] in (b"OB", b"OW", b"UN", b"UT", b"SQ")
        start = at + (12 if long else 8)
        length = int.from_bytes(head[start - (4 if long else 2) : start], "little")
        if head[at + 2 : at + 4] == b"\x02\x00":
            return head[start : start + length].rstrip(b"\0 ").decode("ascii", "replace")
        at = start + length
    return ""


def is_image_class(kind: str) -> bool:
    """Return whether objects of the class may be images: not structures, plans, reports, signals, directories."""
    return not kind or IMAGE_CLASSES.match(kind) is not None
