"""DICOM files one by one: whether a file is one, its header by pydicom, and where its voxels lie."""

import contextlib
import gzip
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from medssl.data.formats.base import ReadError
from medssl.data.formats.claims import check_readable

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
DEFLATED = b"1.2.840.10008.1.2.1.99"
UNDEFINED = 0xFFFFFFFF
MAX_HEADER_BYTES = 2**28
"""A header is not read further: a compressed file could go on for ever."""
IMAGE_CLASSES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(([1-35-7]|12|13|14|20|77|128|130)(\.|$)|4($|\.[134]($|\.))|481\.1$)"
)
"""Storage classes of images: radiography, CT, US, MR (no spectra), NM, secondary capture, PET, RT images and others.

Source: DICOM PS3.4, table B.5-1.
"""

_QUIET = threading.Lock()


@dataclass(frozen=True, eq=False)
class DicomFile:
    """A DICOM image without its voxels.

    Args:
        path: The file.
        dataset: Header, as pydicom reads it.
        offset: Place of the voxels in the file, unzipped.
        length: Bytes of the voxels, `UNDEFINED` where they are coded in fragments.
        coding: Transfer syntax of coded voxels, "" of plain ones.
        little_endian: Order of the bytes of plain voxels.
    """

    path: Path
    dataset: Any
    offset: int
    length: int
    coding: str
    little_endian: bool


def has_dicom_suffix(path: Path) -> bool:
    """Return whether the name ends as those of DICOM files do, compressed or not."""
    return path.name.lower().removesuffix(".gz").endswith(DICOM_SUFFIXES)


def is_dicom(file: Path) -> bool:
    """Return whether the file begins as DICOM files do, with or without a preamble."""
    return dicom_class(file) is not None


def dicom_class(file: Path) -> str | None:
    """Return the class of a DICOM object (SOP class UID); None for other files.

    It is "" if it is missing, or if the two places that state it differ.
    """
    from pydicom.filereader import read_partial

    try:
        with opened(file) as stream:
            head = stream.read(256)
            if not begins_as_dicom(head):
                return None
            stream.seek(0)
            with quiet():
                dataset = read_partial(stream, lambda tag, vr, length: tag > 0x00080016, force=True)
                kinds = {dataset.file_meta.get("MediaStorageSOPClassUID"), dataset.get("SOPClassUID")} - {None, ""}
            return str(kinds.pop()) if len(kinds) == 1 else ""
    except OSError:
        return None
    except Exception:  # pydicom raises many kinds for a damaged header
        return ""


def begins_as_dicom(head: bytes) -> bool:
    """Return whether bytes begin as DICOM: DICM behind a preamble, or an element of group 2 or 8 and a next one.

    Source: DICOM PS3.10, 7.1 (the preamble) and PS3.5, 7.1 (elements).
    """
    if head[128:132] == b"DICM":
        return True
    at = 0
    for first in (True, False):
        group, explicit = int.from_bytes(head[at : at + 2], "little"), head[at + 4 : at + 6].isupper()
        length = int.from_bytes(head[at + 6 : at + 8] if explicit else head[at + 4 : at + 8], "little")
        if group not in ((2, 8) if first else (2, 8, 16)) or length > 128 or len(head) < at + 8:
            return False
        at += 8 + length
    return True


def is_image_class(kind: str) -> bool:
    """Return whether objects of the class may be images: not structures, plans, reports, signals, directories."""
    return not kind or IMAGE_CLASSES.match(kind) is not None


def read_dicom(path: Path) -> DicomFile:
    """Return a DICOM image without its voxels.

    Raises:
        ReadError: The file is empty, cut, damaged or no DICOM; its reason reads on after the name of the file.
    """
    from pydicom import dcmread

    check_readable(path)
    with opened(path) as stream:
        head = stream.read(4096)
        if not begins_as_dicom(head):
            raise ReadError(path, "the file is no DICOM file, whatever its name says")
        if DEFLATED in head:
            raise ReadError(path, "the whole file is deflated (transfer syntax 1.2.840.10008.1.2.1.99); save it plain")
        try:
            stream.seek(0)
            with quiet():
                dataset = dcmread(stream, stop_before_pixels=True, force=True)
                implicit, little = map(bool, dataset.original_encoding)
                element = stream.read(8 if implicit else 12)
                offset = stream.tell()
        except ReadError:
            raise
        except Exception as error:  # pydicom raises many kinds for a damaged header
            raise ReadError(path, "the file is cut or damaged: its header cannot be read") from error
    if len(element) < 8:
        raise ReadError(path, "the file is cut: it ends before its voxels")
    order: Literal["little", "big"] = "little" if little else "big"
    group, number, length = (int.from_bytes(part, order) for part in (element[:2], element[2:4], element[-4:]))
    if not implicit and element[4:6] not in (b"OW", b"OB"):
        raise ReadError(path, "the file is damaged where its voxels begin")
    if (group, number) != (0x7FE0, 0x0010):
        raise ReadError(path, "the voxels are floating-point pixel data, which are not read")
    coding = _coding(path, dataset, fragments=length == UNDEFINED)
    return DicomFile(path, dataset, offset, length, coding, little)


def _coding(path: Path, dataset: Any, *, fragments: bool) -> str:
    """Return the transfer syntax of coded voxels, "" of plain ones."""
    from pydicom.uid import UID, AllTransferSyntaxes

    syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID") or ""))
    known = syntax in AllTransferSyntaxes
    coded = known and syntax.is_compressed
    if (syntax and not known) or coded != fragments:
        raise ReadError(path, f"the transfer syntax {syntax or 'that is missing'} does not go with its voxels")
    return str(syntax) if coded else ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unzipped where its name ends in .gz; its header has an end.

    Raises:
        ReadError: The file is named .gz and is not compressed.
    """
    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as plain:
            yield plain
        return
    with path.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            raise ReadError(path, "not compressed although named .gz; rename it")
        raw.seek(0)
        with _Zipped(fileobj=raw) as stream:
            yield cast(BinaryIO, stream)


class _Zipped(gzip.GzipFile):
    """A compressed file whose header has an end: `MAX_HEADER_BYTES`."""

    def read(self, size: int | None = -1) -> bytes:
        """Read so many bytes."""
        self._check(self.tell() + max(size or 0, 0))
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place."""
        self._check(offset)
        return super().seek(offset, whence)

    @staticmethod
    def _check(place: int) -> None:
        if place > MAX_HEADER_BYTES:
            raise EOFError("a header that does not end")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, which warns of values that this reader checks on its own."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with _QUIET, warnings.catch_warnings():  # the filters belong to the process
        warnings.simplefilter("ignore")
        yield
