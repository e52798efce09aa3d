"""What a file claims, against what it is, what its bytes can hold, and the memory there is."""

import math
import os
import stat
from pathlib import Path

from medssl.data.formats.base import Header, ReadError, size_text

MAX_VOXELS = 2**32
"""Four times a whole-body CT of 1024 x 1024 x 1024; a header that claims more is broken."""
MAX_COMPRESSION = 1032
"""The best ratio that DEFLATE can reach: a header that claims more bytes per byte of the file is wrong."""
MAX_BEHIND = 512
"""Bytes that may lie behind the voxels: a writer may fill up a block of its disk."""
NO_PERMISSION = "the file may not be read (permission denied)"
KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def irregularity(path: Path) -> str | None:
    """Return why a path must not be opened, as it is neither a file nor a folder; None where it may be."""
    try:
        mode = path.stat().st_mode  # of what a link leads to
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else "the file does not exist"
    except PermissionError:
        return NO_PERMISSION
    except OSError as error:
        return f"the file cannot be reached ({os.strerror(error.errno or 0)})"
    return next(
        (f"{kind}, not a file; only files and folders are opened" for is_kind, kind in KINDS if is_kind(mode)), None
    )


def check_readable(path: Path) -> None:
    """Check that a path leads to a file with content, or to a folder, without opening it.

    Raises:
        ReadError: It is missing, a pipe or a device, empty, or may not be read.
    """
    if reason := irregularity(path):
        raise ReadError(path, reason, lasting=reason != NO_PERMISSION)
    if path.is_file() and path.stat().st_size == 0:
        raise ReadError(path, "the file is empty (0 bytes)")
    if not os.access(path, os.R_OK):
        raise ReadError(path, NO_PERMISSION, lasting=False)


def check_claim(path: Path, header: Header, *, held_in: int | None) -> None:
    """Check that the voxels that a header claims can be in their file and fit into memory.

    Args:
        path: File that is named where they cannot.
        header: Header with the claim.
        held_in: Bytes of the compressed data that must hold the voxels; None where they are not known.

    Raises:
        ReadError: A side has no voxel, or the voxels are too many for belief, for the file or for memory.
    """
    voxels = math.prod(header.shape) * header.num_channels
    claimed = voxels * header.voxel_bytes
    if min(header.shape) < 1 or header.num_channels < 1:
        raise ReadError(path, f"the header claims a side without voxels ({size_text(header.shape)})")
    if voxels > MAX_VOXELS:
        claim = f"{size_text(header.shape)} voxels ({claimed / 2**30:,.0f} GiB)"
        raise ReadError(path, f"the header claims {claim}; more than {MAX_VOXELS:,} are not believed")
    if held_in is not None and claimed > MAX_COMPRESSION * held_in:
        raise ReadError(
            path, f"the header claims {claimed:,} bytes of voxels; {held_in:,} bytes of file cannot hold them"
        )
    check_memory(path, claimed)


def check_memory(path: Path, num_bytes: int) -> None:
    """Raise a ReadError, which does not last, where so many bytes are more than the memory that is free."""
    free = free_memory()
    if free is not None and num_bytes > free:
        needed, found = (f"{n / 2**30:.3g} GiB" for n in (num_bytes, free))
        raise ReadError(path, f"the image does not fit into memory: it needs {needed}, {found} are free", lasting=False)


def free_memory() -> int | None:
    """Return the bytes that may still be taken, of the machine and of its control group; None where neither says."""
    known = [n for n in (_free_in_machine(), _free_in_group()) if n is not None]
    return min(known, default=None)


def _free_in_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in (line.split(":", 1) for line in lines)}
        return sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _free_in_group(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what the limits of version 2 and of version 1 leave; file pages that can be dropped count as free."""
    for limit, taken, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = (int((root / name).read_text(encoding="utf-8")) for name in (limit, taken))
            rows = (
                line.split()
                for line in (root / limit).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
            )
            return max(0, most - used + int(dict(rows).get(dropped, 0)))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None
