"""Atomic files: written whole or not at all, by one process at a time; nothing half written is left behind."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medssl.data.workers import check_guard

PARTIAL = ".{}.*.partial"
"""Pattern of the names under which a file or folder is being written: its name and the process."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file gets the name `path` once the body is done, and is removed if it fails."""
    partial = _partial_of(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; it replaces `path` once the body is done, and is removed if it fails."""
    partial = _partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with this number
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing; a file that already holds the text is not touched."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write rows as sorted JSON lines; without rows, remove the file."""
    if rows:
        write_text(path, "".join(sorted(json.dumps(row, sort_keys=True) + "\n" for row in rows)))
    elif path.exists():
        path.unlink()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def clear_partial(folder: Path, name: str = "*") -> None:
    """Remove half-written files and folders of killed processes from a folder, all or those of one name."""
    for partial in folder.glob(PARTIAL.format(name)):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Hold the lock of a store: two processes never prepare it at once, and a killed one releases the lock.

    Raises:
        ValueError: A worker process imports a script without a guard: its parent holds the lock.
    """
    check_guard()
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works on {root}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
