"""What the text header of an NRRD or MetaImage file says of its data, before a decoder sees it."""

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from medssl.data.formats.base import ReadError, size_text
from medssl.data.formats.claims import MAX_BEHIND, MAX_VOXELS, irregularity

MAX_HEADER_BYTES = 2**20
MAX_CHANNELS = 2**16
NOT_OF_KIND = "the file is not an image of the kind its name says"
UNITS_MM = {"": 1.0, "mm": 1.0, "um": 1e-3, "cm": 10.0, "m": 1e3, "micron": 1e-3, "microns": 1e-3, "µm": 1e-3,
            "millimeter": 1.0, "millimeters": 1.0, "nm": 1e-6}  # fmt: skip
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.I)


@dataclass(frozen=True)
class DataPart:
    """Where the data of an image lie, and how they are coded.

    Args:
        path: File of the data, which is the image file where they are not detached.
        offset: Place of the first byte; None where the data end with the file.
        coding: "raw", "zlib", "gzip", "text" or "hex".
        behind: Bytes to pass over once the data are decompressed.
        kind: Order of bytes and kind of values, as in numpy's "<i", where this reader decodes them.
    """

    path: Path
    offset: int | None
    coding: str
    behind: int = 0
    kind: str = ""


@dataclass(frozen=True)
class TextHeader:
    """What a text header says.

    Args:
        data: Where the data lie.
        states_spacing: Whether it states a spacing.
        unit_mm: Millimetres of one unit of length.
        no_directions: Why the directions of the axes are not known; "" where they are stated.
    """

    data: DataPart
    states_spacing: bool
    unit_mm: float
    no_directions: str


def header_lines(path: Path, end: bytes) -> tuple[list[str], int]:
    """Return the lines of a header up to the one that matches `end`, and the place of the first byte behind it.

    Raises:
        ReadError: No line of the first part of the file is the end of a header.
    """
    with path.open("rb") as stream:
        head = stream.read(MAX_HEADER_BYTES)
    found = re.search(end, head)
    if found is None:
        raise ReadError(path, NOT_OF_KIND)
    return head[: found.end()].decode("latin-1").splitlines(), found.end()


def numbers(path: Path, name: str, text: str, count: int | None = None) -> list[float]:
    """Return the numbers of an entry.

    Raises:
        ReadError: It holds anything else, or another count of them.
    """
    words = text.split()
    if not words or (count is not None and len(words) != count) or not all(NUMBER.fullmatch(w) for w in words):
        needed = "numbers" if count is None else f"{count} numbers"
        raise ReadError(path, f"the header's entry {name} is {text[:60]!r}; {needed} are needed")
    return [float(w) for w in words]


def check_sizes(path: Path, name: str, text: str, dimension: int) -> list[int]:
    """Return the sides of an image, after a check that they are a belief's worth.

    Raises:
        ReadError: They are not whole, not positive, or too many voxels.
    """
    sides = numbers(path, name, text, dimension)
    if not all(side.is_integer() for side in sides):
        raise ReadError(path, f"the header's entry {name} is {text[:60]!r}; whole numbers are needed")
    sizes = [int(side) for side in sides]
    if min(sizes) < 1:
        raise ReadError(path, f"the header claims a side without voxels ({size_text(sizes)})")
    return sizes


def check_data(path: Path, data: DataPart, num_bytes: int, *, num_values: int) -> None:
    """Check the data of an image against its file: all of them, and nothing far behind them.

    Raises:
        ReadError: The file is missing, too short or too long.
    """
    if data.path != path and (reason := irregularity(data.path)):
        kind = data.path.suffix or "data file"
        missing = reason == "the file does not exist"
        raise ReadError(path, f"its {kind} is missing ({data.path.name})" if missing else f"{data.path.name}: {reason}")
    size = data.path.stat().st_size
    offset = max(0, size - num_bytes) if data.offset is None else data.offset
    found = size - offset
    if data.coding == "raw":
        if found < num_bytes:
            raise ReadError(path, f"the file is truncated: its voxels need {num_bytes:,} bytes, it has {found:,}")
        if data.offset is not None and found > num_bytes + _allowed_behind(path, data):
            raise ReadError(path, far_behind(num_bytes, found))
    elif data.coding in ("text", "hex") and found < num_values:
        raise ReadError(path, f"the file is truncated: it has {found:,} bytes of text for {num_values:,} values")


