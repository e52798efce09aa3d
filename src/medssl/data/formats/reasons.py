"""The reason why a file cannot be read, in words of our own, from the errors of its decoder."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from medssl.data.formats.base import ReadError
from medssl.data.formats.claims import NO_PERMISSION

NO_MEMORY = "the image does not fit into memory"
DAMAGED = "the file is damaged: its header or its voxels cannot be decoded"


@contextlib.contextmanager
def reasons_for(path: Path) -> Iterator[None]:
    """Turn every error of a parser into the reason why this file cannot be read."""
    try:
        yield
    except ReadError:
        raise
    except Exception as error:
        reason, lasting = _reason(error)
        raise ReadError(path, reason, lasting=lasting) from error


def _reason(error: BaseException) -> tuple[str, bool]:
    """Return the reason, and whether it lasts as long as the file stays as it is."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return NO_MEMORY, False
    if isinstance(error, PermissionError):
        return NO_PERMISSION, False
    if isinstance(error, EOFError) or re.search(r"got only|[Ee]xpected .*bytes|File cannot be read", text):
        return "the file is truncated: the voxels end early", True
    if "Unable to determine ImageIO" in text:
        return "the file is not an image of the kind its name says", True
    if re.search(r"gzip|zlib|decompress|CRC", f"{type(error).__module__} {type(error).__name__} {text}", re.I):
        return "the compressed voxels are damaged", True
    if isinstance(error, OSError) and error.errno is not None:
        return f"the file cannot be read ({os.strerror(error.errno)})", False
    return DAMAGED, True
