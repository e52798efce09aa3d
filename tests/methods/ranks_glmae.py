"""One of two processes that train GL-MAE together for two steps. Run by test_glmae_ddp.py."""

import torch
from ranks import as_rank
from torch import nn

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.glmae import GLMAE
from medssl.models.heads import ProjectionHead
from medssl.models.vit import MaskedDecoder, VisionTransformer


def work(rank, world, centering):
    """Train together."""
    torch.manual_seed(0)
    home = {"size_voxel": 8, "patch_voxel": 2}
    encoder = VisionTransformer(**home, dim=12, depth=1, num_heads=2)
    decoder = MaskedDecoder(**home, encoder_dim=12, dim=12, depth=1, num_heads=2)
    head = ProjectionHead(in_dim=12, hidden_dim=8, bottleneck_dim=4, num_prototypes=6, init_std=0.1)
    method = GLMAE(encoder=encoder, decoder=decoder, head=head, ema_momentum=0.9, centering=centering)
    parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=False, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-3)
    anchors = []
    for step in range(2):
        for micro in range(2):
            generator = torch.Generator().manual_seed(8 * step + 4 * micro + rank)
            batch = {name: group(count, 8, generator) for name, count in (("global", 2), ("local", 1))}
            anchors.append(method._teacher_logits(batch["global"].image.transpose(0, 1).flatten(0, 1)))
            progress = Progress(step, 2, float(step), 2.0, 0, rank, micro)
            with parallel.no_sync() if micro == 0 else torch.enable_grad():
                parallel(batch, progress).loss.backward()
        method.after_backward(progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
    return {"state": method.state_dict(), "anchors": torch.cat(anchors)}


def group(count, side, generator):
    """A group of random pictures."""
    return View.of(torch.rand(2, count, 1, side, side, side, generator=generator))


if __name__ == "__main__":
    as_rank(work)
