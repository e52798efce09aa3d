"""Filters of the keypoint detectors: along one axis after the other, exact in float32, with edge values repeated.

Images may have any number of axes. A filter is a matrix product, which takes a fraction of the time of a convolution of
one channel on a CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, reduce

import torch
from jaxtyping import Float32
from torch import Tensor

TRUNCATE_SIGMA = 4.0
"""Sigmas after which a Gaussian is cut off."""
DERIVATIVE = (1 / 12, -8 / 12, 0.0, 8 / 12, -1 / 12)
"""Central differences of fourth order."""
ROWS = 64
"""Rows of a filter in one product; outside these rows and the reach of the filter its matrix holds only zeros."""


def gaussian(sigma_voxel: float) -> tuple[float, ...]:
    """Return the taps of a sampled Gaussian; they sum to 1."""
    reach = reach_of(sigma_voxel)
    taps = [math.exp(-0.5 * (tap / sigma_voxel) ** 2) for tap in range(-reach, reach + 1)]
    return tuple(tap / sum(taps) for tap in taps)


def reach_of(sigma_voxel: float) -> int:
    """Return how many voxels on each side a Gaussian covers."""
    return int(TRUNCATE_SIGMA * sigma_voxel + 0.5)


def blurred(image: Float32[Tensor, " b *spatial"], sigma_voxel: float) -> Float32[Tensor, " b *spatial"]:
    """Return the image after a Gaussian along every axis."""
    for axis in range(1, image.ndim):
        image = filtered(image, axis, gaussian(sigma_voxel))
    return image


def filtered(image: Float32[Tensor, " b *spatial"], axis: int, taps: Sequence[float]) -> Float32[Tensor, " b *spatial"]:
    """Return the image correlated with an odd number of taps along an axis."""
    side, reach = image.shape[axis], len(taps) // 2
    matrix = filter_matrix(side, tuple(taps)).to(image.device)
    parts = []
    for start in range(0, side, ROWS):
        stop = min(start + ROWS, side)
        lower, upper = max(0, start - reach), min(side, stop + reach)
        rows, seen = matrix[start:stop, lower:upper], image.narrow(axis, lower, upper - lower)
        if axis == image.ndim - 1:
            parts.append(seen @ rows.mT)
        else:
            parts.append((rows @ seen.flatten(axis + 1)).unflatten(-1, seen.shape[axis + 1 :]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


@lru_cache(maxsize=256)
def filter_matrix(side: int, taps: tuple[float, ...]) -> Float32[Tensor, "{side} {side}"]:
    """Return the matrix that correlates `side` values with an odd number of taps, the end values repeated."""
    rows = torch.arange(side)[:, None]
    seen = (rows + torch.arange(len(taps)) - len(taps) // 2).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    weights = torch.tensor(taps, dtype=torch.float64).expand_as(seen)
    return matrix.index_put_((rows.expand_as(seen), seen), weights, accumulate=True).float()


def extreme_within(
    values: Float32[Tensor, " b *axes"], reach: int, extreme: Callable[[Tensor, Tensor], Tensor]
) -> Float32[Tensor, " b *inner"]:
    """Return `torch.maximum` or `torch.minimum` over each cube of `2 * reach + 1` along the axes, where it fits."""
    for axis in range(1, values.ndim):
        values = _extreme_along(values, axis, reach, extreme)
    return values


def extreme_on_cross(
    values: Float32[Tensor, "b level *axes"], reach: int, extreme: Callable[[Tensor, Tensor], Tensor]
) -> Float32[Tensor, "b inner_level *inner"]:
    """Return the extreme as `extreme_within` does, over lines through each cube's middle only.

    A line runs along one of `axes` at a time, at all levels.
    """
    values = _extreme_along(values, 1, reach, extreme)
    arms = []
    for axis in range(2, values.ndim):
        line = values
        for other in range(2, values.ndim):
            if other != axis:
                line = line.narrow(other, reach, line.shape[other] - 2 * reach)
        arms.append(_extreme_along(line, axis, reach, extreme))
    return reduce(extreme, arms)


def _extreme_along(values: Tensor, axis: int, reach: int, extreme: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    length = values.shape[axis] - 2 * reach
    return reduce(extreme, (values.narrow(axis, shift, length) for shift in range(2 * reach + 1)))


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep matrix products in full float32: with ten bits of mantissa differences of Gaussians would be noise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stretched(
    image: Float32[Tensor, " b *spatial"], value_range: Sequence[float] | None
) -> Float32[Tensor, " b *spatial"]:
    """Return the image with `value_range`, or its own extremes, mapped to 0 and 1; all 0 where these are equal."""
    if value_range is not None:
        low, high = value_range
        return (image - low) / (high - low)
    ones = (-1, *[1] * (image.ndim - 1))
    flat = image.flatten(1)
    smallest, largest = flat.amin(1).view(ones), flat.amax(1).view(ones)
    spread = largest - smallest
    return torch.where(spread > 1e-6 * largest.abs(), (image - smallest) / spread, 0.0)


def check_value_range(value_range: Sequence[float] | None) -> None:
    """Check that a range is None or two ascending values.

    Raises:
        ValueError: The range is neither.
    """
    if value_range is not None and (len(value_range) != 2 or not value_range[0] < value_range[1]):
        raise ValueError(f"value_range must be two ascending values or null, got {list(value_range)}")


def halved(image: Float32[Tensor, " b *spatial"]) -> Float32[Tensor, " b *half"]:
    """Return every second voxel along each axis, beginning with the first."""
    return image[(slice(None), *[slice(None, None, 2)] * (image.ndim - 1))]
