"""Ten steps of a tiny configuration, to be held against the losses that are recorded in `golden`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.training.optim import build_optimizer


def assert_recorded(
    name: str, values: Mapping[str, Any], batch: Callable[[int], Mapping[str, View]], **tolerance: float
) -> None:
    """The losses in `golden/NAME_ten_steps.json` are those of the settings `values` on four batches in turn."""
    recorded = json.loads((Path(__file__).parent / "golden" / f"{name}_ten_steps.json").read_text())
    torch.manual_seed(0)
    method = instantiate(values["method"], _convert_="all")
    optimizer, schedule = build_optimizer(values["optimizer"], method.param_groups(), total_steps=200)
    losses = []
    for step in range(10):
        progress = Progress(step, 10, step / 2, 5.0, 0)
        torch.manual_seed(step)
        output = method(batch(step % 4), progress)
        losses.append([output.logs[term].item() for term in recorded["terms"]])
        output.loss.backward()
        method.after_backward(progress)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step(progress)
    for found, expected in zip(losses, recorded["losses"], strict=True):
        assert found == pytest.approx(expected, **tolerance)
