"""Padding: values such as -9999 that stand for "no voxel here", far from the values of the image."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from medssl.data.modality import has_partial_air, sampled

MOST_VALUES = 4
LEAST_VOXELS, LEAST_SHARE, LEAST_SHARE_TOP = 16, 1e-4, 0.05
LEAST_DISTINCT = 16
"""An image with fewer values than this beside the padding is piecewise constant: none of its values is far out."""
SENTINEL_SHARE, SENTINEL_GAP, AIR_GAP = 0.01, 0.25, 0.1
AIR_HU = (-1100.0, -900.0)

Padding = tuple[tuple[float, float], ...]
"""Values of a channel that are padding, each with its share of the voxels."""


def find_padding(channel: Shaped[np.ndarray, "x y z"], *, is_ct: bool | None = None) -> Padding:
    """Return the values of a channel that are padding, each with its share; usually none.

    At the low end these are up to four values that at least 16 voxels and 0.01 % of all share exactly, with a gap to
    the next value as wide as the central 99 % of the rest. Where 1 % share the value, a quarter of that width is enough
    if nothing else is negative, and a tenth if it is a value that images are filled with like air (-1100 to -900).

    At the high end 5 % of all voxels have to share the value, on the faces too, as otherwise saturated metal would
    count. The value 0 is no padding, nor is the air of CT: a value from -1100 to -900 beside voxels that are in part
    air (`has_partial_air`), which an image that was filled with such a value does not have.

    Args:
        channel: The voxels of a channel.
        is_ct: Whether the channel is stated to be CT, whose air is air whatever the rest looks like; False means that
            it is stated to be something else, which has no such air, and None that the values decide.
    """
    sample = np.sort(sampled(channel))
    low = _at_end(channel, sample, top=False, is_ct=is_ct)
    return (*low, *_at_end(channel, sample[::-1], top=True, is_ct=is_ct))


def is_padding(channel: Shaped[np.ndarray, "x y z"], padding: Padding) -> Bool[np.ndarray, "x y z"]:
    """Return which voxels of a channel are padding."""
    return np.isin(channel, np.array([value for value, _ in padding]).astype(channel.dtype))


def _at_end(
    channel: Shaped[np.ndarray, "x y z"], ordered: Float64[np.ndarray, " n"], *, top: bool, is_ct: bool | None
) -> list[tuple[float, float]]:
    """Return the padding at one end; `ordered` is a sample of the values that begins at this end."""
    firsts = np.unique(ordered)
    firsts = firsts[::-1] if top else firsts
    if len(firsts) < LEAST_DISTINCT or not _has_gap(ordered, firsts):
        return []
    found: list[tuple[float, float]] = []
    candidates: list[tuple[float, float]] = []
    beyond: Bool[np.ndarray, "x y z"] | None = None
    for _ in range(MOST_VALUES):
        left = channel if beyond is None else channel[beyond]
        extreme = left.max() if top else left.min()
        share = int(np.count_nonzero(left == extreme)) / channel.size
        if share * channel.size < LEAST_VOXELS or share < (LEAST_SHARE_TOP if top else LEAST_SHARE):
            break
        beyond = channel < extreme if top else channel > extreme
        rest = channel[beyond]
        if rest.size < LEAST_DISTINCT:
            break
        candidates.append((float(extreme), share))
        nearest = rest.max() if top else rest.min()
        if _is_far(channel, float(extreme), float(nearest), rest, share=share, top=top, is_ct=is_ct):
            found = list(candidates)
    return found


def _has_gap(ordered: Float64[np.ndarray, " n"], firsts: Float64[np.ndarray, " k"]) -> bool:
    """Return whether a sample has a gap near its end that may be that of padding; a full search needs one."""
    ends = firsts[: MOST_VALUES + 1]
    width = _width(ordered[np.isin(ordered, ends, invert=True)])
    return bool(np.abs(np.diff(ends)).max() >= AIR_GAP * width)


def _is_far(
    channel: Shaped[np.ndarray, "x y z"],
    value: float,
    nearest: float,
    rest: Shaped[np.ndarray, " n"],
    *,
    share: float,
    top: bool,
    is_ct: bool | None,
) -> bool:
    sample = sampled(rest)
    if value == 0 or len(np.unique(sample)) < LEAST_DISTINCT:
        return False
    width, gap = _width(sample), abs(nearest - value)
    is_like_air = not top and AIR_HU[0] <= value <= AIR_HU[1]
    if is_like_air and (has_partial_air(sample) if is_ct is None else is_ct):
        return False
    if top and not _meets_faces(channel, value, share):
        return False
    least = 1.0
    if not top and share >= SENTINEL_SHARE:
        least = AIR_GAP if is_like_air else SENTINEL_GAP if value < 0 <= nearest else 1.0
    return gap >= least * width


def _width(values: Float64[np.ndarray, " n"]) -> float:
    low, high = np.percentile(values, (0.5, 99.5))
    return float(high - low)


def _meets_faces(channel: Shaped[np.ndarray, "x y z"], value: float, share: float) -> bool:
    """Return whether a value is at least as frequent on the six faces of the volume as in it."""
    faces = [channel.take(end, axis=axis) for axis in range(3) for end in (0, -1)]
    return sum(int((face == value).sum()) for face in faces) >= share * sum(face.size for face in faces)


def without_padding(channel: Shaped[np.ndarray, "x y z"], padding: Padding) -> Shaped[np.ndarray, " voxel"]:
    """Return the values of a channel that are no padding."""
    return channel[~is_padding(channel, padding)] if padding else channel.reshape(-1)


def shown(padding: Sequence[Padding]) -> str:
    """Return padding in words: `-9999 (12 %)`; of several channels each with its number."""
    words = []
    for number, values in enumerate(padding):
        where = f"channel {number}: " if len(padding) > 1 else ""
        words += [f"{where}{value:.6g} ({100 * share:.3g} %)" for value, share in values]
    return ", ".join(words)
