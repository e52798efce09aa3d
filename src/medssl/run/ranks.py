"""The processes of one run: they wait until rank 0 has brought the store up to date, and end together."""

import contextlib
import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medssl.config import user_message
from medssl.data.atomic import PARTIAL, whole_file
from medssl.launcher import is_launched, is_started_by_trainer, launch_key, process_rank
from medssl.run.signals import Stopped

if TYPE_CHECKING:
    import lightning as L

READY = "ready"
POLL_S = 0.5
STALL_S = 1800.0
"""A single case takes minutes at most; if nothing changes in a store for so long, rank 0 has stopped."""
OLD_S = 120.0
"""A file of rank 0 that is older than this process by so much comes from another launch."""

_STARTED = time.time()


class RankZeroFailedError(ValueError):
    """The error of the other ranks when rank 0 could not prepare the store."""


@contextlib.contextmanager
def rank_zero_first(folder: Path, store: Path) -> Iterator[bool]:
    """Run the body on rank 0 (True) first; the other ranks (False) enter it when rank 0 has left it.

    Rank 0 writes `ready` or its error into a file of the run folder; `remove_markers` removes that file.

    Raises:
        RankZeroFailedError: Rank 0 failed, or nothing has changed in `store` for half an hour.
    """
    word = word_file(folder)
    if process_rank() != 0:
        _wait(word, store)
        yield False
        return
    remove_markers(folder)
    try:
        yield True
    except BaseException as error:
        _say(word, f"{type(error).__name__}: {error}")
        raise
    _say(word, READY)


def word_file(folder: Path) -> Path:
    """Return the file in which rank 0 of this launch writes `ready` or its error."""
    return folder / f".store-{hashlib.sha256(launch_key().encode()).hexdigest()[:12]}"


def remove_markers(folder: Path) -> None:
    """Remove the files that rank 0 left for the other ranks."""
    for word in folder.glob(".store-*"):
        word.unlink(missing_ok=True)


def end_together(trainer: "L.Trainer", module: "L.LightningModule", exception: BaseException) -> None:
    """End this process with code 2 if training failed and other processes train too; called by `on_exception`.

    The process that fails prints the reason and ends at once. The others notice by a failing collective and end without
    a traceback. If a failed process stayed alive, the others would wait for it in their collectives.
    """
    if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt | Stopped):
        return
    if lost_others(exception):
        if trainer.is_global_zero:
            print(f"stopped: another process is gone ({str(exception).splitlines()[0]})", file=sys.stderr)
    elif not isinstance(exception, SystemExit):
        message = user_message(exception) if isinstance(exception, Exception) else None
        if not trainer.is_global_zero:
            print(file=sys.stderr)  # the progress bar of rank 0 may stand on the line
        print(f"error: {message}" if message else "".join(traceback.format_exception(exception)), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def lost_others(error: BaseException) -> bool:
    """Return whether `error` comes from a failed collective, which is what happens when another process ended."""
    import torch

    text = r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket"
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(text, str(error), flags=re.IGNORECASE) is not None
    )


def _say(word: Path, text: str) -> None:
    if is_launched():
        with whole_file(word) as partial:
            partial.write_text(text, encoding="utf-8")


def _wait(word: Path, store: Path) -> None:
    if is_started_by_trainer():
        return  # once the store was ready
    changed, state = time.monotonic(), None
    while True:
        with contextlib.suppress(OSError):
            if word.stat().st_mtime > _STARTED - OLD_S:
                said = word.read_text(encoding="utf-8")
                if said != READY:
                    raise RankZeroFailedError(f"rank 0 could not make the store ready: {said}")
                return
        with contextlib.suppress(OSError):
            now = max(path.stat().st_mtime_ns for path in (store, *store.glob(PARTIAL.format("*"))))
            if now != state:
                changed, state = time.monotonic(), now
        if time.monotonic() - changed > STALL_S:
            minutes = f"{STALL_S / 60:g} minutes"
            raise RankZeroFailedError(f"rank 0 has said nothing and {store} has not changed for {minutes}; start again")
        time.sleep(POLL_S)
