"""Hashes of whole files, and the looks at files that tell which of them need not be read again."""

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

from medssl.data.atomic import write_text
from medssl.data.formats import is_dicom, is_other_kind, other_parts

SETTLED_NS = 2_000_000_000
"""Age of a change from which a look is kept: clocks of file systems tick in steps of up to two seconds."""

Look = tuple[int, int, str]
"""Size, time of the last change (ns) and hash of a file."""
Looks = dict[str, dict[str, Look]]
"""Looks by folder and name of the file."""


class Contents:
    """The hashes of files by their whole content.

    A file is read where its size or the time of its last change differ from those of the last look at it. It may be
    used by several threads.

    Args:
        last: The last looks.
        verify: Whether to read every file all the same.

    Attributes:
        looks: The looks at the files that were asked for.
    """

    def __init__(self, last: Looks | None = None, *, verify: bool = False) -> None:
        self.looks: Looks = {}
        self._last = {} if verify else last or {}
        self._lock = threading.Lock()

    @classmethod
    def remembered(cls, path: Path, *, verify: bool = False) -> "Contents":
        """Return the hashes whose looks a file holds; a missing or damaged file holds none."""
        try:
            listed = json.loads(path.read_bytes())
            looks = {folder: {name: _look(*look) for name, look in files.items()} for folder, files in listed.items()}
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            looks = {}
        return cls(looks, verify=verify)

    def save(self, path: Path) -> None:
        """Write the looks to a file; what cannot be written costs the next start a look at every file."""
        with contextlib.suppress(IsADirectoryError):
            write_text(path, json.dumps(self.looks, sort_keys=True, separators=(",", ":")) + "\n")

    def add(self, looks: Looks) -> None:
        """Add the looks of another process."""
        with self._lock:
            for folder, files in looks.items():
                self.looks.setdefault(folder, {}).update(files)

    def of(self, image: Path) -> list[str]:
        """Return what changes with an image: the hashes of its files.

        For a folder these are names and hashes of all files but those that stand beside a series, such as a log.
        """
        try:
            if image.is_dir():
                visible = (file for file in image.iterdir() if not file.name.startswith("."))
                names = sorted(file.name for file in visible if not is_other_kind(file) or is_dicom(file))
                return [text for name in names for text in (name, self.of_file(image / name))]
            return [self.of_file(file) for file in (image, *other_parts(image))]
        except OSError as error:
            return [type(error).__name__]

    def of_file(self, path: Path) -> str:
        """Return the SHA-256 of a file; where it cannot be read, a word for why."""
        try:
            return self._hash(path) if path.is_file() else "no file"  # a pipe would never end
        except OSError as error:
            return type(error).__name__

    def _hash(self, path: Path) -> str:
        now = time.time_ns()
        state = path.stat()
        folder, name = os.fsdecode(path.parent), path.name
        size, changed, digest = self._last.get(folder, {}).get(name, (-1, 0, ""))
        if (size, changed) != (state.st_size, state.st_mtime_ns):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if state.st_mtime_ns + SETTLED_NS < now:  # else it may change once more without a new time
            with self._lock:
                self.looks.setdefault(folder, {})[name] = (state.st_size, state.st_mtime_ns, digest)
        return digest


def _look(size: int, changed: int, digest: str) -> Look:
    return int(size), int(changed), str(digest)
