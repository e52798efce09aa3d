"""One of two processes that share a loss over the rows of both. Run by test_gather.py."""

import torch
from ranks import as_rank
from torch import nn

from medssl.ops.gather import gather_objects, gather_with_gradient, rank_and_world


def work(rank, world):
    """The rows and the gradient of all."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    rows = torch.arange(12.0, dtype=torch.float64).reshape(4, 3).sin()
    parallel = nn.parallel.DistributedDataParallel(layer)
    everyone = gather_with_gradient(parallel(rows[2 * rank : 2 * rank + 2]))
    (everyone @ everyone.T).sin().sum().backward()
    objects = gather_objects({"rank": rank})
    return {"rows": everyone.detach(), "gradient": layer.weight.grad, "objects": objects, "number": rank_and_world()}


if __name__ == "__main__":
    as_rank(work)
