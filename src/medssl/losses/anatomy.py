"""The losses of SAM: contrast of anatomical embeddings between voxels of two views of one volume.

Every voxel has its position in millimetres. Voxels of a pair of views lie in one list, those of the first view first.
Random subsets are drawn by uniform numbers that the caller gives: the members with the largest numbers are taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medssl.checks import choice

MASK_VALUES = ("neginf", "zero")
BLOCK = 256
"""Queries that are compared with all voxels at once: no matrix has more rows."""
RELAXED_MM = 0.5
"""Distance that positives may lie beyond the nearest pair where no pair is near enough."""


@dataclass(frozen=True, kw_only=True)
class FineMining:
    """The rules by which the fine loss chooses the voxels that it compares.

    Args:
        positive_mm: A voxel is a query where the nearest one of the other view, its positive, is closer than this.
        ignore_mm: Voxels closer to the query than this are no negatives.
        num_candidates: Voxels of the overlap in each view from which the queries are drawn.
        num_queries: Largest number of queries in a view.
        num_hard: Number of hard voxels: those of the pair most similar to a query in fine plus coarse vectors.
        num_negatives: Number of the hard voxels, drawn at random, that are the query's negatives.
        mask_value: What the similarity of ignored voxels is set to when the hard ones are chosen. "neginf" keeps
            them out; "zero", the released behaviour, lets them in where too few similarities are positive.
        temperature: Temperature of the softmax.
    """

    positive_mm: float = 2.0
    ignore_mm: float = 20.0
    num_candidates: int = 2000
    num_queries: int = 100
    num_hard: int = 2000
    num_negatives: int = 500
    mask_value: str = "neginf"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        _check(self)


@dataclass(frozen=True, kw_only=True)
class CoarseMining:
    """The rules by which the coarse loss chooses the voxels that it compares.

    Args:
        positive_mm: A voxel is a query where the nearest one of the other view, its positive, is closer than this.
        height_mm: The positive must also be less than this above or below; for queries of view 1 and of view 2.
        ignore_mm: Voxels closer to the query than this are no negatives.
        num_hard: Number of hard voxels: those of the pair most similar to a query.
        num_negatives: Number of the hard voxels, drawn at random, that are the query's negatives.
        num_global: Number of further negatives from the other volumes of the batch.
        mask_value: The same as in `FineMining`; with "zero" ignored voxels also enter the loss as zeros.
        temperature: Temperature of the softmax.
    """

    positive_mm: float = 25.0
    height_mm: Sequence[float] = (8.0, 6.0)
    ignore_mm: float = 5.0
    num_hard: int = 250
    num_negatives: int = 200
    num_global: int = 1000
    mask_value: str = "neginf"
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        _check(self)


class FineDraws(NamedTuple):
    """Uniform numbers for one pair of views.

    Candidates and queries take one for each voxel, negatives one for each row and hard voxel.
    """

    candidate: Float[Tensor, "2 voxel"]
    query: Float[Tensor, "2 voxel"]
    negative: Float[Tensor, "row hard"]


class CoarseDraws(NamedTuple):
    """Uniform numbers for a batch.

    Negatives take one for each voxel and hard voxel, global negatives one for each voxel of the other volumes.
    """

    negative: Float[Tensor, "volume row hard"]
    foreign: Float[Tensor, "volume 2 foreign"]


class Rows(NamedTuple):
    """The comparisons of one pair, as numbers of its voxels; `counted` marks the negatives that count.

    `matched` is the voxel of the other view that is most similar to the query. It is None where the views do not
    overlap, or for the coarse loss; without overlap queries, positives and negatives come from the first view alone.
    """

    query: Int64[Tensor, " row"]
    positive: Int64[Tensor, " row"]
    negative: Int64[Tensor, "row negative"]
    counted: Bool[Tensor, "row negative"]
    matched: Int64[Tensor, " row"] | None


class ContrastTerms(NamedTuple):
    """A loss and, without gradient, the mean similarities of the positives and of each query's hardest negative."""

    loss: Float[Tensor, ""]
    positive: Float[Tensor, ""]
    hardest: Float[Tensor, ""]


