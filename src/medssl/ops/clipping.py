"""Clipping of gradients tensor by tensor; the trainer clips their total norm."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], max_norm: float | None) -> None:
    """Scale every gradient down to a norm of about `max_norm` where it is larger, in place; None leaves it.

    Source: repository facebookresearch/dino, utils.py.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if max_norm is None or not gradients:
        return
    for gradient, norm in zip(gradients, torch._foreach_norm(gradients), strict=True):
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
