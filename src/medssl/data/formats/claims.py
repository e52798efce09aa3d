"""What a header claims, against what its file can hold."""

import math
from pathlib import Path

from medssl.data.formats.base import Header, ReadError, size_text

MAX_VOXELS = 2**32
"""Four times a whole-body CT of 1024 x 1024 x 1024; a header that claims more is broken."""
MAX_COMPRESSION = 1032
"""The best ratio that DEFLATE can reach: a header that claims more bytes per byte of the file is wrong."""


def check_claim(path: Path, header: Header) -> None:
    """Raise a ReadError where the header claims what its file cannot hold."""
    voxels = math.prod(header.shape) * header.num_channels
    claimed = voxels * header.voxel_bytes
    if min(header.shape) < 1 or header.num_channels < 1:
        raise ReadError(path, f"the header claims a side without voxels ({size_text(header.shape)})")
    if voxels > MAX_VOXELS:
        claim = f"{size_text(header.shape)} voxels ({claimed / 2**30:,.0f} GiB)"
        raise ReadError(path, f"the header claims {claim}; more than {MAX_VOXELS:,} are not believed")
    elsewhere = path.is_dir() or path.name.lower().endswith((".nhdr", ".mhd"))
    if not elsewhere and claimed > MAX_COMPRESSION * path.stat().st_size:
        found = f"{path.stat().st_size:,} bytes of file"
        raise ReadError(path, f"the header claims {claimed:,} bytes of voxels; {found} cannot hold them")
