"""Image file formats: the header as the file states it, and a function that loads voxels in the file's order."""

import contextlib
import gzip
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

NIFTI_SUFFIXES = (".nii.gz", ".nii")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd")
MAX_VOXELS = 2**32
"""Four times a whole-body CT of 1024 x 1024 x 1024; a header that claims more is broken."""
MAX_COMPRESSION = 1032
"""The best ratio that DEFLATE can reach: a header that claims more bytes per byte of the file is wrong."""
MAX_SCOUT_SLICES = 7
"""A series this short beside a longer one in its folder is a scout view or a report, not a second scan."""
IMAGE_CLASSES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(([1-35-7]|12|13|14|20|77|128|130)(\.|$)|4($|\.[134]($|\.))|481\.1$)"
)
"""Storage classes of images: radiography, CT, US, MR (no spectra), NM, secondary capture, PET, RT images and others.

Source: DICOM PS3.4, table B.5-1.
"""

_SILENCE = threading.Lock()


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


def open_image(path: Path) -> tuple[Header, Load]:
    """Return the header of an image file or of the DICOM series in a folder, and the function that loads its voxels.

    Raises:
        ReadError: The file is not an image, its voxel type is not supported, or its header claims what it cannot hold.
    """
    if path.is_dir():
        return _open_series(path)
    if not path.exists():
        raise ReadError(path, "the file does not exist")
    if path.stat().st_size == 0:
        raise ReadError(path, "the file is empty (0 bytes)")
    return (_open_nifti if path.name.lower().endswith(NIFTI_SUFFIXES) else _open_itk)(path)


def _open_nifti(path: Path) -> tuple[Header, Load]:
    import nibabel

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # header repairs of no consequence
    try:
        image: Any = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ReadError(path, "the file is not a NIfTI image, whatever its name says") from error
    proxy, dtype = image.dataobj, image.header.get_data_dtype()
    if dtype.kind not in "iuf":
        kind = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, f"of type {dtype}")
        raise ReadError(path, f"the voxels are {kind}; grey values are needed")
    scaled = (proxy.slope, proxy.inter) != (1, 0)
    whole = dtype.kind in "iu" and float(proxy.slope).is_integer() and float(proxy.inter).is_integer()
    shape, num_channels = _sides_and_channels(path, image.shape)
    header = Header(shape, num_channels, image.affine.astype(np.float64), dtype.itemsize, whole)
    _check_claim(path, header)
    needed, found = math.prod(image.shape) * dtype.itemsize + proxy.offset, path.stat().st_size
    if not path.name.lower().endswith(".gz") and needed > found:
        raise ReadError(path, f"the file is truncated: its voxels need {needed:,} bytes, it has {found:,}")
    layout = ((*shape, num_channels), dtype, proxy.offset, proxy.slope, proxy.inter)

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            voxels = nibabel.arrayproxy.ArrayProxy(stream, layout, mmap=False)
            if channel is not None:
                array = np.asarray(voxels[..., channel : channel + 1])
            else:
                array = np.asarray(voxels, dtype=np.float32 if scaled else None)
            while stream.read(2**20):  # the checksum stands at the end
                pass
        return array.astype(np.float32 if scaled or dtype.itemsize > 8 else dtype.newbyteorder("="), copy=False)

    return header, load


