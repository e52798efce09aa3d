"""The interface of every pretext task: one module that turns drawn views into a loss."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medssl.data.randomness import counter_key
from medssl.data.views import View
from medssl.ops import schedules

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StepOutput:
    """What a method computes of one micro-batch.

    Args:
        loss: The scalar to minimise.
        logs: Detached scalars to log, one for each loss term among them.
        extras: Detached tensors that the method's pictures show, where `Progress.with_extras` asks for them.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Progress of a run: schedules and random draws inside a method are functions of this alone.

    `step` counts optimiser steps from 0, `epoch` is its fractional epoch, `micro` numbers the micro-batches that are
    accumulated into one step. `draw` replaces `step` in generators where draws repeat while schedules advance.
    `with_extras` asks `forward` for what pictures show. `Progress()` is the first step of a run of one step and epoch.
    """

    step: int = 0
    total_steps: int = 1
    epoch: float = 0.0
    total_epochs: float = 1.0
    seed: int = 0
    rank: int = 0
    micro: int = 0
    draw: int | None = None
    with_extras: bool = False

    def generator(self, name: str, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh generator for the draw `name`; it depends on seed, step, micro-batch, rank and name only."""
        step = self.step if self.draw is None else self.draw
        key = f"{self.seed}/{step}/{self.micro}/{self.rank}/{name}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        return torch.Generator(device).manual_seed(number >> 1)  # seeds are signed 64-bit integers

    def seed_torch(self) -> None:
        """Seed torch's global generators, so that dropout also depends only on the progress of the run."""
        torch.manual_seed(counter_key("step", self.seed, self.step, self.rank, self.micro))

    def cosine(self, start: float, end: float) -> float:
        """Return the value of half a cosine over the steps of the run: the momentum of a teacher, as in DINO.

        Source: arXiv:2104.14294.
        """
        return schedules.cosine(self.step, self.total_steps, start=start, end=end)

    def warn(self, why: str) -> None:
        """Print the warning `why` to the error stream, on rank 0 only."""
        if self.rank == 0:
            print(f"warning: {why}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Transfer:
    """The networks of pre-training from which a segmenter starts.

    Args:
        recipes: Place of each network's recipe in the method's settings: `encoder`, or `backbone.encoder`.
        facts: Further entries of the card, such as how many blocks of the decoder were trained. `decoder_part` says
            what a segmenter takes of the decoder unless the user states it, see `weights.decoder`.
    """

    recipes: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Method(nn.Module, ABC):
    """A pretext task, whose networks are injected; it knows no files, configs or trainer.

    A subclass sets `encoder` and writes `forward`. Everything that must survive a restart lives in parameters and
    buffers.
    """

    encoder: nn.Module
    networks: tuple[str, ...] = ()
    """Presets of `configs/model` that the method trains; none where it states its network under `method.encoder`."""
    decays_all = False
    """Whether biases, norms and other vectors have the weight decay of the optimiser too."""
    takes_reoriented = True
    """Whether the encoder may be inside a `Reoriented`; False for methods that use more of it than its maps."""

    @classmethod
    def check_recipe(cls, encoder: Mapping[str, Any]) -> None:
        """Check the recipe of the encoder that `model=` chose, before settings of the method that follow from it.

        Raises:
            ValueError: The method does not train such a network.
        """

    @abstractmethod
    def forward(self, batch: Mapping[str, View], progress: Progress) -> StepOutput:
        """Return the loss of one micro-batch; state may only be collected here while `training` is set."""

    def check_groups(self, counts: Mapping[str, int]) -> None:
        """Raise a ValueError where the view groups, with their numbers of views, do not serve; before data are read."""

    def after_backward(self, progress: Progress) -> None:
        """Change gradients: called once per optimiser step, after the last backward and before global clipping."""

    def after_step(self, progress: Progress) -> None:
        """Move teachers, centres and queues: called once after each optimiser step with that step's progress."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups: trainable tensors of two or more dimensions, and the others without weight decay.

        With `decays_all` there is one group of all trainable tensors.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.decays_all:
            return [{"params": trained}]
        groups: list[dict[str, Any]] = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def parts(self) -> dict[str, nn.Module]:
        """Return the networks that pre-training exports, by name."""
        return {"encoder": self.encoder}

    def copies_of_encoder(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Return each network that starts as a copy of one with the encoder, such as a teacher, with that network."""
        return ()

    def transfers(self) -> Transfer:
        """Return which of `parts` fine-tuning starts from: the encoder, unless a method overrides this."""
        return Transfer({"encoder": "encoder"})

    def compile_regions(self) -> Iterable[nn.Module]:
        """Return the modules that `torch.compile` compiles one by one: transformer blocks, else the encoder."""
        blocks = [block for module in self.modules() for block in getattr(module, "blocks", ())]
        return blocks or [self.encoder]

    @torch.no_grad()
    def extras(self, batch: Mapping[str, View], progress: Progress) -> dict[str, Tensor]:
        """Return the extras of `forward` in evaluation mode; state and training mode stay unchanged.

        Every rank must call it, as `forward` may gather.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return self(batch, replace(progress, with_extras=True)).extras
        finally:
            for module, mode in modes:
                module.training = mode

    def figures(
        self, batch: Mapping[str, View], extras: Mapping[str, Tensor], progress: Progress
    ) -> dict[str, "Figure"]:
        """Return pictures of what the method does with `batch`, by name, drawn from the `extras` of its `forward`."""
        return {}
