"""The text header of NRRD files (.nrrd, .nhdr)."""

import math
import re
from pathlib import Path

from medssl.data.formats.base import ReadError
from medssl.data.formats.text_header import (
    NOT_OF_KIND,
    UNITS_MM,
    DataPart,
    TextHeader,
    check_believable,
    check_sizes,
    header_lines,
    numbers,
)

CODINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "txt": "text", "text": "text", "ascii": "text", "hex": "hex"}
ALIASES = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip", "oldmin": "old min",
           "oldmax": "old max"}  # fmt: skip
SPACES = re.compile(r"((right|left)-anterior-superior|left-posterior-superior|ras|las|lps)(-time|t)?", re.I)
"""Words for a space whose axes have anatomical directions."""


def nrrd_header(path: Path) -> TextHeader:
    """Return what the header of an NRRD file says.

    Raises:
        ReadError: An entry that matters cannot be read, or the data are stored in a way that is not read.
    """
    lines, end = header_lines(path, rb"\r?\n\r?\n|\Z" if path.name.lower().endswith(".nhdr") else rb"\r?\n\r?\n")
    if not re.fullmatch(r"NRRD000[1-5]", lines[0].strip()):
        raise ReadError(path, NOT_OF_KIND)
    entries: dict[str, str] = {}
    for line in lines[1:]:
        if found := re.fullmatch(r"([^:#]+):(?!=)\s*(.*?)\s*", line):
            name = ALIASES.get(found[1].strip().lower(), found[1].strip().lower())
            if name in entries:
                raise ReadError(path, f"the header has two entries {name}")
            entries[name] = found[2]
    if not {"type", "dimension", "sizes", "encoding"} <= entries.keys():
        raise ReadError(path, NOT_OF_KIND)
    (dimension,) = numbers(path, "dimension", entries["dimension"], 1)
    if dimension not in (2, 3, 4):
        raise ReadError(path, f"the header states {entries['dimension'][:20]} dimensions; 2 to 4 are read")
    check_believable(path, check_sizes(path, "sizes", entries["sizes"], int(dimension)))
    stated = _states_spacing(path, entries, int(dimension))
    if {"old min", "old max"} & entries.keys():
        raise ReadError(path, "the header's entries old min and old max state a scale, which is not read")
    return TextHeader(_data(path, entries, end), stated, _unit_mm(path, entries), _no_directions(entries))


def _no_directions(entries: dict[str, str]) -> str:
    """Return why the axes have no anatomical directions, "" where they have."""
    if "space directions" not in entries:
        return "no entry space directions"
    if SPACES.fullmatch(entries.get("space", "")):
        return ""
    return f"its space is {entries['space'][:40]}" if "space" in entries else "no entry space"


def _states_spacing(path: Path, entries: dict[str, str], dimension: int) -> bool:
    """Return whether as many axes state a spacing as the image has sides."""
    needed = min(3, dimension)
    if "space directions" in entries:
        vectors = re.findall(r"\(([^()]*)\)|none", entries["space directions"], re.I)
        rest = re.sub(r"\([^()]*\)|none", "", entries["space directions"], flags=re.I)
        if rest.strip() or len(vectors) != dimension:
            raise ReadError(path, "the header's entry space directions cannot be read")
        sides = [numbers(path, "space directions", v.replace(",", " ")) for v in vectors if v]
        origin = entries.get("space origin", f"({','.join(['0'] * needed)})")
        if not re.fullmatch(r"\([^()]*\)", origin) or {len(side) for side in sides} != {needed}:
            raise ReadError(path, "the header's entries space directions and space origin do not go together")
        numbers(path, "space origin", origin[1:-1].replace(",", " "), needed)
        stated = [math.hypot(*side) for side in sides]
    else:
        words = [word for word in entries.get("spacings", "").split() if word.lower() != "nan"]
        stated = numbers(path, "spacings", " ".join(words)) if words else []
    if 0 in stated:
        raise ReadError(path, "the affine is singular: the header states a spacing of 0; repair the header")
    return len(stated) >= needed


def _unit_mm(path: Path, entries: dict[str, str]) -> float:
    """Return the millimetres of the one unit that all axes in space have."""
    names = "space units" if "space directions" in entries else "units"
    words = {word.strip().lower() for word in re.findall(r'"([^"]*)"', entries.get(names, ""))}
    lengths = {word for word in words if word in UNITS_MM} - ({""} if len(words) > 1 else set())
    if len(lengths) > 1 or (not lengths and words - {"s", "ms", "none", "???"}):
        raise ReadError(path, f"the header's entry {names} is {entries[names][:60]}; one unit of length is needed")
    return UNITS_MM[lengths.pop()] if lengths else 1.0


def _data(path: Path, entries: dict[str, str], end: int) -> DataPart:
    encoding = entries["encoding"].lower()
    if encoding not in CODINGS:
        raise ReadError(path, f"the encoding {encoding[:40]!r} is not read; raw and gzip are")
    name = entries.get("data file")
    if name is not None and (name.upper().startswith("LIST") or re.search(r"%\d*d", name)):
        raise ReadError(path, f"its voxels lie in several files ({name[:40]}), which is not read; write them as one")
    lines, skipped = (numbers(path, key, entries.get(key, "0"), 1)[0] for key in ("line skip", "byte skip"))
    if lines != 0 or not skipped.is_integer() or skipped < -1:
        raise ReadError(path, "lines or bytes that are skipped before the data in this way are not read")
    coding = CODINGS[encoding]
    start = end if name is None else 0
    data_file = path if name is None else path.parent / name
    if coding == "gzip":
        return DataPart(data_file, start, coding, behind=max(0, int(skipped)))
    return DataPart(data_file, None if skipped == -1 else start + int(skipped), coding)