def _open_itk(path: Path) -> tuple[Header, Load]:
    reader = _itk_reader(path)
    size = (*reader.GetSize(), 1)[:3] if reader.GetDimension() == 2 else reader.GetSize()
    shape, num_channels = _sides_and_channels(path, (*size, reader.GetNumberOfComponents()))
    affine = _affine_from_lps(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
    header = Header(shape, num_channels, affine, *_itk_type(path, reader.GetPixelID()))
    _check_claim(path, header)
    return header, _itk_loader(reader, shape)


def _open_series(folder: Path) -> tuple[Header, Load]:
    import SimpleITK as sitk

    with _silenced():
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
    slices = [_itk_reader(Path(file)) for file in whole[0]]
    if len(sizes := {s.GetSize() for s in slices}) > 1:
        raise ReadError(folder, f"the slices differ in size: {', '.join(sorted(size_text(s[:2]) for s in sizes))}")
    first = reader = slices[0]
    shape = _three(first.GetSize())
    affine = _affine_from_lps(first.GetDirection(), first.GetSpacing(), first.GetOrigin())
    if len(slices) > 1:
        shape = (*shape[:2], len(slices))
        affine[:3, 2] = _slice_step(folder, slices)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(whole[0])
    header = Header(shape, first.GetNumberOfComponents(), affine, *_itk_type(folder, first.GetPixelID()))
    _check_claim(folder, header)
    return header, _itk_loader(reader, shape)


def _itk_reader(file: Path) -> Any:
    """Return SimpleITK's reader of one file, with the header read."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    with _silenced():
        reader.ReadImageInformation()
    return reader


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


def _itk_type(path: Path, pixel_id: int) -> tuple[int, bool]:
    import SimpleITK as sitk

    name = sitk.GetPixelIDValueAsString(pixel_id)
    if "complex" in name:
        raise ReadError(path, "the voxels are complex numbers; grey values are needed")
    bits = re.search(r"(\d+)-bit", name)
    return int(bits[1]) // 8 if bits else 8, "integer" in name


def _itk_loader(reader: Any, shape: Sequence[int]) -> Load:
    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        import SimpleITK as sitk

        with _silenced():
            image = reader.Execute()
        array = sitk.GetArrayFromImage(image)  # (..., z, y, x[, component])
        num = image.GetDimension()
        array = array.transpose([*reversed(range(num)), *range(num, array.ndim)]).reshape(*shape, -1)
        return array if channel is None else array[..., channel : channel + 1]

    return load


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


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (int(n) for n in (*shape, 1, 1)[:3])
    return x, y, z


def _sides_and_channels(path: Path, shape: Sequence[int]) -> tuple[tuple[int, int, int], int]:
    channels = [int(n) for n in shape[3:] if n != 1]
    if len(channels) > 1:
        raise ReadError(path, f"the image is {size_text(shape)}: three sides and channels can be read, no more")
    return _three(shape), math.prod(channels)


def _check_claim(path: Path, header: Header) -> None:
    voxels = math.prod(header.shape) * header.num_channels
    claimed = voxels * header.voxel_bytes
    if min(header.shape) < 1 or header.num_channels < 1:
        raise ReadError(path, f"the header claims a side without voxels ({size_text(header.shape)})")
    if voxels > MAX_VOXELS:
        claim = f"{size_text(header.shape)} voxels ({claimed / 2**30:,.0f} GiB)"
        raise ReadError(path, f"the header claims {claim}; more than {MAX_VOXELS:,} are not believed")
    elsewhere = path.is_dir() or path.name.lower().endswith((".nhdr", ".mhd"))
    if not elsewhere and claimed > MAX_COMPRESSION * path.stat().st_size:
        found = f"{path.stat().st_size:,} bytes of file"
        raise ReadError(path, f"the header claims {claimed:,} bytes of voxels; {found} cannot hold them")


def size_text(shape: Sequence[int]) -> str:
    """Return the sides as text: 24 x 24 x 21."""
    return " x ".join(map(str, shape))


@contextlib.contextmanager
def reasons_for(path: Path) -> Iterator[None]:
    """Turn every error of a parser into the reason why this file cannot be read."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        raise ReadError(path, _reason(error)) from error


def _reason(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "the image does not fit into memory"
    if isinstance(error, PermissionError):
        return "the file may not be read (permission denied)"
    if isinstance(error, EOFError) or re.search(r"got only|[Ee]xpected .*bytes|File cannot be read", text):
        return "the file is truncated: the voxels end early"
    if "Unable to determine ImageIO" in text:
        return "the file is not an image of the kind its name says"
    if re.search(r"gzip|zlib|decompress|CRC", f"{type(error).__module__} {type(error).__name__} {text}", re.I):
        return "the compressed voxels are damaged"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"cannot be read: {lines[-1] if lines else type(error).__name__}"


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Suppress all that ITK and its libraries write to the console from C++."""
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    with _SILENCE:
        saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(sink)
