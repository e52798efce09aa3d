"""Teachers of self-distillation: frozen copies that follow a student by an exponential moving average (EMA)."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(student: Module) -> Module:
    """Return an exact copy in evaluation mode whose parameters take no gradient."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, *, momentum: float, copy_buffers: bool = True) -> None:
    """Set the teacher's trained parameters to `momentum * teacher + (1 - momentum) * student`, in place.

    Frozen parameters and buffers are copied, because an average of equal floats drifts by rounding. Without
    `copy_buffers` the teacher keeps its own buffers, such as the batch statistics of its own forward passes.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    trained = [(old, new) for old, new in pairs if new.requires_grad]
    if trained:  # frozen networks and those without parameters are copied
        torch._foreach_lerp_([old for old, _ in trained], [new for _, new in trained], 1 - momentum)
    copied: list[tuple[Tensor, Tensor]] = [(old, new) for old, new in pairs if not new.requires_grad]
    if copy_buffers:
        copied += zip(teacher.buffers(), student.buffers(), strict=True)
    for old, new in copied:
        old.copy_(new)