@torch.no_grad()
def mine_fine(
    fine: Float[Tensor, "2 voxel dim"],
    context: Float[Tensor, "2 voxel dim"],
    position_mm: Float[Tensor, "2 voxel 3"],
    valid: Bool[Tensor, "2 voxel"],
    *,
    mining: FineMining,
    draws: FineDraws,
) -> Rows:
    """Choose the comparisons of one pair for the fine loss.

    Where no candidate of the first view has a voxel of the second within `positive_mm`, the limit for both views is
    the smallest distance of the first view plus half a millimetre. Views without a common voxel compare `num_queries`
    voxels of the first view with themselves and the most similar others.

    Args:
        fine: Fine vectors of length 1.
        context: Coarse vectors at the fine voxels, of length 1.
        position_mm: Positions of the voxels.
        valid: Whether the voxels lie in the volume.
        mining: Rules of the choice.
        draws: Uniform numbers that decide the random subsets.

    Source: arXiv:2012.02383, section III-B; repository alibaba-damo-academy/self-supervised-anatomical-embedding-v2.
    """
    candidates = common_voxels(position_mm, valid)
    if not candidates.any(dim=1).all():
        return _mine_one_view(fine[0], position_mm[0], mining=mining, draws=draws)
    num_voxels = fine.shape[1]
    queries, positives, found = [], [], []
    for view in (0, 1):
        number = _subset(candidates[view].nonzero()[:, 0], draws.candidate[view], mining.num_candidates)
        found.append((number, *nearest(position_mm[view, number], position_mm[1 - view])))
    limit_mm = mining.positive_mm
    if not (found[0][1] < limit_mm).any():
        limit_mm = found[0][1].min().item() + RELAXED_MM
    for view, (number, distance, partner) in enumerate(found):
        near = (distance < limit_mm).nonzero()[:, 0]
        chosen = _subset(near, draws.query[view, number], mining.num_queries)
        queries.append(number[chosen] + view * num_voxels)
        positives.append(partner[chosen] + (1 - view) * num_voxels)
    query = torch.cat(queries)
    vectors, place = torch.cat([fine, context], dim=2).flatten(0, 1), position_mm.flatten(0, 1)
    parts = []
    for rows, noise in zip(query.split(BLOCK), draws.negative[: len(query)].split(BLOCK), strict=True):
        score = vectors[rows] @ vectors.T  # fine and coarse similarity, added
        near = distances(place[rows], place) < mining.ignore_mm
        other = 1 - rows // num_voxels
        best = score.unflatten(1, (2, -1))[torch.arange(len(rows), device=rows.device), other].argmax(dim=1)
        parts.append((*_negatives(score, near, noise, mining), best + other * num_voxels))
    negative, counted, matched = (torch.cat(part) for part in zip(*parts, strict=True))
    return Rows(query, torch.cat(positives), negative, counted, matched)


def fine_contrast(fine: Float[Tensor, "2 voxel dim"], rows: Rows, *, temperature: float) -> ContrastTerms:
    """Return the cross-entropy of each query's positive against its negatives, by fine similarity alone.

    Mean over the queries of both views, in nats. Gradient flows to queries, positives and negatives.

    Source: arXiv:2012.02383, eq. 1.
    """
    vectors = fine.flatten(0, 1)
    query = vectors[rows.query]
    positive = (query * vectors[rows.positive]).sum(1)
    negative = torch.einsum("rd,rkd->rk", query, vectors[rows.negative])
    return contrast(positive, negative.masked_fill(~rows.counted, -torch.inf), temperature=temperature)


