"""The reason why a file cannot be read, from the errors of its decoder."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from medssl.data.formats.base import ReadError


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
