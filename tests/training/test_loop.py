"""The order in which the loop calls a method, and what it does to gradients, seen by a method that writes it down."""

import csv
import importlib
import math
import sys

import pytest
import torch

from medssl.config import main
from medssl.pretrain import run

RECORDER = """
import torch
from medssl import Method, StepOutput

EVENTS, RUINED = [], set()

class Recorder(Method):
    '''The gradient of each of its two weights is 3, and made 30 by itself.'''

    def __init__(self, *, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch, progress):
        kind = "train" if self.training else "validate"
        EVENTS.append((kind, progress, progress.generator("draw").initial_seed()))
        return StepOutput(3 * self.encoder.weight.sum())

    def after_backward(self, progress):
        gradient = self.encoder.weight.grad
        EVENTS.append(("after_backward", progress, gradient.clone(), self.encoder.weight.detach().clone()))
        gradient.mul_(float("inf") if progress.step in RUINED else 10)

    def after_step(self, progress):
        EVENTS.append(("after_step", progress, self.encoder.weight.detach().clone()))
"""
METHOD = """
# @package _global_
method: {_target_: recorder_of_the_loop.Recorder, encoder: {_target_: torch.nn.Linear, in_features: 2, out_features: 1}}
views:
  _target_: medssl.data.views.ViewPlan
  groups:
    crop: {_target_: medssl.data.placements.RandomCrop, count: 1, size: [8, 8, 8], within: volume}
sampler: {_target_: medssl.data.sampling.Shuffled}
"""
STEPS, CLIP = 3, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("loop")
    (root / "conf" / "method").mkdir(parents=True)
    (root / "conf" / "recorder_of_the_loop.py").write_text(RECORDER)
    (root / "conf" / "method" / "recorder.yaml").write_text(METHOD)
    return root


def train(folder, name, *more):
    """The recorder's events of a run: two micro-batches a step, a validation after each, a rate of 1."""
    settings = ["data=phantoms", "data.num_cases=4", "data.size_voxel=32", f"store={folder / 'store'}"]
    settings += [f"trainer.max_steps={STEPS}", "batch_size=2", "accumulate=2", "validate_every=1", "checkpoint_every=1"]
    settings += ["optimizer=sgd", "optimizer.lr=1", "optimizer.momentum=0", "optimizer.nesterov=false"]
    settings += ["optimizer.weight_decay=0", "optimizer.final_fraction=1", f"optimizer.clip_norm={CLIP}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder / "conf"), *sys.path])
        events = importlib.import_module("recorder_of_the_loop").EVENTS
        events.clear()
        command = ["--config-dir", str(folder / "conf"), "method=recorder", f"output_dir={folder / name}"]
        main("pretrain", run, arguments=[*command, *settings, *more])
    return list(events)


@pytest.fixture(scope="module")
def events(folder):
    return train(folder, "run")


def test_each_step_ends_with_one_after_backward_and_one_after_step_of_its_own_progress(events):
    calls = [(kind, progress.step, progress.micro) for kind, progress, *_ in events if kind != "validate"]
    step = [("train", 0), ("train", 1), ("after_backward", 1), ("after_step", 1)]
    assert calls == [(kind, number, micro) for number in range(STEPS) for kind, micro in step]


def test_gradients_are_clipped_between_after_backward_and_the_step(events):
    before = [event[2:] for event in events if event[0] == "after_backward"]
    after = [event[2] for event in events if event[0] == "after_step"]
    for (gradient, weight), moved in zip(before, after, strict=True):
        assert torch.equal(gradient, torch.full((1, 2), 3.0))
        torch.testing.assert_close(weight - moved, torch.full((1, 2), CLIP / math.sqrt(2)))


def test_the_norm_of_the_changed_gradient_before_clipping_is_written_down(folder, events):
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        norms = [float(row["grad_norm"]) for row in csv.DictReader(file)]
    assert norms == pytest.approx([30 * math.sqrt(2)] * STEPS)


def test_validation_knows_where_the_run_stands_and_repeats_its_draws(events):
    seen = [(progress.step, progress.epoch, draw) for kind, progress, draw, *_ in events if kind == "validate"]
    first = seen[0][2]
    assert seen == [(step, pytest.approx(step * 2 / 3), first) for step in range(1, STEPS + 1)]
    assert first not in [event[2] for event in events if event[0] == "train"]


def test_a_gradient_that_is_not_finite_stops_before_it_harms_the_weights(folder, events, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["recorder_of_the_loop"], "RUINED", {1})
    with pytest.raises(SystemExit) as stop:
        train(folder, "ruined")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: step 2: grad_norm = inf; cases phantom_")
    assert message.count("phantom_") == 2
    saved = torch.load(folder / "ruined" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert saved["state_dict"]["method.encoder.weight"].isfinite().all()


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(folder, events, capsys, monkeypatch):
    recorder = sys.modules["recorder_of_the_loop"].Recorder

    def ruin(self, progress):
        if progress.step == 1:
            torch.nn.init.constant_(self.encoder.weight, math.nan)

    monkeypatch.setattr(recorder, "after_step", ruin)
    with pytest.raises(SystemExit) as stop:
        train(folder, "harmed")
    assert stop.value.code == 2
    assert "error: step 2: weights are not finite" in capsys.readouterr().err
    assert torch.load(folder / "harmed" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