def coarse_contrast(
    coarse: Float[Tensor, "volume 2 voxel dim"],
    position_mm: Float[Tensor, "volume 2 voxel 3"],
    *,
    mining: CoarseMining,
    draws: CoarseDraws,
) -> ContrastTerms:
    """Return the cross-entropy of each query's positive against negatives of its pair and of the other volumes.

    Where no voxel of the first view has a positive, every voxel of the pair is compared with itself and the most
    similar others. A single volume has no global negatives. Mean over the queries of a volume, then over volumes, in
    nats. Gradient flows to queries, positives and negatives.

    Source: arXiv:2012.02383, section III-B; repository alibaba-damo-academy/self-supervised-anatomical-embedding-v2.
    """
    terms, num_voxels = [], coarse.shape[2]
    for number, (vectors, place) in enumerate(zip(coarse.flatten(1, 2), position_mm.flatten(1, 2), strict=True)):
        rows, near = _mine_coarse(vectors.detach(), place, mining=mining, noise=draws.negative[number])
        similarity = vectors[rows.query] @ vectors.T
        positive = similarity.gather(1, rows.positive[:, None])[:, 0]
        if mining.mask_value == "zero" and near is not None:
            similarity = similarity.masked_fill(near, 0)
        negative = similarity.gather(1, rows.negative).masked_fill(~rows.counted, -torch.inf)
        if mining.mask_value == "zero" and near is not None:
            negative = F.pad(negative, (0, mining.num_negatives - negative.shape[1]))
        foreign = torch.cat([coarse[:number], coarse[number + 1 :]]).flatten(0, 2)
        chosen = draws.foreign[number].topk(min(mining.num_global, len(foreign)), dim=1).indices  # (2, foreign)
        of_views = [vectors[rows.query[rows.query < num_voxels]], vectors[rows.query[rows.query >= num_voxels]]]
        beyond = torch.cat([query @ foreign[few].T for query, few in zip(of_views, chosen, strict=True)])
        terms.append(contrast(positive, torch.cat([negative, beyond], dim=1), temperature=mining.temperature))
    return ContrastTerms(*(torch.stack(values).mean() for values in zip(*terms, strict=True)))


def contrast(
    positive: Float[Tensor, " row"], negative: Float[Tensor, "row negative"], *, temperature: float
) -> ContrastTerms:
    """Return the cross-entropy of the positives; negatives of minus infinity do not count. Mean over rows, in nats."""
    logits = torch.cat([positive[:, None], negative], dim=1) / temperature
    loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
    hardest = F.pad(negative.detach(), (0, 1), value=-1.0).amax(dim=1)  # -1 where a row has no negative
    return ContrastTerms(loss, positive.detach().mean(), hardest.clamp(min=-1).mean())


def common_voxels(position_mm: Float[Tensor, "2 voxel 3"], valid: Bool[Tensor, "2 voxel"]) -> Bool[Tensor, "2 voxel"]:
    """Return which valid voxels lie in the intersection of the boxes that the valid voxels of both views span."""
    outside = ~valid[..., None]
    lowest = position_mm.masked_fill(outside, torch.inf).amin(dim=1).amax(dim=0)
    highest = position_mm.masked_fill(outside, -torch.inf).amax(dim=1).amin(dim=0)
    return valid & (position_mm >= lowest).all(-1) & (position_mm <= highest).all(-1)


