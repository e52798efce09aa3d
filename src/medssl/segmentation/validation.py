"""Validation of a segmentation run: whole cases by sliding window, at regular steps; the best weights are kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from medssl.data.module import Batch
from medssl.run.signals import StopSignals
from medssl.segmentation.evaluator import Evaluator
from medssl.segmentation.method import Segmentation
from medssl.segmentation.pictures import CasePicture, case_figure
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule
from medssl.training.metrics import Metrics
from medssl.weights import save_weights


class Validation(StepCallback):
    """Predicts the validation cases every `every` optimiser steps and at the end, and writes the best weights.

    A stop signal ends it between two windows; the resumed run then begins with this validation.

    Args:
        evaluator: The evaluator that predicts and scores.
        cases: Numbers of the validation cases; without any, nothing is done.
        every: Steps between two validations, None for none.
        metrics: The table that gets the mean Dice.
        best: File of the best weights.
        card: Card of that file.
        figures: Folder of the pictures.
        signals: The stop signals of the run.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        cases: Sequence[int],
        *,
        every: int | None,
        metrics: Metrics,
        best: Path,
        card: dict[str, Any],
        figures: Path,
        signals: StopSignals,
    ) -> None:
        self.evaluator, self.cases, self.every, self.metrics = evaluator, cases, every, metrics
        self.best, self.card, self.figures, self.signals = best, card, figures, signals

    def start(self, trainer: L.Trainer) -> None:
        """Run the validation that a stop signal interrupted."""
        module = trainer.lightning_module
        assert isinstance(module, MethodModule)
        if self.step and self._due(trainer) and int(self._method(module).validated_step) != self.step:
            self._validate(trainer, module)

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Validate if this step is due."""
        if self._due(trainer) and not self._is_stopping(trainer):
            self._validate(trainer, module)

    def _is_stopping(self, trainer: L.Trainer) -> bool:
        """Return whether a rank was asked to stop: all of them validate, or none."""
        return trainer.strategy.reduce_boolean_decision(bool(self.signals.requested), all=False)

    def _due(self, trainer: L.Trainer) -> bool:
        if not (self.every and self.cases):
            return False
        return self.step % self.every == 0 or self.step == trainer.max_steps

    def _validate(self, trainer: L.Trainer, module: MethodModule) -> None:
        method = self._method(module)
        with trainer.precision_plugin.forward_context():
            found = self.evaluator.run(
                method.segmenter,
                self.cases,
                device=module.device,
                full=False,
                title="validating",
                should_stop=lambda: bool(self.signals.requested),
            )
        if found is None:
            return
        dice = found.mean_dice()
        self.metrics.add_validation(trainer, dice)
        method.validated_step.fill_(self.step)
        if dice > float(method.best):
            method.best.fill_(dice)
            if trainer.is_global_zero:
                save_weights(self.best, method.parts(), {**self.card, "step": self.step, "validation_dice": dice})
        if trainer.is_global_zero:
            write_pictures(
                found.pictures,
                self.figures,
                name="validation",
                step=self.step,
                num_classes=len(self.evaluator.label_values),
            )

    @staticmethod
    def _method(module: MethodModule) -> Segmentation:
        assert isinstance(module.method, Segmentation)
        return module.method


def write_pictures(
    pictures: Sequence[CasePicture], folder: Path, *, name: str, step: int, num_classes: int
) -> list[Path]:
    """Save the worst and the best case as `NAME-worst-STEP.png` and `NAME-best-STEP.png`, and return the paths."""
    paths = []
    for which, picture in zip(("worst", "best")[: len(pictures)], pictures, strict=True):
        path = folder / f"{name}-{which}-{step:07d}.png"
        title = f"{picture.case}: mean Dice {picture.dice:.3f} ({which} of the {name} cases, step {step})"
        case_figure(picture, num_classes=num_classes, title=title).savefig(path, dpi=100)
        paths.append(path)
    return paths
