"""One line that says how far the run is."""

import sys
from typing import Any

import lightning as L
from tqdm import tqdm

from medssl.training.pretrain_module import PretrainModule


class ProgressBar(L.Callback):
    """Steps done and to come, speed and loss, on stderr of rank 0; rarely refreshed where that is a file."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where the run stands."""
        self.step = trainer.global_step
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=self.step,
            desc="pre-training",
            unit="step",
            disable=not trainer.is_global_zero,
            mininterval=0.1 if sys.stderr.isatty() else 30,
            dynamic_ncols=True,
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: PretrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance at the end of an optimiser step."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            losses = [scalars["loss"] for scalars in pl_module.scalars]
            self.bar.set_postfix(loss=f"{sum(losses) / len(losses):.4g}", refresh=False)
            self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the last state on the screen."""
        self.bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the line back before an error message is printed."""
        if hasattr(self, "bar"):
            self.bar.close()
