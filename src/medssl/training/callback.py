"""A callback that counts optimiser steps instead of micro-batches."""

from typing import Any

import lightning as L

from medssl.data.module import Batch
from medssl.training.method_module import MethodModule


class StepCallback(L.Callback):
    """Calls `start` once, and `after_step` when the last micro-batch of each optimiser step is done.

    `step` is the number of steps done in the whole run.
    """

    step: int

    def start(self, trainer: L.Trainer) -> None:
        """Act before the loop begins, or continues, at `step`."""

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Act when optimiser step number `step` is done; `batch` was its last micro-batch."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Call `start` at the step of the trainer."""
        self.step = trainer.global_step
        self.start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `after_step` if this micro-batch completed an optimiser step."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            assert isinstance(pl_module, MethodModule)
            self.after_step(trainer, pl_module, batch)
