"""Stop signals: Ctrl-C, SIGTERM and SIGUSR1 (SLURM: time is short).

Outside of training a signal stops the process at once, in training after the current step.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from medssl.launcher import local_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The exception of a stop by the user or the scheduler at a point where there is nothing to save."""


class StopSignals:
    """A context in which each signal raises `Stopped`.

    With `training` set, a signal leaves its name in `requested` instead. A second Ctrl-C always raises.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.training = False

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers; this is repeated after the trainer has replaced them by its own."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if not self.training or (self.requested and number == signal.SIGINT):
            raise Stopped(name)
        if not self.requested and local_rank() == 0:
            os.write(2, f"\n{name}: finishing the step under way, then saving (Ctrl-C again stops at once)\n".encode())
        self.requested = name


@contextmanager
def stoppable(resume_hint: Callable[[], str]) -> Iterator[StopSignals]:
    """Handle the signals inside the `with`: a stop prints `resume_hint()`, how to continue, and exits with code 130."""
    with StopSignals() as signals:
        try:
            yield signals
        except Stopped as stop:
            print(f"\nstopped by {stop}; {resume_hint()}", file=sys.stderr)
            sys.exit(130)
