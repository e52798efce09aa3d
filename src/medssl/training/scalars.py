"""The scalars of a step: loss, terms and gradient norm, over all ranks; a value that is not finite ends the run."""

import math

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from medssl.data.module import Batch
from medssl.methods.base import StepOutput
from medssl.ops.gather import gather_objects, rank_and_world

ADVICE = "look at these volumes, lower optimizer.lr or set optimizer.clip_norm, then resume"


class StepScalars:
    """Collects the scalars of one optimiser step over its micro-batches."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.cases: list[str] = []
        self.grad_norm = math.nan

    def add(self, output: StepOutput, batch: Batch, *, strategy: Strategy) -> None:
        """Add the loss and the terms of a micro-batch.

        Raises:
            ValueError: A value is not finite on this rank.
        """
        if batch.micro == 0:
            self.rows, self.cases = [], []
        terms = {"loss": output.loss, **output.logs}
        local = torch.stack([value.detach().float().reshape(()) for value in terms.values()])
        mean = strategy.reduce(local.clone(), reduce_op="mean").tolist()
        if not all(map(math.isfinite, mean)):  # on one rank at least: all of them stop here
            values = zip(terms, local.tolist(), strict=True)
            faults = [f"{name} = {value}" for name, value in values if not math.isfinite(value)]
            if not faults:
                raise SystemExit(2)  # the rank at fault prints the message
            raise ValueError(f"step {batch.step + 1}: {', '.join(faults)}; cases {', '.join(batch.cases)}; {ADVICE}")
        self.rows.append(dict(zip(terms, mean, strict=True)))
        self.cases += batch.cases

    def add_gradients(self, gradients: list[Tensor], *, step: int, may_overflow: bool) -> None:
        """Record the total norm of the gradients, the same on all ranks.

        Raises:
            ValueError: The norm is not finite, and `may_overflow` is false.
        """
        self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(self.grad_norm) and not may_overflow:
            cases = [case for part in gather_objects(self.cases) for case in part]
            if rank_and_world()[0] != 0:
                raise SystemExit(2)  # rank 0 prints the message
            raise ValueError(f"step {step + 1}: grad_norm = {self.grad_norm}; cases {', '.join(cases)}; {ADVICE}")

    def mean(self) -> dict[str, float]:
        """Return loss and terms averaged over the micro-batches, and the norm of the gradient before clipping."""
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in self.rows[0]}
        return {**means, "grad_norm": self.grad_norm}
