"""The losses of VoCo: a crop is as similar to each cell of a field as it overlaps with it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from medssl.checks import choice

FORMS = ("released", "first", "nnssl")
EPSILON = 1e-6
"""Number that keeps logarithms finite and divisors above 0, as in the released code."""
TOUCHING = 1e-6
"""Boxes that have less in common along an axis, as a share of the first box's side, do not overlap."""


def box_overlap(
    box: Float64[Tensor, "b target 2 3"], base: Float64[Tensor, "b base 2 3"]
) -> Float64[Tensor, "b target base"]:
    """Return the share of each box's volume that lies in each base, from lower and upper faces."""
    lower = torch.maximum(box[:, :, None, 0], base[:, None, :, 0])
    upper = torch.minimum(box[:, :, None, 1], base[:, None, :, 1])
    common = (upper - lower) / (box[:, :, 1] - box[:, :, 0])[:, :, None]  # (b, target, base, axis)
    return torch.where(common > TOUCHING, common, 0).prod(3)


def predicted_overlap(
    target: Float[Tensor, "b target dim"], base: Float[Tensor, "b base dim"]
) -> Float[Tensor, "b target base"]:
    """Return the cosine of each target and each base of a volume, 0 where it is negative."""
    return (F.normalize(target, dim=2) @ F.normalize(base, dim=2).mT).clamp(min=0)


def overlap_losses(
    predicted: Float[Tensor, "b target base"], overlap: Float[Tensor, "b target base"], *, form: str = "released"
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the losses of pairs that overlap and of pairs that do not.

    The first is the mean of `-log(1 - |overlap - predicted|)`, weighted by the overlap, or alike for `form="first"`.
    The second is the mean of the squared prediction. Both are means over each volume and then over volumes, or over
    all pairs of the batch for `form="nnssl"`. Half precision is computed in float32.

    Source: arXiv:2402.17300, eq. 3, in the form of repository Luffy03/VoCo.
    """
    choice("form", form, FORMS)
    with torch.autocast(predicted.device.type, enabled=False):
        predicted = predicted.float() if predicted.dtype.itemsize < 4 else predicted
        overlap = overlap.to(predicted)
        is_apart = (overlap == 0).to(predicted)
        weight = 1 - is_apart if form == "first" else overlap
        surprise = -torch.log(1 - (overlap - predicted).abs() + EPSILON)
        dims = (0, 1, 2) if form == "nnssl" else (1, 2)
        positive = (weight * surprise).sum(dims) / (weight.sum(dims) + EPSILON)
        negative = (is_apart * predicted.square()).sum(dims) / (is_apart.sum(dims) + EPSILON)
        return positive.mean(), negative.mean()


def base_similarity(base: Float[Tensor, "b base dim"], *, squared: bool = True) -> Float[Tensor, ""]:
    """Return the mean, over pairs of bases of a volume, of their cosine or its square; negative ones count as 0.

    Gradient flows to both bases of a pair.

    Source: arXiv:2402.17300, eq. 5.
    """
    with torch.autocast(base.device.type, enabled=False):
        base = base.float() if base.dtype.itemsize < 4 else base
        cosine = predicted_overlap(base, base)
        pairs = torch.ones_like(cosine[0], dtype=torch.bool).triu(diagonal=1)
        similar = cosine[:, pairs]  # (b, pair)
        return (similar.square() if squared else similar).mean()
