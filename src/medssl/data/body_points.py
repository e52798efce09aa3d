"""Body points: the voxels that crops are centred on and pairs are searched for."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int64

from medssl.data.store import VolumeStore

MOST_TRIES = 256
"""Voxels of CT that are read for one point. If none of them lies above the threshold, the first one is taken."""


def voxels_at(uniform: Float[np.ndarray, "n 3"], shape: tuple[int, int, int]) -> Int64[np.ndarray, "n 3"]:
    """Return the voxels of a volume that uniform numbers from [0, 1) stand for.

    Source: the loader released with arXiv:2302.05615.
    """
    return np.floor(uniform * np.array(shape)).astype(np.int64)


def away_from_faces(
    voxels: Int64[np.ndarray, "n 3"],
    shape: tuple[int, int, int],
    *,
    lower: np.ndarray | float,
    upper: np.ndarray | float,
) -> Bool[np.ndarray, " n"]:
    """Return which voxels leave at least `lower` voxels before them and `upper` behind them, along every axis."""
    return np.all((voxels >= lower) & (voxels < np.array(shape) - upper), axis=1)


def first_above(
    voxels: Int64[np.ndarray, "n 3"],
    values: Callable[[Int64[np.ndarray, "k 3"]], np.ndarray],
    *,
    low: float,
    count: int,
    most_tries: int | None = None,
) -> Int64[np.ndarray, "m 3"]:
    """Return the first `count` voxels with a value above `low`, or fewer; with none, the first `count` of all.

    Args:
        voxels: The candidates, in order.
        values: Function that gives the values of some voxels. It gets `count` voxels at a time, as far as needed.
        low: Bound that the values must exceed.
        count: Number of voxels to return.
        most_tries: Number of candidates that are looked at; None for all.
    """
    accepted: list[np.ndarray] = []
    for start in range(0, len(voxels[:most_tries]), count):
        some = voxels[start : start + count]
        accepted += list(some[values(some) > low])
        if len(accepted) >= count:
            break
    return np.array(accepted[:count]) if accepted else voxels[:count]


def draw_body_points(
    store: VolumeStore,
    case: int,
    count: int,
    *,
    rng: np.random.Generator,
    low_hu: float | None,
    margin_voxel: float,
    most_tries: int | None = None,
) -> Int64[np.ndarray, "n 3"]:
    """Return at most `count` body voxels of a case in random order, away from the faces of the volume.

    Of CT only voxels above `low_hu` in the first channel are taken: no lung, no air. Where there is none, any body
    voxel is taken. Where all body voxels lie near the faces, these are taken. The margin is at most a quarter of a
    side.
    """
    record, points = store.record(case), store.points(case)
    body = rng.permutation(points[points[:, 3] == -1, :3].astype(np.int64))
    margin = np.minimum(margin_voxel, np.array(record.shape) // 4)
    inner = body[away_from_faces(body, record.shape, lower=margin, upper=margin)]
    inner = inner if len(inner) else body
    if record.modality[0] != "ct" or low_hu is None:
        return inner[:count]

    def hu(some: Int64[np.ndarray, "k 3"]) -> np.ndarray:
        reads = [store.read(case, 0, point, point + 1) for point in some]
        return np.array([record.values(read.result())[0, 0, 0, 0] for read in reads])

    return first_above(inner, hu, low=low_hu, count=count, most_tries=most_tries)


def draw_body_point(
    store: VolumeStore, case: int, *, rng: np.random.Generator, low_hu: float | None, margin_voxel: float
) -> Float[np.ndarray, "3"]:
    """Return one body voxel by the rule of `draw_body_points`; without bounds, any one by a single random number."""
    if low_hu is None and margin_voxel == 0:
        points = store.points(case)
        body = points[points[:, 3] == -1, :3]
        return body[rng.integers(len(body))].astype(np.float64)
    found = draw_body_points(store, case, 1, rng=rng, low_hu=low_hu, margin_voxel=margin_voxel, most_tries=MOST_TRIES)
    return found[0].astype(np.float64)
