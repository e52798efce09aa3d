"""One of two processes that share a loss over the rows of both; writes its gradient. Run by test_gather.py."""

import sys

import torch
import torch.distributed as dist
from torch import nn

from medssl.ops.gather import gather_with_gradient


def main(rank, rendezvous, out):
    """Join the other rank, compute, save."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    rows = torch.arange(12.0, dtype=torch.float64).reshape(4, 3).sin()
    parallel = nn.parallel.DistributedDataParallel(layer)
    everyone = gather_with_gradient(parallel(rows[2 * rank : 2 * rank + 2]))
    (everyone @ everyone.T).sin().sum().backward()
    torch.save({"rows": everyone.detach(), "gradient": layer.weight.grad}, out)
    dist.destroy_process_group()


main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
