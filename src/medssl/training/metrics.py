"""The table of a run, metrics.csv: one row per optimiser step, sent to the logger as well."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning as L
from torch.optim import Optimizer

from medssl.data.atomic import whole_file
from medssl.data.module import Batch, VolumeDataModule
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule


class MetricsTable:
    """A CSV file that grows by rows and can be cut back to a step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.last: dict[str, Any] = {}
        self.last_offset = 0

    def take_back(self, *, step: int) -> None:
        """Drop the rows after `step`, which the run is about to repeat, and a line that was cut off in writing."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or [])
            rows = [row for row in reader if None not in row.values() and int(row["step"]) <= step]
        self._rewrite(rows)
        if rows:  # a validation that a stop cut short amends it
            self.last, self.last_offset = dict(rows[-1]), self.path.read_bytes().rstrip(b"\r\n").rfind(b"\n") + 1

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; one with a new column rewrites the file."""
        if any(name not in self.columns for name in row):
            self.columns += [name for name in row if name not in self.columns]
            with self.path.open(newline="", encoding="utf-8") if self.path.is_file() else io.StringIO() as file:
                self._rewrite(list(csv.DictReader(file)))
        self.last, self.last_offset = row, self.path.stat().st_size
        self._append(row)

    def amend(self, **values: Any) -> None:
        """Write the last row again, with `values` in it."""
        with self.path.open("r+", encoding="utf-8") as file:
            file.truncate(self.last_offset)
        self.add({**self.last, **values})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with whole_file(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


def float32(value: float) -> float:
    """Return the value rounded to the digits of a 32-bit number."""
    return float(f"{value:.9g}")


class Metrics(StepCallback):
    """Writes the row of each optimiser step: loss, its terms, learning rate, speed, shares of waiting and drawing.

    Args:
        path: Path of metrics.csv.
        batch_size: Samples per optimiser step over all ranks.
        validation: The column for the value of a validation; None if there is none.
    """

    def __init__(self, path: Path, *, batch_size: int, validation: str | None) -> None:
        self.table, self.batch_size, self.validation = MetricsTable(path), batch_size, validation

    def start(self, trainer: L.Trainer) -> None:
        """Open the table at the current step of the run."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, VolumeDataModule)
        self.timers = data.timers
        if trainer.is_global_zero:
            self.table.take_back(step=self.step)
        self.since = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Record the learning rate of the step, before its schedule moves on."""
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Write the row of the step."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        timers = self.timers.take()
        row: dict[str, Any] = {"step": self.step}
        row |= {name: float32(value) for name, value in module.scalars.mean().items()}
        row["learning_rate"] = float32(self.learning_rate)
        row["samples_per_s"] = round(self.batch_size / seconds, 3)
        row["data_wait_share"] = round(timers["wait_s"] / seconds, 4)
        row["draw_share"] = round(timers["draw_s"] / seconds, 4)
        if trainer.is_global_zero:
            self.table.add({**row, self.validation: ""} if self.validation else row)
            for logger in trainer.loggers:
                logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=self.step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the loss on held-out volumes to the row of the step just done."""
        assert isinstance(pl_module, MethodModule)
        self.add_validation(trainer, pl_module.validation_loss())

    def add_validation(self, trainer: L.Trainer, value: float) -> None:
        """Add the value of a validation to the row of the step just done; its time does not count as training."""
        assert self.validation is not None
        if trainer.is_global_zero:
            self.table.amend(**{self.validation: float32(value)})
            for logger in trainer.loggers:
                logger.log_metrics({self.validation: float32(value)}, step=self.step)
        self.since = time.perf_counter()
        self.timers.take()
