"""One of two processes that train Alice together for two steps. Run by test_alice_ddp.py."""

import torch
from ranks import as_rank
from torch import nn

from medssl.data.views import View
from medssl.methods.alice import Alice
from medssl.methods.base import Progress
from medssl.models.alice_head import AliceHead
from medssl.models.cafa import CAFA
from medssl.models.nnformer import NnFormer


def work(rank, world):
    """Train together."""
    torch.manual_seed(0)
    backbone = NnFormer(size_voxel=16, feature_size=12, num_heads=(2, 2, 4, 4), window_tokens=(4, 4, 2, 1))
    widths = {"bottleneck_channels": 96, "decoded_channels": 48, "hidden_dim": 16, "bottleneck_dim": 8}
    method = Alice(
        backbone=backbone,
        head=AliceHead(**widths, num_prototypes=12, init_std=0.1),
        cafa=CAFA(dim=12, hidden_dim=16, num_heads=2, head_dim=4),
        mask_patch_voxel=4,
        ema_momentum=0.9,
        cafa_ema=True,
        freeze_last_layer_epochs=1,
    )
    parallel = nn.parallel.DistributedDataParallel(method, find_unused_parameters=False, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-3)
    rows = []
    method.teacher_head.register_forward_hook(lambda _, inputs, output: rows.append(output.pooled))
    for step in range(2):
        for micro in range(2):
            batch = pairs(torch.Generator().manual_seed(8 * step + 4 * micro + rank))
            progress = Progress(step, 2, float(step), 2.0, 0, rank, micro)
            torch.manual_seed(100 * step + 10 * micro + rank)
            with parallel.no_sync() if micro == 0 else torch.enable_grad():
                parallel(batch, progress).loss.backward()
        method.after_backward(progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
    return {"state": method.state_dict(), "rows": torch.cat(rows)}


def pairs(generator):
    """Two pairs of random pictures."""
    return {"pair": View.of(torch.rand(2, 2, 1, 16, 16, 16, generator=generator))}


if __name__ == "__main__":
    as_rank(work)
