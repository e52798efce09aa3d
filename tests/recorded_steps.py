"""Ten steps of a tiny configuration, held against the losses that are recorded in `golden`.

Each `methods/test_*_configs.py` states its `TEN_STEPS`. Tests compare them; `python -m tests.record` takes them anew.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medssl.building import build
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.training.optim import build_optimizer

GOLDEN = Path(__file__).parent / "golden"
NUM_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class TenSteps:
    """What the recorded steps of a tiny configuration are taken with.

    Args:
        name: of the method's configuration and of the file of its losses.
        values: the resolved settings of a run; a function, since composing them takes seconds.
        batch: the views that a step sees.
        optimizer: settings that differ from those of the run.
        clip_norm: largest norm of all gradients; None does not clip.
        float64: compute in 64 bits, for losses that amplify the rounding of 32 bits, as hard negatives do.
        rel, abs: how far a test lets a loss be from the recorded one.
    """

    name: str
    values: Callable[[], Mapping[str, Any]]
    batch: Callable[[int], Mapping[str, View]]
    optimizer: Mapping[str, Any] | None = None
    clip_norm: float | None = None
    float64: bool = False
    rel: float = 5e-3
    abs: float | None = None


def read_recorded(name: str, folder: Path = GOLDEN) -> dict[str, Any]:
    """Return what is recorded of a configuration: `terms` (names) and `losses` (a row a step)."""
    return json.loads(recorded_file(name, folder).read_text())


def recorded_file(name: str, folder: Path = GOLDEN) -> Path:
    """Return the file of a configuration's recorded losses."""
    return folder / f"{name}_ten_steps.json"


def assert_recorded(steps: TenSteps) -> None:
    """Check that the steps still give the recorded losses."""
    recorded = read_recorded(steps.name)
    for found, expected in zip(take(steps, recorded["terms"]), recorded["losses"], strict=True):
        assert found == pytest.approx(expected, rel=steps.rel, abs=steps.abs)


def take(steps: TenSteps, terms: list[str]) -> list[list[float]]:
    """Train for ten steps and return the losses of `terms`, a row a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if steps.float64 else before)
    try:
        return _take(steps, terms)
    finally:
        torch.set_default_dtype(before)


def _take(steps: TenSteps, terms: list[str]) -> list[list[float]]:
    values = steps.values()
    torch.manual_seed(0)
    method = build(values["method"], base=Method)
    settings = {**values["optimizer"], **(steps.optimizer or {})}
    optimizer, schedule = build_optimizer(settings, method.param_groups(), total_steps=200)
    losses = []
    for step in range(NUM_STEPS):
        progress = Progress(step, NUM_STEPS, step / 2, 5.0, 0)
        torch.manual_seed(step)
        views = steps.batch(step)
        if steps.float64:
            views = {name: replace(view, image=view.image.double()) for name, view in views.items()}
        output = method(views, progress)
        losses.append([output.logs[term].item() for term in terms])
        output.loss.backward()
        method.after_backward(progress)
        if steps.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(method.parameters(), steps.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step(progress)
    return losses
