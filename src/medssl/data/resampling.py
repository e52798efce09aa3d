"""One-axis resampling as a matrix: the filter behind pyramid levels, resized views and resampling to a spacing."""

import numpy as np
from jaxtyping import Float32, Float64

LOBES = 4
"""Lobes of the windowed sinc: four keep > 85 % at 0.8 of the Nyquist limit, < 5 % from 1.3 of it on (three: 8 %)."""


SINC_RATIO = 1 + 1e-9
"""Least ratio that selects the Lanczos filter, for views as fine as their pyramid level but coarser than level 0."""


def resampling_matrix(
    positions: Float64[np.ndarray, " out"], num_in: int, *, ratio: float, border: bool
) -> Float32[np.ndarray, "out {num_in}"]:
    """Return the weights that turn `num_in` samples into values at `positions`.

    With `ratio` <= 1 (the output is as fine as the input or finer) this is linear interpolation. With `ratio` > 1 it is
    a Lanczos filter stretched by `ratio`, so that nothing beyond the output's Nyquist limit folds back.

    Args:
        positions: Places to sample at, in input voxels (0 is the centre of the first one).
        num_in: Number of input samples.
        ratio: Step of the output over step of the input.
        border: True repeats the edge sample outside; False counts what lies outside as zero, so that rows sum to less
            than one there.

    Source: C. E. Duchon, Lanczos filtering in one and two dimensions, J. Appl. Meteorol. 18 (1979).
    """
    scale = max(1.0, ratio)
    half_width = LOBES * scale if ratio > 1 else 1.0
    first = np.floor(positions - half_width).astype(np.int64)
    taps = first[:, None] + np.arange(int(np.ceil(2 * half_width)) + 2)  # (out, taps)
    offset = (taps - positions[:, None]) / scale
    if ratio > 1:
        weight = np.where(np.abs(offset) < LOBES, np.sinc(offset) * np.sinc(offset / LOBES), 0.0)
    else:
        weight = np.clip(1.0 - np.abs(offset), 0.0, None)
    weight /= weight.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(positions), num_in))
    rows = np.broadcast_to(np.arange(len(positions))[:, None], taps.shape)
    if border:
        np.add.at(matrix, (rows, np.clip(taps, 0, num_in - 1)), weight)
    else:
        inside = (taps >= 0) & (taps < num_in)
        matrix[rows[inside], taps[inside]] = weight[inside]
    return matrix.astype(np.float32)


def support_voxel(ratio: float) -> float:
    """Return the half width of the filter for an output `ratio` times as coarse as the input, in input voxels."""
    return LOBES * ratio if ratio > 1 else 1.0


def resample_axis(
    array: Float32[np.ndarray, "..."], axis: int, *, positions: Float64[np.ndarray, " out"], ratio: float
) -> Float32[np.ndarray, "..."]:
    """Return the array with one axis sampled at `positions` (input voxels); edge samples repeat outside."""
    matrix = resampling_matrix(positions, array.shape[axis], ratio=ratio, border=True)
    return np.ascontiguousarray(np.moveaxis(np.tensordot(matrix, array, axes=(1, axis)), 0, axis))


def halve(
    array: Float32[np.ndarray, "channel x y z"], *, axes: tuple[bool, ...]
) -> Float32[np.ndarray, "channel x2 y2 z2"]:
    """Return the array at half the resolution along the chosen axes; voxel i lies at 2i + 0.5 of the input."""
    for axis, chosen in enumerate(axes, start=1):
        if chosen:
            positions = 2.0 * np.arange(-(-array.shape[axis] // 2)) + 0.5
            array = resample_axis(array, axis, positions=positions, ratio=2.0)
    return array
