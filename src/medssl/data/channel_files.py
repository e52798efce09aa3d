"""Cases in files of one channel each, CASE_0000, CASE_0001, ...: the layout of nnU-Net."""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from medssl.data.cases import Scan, file_name
from medssl.data.formats import stem

NUMBERED = re.compile(r"(.+)_(\d{4})")
"""The name of such a file without its suffix: case and number of the channel."""


def channel_of(file: Path) -> tuple[str, int] | None:
    """Return the case and the number of the channel that the name of a file states; None where it states none."""
    match = NUMBERED.fullmatch(stem(file))
    return None if match is None else (match[1], int(match[2]))


def by_case(files: Iterable[Path], scan: Scan) -> dict[str, dict[int, Path]]:
    """Return the files of each case by their channel; what has no such name, or comes twice, is noted as a problem."""
    found: dict[str, dict[int, Path]] = {}
    for file in files:
        if (named := channel_of(file)) is None:
            scan.reject(file, file_name(stem(file)), "the name does not end in a channel number such as _0000")
            continue
        case, number = named
        first = found.setdefault(case, {}).setdefault(number, file)
        if first is not file:
            scan.reject(file, file_name(case), f"{first.name} is the same channel; drop one of the two")
    return found


def in_order(
    files: Mapping[int, Path], scan: Scan, *, case: str, channels: Collection[int], stated: str
) -> tuple[Path, ...]:
    """Return the files of a case in the order of `channels`; without any where a channel is missing.

    A missing channel is noted as a problem of the first file; the others, and files of other channels, as skipped.

    Args:
        files: The files of the case by their channel.
        scan: The scan that notes them.
        case: The name of the case.
        channels: The channels that each case has.
        stated: Who says so, for the reason: "dataset.json states".
    """
    for number in sorted(files.keys() - set(channels)):
        held = f"{len(channels)} channel{'s' * (len(channels) != 1)}"
        scan.skip(files[number], f"channel {number:04d} is one too many: {stated} {held}, numbered from 0000")
    missing, known = [n for n in sorted(channels) if n not in files], [files[n] for n in sorted(channels) if n in files]
    if missing and known:
        scan.reject(known[0], case, f"channel {missing[0]:04d} is missing")
        for file in known[1:]:
            scan.skip(file, f"channel {missing[0]:04d} of its case is missing")
    return () if missing else tuple(known)
