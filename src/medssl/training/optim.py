"""The optimiser and its schedule, both from the `optimizer` part of a configuration."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from hydra.utils import instantiate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medssl import checks
from medssl.ops import schedules

SHAPES = ("cosine", "poly")


def rate_share(
    step: float,
    *,
    total_steps: int,
    warmup_steps: float = 0,
    final_fraction: float = 0.0,
    least_fraction: float = 0.0,
    hold_steps: float | None = None,
    shape: str = "cosine",
    exponent: float = 0.9,
) -> float:
    """Return the share of the peak learning rate at `step`: linear from 0, then down to `final_fraction`.

    The way down is half a cosine, or `(1 - done) ** exponent` for `shape="poly"`. The share stays at `least_fraction`
    where it would fall below it. With `hold_steps` the schedule goes by epochs of that length: each keeps the share of
    its first step on the way down, and that of its end in the warm-up.

    Source: arXiv:2111.06377, appendix A.1, updated every step; arXiv:1809.10486 for `poly`.
    """
    if hold_steps is not None:
        step = step // hold_steps * hold_steps
    if step < warmup_steps:
        return min(1.0, (step + (hold_steps or 0)) / warmup_steps)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else (1 - done) ** exponent
    return max(least_fraction, final_fraction + (1 - final_fraction) * left)


class RateAndDecay(LambdaLR):
    """A schedule of the learning rate and of the weight decay of some groups.

    Neither function is part of its state: a restored run continues with the schedules of its new settings.

    Args:
        optimizer: The optimiser with the groups.
        rate: Share of each group's learning rate, by step.
        decay: Weight decay by step.
        decayed: Numbers of the groups that have this weight decay.
    """

    def __init__(
        self, optimizer: Optimizer, rate: Callable[[int], float], *, decay: Callable[[int], float], decayed: list[int]
    ) -> None:
        self.decay, self.decayed = decay, decayed
        super().__init__(optimizer, rate)

    def step(self, epoch: int | None = None) -> None:
        """Move rates and decays on by one step."""
        super().step(epoch)
        self.set_decay()

    def set_decay(self) -> None:
        """Give the groups the weight decay of the step that the schedule stands at."""
        for number in self.decayed:
            self.optimizer.param_groups[number]["weight_decay"] = self.decay(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, without its functions."""
        return {key: value for key, value in super().state_dict().items() if key not in ("decay", "decayed")}


def build_optimizer(
    settings: dict[str, Any], groups: Sequence[dict[str, Any]], *, total_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """Return the optimiser over `groups` and its schedule, one call of `step()` per optimiser step.

    Args:
        settings: `_target_` and arguments of a torch optimiser, with `warmup_steps`, `final_fraction` and `clip_norm`
            beside them (clipping is done by the trainer). `weight_decay_end` lets `weight_decay` follow half a cosine
            that ends there; without it the decay is constant. `hold_steps` keeps the rate for that many steps, an
            epoch: in a warm-up of n of them, epoch e (from 0) has the share (e + 1) / n.
            `least_fraction` is the share of the rate below which the schedule does not fall after the warm-up. `shape`
            is that of the way down, `cosine` or `poly` with `exponent`.
        groups: Parameter groups; what a group states (`weight_decay`, `lr`) wins over `settings`, and its `lr_scale` is
            a share of the learning rate there.
        total_steps: Length of the run, where the cosine ends.

    Raises:
        ValueError: The warm-up is as long as the run, the optimiser does not know a key, or a decay is to move and has
            no beginning.
    """
    ours = ("warmup_steps", "final_fraction", "clip_norm", "weight_decay_end", "hold_steps", "least_fraction",
            "shape", "exponent")  # fmt: skip
    arguments = {key: value for key, value in settings.items() if key not in ours}
    warmup_steps, final_fraction = settings.get("warmup_steps", 0), settings.get("final_fraction", 0.0)
    if warmup_steps and warmup_steps >= total_steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup_steps} leaves nothing of trainer.max_steps={total_steps};"
            " lower the first or raise the second"
        )
    shape = checks.choice("optimizer.shape", settings.get("shape", "cosine"), SHAPES)
    exponent = checks.number("optimizer.exponent", settings.get("exponent", 0.9), above=0)
    if (hold := settings.get("hold_steps")) is not None:
        checks.number("optimizer.hold_steps", hold, above=0)
    start, end = settings.get("weight_decay"), settings.get("weight_decay_end")
    if end is not None and (start is None or end < 0):
        raise ValueError(
            f"optimizer.weight_decay_end={end} must be 0 or more and starts at optimizer.weight_decay={start}"
        )
    decayed = [number for number, group in enumerate(groups) if "weight_decay" not in group]
    build = instantiate(arguments, _partial_=True)
    scaled = [
        {**{k: v for k, v in group.items() if k != "lr_scale"}, "lr": settings["lr"] * group["lr_scale"]}
        if "lr_scale" in group
        else group
        for group in groups
    ]
    try:
        optimizer = build(scaled)
    except TypeError as error:
        raise ValueError(f"optimizer: {error}; a key is taken out by ~optimizer.KEY") from error
    except ValueError as error:
        raise ValueError(f"optimizer: {error}") from error

    def share(step: int) -> float:
        return rate_share(
            step,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            final_fraction=final_fraction,
            least_fraction=settings.get("least_fraction", 0.0),
            hold_steps=hold,
            shape=shape,
            exponent=exponent,
        )

    if end is None or start is None:
        return optimizer, LambdaLR(optimizer, share)

    def decay(step: int) -> float:
        return schedules.cosine(step, total_steps, start=start, end=end)

    return optimizer, RateAndDecay(optimizer, share, decay=decay, decayed=decayed)


def rescale(optimizer: Optimizer, schedule: LambdaLR, *, settings: Optimizer) -> None:
    """Give a restored optimiser and its schedule the settings of another optimiser over the same groups.

    The restored values are those of the run so far; new settings may change its `lr`, decay and length.
    """
    schedule.base_lrs = [group["initial_lr"] for group in settings.param_groups]
    shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
    for group, new, base, factor in zip(
        optimizer.param_groups, settings.param_groups, schedule.base_lrs, shares, strict=True
    ):
        group.update({key: value for key, value in new.items() if key != "params"}, lr=base * factor)
    if isinstance(schedule, RateAndDecay):
        schedule.set_decay()
