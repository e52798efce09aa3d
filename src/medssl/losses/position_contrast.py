"""The contrast of KAF and MACL: positives are views of nearly the same position, also of other volumes."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from medssl.checks import choice

Missing = Literal["drop", "raise"]
MISSING = ("drop", "raise")
EPSILON = 1e-8


def equal_labels(label: Int64[Tensor, " row"]) -> Bool[Tensor, "row row"]:
    """Return which rows have the same label, such as the two views of an image."""
    return label[:, None] == label


def contrast_of_positives(
    vectors: Float[Tensor, "row dim"],
    positive: Bool[Tensor, "row row"],
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    compared: Bool[Tensor, "row row"] | None = None,
    missing: Missing = "drop",
) -> Float[Tensor, ""]:
    """Return minus the mean log-probability of each row's positives among all other rows.

    The loss is multiplied by `temperature / base_temperature`; `base_temperature=temperature` gives the equation of the
    paper. Mean over the rows that have a positive, in nats; zero with a gradient of zero where none has. A row is no
    positive of itself, whatever the mask says. Half precision is computed in float32, also under autocast.

    Args:
        vectors: Vectors of any length but zero; they are compared by their cosine.
        positive: Mask of positives.
        temperature: Temperature of the cosines.
        base_temperature: Divisor of the scale of the loss.
        compared: Which rows a row is compared with; None for all. Rows that are not compared are no positives either.
        missing: `drop` leaves out rows without a positive, `raise` refuses them.

    Raises:
        ValueError: A row has no positive, and `missing` is `raise`.

    Source: arXiv:2004.11362, eq. 2; arXiv:2106.09157, eq. 3; repository zshyang/kaf, loss/contrast_loss.py; with
        `missing="raise"` repository stevezs315/MACL, loss/contrast_loss.py.
    """
    counted, compared = masks(positive, compared, missing=missing)
    loss = contrast_of_rows(vectors[None], counted, compared=compared, temperature=temperature)
    return temperature / base_temperature * loss[0]


def nearest_is_positive(vectors: Float[Tensor, "row dim"], positive: Bool[Tensor, "row row"]) -> Float[Tensor, ""]:
    """Return the share of rows to which one of their positives is more similar than all other rows; no gradient."""
    rows = F.normalize(vectors.detach(), dim=1)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    nearest = (rows @ rows.mT).masked_fill(own, -torch.inf).argmax(1, keepdim=True)
    return (positive & ~own).take_along_dim(nearest, dim=1).to(rows).mean()


def masks(
    positive: Bool[Tensor, "row row"], compared: Bool[Tensor, "row row"] | None, *, missing: Missing = "drop"
) -> tuple[Bool[Tensor, "row row"], Bool[Tensor, "row row"]]:
    """Return the positives that count and the rows that are compared, both without the row itself.

    Raises:
        ValueError: A row has no positive, and `missing` is `raise`.
    """
    other = ~torch.eye(len(positive), dtype=torch.bool, device=positive.device)
    compared = other if compared is None else compared & other
    counted = positive & compared
    choice("missing", missing, MISSING)
    if missing == "raise" and len(alone := (~counted.any(1)).nonzero().flatten().tolist()):
        raise ValueError(f"rows {alone} have no positive; raise the threshold of positions above 0")
    return counted, compared


def contrast_of_rows(
    rows: Float[Tensor, "place row dim"],
    counted: Bool[Tensor, "row row"],
    *,
    compared: Bool[Tensor, "row row"],
    temperature: float,
) -> Float[Tensor, " place"]:
    """Return minus the mean log-probability of positives at each place.

    This is `contrast_of_positives` without its scale, for the result of `masks`. Half precision is computed in
    float32, also under autocast.

    Args:
        rows: Vectors of any length but zero; they are compared by their cosine.
        counted: Mask of positives, the same at all places.
        compared: Mask of the rows that a row is compared with, the same at all places.
        temperature: Temperature of the cosines.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        products = rows @ rows.mT
        inverse = products.diagonal(dim1=1, dim2=2).clamp(min=EPSILON**2).rsqrt()
        logits = products * (inverse[:, :, None] * inverse[:, None] / temperature)  # saves passes over normed rows
        lowest = torch.finfo(logits.dtype).min  # its exponential is 0, and a row without any other stays finite
        log_sum = logits.masked_fill(~compared, lowest).logsumexp(-1)
        numbers = counted.sum(1)
        has_positive = numbers > 0
        share = counted.to(logits.dtype) / numbers.clamp(min=1)[:, None]
        total = (log_sum * has_positive).sum(-1) - (logits * share).sum((1, 2))
        return total / has_positive.sum().clamp(min=1)
