"""One of one or two processes that take the gradients of SimCLR and VoCo. Run by test_contrast_ddp.py."""

import torch
from ranks import as_rank
from small_contrast import pairs_of_crops
from torch import nn

from medssl.methods.base import Progress
from medssl.methods.simclr import SimCLR
from medssl.models.pooled import PooledProjector
from medssl.models.resenc import ResidualEncoder


def work(rank, world):
    """The logs of a step on the own samples and the averaged gradients, for each method."""
    pairs = pairs_of_crops(b=4, side=8)
    return {
        "simclr": step(SimCLR, pairs, rank, world),
        "simclr alone": step(SimCLR, pairs, rank, world, gather=False),
    }


def step(kind, batch, rank, world, **options):
    """What one method gives."""
    torch.manual_seed(0)
    encoder = ResidualEncoder(widths=(4, 8), blocks=(1, 1))
    projector = PooledProjector(encoder.channels, encoder.strides, hidden_dim=8, out_dim=6)
    method = kind(encoder=encoder, projector=projector, **options).double()
    own = slice(4 // world * rank, 4 // world * (rank + 1))
    views = {}
    for name, view in batch.items():
        views[name] = type(view).of(view.image[own].double(), crop_body=view.crop_body[own])
    parallel = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    output = parallel(views, Progress(rank=rank))
    output.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logs": output.logs, "gradients": gradients}


if __name__ == "__main__":
    as_rank(work)
