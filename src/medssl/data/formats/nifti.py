"""NIfTI files and pairs, Analyze pairs and FreeSurfer's MGH files, by nibabel."""

import gzip
import itertools
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from medssl.data.formats.base import (
    NO_SPACING,
    Header,
    Load,
    ReadError,
    Spacing,
    directions_assumed,
    sides_and_channels,
    three_sides,
)
from medssl.data.formats.claims import MAX_BEHIND, check_claim, check_memory, irregularity
from medssl.data.formats.text_header import UNITS_MM, far_behind

MGH_SUFFIXES = (".mgz", ".mgh")
PAIR_SUFFIXES = (".hdr", ".img")
UNIT_CODES_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""Millimetres of the units that the field xyzt_units names; 0 says nothing, which means mm."""
MAX_OFFSET = 2**26
"""Bytes before the voxels that are believed: extensions of the header lie there."""
SIZES = (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c")
"""The first bytes of headers of NIfTI 1 and 2: their length, 348 or 540, in either order of bytes."""
MGH_FOOTER = 2**20
"""Bytes that may lie behind the voxels of an MGH file: times, transforms and command lines."""


def open_nifti(path: Path, *, assumed: Spacing | None = None) -> tuple[Header, Load]:
    """Return the header of a NIfTI, Analyze or MGH file, and the function that loads its voxels.

    Raises:
        ReadError: The file is of another kind, damaged, or states no spacing where none is assumed.
    """
    header_file, data_file = _files(path)
    zipped = _is_zipped(header_file)
    _check_offset(path, header_file, zipped=zipped)
    stored = _stored(header_file)
    dtype, slope, inter = stored.dtype, stored.slope, stored.inter
    if dtype.kind not in "iuf":
        kind = {"c": "complex numbers", "V": "colours"}.get(dtype.kind, f"of type {dtype}")
        raise ReadError(path, f"the voxels are {kind}; grey values are needed")
    shape, num_channels = sides_and_channels(path, stored.shape)
    scaled = (slope, inter) != (1, 0)
    whole = dtype.kind in "iu" and float(slope).is_integer() and float(inter).is_integer()
    affine, is_assumed = _affine(path, stored, header_file, zipped=zipped, assumed=assumed)
    header = Header(
        shape,
        num_channels,
        affine,
        dtype.itemsize,
        whole,
        spacing_is_assumed=is_assumed,
        doubts=_doubts(stored, affine),
    )
    found = data_file.stat().st_size
    check_claim(path, header, held_in=found if zipped else None)
    num_values = math.prod(shape) * num_channels
    check_memory(path, num_values * (4 if scaled else dtype.itemsize))
    needed = num_values * dtype.itemsize + stored.offset
    behind = MGH_FOOTER if path.name.lower().endswith(MGH_SUFFIXES) else MAX_BEHIND
    if not 0 <= stored.offset <= MAX_OFFSET:
        raise ReadError(path, f"the header says that voxels begin at byte {stored.offset:,}, which is not believed")
    if not zipped and needed > found:
        raise ReadError(path, f"the file is truncated: its voxels need {needed:,} bytes, it has {found:,}")
    if not zipped and found > needed + behind:
        raise ReadError(path, far_behind(needed, found))
    layout = ((*shape, num_channels), dtype, stored.offset, slope, inter)

    def load(channel: int | None) -> Shaped[np.ndarray, "x y z c"]:
        import nibabel

        with gzip.open(data_file) if zipped else data_file.open("rb") as stream:
            voxels = nibabel.arrayproxy.ArrayProxy(stream, layout, mmap=False)
            if channel is not None:
                array = np.asarray(voxels[..., channel : channel + 1])
            else:
                array = np.asarray(voxels, dtype=np.float32 if scaled else None)
            stream.seek(needed)
            if len(stream.read(behind + 1)) > behind:  # the checksum stands at the end
                raise ReadError(path, far_behind(needed, needed + behind + 1))
        return array.astype(np.float32 if scaled or dtype.itemsize > 8 else dtype.newbyteorder("="), copy=False)

    return header, load


def _files(path: Path) -> tuple[Path, Path]:
    """Return the files of the header and of the voxels."""
    if not path.name.lower().endswith(PAIR_SUFFIXES):
        return path, path
    upper = path.suffix.isupper()
    header, data = (path.with_suffix(s.upper() if upper else s) for s in PAIR_SUFFIXES)
    for file in (header, data):
        if reason := irregularity(file):
            missing = reason == "the file does not exist"
            raise ReadError(
                path, f"its {file.suffix} is missing ({file.name})" if missing else f"{file.name}: {reason}"
            )
    return header, data


def _check_offset(path: Path, header_file: Path, *, zipped: bool) -> None:
    """Check where a NIfTI header says that voxels begin: nibabel reads all before it, however much that is.

    Raises:
        ReadError: It lies too far off, or in the header.
    """
    import nibabel

    with gzip.open(header_file) if zipped else header_file.open("rb") as stream:
        raw = stream.read(544)
    for kind, sizes in ((nibabel.Nifti1Header, SIZES[:2]), (nibabel.Nifti2Header, SIZES[2:])):
        length = kind.template_dtype.itemsize
        if raw[:4] in sizes and len(raw) >= length:
            offset = float(kind(raw[:length], check=False)["vox_offset"])
            least = 0 if header_file.suffix.lower() == ".hdr" else length  # nibabel would read the header as voxels
            if not least <= offset <= MAX_OFFSET:
                raise ReadError(path, f"the header says that voxels begin at byte {offset:,.0f}, which is not believed")


def _is_zipped(path: Path) -> bool:
    """Return whether the file is compressed, as its name must say."""
    name = path.name.lower()
    with path.open("rb") as stream:
        start = stream.read(2)
        if name.endswith((".gz", ".mgz")) and start != b"\x1f\x8b":
            start += stream.read(2)
            if start in (*SIZES, b"\0\0\0\x01"):  # the length of a header, or the version of an MGH file
                raise ReadError(path, f"not compressed although named .{name.rsplit('.', 1)[1]}; rename it")
    if not name.endswith((".gz", ".mgz")) and start == b"\x1f\x8b":
        packed = ".mgz" if path.suffix.lower() == ".mgh" else f"{path.suffix}.gz"
        raise ReadError(path, f"compressed although named {path.suffix}; rename it to {packed}")
    return name.endswith((".gz", ".mgz"))


@dataclass(frozen=True, eq=False)
class Stored:
    """How nibabel reads a header: shape, type and place of the voxels, their scale, and the map to RAS."""

    header: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: Float[np.ndarray, "4 4"]


def _stored(path: Path) -> Stored:
    import nibabel
    from nibabel.freesurfer.mghformat import MGHHeader

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # header repairs of no consequence
    try:
        if path.name.lower().endswith(MGH_SUFFIXES):
            with gzip.open(path) if path.name.lower().endswith(".mgz") else path.open("rb") as stream:
                header = MGHHeader.from_fileobj(stream)
            offset, slope, inter = header.get_data_offset(), 1.0, 0.0
            affine = header.get_affine()
        else:
            image: Any = nibabel.load(path)
            header, affine = image.header, image.affine
            offset, slope, inter = (getattr(image.dataobj, name) for name in ("offset", "slope", "inter"))
        shape = tuple(int(n) for n in header.get_data_shape())
        return Stored(header, shape, header.get_data_dtype(), int(offset), slope, inter, affine.astype(np.float64))
    except nibabel.filebasedimages.ImageFileError as error:
        kind = "NIfTI or Analyze" if path.suffix.lower() == ".hdr" else "NIfTI"
        raise ReadError(path, f"the file is not a {kind} image, whatever its name says") from error
    except (OSError, EOFError, MemoryError, zlib.error):
        raise
    except Exception as error:  # nibabel raises many kinds for a damaged header
        reason = "the header is damaged: its fields are of no known kind or contradict each other"
        raise ReadError(path, reason) from error


def _affine(
    path: Path, stored: Stored, header_file: Path, *, zipped: bool, assumed: Spacing | None
) -> tuple[Float[np.ndarray, "4 4"], bool]:
    """Return the map to RAS mm: nibabel's, in the unit of the header, and whether a spacing had to be assumed."""
    affine, header = stored.affine.copy(), stored.header
    with gzip.open(header_file) if zipped else header_file.open("rb") as stream:
        raw = stream.read(header.template_dtype.itemsize)
    missing, unit = _missing_spacing(path, header, raw)
    if missing.any():
        if assumed is None:
            raise ReadError(path, NO_SPACING)
        steps = np.where(missing, np.array(assumed) / unit, 1.0)  # nibabel reads a missing spacing as 1
        turned = affine[:3, :3] * steps
        if _is_centred(header):
            affine[:3, 3] = turned @ np.linalg.solve(affine[:3, :3], affine[:3, 3])
        affine[:3, :3] = turned
    affine[:3] *= unit
    return affine, bool(missing.any())


