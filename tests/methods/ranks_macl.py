"""One of one or two processes that take the gradient of MACL on four samples. Run by test_macl_ddp.py."""

import torch
from ranks import as_rank
from torch import nn

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.macl import MACL
from medssl.methods.positions import PositionRule
from medssl.models.macl_heads import MACLHeads
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.partial_unet import PartialUNet


def work(rank, world):
    """The logs of a step on the own samples and the averaged gradients, for each way of gathering."""
    return {name: step(rank, world, gather) for name, gather in (("always", True), ("small", None), ("never", False))}


def step(rank, world, gather):
    """What one way gives."""
    torch.manual_seed(0)
    encoder = MACLUNetEncoder(base_channels=2, num_levels=2)
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    backbone = PartialUNet(encoder, MACLUNetDecoder(in_channels=1, **fitted), num_blocks=1)
    widths = {"bottleneck_channels": backbone.bottleneck_channels, "decoded_channels": backbone.decoded_channels}
    method = MACL(
        backbone=backbone,
        heads=MACLHeads(**widths, spatial_dims=3, hidden_dim=8, proj_dim=6),
        positions=PositionRule(threshold=0.1),
        gather=gather,
        weight_dense=0.7,
    ).double()
    method.eval()  # statistics of a batch would be those of the own samples
    parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=False, broadcast_buffers=False)
    output = parallel(batch_of(rank, world), Progress(0, 10, 0.0, 1.0, 0, rank))
    output.loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logs": output.logs, "gradients": gradients}


def batch_of(rank, world):
    """This process' share of four samples."""
    generator = torch.Generator().manual_seed(0)
    own = slice(4 // world * rank, 4 // world * (rank + 1))
    location = torch.tensor([0.2, 0.6, 0.25, 0.9], dtype=torch.float64)[:, None, None].expand(
        4, 1, 3
    )  # neighbours on other ranks
    views = {}
    for name, count in (("still", 1), ("moved", 2)):
        image = torch.rand(4, count, 1, 8, 8, 8, generator=generator, dtype=torch.float64)
        views[name] = View.of(image[own], location_body=location[own])
    return views


if __name__ == "__main__":
    as_rank(work)
