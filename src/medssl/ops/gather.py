"""Sums and gathers over the processes of a run; a run of one process passes tensors through."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process in its process group and the size of the group; 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if _is_joined() else (0, 1)


def gather_objects(item: Item) -> list[Item]:
    """Return the objects of all ranks, rank 0 first; every rank must call it."""
    if not _is_joined():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all ranks as a new tensor without gradient; every rank must call it."""
    total = tensor.detach().clone()
    if _is_joined():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def gather_ranks(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, rank 0 first, without gradient; every rank must call it with equally many rows."""
    if not _is_joined():
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks, rank 0 first; every rank must call it with equally many rows.

    Each rank gets back the sum of all ranks' gradients of its own rows. So a loss of all rows that every rank computes
    alike has the gradient that one process would have, once gradients are averaged over the ranks.
    """
    if not _is_joined():
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the rows of all ranks."""
        ctx.num_rows = len(tensor)
        return gather_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient of this rank's rows, summed over all ranks."""
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]
