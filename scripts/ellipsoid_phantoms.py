"""Small synthetic bodies of deformed ellipsoids, and where points of their common atlas lie in them.

The fields of the torso phantoms (`medssl.phantoms.canvas`) turn, scale, shift and bend them, so that the true place
of every point is known.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.cases import Scan
from medssl.data.volume import Volume
from medssl.phantoms.canvas import Canvas, ellipsoid
from medssl.phantoms.source import PhantomCase

SIZE_VOXEL, SPACING_MM = (64, 64, 32), 2.0
ORGANS = {  # centre and radii in mm (RAS about the middle of the field), HU
    "spine": ((0, -28, 0), (9, 9, 90), 350),
    "right lung": ((24, 0, 24), (18, 22, 13), -800),
    "left lung": ((-24, 0, 26), (17, 22, 13), -800),
    "heart": ((-5, 10, 22), (14, 12, 11), 150),
    "liver": ((24, 6, 0), (19, 20, 11), 110),
    "stomach": ((-16, 18, 4), (14, 12, 9), 0),
    "spleen": ((-34, -10, 4), (8, 13, 10), 130),
    "right kidney": ((24, -18, -16), (8, 8, 12), 200),
    "left kidney": ((-24, -18, -13), (8, 8, 12), 200),
    "gall bladder": ((14, 24, -12), (6, 6, 6), 10),
    "bowel": ((-4, 18, -20), (11, 9, 8), -500),
    "aorta": ((-8, -14, 0), (6, 6, 90), 220),
}


@dataclass(frozen=True)
class EllipsoidCase(PhantomCase):
    """One subject."""

    @property
    def has_label(self) -> bool:
        """Ellipsoids have none."""
        return False

    def read(self, *, channels: str | int | None, min_side_voxel: int) -> tuple[Volume, None]:
        """Its image in HU, without a label map."""
        canvas = drawn(self.seed)
        noise = canvas.subject.noise_hu * canvas.rng.standard_normal(canvas.hu.shape, dtype=np.float32)
        hu = np.rint(canvas.hu + noise).clip(-1024, 3071).astype(np.int16).reshape(canvas.size)
        affine = np.diag([SPACING_MM] * 3 + [1.0])
        affine[:3, 3] = [-(n - 1) / 2 * SPACING_MM for n in canvas.size]
        return Volume(hu[None], affine, f"ellipsoids, seed {self.seed}"), None


@dataclass(frozen=True)
class Ellipsoids:
    """A source of `num_cases` subjects."""

    num_cases: int = 20

    def recipe(self) -> dict[str, Any]:
        """What the subjects depend on."""
        return {"kind": "ellipsoids", "num_cases": self.num_cases}

    def label_names(self) -> dict[int, str]:
        """There are no labels."""
        return {}

    def scan(self) -> Scan:
        """One case a subject; its number is its seed."""
        scan = Scan()
        for seed in range(self.num_cases):
            name = f"ellipsoids_{seed:04d}"
            scan.cases.append(EllipsoidCase(name, Path(name), group="ellipsoids", modality="ct", seed=seed))
        return scan


def drawn(seed: int) -> Canvas:
    """A subject without noise."""
    canvas = Canvas(SIZE_VOXEL, SPACING_MM, np.random.default_rng(seed))
    every = np.arange(canvas.point.shape[1])
    canvas.paint(every, ellipsoid(canvas.point, (0, 0, 0), (52, 44, 300)), 40.0)
    for centre, radii, hu in ORGANS.values():
        canvas.paint(every, ellipsoid(canvas.point, centre, radii), hu + canvas.rng.normal(0, 15))
    return canvas


def places_mm(canvas: Canvas, atlas_mm: np.ndarray) -> np.ndarray:
    """Where atlas points (n, 3) lie in a subject, RAS mm; NaN for those beyond its field."""
    size = np.array(canvas.size)
    points = []
    for wanted in atlas_mm:
        away = wanted[:, None] - canvas.point
        nearest = (away**2).sum(0).argmin()
        voxel = np.array(np.unravel_index(nearest, canvas.size))
        inside = ((voxel > 0) & (voxel < size - 1)).all()
        place = (voxel - (size - 1) / 2) * canvas.spacing_mm + away[:, nearest]  # the warp's slope is about 1
        points.append(place if inside else np.full(3, np.nan))
    return np.stack(points)
