"""A run that was killed, at the price of the run that was not: a copy of its folder from the middle of a step."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def copied_at(kind: type, step: int, folder: Path, copy: Path) -> Iterator[None]:
    """While a method of this kind trains in `folder`, copy the folder as the forward pass of a step begins.

    The copy is what a run leaves behind that is killed there; the run itself goes on to its end.
    """
    forward = kind.forward

    def copying(method, batch, progress):
        if progress.step == step and not copy.exists():
            shutil.copytree(folder, copy)
        return forward(method, batch, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", copying)
        yield
    assert copy.exists(), f"the run did not come to step {step}"
