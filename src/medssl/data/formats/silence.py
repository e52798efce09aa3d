"""Silence of libraries that write to the console from C++."""

import contextlib
import os
import threading
from collections.abc import Iterator

_SILENCE = threading.Lock()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress all that ITK and its libraries write to the console from C++."""
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    with _SILENCE:
        saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            os.close(sink)
