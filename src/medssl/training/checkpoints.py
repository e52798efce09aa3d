"""last.ckpt, written every so often and when the run is asked to stop."""

from pathlib import Path

import lightning as L
import torch

from medssl.data.module import Batch
from medssl.training.callback import StepCallback
from medssl.training.pretrain_module import PretrainModule
from medssl.training.stopping import StopSignals


class LastCheckpoint(StepCallback):
    """Keeps `last.ckpt`: every `every` optimiser steps, at the end, and at a stop signal, which also ends the run.

    Saves only between optimiser steps. The file is replaced in one move, so that a kill leaves the old or the new one.
    """

    def __init__(self, path: Path, *, every: int, signals: StopSignals) -> None:
        self.path, self.every, self.signals = path, every, signals
        self.saved_step = -1

    def start(self, trainer: L.Trainer) -> None:
        """From here on a signal waits for the end of the step."""
        self.saved_step = self.step
        self.signals.install()
        self.signals.training = True

    def after_step(self, trainer: L.Trainer, module: PretrainModule, batch: Batch) -> None:
        """Save where it is time to, or the run is asked to stop."""
        stop = trainer.strategy.reduce_boolean_decision(bool(self.signals.requested), all=False)
        if stop or self.step % self.every == 0:
            self.save(trainer)
        if stop:
            self.signals.requested = self.signals.requested or "another rank"
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the run."""
        if self.saved_step != self.step:
            self.save(trainer)
        self.signals.training = False

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of this very moment."""
        partial = self.path.with_name(".last.ckpt.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.path)
        self.saved_step = self.step


def check_checkpoint(path: Path, *, total_steps: int) -> int:
    """The step of a checkpoint. Raises: ValueError: not a checkpoint of ours, or nothing is left to train."""
    try:
        step = int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])
    except Exception as error:
        raise ValueError(
            f"resume: {path} is not a whole checkpoint of a run; give a run folder or its checkpoints/last.ckpt"
        ) from error
    if step >= total_steps:
        raise ValueError(f"resume: {path} is at step {step} of {total_steps}; raise trainer.max_steps to go on")
    return step
