"""The images of a folder tree, and a line for each file of an image kind that is not read."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from medssl.data.cases import Scan
from medssl.data.formats import (
    ARCHIVES,
    NO_PERMISSION,
    PICTURES,
    dicom_class,
    has_dicom_suffix,
    has_image_suffix,
    irregularity,
    is_dicom,
    is_image_class,
    is_other_kind,
)

NUM_DICOM_PROBES = 256
NUM_NAMED = 3
STORE = "store.json"
"""The file by which a folder is a prepared store, such as the one that is being made."""
UNREAD = (
    ".brik", ".ecat", ".ecat7", ".gipl", ".head", ".inr", ".mif", ".mih", ".minc", ".mnc", ".mnc2", ".mrc", ".nia",
    ".par", ".v", ".vti", ".vtk", ".xif",
)  # fmt: skip
"""Endings of images that are not read."""
WRAPPED = re.compile(
    r"\.(nii|nrrd|nhdr|mha|mhd|hdr|img|mgh|mgz|dcm|dicom|brik|gipl|mif|mnc)"
    r"( ?\(\d+\)|~|\.?(gz|bz2|xz|zst|lz4|zip|7z|tar|bak|old|part|crdownload|tmp))+$"
)
"""Names of images that are compressed in a way that is not read, or that a browser or an editor has changed."""


def images_below(root: Path, scan: Scan) -> Iterator[Path]:
    """Yield image files and DICOM folders, sorted, without hidden names, .zarr folders and stores; follow links once.

    What is of an image kind and is not yielded is noted in `scan`.
    """
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        scan.reject(error.filename, "", f"the folder cannot be read ({error.strerror})")

    for name, below, files in os.walk(root, followlinks=True, onerror=unreadable):
        folder = Path(name)
        state = folder.stat()
        if (state.st_dev, state.st_ino) in seen or STORE in files:
            below.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        _note_passed_over(folder, below, files, scan)
        below[:] = sorted(name for name in below if not name.startswith(".") and not name.endswith(".zarr"))
        paths = _regular([folder / name for name in sorted(files) if not name.startswith(".")], scan)
        yield from (path for path in paths if has_image_suffix(path))
        others = [path for path in paths if not has_image_suffix(path) and not _has_header(path)]
        if _holds_slices(folder, [path for path in others if _may_be_dicom(path)], scan):
            yield folder


def is_half(path: Path) -> bool:
    """Return whether a file is the .img of a pair, by its name."""
    return path.suffix.lower() == ".img"


def _has_header(path: Path) -> bool:
    """Return whether a file is the .img of a pair whose .hdr lies beside it."""
    return is_half(path) and any(path.with_suffix(suffix).exists() for suffix in (".hdr", ".HDR"))


def note_unlisted(root: Path, scan: Scan) -> None:
    """Note image files below a root that the layout of its source gives no part."""
    known = [row["file"] for row in (*scan.skipped, *scan.problems)]
    for case in scan.cases:
        known += [str(file) for file in (case.image, *case.more_channels, case.label) if file is not None]
    mentioned = {os.path.normpath(file) for file in known}
    found = Scan()
    for path in images_below(root, found):
        found.skip(path, "no case: the list or the layout of the source does not name it")
    named = {os.path.realpath(file) for file in mentioned}
    scan.skipped += [
        {"file": row["file"], "reason": row["reason"]}
        for row in (*found.skipped, *found.problems)
        if os.path.normpath(row["file"]) not in mentioned and os.path.realpath(row["file"]) not in named
    ]


def _regular(paths: Sequence[Path], scan: Scan) -> list[Path]:
    """Return the paths that may be opened; images among the others are problems."""
    regular = []
    for path in paths:
        is_image = has_image_suffix(path) or has_dicom_suffix(path) or is_half(path)
        reason = irregularity(path)
        if reason is None and (has_dicom_suffix(path) or not path.suffix) and not os.access(path, os.R_OK):
            reason = NO_PERMISSION
        if reason is None and is_half(path) and not _has_header(path) and not is_dicom(path):
            reason = f"its .hdr is missing ({path.stem}.hdr)"
        if reason is None:
            regular.append(path)
        elif is_image:
            scan.reject(path, "", reason)
        else:
            scan.skip(path, reason)
    return regular


def _note_passed_over(folder: Path, below: Sequence[str], files: Sequence[str], scan: Scan) -> None:
    """Note by a count what is passed over in a folder without being looked at."""

    def note(names: Sequence[str], text: str) -> None:
        if names:
            shown = ", ".join(sorted(names)[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
            scan.skip(folder, f"{len(names)} {text} ({shown})")

    hidden = [name for name in files if name.startswith(".") and _is_image_name(name)]
    note([*hidden, *(name for name in below if name.startswith("."))], "hidden images or folders are left out")
    note([name for name in below if name.endswith(".zarr")], "folders .zarr are not read")
    visible = [name for name in files if not name.startswith(".")]
    note([name for name in visible if name.lower().endswith(PICTURES)], "pictures are not read: no format of volumes")
    note([name for name in visible if name.lower().endswith(ARCHIVES)], "archives are not opened; unpack them")
    note([name for name in visible if _is_unread(name)], "images of a format that is not read")


def _is_unread(name: str) -> bool:
    """Return whether a name is that of an image of a kind that is not read."""
    is_known = has_image_suffix(Path(name)) or has_dicom_suffix(Path(name)) or is_half(Path(name))
    return not is_known and (name.lower().endswith(UNREAD) or WRAPPED.search(name.lower()) is not None)


def _is_image_name(name: str) -> bool:
    path = Path(name)
    return has_image_suffix(path) or has_dicom_suffix(path) or is_half(path)


def _may_be_dicom(path: Path) -> bool:
    return not (_is_unread(path.name) or path.name.lower().removesuffix(".gz").endswith(UNREAD) or is_other_kind(path))


def _holds_slices(folder: Path, files: Sequence[Path], scan: Scan) -> bool:
    """Return whether one of the files is a DICOM image or is named like one.

    A folder that only might hold some is noted as skipped.
    """
    likely = sorted(files, key=lambda file: not has_dicom_suffix(file) and file.suffix != "")
    probes = likely[:NUM_DICOM_PROBES]
    num_objects = 0
    for file in probes:
        kind = dicom_class(file)
        if kind is not None and is_image_class(kind):
            return True
        num_objects += kind is not None
    if sum(map(has_dicom_suffix, probes)) > num_objects:
        return True  # a file is named like a slice and is none: the reader says why
    if num_objects:
        scan.skip(folder, "DICOM objects, none of them an image (structures, plans, reports, ...)")
    elif len(probes) < len(files):
        left = len(files) - len(probes)
        scan.skip(folder, f"none of {len(probes)} files looked into is DICOM; {left} more were not opened")
    return False
