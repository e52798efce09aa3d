"""The Lightning module around a method: one step of training."""

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from medssl.data.module import VALIDATION_SEED, Batch
from medssl.methods.base import Method, Progress
from medssl.training.optim import build_optimizer, rescale
from medssl.training.scalars import StepScalars


class MethodModule(L.LightningModule):
    """Runs a `Method` under Lightning: progress, seeds, hooks, and the scalars of each step, averaged over ranks.

    Torch's global generator is seeded before every micro-batch, so that dropout draws the same after a restart.

    Args:
        method: The pretext task.
        optimizer: The `optimizer` part of the configuration.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps in which every volume comes once.
        seed: Seed of the run.
    """

    def __init__(
        self, method: Method, *, optimizer: dict[str, Any], total_steps: int, steps_per_epoch: float, seed: int
    ) -> None:
        super().__init__()
        self.method, self.optimizer_settings = method, optimizer
        self.total_steps, self.steps_per_epoch, self.seed = total_steps, steps_per_epoch, seed
        # what stays on the CPU is equal on all ranks already, and not for their GPUs to synchronise
        self._ddp_params_and_buffers_to_ignore = [
            f"method.{name}.{buffer}"
            for name, module in method.named_modules()
            if getattr(module, "stays_on_cpu", False)
            for buffer, _ in module.named_buffers()
        ]
        self.scalars = StepScalars()
        self.validation_losses: list[Tensor] = []

    def progress(self, batch: Batch) -> Progress:
        """Return the progress of the run at `batch`."""
        epoch, total_epochs = batch.step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch
        return Progress(batch.step, self.total_steps, epoch, total_epochs, self.seed, self.global_rank, batch.micro)

    def validation_progress(self, batch: Batch) -> Progress:
        """Return the progress of the run, with a seed that draws the same for a held-out batch at every validation."""
        now = self.progress(replace(batch, step=self.trainer.global_step))
        return replace(now, seed=VALIDATION_SEED, draw=batch.step)

    def on_train_start(self) -> None:
        """Continue with the rates and decays of the settings, which may differ from those of the checkpoint."""
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        rescale(schedule.optimizer, schedule, settings=self.new_optimizer()[0])

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss of one micro-batch.

        Raises:
            ValueError: A term is not finite.
        """
        self.last_progress = progress = self.progress(batch)
        progress.seed_torch()
        output = self.method(batch.views, progress)
        self.scalars.add(output, batch, strategy=self.trainer.strategy)
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the method change its gradients, then check and record their norm.

        Raises:
            ValueError: The gradients are not finite.
        """
        self.method.after_backward(self.last_progress)
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        has_scaler = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # skips such steps
        self.scalars.add_gradients(gradients, step=self.last_progress.step, may_overflow=has_scaler)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the method update what depends on its weights."""
        super().optimizer_step(*args, **kwargs)
        self.method.after_step(self.last_progress)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Record the loss on one batch of held-out volumes."""
        self.validation_losses.append(self.method(batch.views, self.validation_progress(batch)).loss.detach().float())

    def validation_loss(self) -> float:
        """Return the mean of the recorded losses over the batches and ranks since the last call."""
        mean = self.trainer.strategy.reduce(torch.stack(self.validation_losses).mean(), reduce_op="mean")
        self.validation_losses = []
        return float(mean)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return optimiser and schedule, stepped together."""
        optimizer, schedule = self.new_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def new_optimizer(self) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Return a new optimiser and its schedule, built from the settings."""
        return build_optimizer(self.optimizer_settings, self.method.param_groups(), total_steps=self.total_steps)
