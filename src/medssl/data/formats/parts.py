"""The files that an image consists of beside the one that names it."""

from pathlib import Path

from medssl.data.formats.base import ReadError
from medssl.data.formats.metaimage import metaimage_header
from medssl.data.formats.nrrd import nrrd_header

PAIRS = {".hdr": (".img", ".IMG", ".mat"), ".img": (".hdr", ".HDR", ".mat")}
"""Files that lie beside one half of an Analyze or NIfTI pair."""
HEADERS = {".mhd": metaimage_header, ".mha": metaimage_header, ".nhdr": nrrd_header, ".nrrd": nrrd_header}


def other_parts(path: Path) -> list[Path]:
    """Return the files that hold voxels or the place of an image apart from the file that names it; mostly none."""
    ending = path.suffix.lower()
    if ending in HEADERS:
        try:
            data = HEADERS[ending](path).data.path
        except ReadError:
            return []  # the reader says why
        return [data] if data != path and data.is_file() else []
    return [part for part in map(path.with_suffix, PAIRS.get(ending, ())) if part.is_file()]
