"""The text header of MetaImage files (.mha, .mhd)."""

import re
from pathlib import Path

from medssl.data.formats.base import ReadError
from medssl.data.formats.text_header import (
    NOT_OF_KIND,
    UNITS_MM,
    DataPart,
    TextHeader,
    check_believable,
    check_channels_stated,
    check_sizes,
    header_lines,
    numbers,
)

TYPES = ("CHAR", "UCHAR", "SHORT", "USHORT", "INT", "UINT", "LONG", "ULONG", "LONG_LONG", "ULONG_LONG", "FLOAT",
         "DOUBLE")  # fmt: skip
FLAGS = ("BinaryData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "CompressedData")
VECTORS = ("Offset", "Origin", "Position", "CenterOfRotation", "ElementSpacing", "ElementSize")
MATRICES = ("TransformMatrix", "Rotation", "Orientation")


def metaimage_header(path: Path) -> TextHeader:
    """Return what the header of a MetaImage file says.

    Raises:
        ReadError: An entry that matters cannot be read, or the data are stored in a way that is not read.
    """
    lines, end = header_lines(path, rb"(^|\n)[ \t]*ElementDataFile[ \t]*=[^\n]*(\n|$)")
    entries: dict[str, str] = {}
    for line in lines:
        if found := re.fullmatch(r"\s*(\w+)\s*=\s*(.*?)\s*", line):
            if found[1] in entries:
                raise ReadError(path, f"the header has two entries {found[1]}")
            entries[found[1]] = found[2]
    if not {"NDims", "DimSize", "ElementType"} <= entries.keys():
        raise ReadError(path, NOT_OF_KIND)
    _check_entries(path, entries)
    unit = entries.get("DistanceUnits", "")
    if unit.lower() not in UNITS_MM and unit != "?":
        raise ReadError(path, f"the header's entry DistanceUnits is {unit[:60]!r}; um, mm and cm are known")
    stated = "ElementSpacing" in entries or "ElementSize" in entries
    turned = any(name in entries for name in MATRICES)
    why = "" if turned else f"no entry {MATRICES[0]}"
    return TextHeader(_data(path, entries, end), stated, UNITS_MM.get(unit.lower(), 1.0), why)


def _check_entries(path: Path, entries: dict[str, str]) -> None:
    (dimension,) = numbers(path, "NDims", entries["NDims"], 1)
    if dimension not in (2, 3, 4):
        raise ReadError(path, f"the header states {entries['NDims'][:20]} dimensions; 2 to 4 are read")
    num = int(dimension)
    check_believable(path, check_sizes(path, "DimSize", entries["DimSize"], num))
    kind = entries["ElementType"].removeprefix("MET_").removesuffix("_ARRAY")
    if kind not in TYPES:
        raise ReadError(path, f"the voxels are of type {entries['ElementType'][:40]}; grey values are needed")
    if "ElementNumberOfChannels" in entries:
        check_channels_stated(path, "ElementNumberOfChannels", entries["ElementNumberOfChannels"])
    for name in FLAGS:
        if name in entries and entries[name].lower() not in ("true", "false", "1", "0"):
            raise ReadError(path, f"the header's entry {name} is {entries[name][:60]!r}; True or False is needed")
    order = [entries[name].lower() in ("true", "1") for name in FLAGS[1:3] if name in entries]
    if len(set(order)) > 1:
        raise ReadError(path, f"the header's entries {FLAGS[1]} and {FLAGS[2]} contradict each other")
    for name, neutral in (("ElementToIntensityFunctionSlope", 1), ("ElementToIntensityFunctionOffset", 0)):
        if name in entries and numbers(path, name, entries[name], 1) != [neutral]:
            raise ReadError(path, f"the header's entry {name} is {entries[name][:40]}: such a scale is not read")
    for names, count in ((VECTORS, num), (MATRICES, num * num)):
        for name in names:
            if name in entries:
                numbers(path, name, entries[name], count)
    if "ElementSpacing" not in entries and "ElementSize" in entries:
        entries["ElementSpacing"] = entries["ElementSize"]
    if min(numbers(path, "ElementSpacing", entries.get("ElementSpacing", "1"))) <= 0:
        raise ReadError(path, f"the spacing {entries['ElementSpacing'][:60]} is not positive; repair the header")


def _data(path: Path, entries: dict[str, str], end: int) -> DataPart:
    name = entries.get("ElementDataFile", "")
    if name.upper().startswith("LIST") or "%" in name or not name:
        raise ReadError(path, f"its voxels lie in several files ({name[:40]}), which is not read; write them as one")
    local = name.upper() == "LOCAL"
    (skipped,) = numbers(path, "HeaderSize", entries.get("HeaderSize", "0"), 1)
    if not skipped.is_integer() or skipped < -1 or (local and skipped):
        raise ReadError(path, f"the header's entry HeaderSize is {entries['HeaderSize'][:40]!r}, which is not read")
    offset = end if local else None if skipped == -1 else int(skipped)
    coding = "raw"
    if entries.get("CompressedData", "False").lower() in ("true", "1"):
        coding = "zlib"
    elif entries.get("BinaryData", "True").lower() in ("false", "0"):
        coding = "text"
    msb = any(entries.get(key, "False").lower() in ("true", "1") for key in FLAGS[1:3])
    name_of_type = entries["ElementType"].removeprefix("MET_")
    kind = "f" if name_of_type in ("FLOAT", "DOUBLE") else "u" if name_of_type.startswith("U") else "i"
    return DataPart(path if local else path.parent / name, offset, coding, kind=(">" if msb else "<") + kind)
