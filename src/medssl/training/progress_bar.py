"""The progress bar of a run: one line that says how far it is."""

import sys

import lightning as L
from tqdm import tqdm

from medssl.data.module import Batch
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule


class ProgressBar(StepCallback):
    """Steps done and to come, speed and loss, on stderr of rank 0; rarely refreshed where that is a file."""

    def start(self, trainer: L.Trainer) -> None:
        """Open the bar at the current step of the run."""
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not trainer.is_global_zero,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Advance by one step."""
        self.bar.set_postfix(loss=f"{module.scalars.mean()['loss']:.4g}", refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state on the screen."""
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the line before an error message is printed."""
        if hasattr(self, "bar"):
            self.bar.close()
