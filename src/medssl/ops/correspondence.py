"""Correspondence of the keypoints of two views: rows (sample, number in the first view, number in the second)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Choice(NamedTuple):
    """Keypoints that two views take from one list, and which of them are the same.

    Args:
        first: Numbers in the list of the points that the first view takes. Points that both views take come first.
        second: Numbers of the points that the second view takes. It begins with the same points in the same order.
        first_valid: Whether an entry of `first` is a point.
        second_valid: Whether an entry of `second` is a point.
        pairs: Rows (sample, place in `first`, place in `second`); -1 where a point has no partner.
    """

    first: Int64[Tensor, "b n"]
    second: Int64[Tensor, "b n"]
    first_valid: Bool[Tensor, "b n"]
    second_valid: Bool[Tensor, "b n"]
    pairs: Int64[Tensor, "pair 3"]


def choose_shared(
    first_inside: Bool[Tensor, "b k"],
    second_inside: Bool[Tensor, "b k"],
    noise: Float[Tensor, "b k"],
    *,
    max_points: int,
    max_matched_fraction: float = 0.9,
) -> Choice:
    """Choose the points of a volume that two views see, in the random order of `noise`, shared ones first.

    Where a view sees more than `max_points`, at most `max_matched_fraction * max_points` shared points are taken. The
    rest of a view are points that it alone sees, so that partnerless points remain. A shared point that is left out is
    left out of both views.

    Args:
        first_inside: Which points of the list lie in the first view.
        second_inside: Which points of the list lie in the second view.
        noise: Uniform numbers in [0, 1), one for each point.
        max_points: Largest number of points in a view.
        max_matched_fraction: Largest fraction of `max_points` that is shared where a view sees more points than that.
    """
    both = first_inside & second_inside
    crowded = (torch.maximum(first_inside.sum(1), second_inside.sum(1)) > max_points)[:, None]
    limit = torch.where(crowded, int(max_matched_fraction * max_points), max_points)
    order = torch.where(both, noise, 2.0).argsort(dim=1)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    shared = both & (rank < limit)
    chosen = []
    for inside in (first_inside, second_inside):
        key = torch.where(shared, noise, torch.where(inside & ~both, 1 + noise, torch.inf))
        values, places = key.sort(dim=1)
        chosen.append((places[:, :max_points], values[:, :max_points].isfinite()))
    (first, first_valid), (second, second_valid) = chosen
    number = shared.sum(1, keepdim=True)
    place = torch.arange(first.shape[1], device=first.device)
    matched = (place < number).nonzero()
    pairs = _with_partnerless(
        torch.cat([matched, matched[:, 1:]], dim=1), first_valid=first_valid, second_valid=second_valid
    )
    return Choice(first, second, first_valid, second_valid, pairs)


def mutual_nearest(
    cost: Float[Tensor, "b m n"],
    allowed: Bool[Tensor, "b m n"],
    *,
    first_valid: Bool[Tensor, "b m"],
    second_valid: Bool[Tensor, "b n"],
) -> Int64[Tensor, "pair 3"]:
    """Return pairs of points that are each other's cheapest allowed partner, then the points without a partner.

    Source: repository zshyang/kaf, dataset/match_utils.py.
    """
    usable = allowed & first_valid[:, :, None] & second_valid[:, None]
    cost = cost.masked_fill(~usable, torch.inf)
    if not cost.numel():
        return _with_partnerless(cost.new_empty(0, 3).long(), first_valid=first_valid, second_valid=second_valid)
    forth, back = cost.argmin(2), cost.argmin(1)
    here = torch.arange(cost.shape[1], device=cost.device)
    is_pair = (back.gather(1, forth) == here) & cost.gather(2, forth[..., None])[..., 0].isfinite()
    sample, first = is_pair.nonzero().unbind(1)
    matched = torch.stack([sample, first, forth[sample, first]], dim=1)
    return _with_partnerless(matched, first_valid=first_valid, second_valid=second_valid)


def patch_descriptors(
    image: Float[Tensor, "b c *spatial"], points: Float[Tensor, "b n d"], *, side: int = 5
) -> Float[Tensor, "b n values"]:
    """Return the voxels around each point as a vector of mean 0 and length 1.

    A patch has `side` voxels along each axis, the nearest voxel in its middle. Outside the image its edge is repeated.
    A patch of one value gives zeros.
    """
    spatial = image.shape[2:]
    reach = torch.arange(side, device=image.device) - side // 2
    offsets = torch.stack(torch.meshgrid(*[reach] * len(spatial), indexing="ij"), dim=-1).reshape(-1, len(spatial))
    last = torch.tensor(spatial, device=image.device) - 1
    place = ((points + 0.5).floor().long()[:, :, None] + offsets).clamp(min=0)
    flat = torch.zeros_like(place[..., 0])
    for axis, n in enumerate(spatial):
        flat = flat * n + torch.minimum(place[..., axis], last[axis])
    values = image.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, image.shape[1], -1))
    return _as_descriptors(values.unflatten(2, flat.shape[1:]))


def descriptors_at(
    image: Float[Tensor, "b c *spatial"], places: Float[Tensor, "b n voxel d"]
) -> Float[Tensor, "b n values"]:
    """Return the interpolated values at the places of each point as a vector of mean 0 and length 1.

    Places are voxels of the image; outside it its edge is repeated. Equal values give zeros.
    """
    spatial = image.shape[2:]
    last = torch.tensor(spatial, device=image.device) - 1
    grid = (2 * places / last.clamp(min=1) - 1).flip(-1).flatten(1, 2)  # x last, as grid_sample has it
    grid = grid.reshape(len(image), -1, *[1] * (len(spatial) - 1), len(spatial)).to(image.dtype)
    values = F.grid_sample(image, grid, align_corners=True, padding_mode="border").flatten(2)
    return _as_descriptors(values.unflatten(2, places.shape[1:3]))


def _as_descriptors(values: Float[Tensor, "b c n voxel"]) -> Float[Tensor, "b n values"]:
    """Return the values of all channels and voxels of a point as a vector of mean 0 and length 1."""
    patches = values.transpose(1, 2).flatten(2)
    return F.normalize(patches - patches.mean(2, keepdim=True), dim=2)


def _with_partnerless(
    matched: Int64[Tensor, "pair 3"], *, first_valid: Bool[Tensor, "b m"], second_valid: Bool[Tensor, "b n"]
) -> Int64[Tensor, "row 3"]:
    """Return the pairs, then a row for each valid point that is in none of them."""
    rows = [matched]
    for column, valid in ((1, first_valid), (2, second_valid)):
        alone = valid.clone()
        alone[matched[:, 0], matched[:, column]] = False
        sample, place = alone.nonzero().unbind(1)
        nobody = torch.full_like(sample, -1)
        rows.append(torch.stack([sample, *((place, nobody) if column == 1 else (nobody, place))], dim=1))
    return torch.cat(rows)
