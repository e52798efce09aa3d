"""The loss of DrasCLR: instance discrimination of a query's own key from the keys of a queue."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Negatives(NamedTuple):
    """Keys of some queues, and the queue of each query.

    Args:
        keys: Unit vectors of each queue.
        queue: Number of the queue that each query is compared with.
        excluded: Entries that do not count for a query, such as older keys of its own subject.
    """

    keys: Float[Tensor, "queue length dim"]
    queue: Int64[Tensor, " query"]
    excluded: Bool[Tensor, "query length"]


class Discrimination(NamedTuple):
    """A loss and, without gradient, the share of queries that are most similar to their own key."""

    loss: Float[Tensor, ""]
    top1: Float[Tensor, ""]


def queue_logits(
    query: Float[Tensor, "query dim"],
    key: Float[Tensor, "query dim"],
    negatives: Negatives,
    *,
    temperature: float,
) -> Float[Tensor, "query _"]:
    """Return dot products divided by `temperature`: with the query's own key first, then with its queue.

    Excluded entries are minus infinity. Gradient flows to `query` alone.

    Source: arXiv:1911.05722, eq. 1; repository batmanlab/DrasCLR, models/builder.py.
    """
    own = (query * key.detach()).sum(1, keepdim=True)
    others = query.new_empty(len(query), negatives.keys.shape[1])
    for number, keys in enumerate(negatives.keys.detach()):
        rows = (negatives.queue == number).nonzero()[:, 0]
        others = others.index_copy(0, rows, query[rows] @ keys.T)
    others = others.masked_fill(negatives.excluded, -torch.inf)
    return torch.cat([own, others], dim=1) / temperature


def discriminate(
    logits: Float[Tensor, "query key"], *, counted: Bool[Tensor, " query"] | None = None
) -> Discrimination:
    """Return the cross-entropy of the first entry against the others, mean over the counted queries, in nats.

    If no query counts, the loss is zero with a gradient of zero.

    Source: arXiv:1911.05722, eq. 1.
    """
    weight = torch.ones_like(logits[:, 0]) if counted is None else counted.to(logits)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    total = weight.sum().clamp(min=1)
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / total
    is_first = (logits.detach().argmax(1) == 0).to(logits)
    return Discrimination(loss, (is_first * weight).sum() / total)
