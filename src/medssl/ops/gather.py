"""Reductions over the processes of a run; plain pass-through where there is only one."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, as a new tensor without gradient; every rank must call it."""
    total = tensor.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


@torch.no_grad()
def gather_ranks(tensor: Tensor) -> Tensor:
    """The rows of all ranks, those of rank 0 first, without gradient; every rank must call it with equally many."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)
