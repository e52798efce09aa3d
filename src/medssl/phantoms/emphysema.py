"""Emphysema of phantoms: holes of air in the lungs, more of them in severe cases, most of them near the tips.

The holes follow from the subject's seed by a separate random stream, so the anatomy is the same with and without them.
Lengths are in mm, points in atlas space (see `medssl.phantoms.canvas`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Real

VERSION = 1
"""Version of the drawing, raised whenever the same seed gives other holes."""

HOLE_HU = -980.0
LOW_HU = -950.0
"""Lung below this value counts as emphysema, as is usual for CT in full inspiration."""

STREAM = 0xE3F45  # separates this random stream from that of the anatomy, which is seeded by the seed alone
SHARE_HEALTHY = 0.25
MARGIN_MM = np.array([[-150.0, -120.0, -130.0], [150.0, 120.0, 235.0]])
"""A box around every lung."""


@dataclass(frozen=True)
class Kind:
    """Holes of one kind: at most one in each cell of a grid over the chest."""

    pitch_mm: float
    radius_mm: tuple[float, float]
    power: int  # how the share of taken cells grows with the severity


KINDS = (
    Kind(8.0, (2.0, 4.5), 1),  # centrilobular: about one per lobule
    Kind(17.0, (4.5, 7.5), 2),  # bullae, in severe cases
)


def draw_severity(seed: int) -> float:
    """Return the severity of a seed's subject, from 0 to 1: 0 for a quarter of the subjects, else uniform."""
    return max(0.0, (float(_stream(seed).uniform()) - SHARE_HEALTHY) / (1 - SHARE_HEALTHY))


def hole_share(
    point: Float[np.ndarray, "3 n"], *, seed: int, severity: float, spacing_mm: float
) -> Float32[np.ndarray, " n"]:
    """Return the share of each voxel, about these atlas points, that holes of the subject take.

    A higher severity adds holes and moves none. A hole smaller than a voxel takes no more than its volume.
    """
    rng = _stream(seed)
    rng.uniform()  # the severity
    point = point + 1.2 * np.stack([_waves(point, rng, (9, 18)) for _ in range(3)])  # no hole is an ellipsoid
    share = np.zeros(point.shape[1], np.float32)
    for kind in KINDS:
        np.maximum(share, _share_of_kind(kind, point, rng, severity, spacing_mm), out=share)
    return share


def low_attenuation(volume_hu: Real[np.ndarray, "x y z"], lungs: Bool[np.ndarray, "x y z"]) -> float:
    """Return the share of the lungs below `LOW_HU`; NaN where the volume shows no lung."""
    return float((volume_hu[lungs] < LOW_HU).mean()) if lungs.any() else float("nan")


def _stream(seed: int) -> np.random.Generator:
    return np.random.default_rng([STREAM, seed])


def _waves(
    point: Float[np.ndarray, "3 n"], rng: np.random.Generator, length_mm: tuple[float, float], num: int = 5
) -> Float[np.ndarray, " n"]:
    """Return a smooth function of place, mean 0 and deviation 1: plane waves in random directions."""
    way = rng.standard_normal((num, 3))
    way *= (2 * np.pi / rng.uniform(*length_mm, num) / np.linalg.norm(way, axis=1))[:, None]
    phase = rng.uniform(0, 2 * np.pi, num)
    return np.sqrt(2 / num) * sum(np.sin(k @ point + p) for k, p in zip(way, phase, strict=True))


def _share_of_kind(
    kind: Kind, point: Float[np.ndarray, "3 n"], rng: np.random.Generator, severity: float, spacing_mm: float
) -> Float32[np.ndarray, " n"]:
    low, pitch = MARGIN_MM[0] - 2 * kind.pitch_mm, kind.pitch_mm
    cells = tuple(int(n) for n in np.ceil((MARGIN_MM[1] - MARGIN_MM[0]) / pitch) + 4)
    corner = low[:, None] + pitch * np.indices(cells).reshape(3, -1)
    centre = corner + pitch * rng.uniform(0, 1, corner.shape)
    radius = rng.uniform(*kind.radius_mm, corner.shape[1])
    stretch = np.exp(rng.normal(0, 0.2, corner.shape)).clip(0.75, 1.33)
    upper = 1 / (1 + np.exp((95 - centre[2]) / 30))
    chance = severity**kind.power * (0.15 + 0.85 * upper) * (1 + 0.5 * _waves(centre, rng, (60, 120)))
    taken = rng.uniform(size=corner.shape[1]) < chance
    fill = np.minimum(1, 4 / 3 * np.pi * (radius / spacing_mm) ** 3)
    share = np.zeros(point.shape[1], np.float32)
    own = np.floor((point - low[:, None]) / pitch).astype(np.int64)
    for step in np.indices((3, 3, 3)).reshape(3, -1).T - 1:
        near = own + step[:, None]
        inside = ((near >= 0) & (near < np.array(cells)[:, None])).all(0)
        number = np.ravel_multi_index(tuple(np.where(inside, near, 0)), cells)
        some = np.flatnonzero(inside & taken[number])
        cell = number[some]
        away = np.linalg.norm((point[:, some] - centre[:, cell]) / stretch[:, cell], axis=0) - radius[cell]
        share[some] = np.maximum(share[some], np.clip(0.5 - away / spacing_mm, 0, 1) * fill[cell])
    return share
