"""Checksums of JSON: a text states the CRC-32 of its other values, and reading compares the two."""

import json
import zlib
from pathlib import Path
from typing import Any

SEAL = b', "checksum": "'
"""What stands before the checksum at the end of a sealed line."""


class DamagedError(ValueError):
    """A file whose content does not fit its checksum."""


def checksum(content: bytes) -> str:
    """Return the CRC-32 of some bytes as eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with `checksum`, that of their JSON text with sorted keys."""
    return {**values, "checksum": checksum(json.dumps(values, sort_keys=True).encode())}


def sealed_line(values: dict[str, Any]) -> str:
    """Return the JSON text of the values in one line, with sorted keys and their checksum at its end."""
    text = json.dumps(values, sort_keys=True)
    return f'{text[:-1]}{SEAL.decode()}{checksum(text.encode())}"}}'


def is_whole_line(line: bytes) -> bool:
    """Return whether a sealed line fits its checksum; nothing is parsed."""
    content, mark, seal = line.rpartition(SEAL)
    return bool(mark) and seal.decode(errors="replace") == f'{checksum(content + b"}")}"}}'


def read_sealed(path: Path, *, remedy: str, inside: str = "") -> dict[str, Any]:
    """Return the values of a sealed JSON file, without their checksum.

    Args:
        path: The file.
        remedy: What to do about a damaged file, for the message.
        inside: The key of the sealed values, where the whole file is not sealed.

    Raises:
        DamagedError: The file is no JSON, or does not fit its checksum.
        FileNotFoundError: There is no such file.
    """
    try:
        values = json.loads(path.read_bytes())
        values = values[inside] if inside else values
        stated = values.pop("checksum")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise DamagedError(f"{path} is damaged: it is no JSON with a checksum; {remedy}") from None
    if sealed(values)["checksum"] != stated:
        raise DamagedError(f"{path} is damaged: it does not fit its checksum; {remedy}")
    return values