def nearest(
    points: Float[Tensor, "point 3"], others: Float[Tensor, "other 3"]
) -> tuple[Float[Tensor, " point"], Int64[Tensor, " point"]]:
    """Return the distance to the nearest of the other points, and its number."""
    found = [distances(block, others).min(dim=1) for block in points.split(BLOCK)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def distances(points: Float[Tensor, "point 3"], others: Float[Tensor, "other 3"]) -> Float[Tensor, "point other"]:
    """Return all distances, exact also far from the origin."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def _subset(numbers: Int64[Tensor, " some"], noise: Float[Tensor, " all"], count: int) -> Int64[Tensor, " few"]:
    return numbers[noise[numbers].topk(min(count, len(numbers))).indices]


def _negatives(
    score: Float[Tensor, "row voxel"],
    near: Bool[Tensor, "row voxel"],
    noise: Float[Tensor, "row hard"],
    mining: FineMining | CoarseMining,
) -> tuple[Int64[Tensor, "row negative"], Bool[Tensor, "row negative"]]:
    """Return a random part of the hardest voxels of each row, and which of them count."""
    is_zero = mining.mask_value == "zero"
    hard = score.masked_fill(near, 0 if is_zero else -torch.inf).topk(min(mining.num_hard, score.shape[1]), dim=1)
    noise = noise[:, : hard.indices.shape[1]].masked_fill(hard.values == -torch.inf, -1)
    chosen = noise.topk(min(mining.num_negatives, noise.shape[1]), dim=1).indices
    return hard.indices.gather(1, chosen), hard.values.gather(1, chosen) > -torch.inf


def _mine_one_view(
    fine: Float[Tensor, "voxel dim"], position_mm: Float[Tensor, "voxel 3"], *, mining: FineMining, draws: FineDraws
) -> Rows:
    everything = torch.arange(len(fine), device=fine.device)
    query = _subset(everything, draws.query[0], mining.num_queries)
    near = distances(position_mm[query], position_mm) < mining.ignore_mm
    score = (fine[query] @ fine.T).masked_fill(near, 0 if mining.mask_value == "zero" else -torch.inf)
    hard = score.topk(min(mining.num_negatives, len(fine)), dim=1)
    return Rows(query, query, hard.indices, hard.values > -torch.inf, None)


@torch.no_grad()
def _mine_coarse(
    vectors: Float[Tensor, "voxel dim"],
    place: Float[Tensor, "voxel 3"],
    *,
    mining: CoarseMining,
    noise: Float[Tensor, "most hard"],
) -> tuple[Rows, Bool[Tensor, "row voxel"] | None]:
    """Return the comparisons of one pair and the ignored voxels of each row; None where voxels are own positives."""
    half, all_near = len(vectors) // 2, distances(place, place)
    queries, positives = [], []
    for first, second, height_mm in ((0, half, mining.height_mm[0]), (half, 0, mining.height_mm[1])):
        found = all_near[first : first + half, second : second + half].min(dim=1)
        apart = (place[first : first + half, 2] - place[second + found.indices, 2]).abs()
        kept = ((found.values < mining.positive_mm) & (apart < height_mm)).nonzero()[:, 0]
        queries.append(first + kept)
        positives.append(second + found.indices[kept])
    if len(queries[0]) == 0:
        everything = torch.arange(len(vectors), device=vectors.device)
        score = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
        hard = score.topk(min(mining.num_negatives, len(vectors) - 1), dim=1).indices
        return Rows(everything, everything, hard, torch.ones_like(hard, dtype=torch.bool), None), None
    query = torch.cat(queries)
    near = all_near[query] < mining.ignore_mm
    negative, counted = _negatives(vectors[query] @ vectors.T, near, noise[: len(query)], mining)
    return Rows(query, torch.cat(positives), negative, counted, None), near


def _check(mining: FineMining | CoarseMining) -> None:
    name = type(mining).__name__
    choice(f"{name}: mask_value", mining.mask_value, MASK_VALUES)
    for key in ("temperature", "positive_mm"):
        if getattr(mining, key) <= 0:
            raise ValueError(f"{name}: {key} must be positive, got {getattr(mining, key)}")
    if mining.ignore_mm < 0:
        raise ValueError(f"{name}: ignore_mm must be at least 0, got {mining.ignore_mm}")
    if isinstance(mining, CoarseMining) and (len(mining.height_mm) != 2 or min(mining.height_mm) <= 0):
        got = list(mining.height_mm)
        raise ValueError(f"{name}: height_mm must be two positive lengths, of view 1 and view 2; got {got}")
    for key, value in vars(mining).items():
        least = 0 if key == "num_global" else 1
        if key.startswith("num_") and value < least:
            raise ValueError(f"{name}: {key} must be at least {least}, got {value}")
