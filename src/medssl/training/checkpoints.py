"""The checkpoint of a run, last.ckpt: written at regular steps and when the run is asked to stop."""

import contextlib
from pathlib import Path

import lightning as L
import torch

from medssl.data.atomic import whole_file
from medssl.data.module import Batch
from medssl.run.signals import StopSignals
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule


class LastCheckpoint(StepCallback):
    """Keeps `last.ckpt`: every `every` optimiser steps, at the end, and at a stop signal, which also ends the run.

    Saves only between optimiser steps. The file is replaced in one move, so that a kill leaves the old or the new one.
    """

    def __init__(self, path: Path, *, every: int, signals: StopSignals) -> None:
        self.path, self.every, self.signals = path, every, signals
        self.saved_step = -1

    def start(self, trainer: L.Trainer) -> None:
        """Let signals wait for the end of the step."""
        self.saved_step = self.step
        self.signals.install()
        self.signals.training = True

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Save if this step is due, or if the run is asked to stop."""
        stop = trainer.strategy.reduce_boolean_decision(bool(self.signals.requested), all=False)
        if stop or self.step % self.every == 0:
            self.save(trainer)
        if stop:
            self.signals.requested = self.signals.requested or "another rank"
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last state of the run."""
        if self.saved_step != self.step:
            self.save(trainer)
        self.signals.training = False

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of the current step.

        Raises:
            ValueError: The weights are not finite.
        """
        if not all(bool(weight.isfinite().all()) for weight in trainer.lightning_module.parameters()):
            raise ValueError(
                f"step {self.step}: weights are not finite; {self.path} stays as it was before;"
                " lower optimizer.lr or set optimizer.clip_norm, then resume"
            )
        with whole_file(self.path) if trainer.is_global_zero else contextlib.nullcontext(self.path) as file:
            trainer.save_checkpoint(file)  # all ranks take part, the first one writes
        self.saved_step = self.step


def check_checkpoint(path: Path, module: MethodModule, *, may_be_done: bool = False) -> None:
    """Check that a run can continue from a checkpoint.

    Raises:
        ValueError: The file is not a checkpoint of ours, belongs to another network or optimiser, or leaves nothing to
            train.
    """
    try:
        saved = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        step, groups, _ = saved["global_step"], saved["optimizer_states"][0]["param_groups"], saved["loops"]
        theirs = {name: tuple(tensor.shape) for name, tensor in saved["state_dict"].items()}
        _ = saved["pytorch-lightning_version"]
    except Exception as error:
        raise ValueError(
            f"resume: {path} is not a whole checkpoint of a run; give a run folder or its checkpoints/last.ckpt"
        ) from error
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        first = f"{wrong[0]} has shape {theirs.get(wrong[0], 'none')} there, {ours.get(wrong[0], 'none')} here"
        others = f", and {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
        raise ValueError(f"resume: {path} is of another network: {first}{others}; give the method settings of that run")
    now = module.new_optimizer()[0].param_groups
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in now] or any(
        then.keys() - group.keys() and group.keys() - then.keys() for then, group in zip(groups, now, strict=True)
    ):
        raise ValueError(f"resume: {path} was trained by another optimiser; give the optimizer settings of that run")
    if step >= module.total_steps + may_be_done:
        raise ValueError(f"resume: {path} is at step {step} of {module.total_steps}; raise trainer.max_steps to go on")
