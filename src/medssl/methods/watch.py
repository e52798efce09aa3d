"""A watch over numbers of training that reads many steps at once, so that the device is rarely waited for."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from medssl.methods.base import Progress

WATCHED_STEPS = 20


class Watch:
    """Watch that warns once in a run, after the first window of `WATCHED_STEPS` steps whose numbers call for it.

    Args:
        judge: Function from a table of numbers, one row for each step, to a warning, or to None if nothing is wrong.
    """

    def __init__(self, judge: Callable[[Float[Tensor, "step number"]], str | None]) -> None:
        self.judge = judge
        self.rows: list[Tensor] | None = []

    def __call__(self, numbers: Sequence[Float[Tensor, ""]], progress: Progress) -> None:
        """Take the numbers of a step."""
        if self.rows is None:
            return
        self.rows.append(torch.stack(list(numbers)))
        if len(self.rows) < WATCHED_STEPS:
            return
        warning = self.judge(torch.stack(self.rows).cpu())  # one wait for the device in many steps
        self.rows = None if warning else []
        if warning:
            progress.warn(warning)
