"""One of one or two processes that take the gradient of MAE on four crops. Run by test_mae_ddp.py."""

import torch
from ranks import as_rank
from small_mae import FORMS, crops, given, make_mae
from torch import nn

from medssl.data.views import View
from medssl.methods.base import Progress


def work(rank, world):
    """What each form gives, and the U-Net where fewer voxels count in the first half of the samples."""
    cases = {form: (form, False) for form in FORMS} | {"valid": ("cnn", True)}
    return {name: step(rank, world, form, valid) for name, (form, valid) in cases.items()}


def step(rank, world, form, has_valid):
    """The logs of a step on the own samples, and the averaged gradients."""
    own = slice(4 // world * rank, 4 // world * (rank + 1))
    masked = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 48
    method = make_mae(form).double()
    method._mask = lambda image, progress: given(masked[own])
    valid = torch.ones(4, 1, 1, 16, 16, 16, dtype=torch.bool)
    valid[:2, ..., 6:, :, :] = False
    image = crops(b=4)["crop"].image.double()
    batch = {"crop": View.of(image[own], valid=valid[own] if has_valid else None)}
    parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=False, broadcast_buffers=False)
    output = parallel(batch, Progress(0, 10, 0.0, 1.0, 0, rank))
    output.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    return {"loss": output.loss.detach(), "gradients": gradients}


if __name__ == "__main__":
    as_rank(work)
