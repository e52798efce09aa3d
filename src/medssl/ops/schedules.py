"""Schedules: values that change over a run, as functions of the step or epoch."""

import math


def cosine(step: float, total_steps: float, *, start: float, end: float, warmup_steps: int = 0) -> float:
    """Return the value of half a cosine from `start` at the end of the warm-up to `end` at `total_steps`.

    The warm-up rises linearly from 0 at step 0 to `start` at its last step, `warmup_steps - 1`. Past `total_steps` the
    value stays at `end`.

    Source: arXiv:2104.14294.
    """
    if step < warmup_steps:
        return start * step / max(warmup_steps - 1, 1)
    share = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def teacher_temperature(epoch: float, epochs: float, *, start: float, end: float) -> float:
    """Return a teacher's temperature: `start` in epoch 0 (the first), `end` from epoch `epochs - 1`, linear between.

    Source: arXiv:2104.14294, released code; repository alibaba-damo-academy/alice, loss.py.
    """
    return linear_ramp(epoch, max(epochs - 1, 0), start=start, end=end)


def linear_ramp(position: float, length: float, *, start: float, end: float) -> float:
    """Return the value of a line from `start` at 0 to `end` at `length`, constant after; `end` where `length` is 0."""
    return end if position >= length else start + (end - start) * position / length
