"""DICOM series: the files of a folder that belong together, and their volume."""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from medssl.data.formats.base import Header, Load, ReadError, Spacing
from medssl.data.formats.claims import check_claim, irregularity
from medssl.data.formats.dicom_files import (
    DicomFile,
    dicom_class,
    has_dicom_suffix,
    is_image_class,
    read_dicom,
)
from medssl.data.formats.dicom_frames import DicomSlice, frames_of, modality_of, num_frames_of, series_of
from medssl.data.formats.dicom_grid import affine_of, sorted_frames
from medssl.data.formats.dicom_voxels import grey_type, grey_values

MAX_SCOUT_SLICES = 7
"""A series this short beside a longer one in its folder is a scout view or a report, not a second scan."""
LOW_IS_BRIGHT = "MONOCHROME1: low values are shown bright; the values are read as they are stored"
NO_INTERCEPT = "a CT whose header states no RescaleIntercept: its values may not be Hounsfield units"
NO_IMAGE = "a DICOM object that is no image (structures, a plan, a report, ...)"


def open_dicom(path: Path, *, assumed: Spacing | None = None) -> tuple[Header, Load]:
    """Return the header of the DICOM series in a folder, or of one file, and the function that loads its voxels.

    Raises:
        ReadError: The folder holds no series or several, a file of the series cannot be read, or its slices do not
            make a volume; the reason names the file.
    """
    left_out: list[tuple[str, str]] = []
    with _named(path):
        files = _series_in(path, left_out) if path.is_dir() else [read_dicom(path)]
        frames = [frame for file in files for frame in frames_of(file)]
        _check_kinds(path, files, frames)
        frames = sorted_frames(path, frames)
        affine = affine_of(path, frames, assumed=assumed)
        modality = modality_of(files[0])
    kind, pixels = grey_type(frames), frames[0].pixels
    shape = (pixels.columns, pixels.rows, len(frames))
    header = Header(
        shape,
        1,
        affine,
        kind.itemsize,
        kind.kind in "iu",
        modality=modality,
        left_out=tuple(sorted(left_out)),
        series=series_of(files[0]),
        doubts=_doubts(frames[0], modality),
    )
    check_claim(path, header, held_in=None)  # the length of each file's voxels was looked at

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z 1"]:
        with _named(path):
            return grey_values(frames)[..., None]

    return header, load


def _doubts(frame: DicomSlice, modality: str | None) -> tuple[str, ...]:
    """Return what is odd in headers whose slices agree with each other."""
    if modality == "ct":
        return () if frame.scaled else (NO_INTERCEPT,)
    return (LOW_IS_BRIGHT,) if frame.pixels.low_is_bright else ()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the fault of a file into one of its folder, which is the image."""
    try:
        yield
    except ReadError as error:
        if error.path == path:
            raise
        raise ReadError(path, f"{error.path.name}: {error.reason}", lasting=error.lasting) from error


def _series_in(folder: Path, left_out: list[tuple[str, str]]) -> list[DicomFile]:
    """Return the files of the one series of a folder."""
    images, others, objects = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        kind = None if irregularity(path) else dicom_class(path)
        if kind is None:
            others.append(path)
        elif is_image_class(kind):
            images.append(path)
        else:
            objects.append(path)
    patterns = {_pattern(path) for path in images}
    for path in others:
        if has_dicom_suffix(path) or _pattern(path) in patterns or (not path.suffix and _is_empty(path)):
            images.append(path)
        elif not path.suffix:
            left_out.append((str(path), "no DICOM file, and not named like a slice"))
    series: dict[str, list[DicomFile]] = defaultdict(list)
    for path in sorted(images):
        file = read_dicom(path)
        series[series_of(file)].append(file)
    for path in objects:
        try:
            file = read_dicom(path)
        except ReadError as error:  # most objects have no voxels; a slice that is cut looks like one
            if _pattern(path) in patterns:
                raise ReadError(path, error.reason) from error
        else:
            if "Rows" in file.dataset and series_of(file) in series:
                raise ReadError(path, "its class is not one of images, and it belongs to the series")
        left_out.append((str(path), NO_IMAGE))
    return _chosen(folder, list(series.values()), left_out)


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _pattern(path: Path) -> str:
    """Return a name that all slices of a series share: with one sign for each number."""
    return re.sub(r"\d+", "#", path.name)


def _chosen(folder: Path, series: Sequence[list[DicomFile]], left_out: list[tuple[str, str]]) -> list[DicomFile]:
    """Return the series that is a scan; shorter ones beside it are noted."""
    lengths = [sum(map(num_frames_of, files)) for files in series]
    scans = [i for i, length in enumerate(lengths) if length > MAX_SCOUT_SLICES or len(series) == 1]
    if len(scans) != 1:
        counts = ", ".join(str(lengths[i]) for i in scans)
        held = f"{len(scans)} DICOM series of {counts} slices" if scans else "no DICOM series"
        raise ReadError(folder, f"the folder holds {held}; each series needs a folder of its own")
    for i, files in enumerate(series):
        if i != scans[0]:
            why = f"of a series of {lengths[i]} slices beside one of {lengths[scans[0]]}: a scout view"
            left_out += [(str(file.path), why) for file in files]
    return series[scans[0]]


def _check_kinds(path: Path, files: Sequence[DicomFile], frames: Sequence[DicomSlice]) -> None:
    """Check that the files of a series go together, as far as places do not matter."""
    if len(files) > 1 and len(frames) > len(files):
        raise ReadError(path, f"{len(files)} files of several frames each in one series; give each a folder of its own")
    kinds = {modality_of(file) for file in files}
    if len(kinds) > 1:
        raise ReadError(path, f"files of several modalities ({', '.join(map(str, kinds))}) in one series")
    num_bright = sum(frame.pixels.low_is_bright for frame in frames)
    if 0 < num_bright < len(frames) and kinds != {"ct"}:  # the values of CT are HU, however they are shown
        raise ReadError(path, f"{num_bright} of {len(frames)} slices are MONOCHROME1, the others MONOCHROME2")
    without = [frame.name for frame in frames if not frame.scaled]
    if 0 < len(without) < len(frames):
        share = f"{len(without)} of {len(frames)} slices, such as {without[0]}"
        raise ReadError(path, f"no RescaleSlope in {share}: their grey values are not those of the others")
