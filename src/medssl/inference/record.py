"""The record of a volume in memory, as a store would have it, and the access to its voxels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from medssl.data.measurements import Measurements, measure
from medssl.data.store import Record
from medssl.data.volume import Box, Volume, find_body
from medssl.inference.working_grid import Fetch


def fetch_from(voxels: Shaped[np.ndarray, "c x y z"]) -> Fetch:
    """Return a function that gives the voxels of an array."""

    def fetch(lower: np.ndarray, upper: np.ndarray) -> Shaped[np.ndarray, "c x y z"]:
        x, y, z = (slice(a, b) for a, b in zip(lower, upper, strict=True))
        return voxels[:, x, y, z]

    return fetch


def record_of(
    volume: Volume, case: str = "", *, modality: str | Sequence[str] | None = None, with_body: bool = False
) -> Record:
    """Return the record that the volume would have in a store; its body is the whole volume unless `with_body`."""
    return record_from(measure(volume, setting=modality), case, with_body=with_body)


def record_from(measured: Measurements, case: str = "", *, with_body: bool = False) -> Record:
    """Return the record of a measured volume; its voxels are those of `measured.volume`, without padding."""
    volume, channels = measured.volume, measured.volume.num_channels
    body = find_body(volume, modality=measured.modality[0])[0] if with_body else Box.whole(volume.shape)
    (a, b, c), (x, y, z) = body.lower.tolist(), body.upper.tolist()
    return Record(
        case=case,
        folder="",
        shape=volume.shape,
        channels=channels,
        affine=tuple(tuple(float(v) for v in row) for row in volume.affine),
        spacing_mm=volume.spacing_mm,
        modality=measured.modality,
        modality_from=measured.modality_from,
        group="",
        split="",
        statistics=measured.statistics,
        padding=measured.padding,
        doubts=measured.doubts,
        body_lower=(a, b, c),
        body_upper=(x, y, z),
        voxel_hash="",
        source=volume.source,
        slope=(1.0,) * channels,
        intercept=(0.0,) * channels,
        level_factors=((1, 1, 1),),
        labels=(),
    )