def _doubts(stored: Stored, affine: Float[np.ndarray, "4 4"]) -> tuple[str, ...]:
    """Return a sentence where a header holds no map to space, or two that lie more than half a voxel apart."""
    header = stored.header
    if "goodRASFlag" in header:
        return ()
    if "sform_code" not in header:
        return (directions_assumed("Analyze", affine),)
    codes = int(header["sform_code"]), int(header["qform_code"])
    if max(codes) <= 0:
        return (directions_assumed("the codes of qform and sform are 0", affine),)
    if min(codes) <= 0:
        return ()
    sides = three_sides(stored.shape)
    corners = np.array(list(itertools.product(*((0, side - 1) for side in sides), (1,))))
    try:
        other = header.get_qform()
    except Exception:  # nibabel raises many kinds for a quaternion that is none; the sform is the one in use
        return ("the qform is damaged; the sform is used",)
    apart = np.linalg.norm((corners @ (stored.affine - other).T)[:, :3], axis=1).max()
    step = np.linalg.norm(stored.affine[:3, :3], axis=0).max()
    if apart <= step / 2:
        return ()
    apart *= np.linalg.norm(affine[:3, :3], axis=0).max() / step  # in mm, whatever the unit of the header
    return (f"sform and qform place voxels up to {apart:.3g} mm apart; the sform is used",)


