"""Pictures of a method at work, for the run folder and the logger."""

from dataclasses import replace
from pathlib import Path

import lightning as L

from medssl.data.module import Batch
from medssl.methods.base import Method
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule


class Pictures(StepCallback):
    """Saves the method's figures as `figures/NAME-STEP.png`, every `every` optimiser steps and at the end of the run.

    Where `every` is None, none is drawn.
    """

    def __init__(self, folder: Path, *, every: int | None) -> None:
        self.folder, self.every = folder, every

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Draw the pictures from the batch of the step just done."""
        if self.every is None or (self.step % self.every and self.step != trainer.max_steps):
            return
        method, progress = module.method, replace(module.progress(batch), step=self.step)
        if type(method).figures is Method.figures:
            return
        with trainer.precision_plugin.forward_context():
            extras = method.extras(batch.views, progress)  # on every rank: what is compared may be gathered
        if not trainer.is_global_zero:
            return
        figures = method.figures(batch.views, extras, progress)
        for name, figure in figures.items():
            path = self.folder / f"{name}-{self.step:07d}.png"
            figure.savefig(path, dpi=100)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(key=name, images=[str(path)], step=self.step)