def _allowed_behind(path: Path, data: DataPart) -> int:
    """Return the bytes that may lie behind the voxels: behind a header in the same file, none but the end of a line."""
    return 1 if data.path == path else MAX_BEHIND


def far_behind(num_bytes: int, found: int) -> str:
    """Return the reason of data that go on behind the voxels."""
    return f"the data go on far behind the voxels: {num_bytes:,} bytes are stated, {found:,} or more are there"


def check_coded(path: Path, data: DataPart, num_bytes: int, *, num_values: int) -> None:
    """Check coded data by decoding them in small parts: as many as stated, undamaged, nothing far behind them.

    Raises:
        ReadError: The data are damaged, end early or go on.
    """
    if data.coding in ("text", "hex"):
        with data.path.open("rb") as stream:
            stream.seek(data.offset or 0)
            words = stream.read().split()
        found, stated = (len(words), num_values) if data.coding == "text" else (sum(map(len, words)), 2 * num_bytes)
        if found != stated:
            raise ReadError(path, f"the header states {stated:,} values of text, the file holds {found:,}")
    elif data.coding != "raw":
        needed, found = num_bytes + data.behind, 0
        for part in _decompressed(data):
            found += len(part)
            if found > needed + _allowed_behind(path, data):
                raise ReadError(path, far_behind(needed, found))
        if found < needed:
            raise ReadError(path, "the file is truncated: the voxels end early")


def unpacked(path: Path, data: DataPart, dtype: np.dtype[Any], num_values: int) -> Shaped[np.ndarray, " value"]:
    """Return the values in compressed data, which `check_coded` refuses where there are more or fewer of them.

    SimpleITK returns memory as it was, without an error, where `CompressedDataSize` is missing or wrong.
    """
    values = np.empty(num_values, dtype)
    room, place = values.view(np.uint8), 0
    for part in _decompressed(data):
        end = min(place + len(part), len(room))
        room[place:end] = np.frombuffer(part, np.uint8, max(0, end - place))
        place += len(part)
        if place > len(room) + _allowed_behind(path, data):
            raise ReadError(path, far_behind(len(room), place))
    if place < len(room):
        raise ReadError(path, "the file is truncated: the voxels end early")
    return values


def _decompressed(data: DataPart) -> Iterator[bytes]:
    """Yield the parts of compressed data; the checksum is looked at."""
    with data.path.open("rb") as stream:
        stream.seek(data.offset or 0)
        if data.coding == "gzip":
            with gzip.GzipFile(fileobj=stream) as unzipped:
                while part := unzipped.read(2**20):
                    yield part
            return
        decoder = zlib.decompressobj()
        while not decoder.eof:
            block = decoder.unconsumed_tail or stream.read(2**18)
            if not block:
                raise EOFError("the data end early")
            yield decoder.decompress(block, 2**20)
        if len(decoder.unused_data) + len(stream.read(2)) > 1:
            raise ReadError(data.path, "the data go on far behind the voxels: more than one compressed stream")


def check_channels_stated(path: Path, name: str, text: str) -> None:
    """Raise a ReadError unless an entry states a believable number of channels."""
    (count,) = numbers(path, name, text, 1)
    if not count.is_integer() or not 1 <= count <= MAX_CHANNELS:
        raise ReadError(path, f"the header's entry {name} is {text[:60]!r}; 1 to {MAX_CHANNELS} channels are believed")


def check_believable(path: Path, sizes: list[int]) -> None:
    """Raise a ReadError where a decoder's arithmetic might overflow; what fits is looked at later."""
    if math.prod(sizes) > MAX_VOXELS * MAX_CHANNELS:
        raise ReadError(path, f"the header claims {size_text(sizes)} voxels; more than {MAX_VOXELS:,} are not believed")