def _missing_spacing(path: Path, found: Any, raw: bytes) -> tuple[np.ndarray, float]:
    """Return the axes without a spacing, and the millimetres of the header's unit.

    Raises:
        ReadError: The header names a unit that is none of length.
    """
    if path.name.lower().endswith(MGH_SUFFIXES):
        if int.from_bytes(raw[28:30], "big") == 0:
            raise ReadError(path, "the header states no place in space (goodRASFlag is 0); convert the file with one")
        return np.zeros(3, dtype=bool), 1.0
    header = type(found)(raw, check=False)
    missing = np.asarray(header["pixdim"][1:4]) == 0
    if "xyzt_units" not in header:  # Analyze
        unit = bytes(header["vox_units"].item()).decode("latin-1").strip("\0 ").lower()
        return missing, UNITS_MM.get(unit, 1.0)
    if int(found["sform_code"]) > 0:
        missing[:] = False
    code = int(header["xyzt_units"]) & 7
    if code not in UNIT_CODES_MM:
        raise ReadError(path, f"the header's field xyzt_units is {int(header['xyzt_units'])}, no unit of length")
    return missing, UNIT_CODES_MM[code]


def _is_centred(header: Any) -> bool:
    """Return whether the place of the image follows from its middle, which no field states."""
    return "qform_code" not in header or int(header["qform_code"]) == 0
