"""The dense losses of MACL and SuperCL: contrast of maps at each place over a batch, or within a sample by segments."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medssl.losses.position_contrast import Missing, contrast_of_rows, masks
from medssl.ops.downsample import shrunk


def dense_contrast(
    first: Float[Tensor, "b c *spatial"],
    second: Float[Tensor, "b c *spatial"],
    positive: Bool[Tensor, "row row"],
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    compared: Bool[Tensor, "row row"] | None = None,
    missing: Missing = "drop",
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Return `contrast_of_positives` of the 2b vectors at each place of two maps: mean over the places, in nats.

    Rows are all samples of `first`, then all of `second`. The masks are the same at all places: a place is compared
    with the same place in other samples and never with other places. Half precision is computed in float32.

    Args:
        first: One map of each sample.
        second: Another map of each sample, of the same size.
        positive: Mask of positives, 2b x 2b.
        temperature: Temperature of the cosines.
        base_temperature: The loss is multiplied by `temperature / base_temperature`.
        compared: Mask, 2b x 2b, of the rows that a row is compared with; None for all.
        missing: What happens to rows without a positive: `drop` or `raise`.
        chunk: Places whose 2b x 2b cosines are held at once and recomputed for the gradient; None holds all.

    Source: repository stevezs315/MACL, pretrain_MACL.py (a loop over places there); arXiv:2309.11876, eq. 10.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 or null, got {chunk}")
    counted, compared = masks(positive, compared, missing=missing)

    def contrast(part: Tensor) -> Tensor:
        return contrast_of_rows(part, counted, compared=compared, temperature=temperature).sum()

    # (place, 2b, c); small products of strided rows are slow
    rows = torch.cat([first, second]).flatten(2).permute(2, 0, 1).contiguous()
    if chunk is None or chunk >= len(rows):
        total = contrast(rows)
    else:
        total = torch.stack([checkpoint(contrast, part, use_reentrant=False) for part in rows.split(chunk)]).sum()
    return temperature / base_temperature * total / len(rows)


def equivariance_loss(
    auxiliary: Float[Tensor, "b c *large"], dominant: Float[Tensor, "b c *small"], *, how: str = "linear"
) -> Float[Tensor, ""]:
    """Return the mean absolute difference between the map of a small image and the shrunk map of the large one.

    Gradient flows into both. Half precision is computed in float32.

    Args:
        auxiliary: Map of the full image.
        dominant: Map of the image that was shrunk.
        how: Way in which image and map are shrunk, see `shrunk`.

    Source: repository stevezs315/MACL, pretrain_MACL.py; arXiv:2309.11876, eq. 8.
    """
    with torch.autocast(auxiliary.device.type, enabled=False):
        return F.l1_loss(shrunk(_float(auxiliary), dominant.shape[2:], how=how), _float(dominant))


def segment_contrast(
    first: Float[Tensor, "b c *spatial"],
    second: Float[Tensor, "b c *spatial"],
    segment: Int[Tensor, " b *fine"],
    *,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    every: int = 16,
) -> Float[Tensor, ""]:
    """Return the contrast within each sample: places of both maps are positives where they lie in one segment.

    Mean over the samples, in nats. The vector at the same place of the other map is always a positive.

    Args:
        first: One map of each sample.
        second: Another map of the same geometry.
        segment: Number of the segment at each place, or on a finer grid of the same extent, whose nearest voxel counts.
        temperature: Temperature of the cosines.
        base_temperature: The loss is multiplied by `temperature / base_temperature`.
        every: Only each `every`-th place, in order, takes part. For volumes give a number that shares no divisor
            with the sides of the maps; with others the places lie on few planes.

    Source: arXiv:2504.14737; repository stevezs315/SuperCL, train_contrast.py.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    pair = torch.stack([first.flatten(2), second.flatten(2)], dim=1)[..., ::every]  # (b 2 c place)
    rows = pair.transpose(2, 3).flatten(1, 2)  # (b, 2 place, c)
    segment = _nearest(segment, tuple(first.shape[2:])).flatten(1)[:, ::every]
    terms = []
    for own, number in zip(rows, segment, strict=True):
        counted, compared = masks((number[:, None] == number).repeat(2, 2), None)
        terms.append(contrast_of_rows(own[None], counted, compared=compared, temperature=temperature)[0])
    return temperature / base_temperature * torch.stack(terms).mean()


def _float(maps: Tensor) -> Tensor:
    return maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps


def _nearest(segment: Int[Tensor, " b *fine"], size: tuple[int, ...]) -> Int[Tensor, " b *spatial"]:
    """Return the segment numbers at the middles of a coarser grid's voxels."""
    for axis, (fine, side) in enumerate(zip(segment.shape[1:], size, strict=True), start=1):
        if fine != side:
            at = ((torch.arange(side, device=segment.device) + 0.5) * fine / side).long()
            segment = segment.index_select(axis, at)
    return segment
