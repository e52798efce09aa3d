"""Pictures of what a method does, into the run folder and to the logger."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from medssl.training.pretrain_module import PretrainModule


class Pictures(L.Callback):
    """Saves the method's figures as `figures/NAME-STEP.png` every `every` optimiser steps and at the end of the run."""

    def __init__(self, folder: Path, *, every: int | None) -> None:
        self.folder, self.every = folder, every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run stands."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: PretrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw them from the batch of the step just done."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        due = self.step == trainer.max_steps or (self.every and self.step % self.every == 0)
        if not due or not trainer.is_global_zero:
            return
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            figures = pl_module.method.figures(batch.views, pl_module.progress(batch))
        for name, figure in figures.items():
            path = self.folder / f"{name}-{self.step:07d}.png"
            figure.savefig(path, dpi=100)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[str(path)], step=self.step)
