"""Pictures of a method at work, for the run folder and the logger."""

from dataclasses import replace
from pathlib import Path

import lightning as L
import torch

from medssl.data.module import Batch
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule


class Pictures(StepCallback):
    """Saves the method's figures as `figures/NAME-STEP.png` every `every` optimiser steps and at the end of the run."""

    def __init__(self, folder: Path, *, every: int | None) -> None:
        self.folder, self.every = folder, every

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Draw the pictures from the batch of the step just done."""
        due = self.step == trainer.max_steps or (self.every and self.step % self.every == 0)
        if not due or not trainer.is_global_zero:
            return
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            figures = module.method.figures(batch.views, replace(module.progress(batch), step=self.step))
        for name, figure in figures.items():
            path = self.folder / f"{name}-{self.step:07d}.png"
            figure.savefig(path, dpi=100)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[str(path)], step=self.step)
