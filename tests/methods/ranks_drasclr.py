"""One of two processes that train DrasCLR together for three steps. Run by test_drasclr_ddp.py."""

import torch
from ranks import as_rank
from test_drasclr import COORDINATES, Encoder, view
from torch import nn

from medssl.methods.base import Progress
from medssl.methods.drasclr import DrasCLR
from medssl.models.heads import MLPHead
from medssl.ops.queue import LocationQueue


def work(rank, world, key_norm):
    """Train together."""
    torch.manual_seed(0)
    method = DrasCLR(
        encoder=Encoder(),
        head=MLPHead(in_dim=6, hidden_dim=7, out_dim=5),
        queue=LocationQueue(num_locations=3, dim=5, length=16),
        num_locations=3,
        ema_momentum=0.9,
        key_norm=key_norm,
    )
    if key_norm == "plain":  # without batch statistics two ranks do what one does
        method.encoder.bn = method.key_encoder.bn = nn.Identity()
    parallel = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1)
    losses = []
    for step, location in enumerate((1, 2, 1)):
        progress = Progress(step, 3, float(step), 3.0, 0, rank)
        loss = parallel(part(step, location, rank, world), progress).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(progress)
        losses.append(loss.item())
    return {"state": method.state_dict(), "losses": losses}


def part(step, location, rank, world):
    """A rank's part of a batch of eight subjects."""
    images = torch.rand(8, 4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(step))
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    cases = list(range(8 * step, 8 * step + 8))[mine]
    rows = images[mine]
    near = [[(location + 1) % 3, (location + 2) % 3]] * len(rows)
    anchor = view(rows[:, :2], [[location] * 2] * len(rows), cases=cases)
    assert COORDINATES.shape == (3, 3)
    return {"anchor": anchor, "neighbours": view(rows[:, 2:], near, cases=cases)}


if __name__ == "__main__":
    as_rank(work)
