"""One of some processes that compute KAF's loss of one batch together. Run by test_kaf_ddp.py."""

from dataclasses import fields, replace

from ranks import as_rank
from test_kaf import at, batch, make
from torch import nn


def work(rank, world):
    """The loss of a part of the batch, and the gradient over all processes."""
    weights = {"weight_matching": 1.0, "weight_local": 0.5}
    method = make(
        points={"min_points": 0}, local=True, negative_threshold=0.8, **weights
    )  # leaves out pairs of both ranks too
    method.eval()  # batch statistics are a rank's own
    views = batch(b=4)
    views["first"].inside[3] = False  # a view without keypoints
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    parallel = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    output = parallel({name: part(view, mine) for name, view in views.items()}, at())
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return {"loss": output.loss.detach(), "logs": dict(output.logs), "gradients": gradients}


def part(view, rows):
    """Some samples of a view."""
    found = {field.name: getattr(view, field.name) for field in fields(view)}
    return replace(view, **{name: value[rows] for name, value in found.items() if value is not None})


if __name__ == "__main__":
    as_rank(work)
