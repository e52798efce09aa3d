"""One of one or two processes that take the gradients of SimCLR and VoCo. Run by test_contrast_ddp.py."""

import torch
from ranks import as_rank
from small_contrast import cells_and_targets, pairs_of_crops
from torch import nn

from medssl.methods.base import Progress
from medssl.methods.simclr import SimCLR
from medssl.methods.voco import VoCo
from medssl.models.pooled import PooledProjector
from medssl.models.resenc import ResidualEncoder


def work(rank, world):
    """The logs of a step on the own samples and the averaged gradients, for each method."""
    pairs, cells = pairs_of_crops(b=4, side=8), cells_and_targets(b=4, t=2, side=8, grid=(2, 2, 1))
    return {
        "voco": step(VoCo, cells, rank, world),
        "voco of nnssl": step(VoCo, cells, rank, world, form="nnssl"),
        "voco with a teacher": step(VoCo, cells, rank, world, teacher="ema"),
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
    output = parallel(views, Progress(rank=rank, with_extras=True))
    output.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logs": output.logs, "extras": output.extras, "gradients": gradients}


if __name__ == "__main__":
    as_rank(work)
