"""The canvas of a phantom in atlas space, and distances to simple solids in millimetres, to paint with.

Atlas space is RAS: x to the patient's right, y to the front, z up; z = 0 is the top of the right diaphragm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Int

Triple = Sequence[float] | Float[np.ndarray, "3"]

LABELS = {
    "body": 1,
    "fat": 2,
    "muscle": 3,
    "lungs": 4,
    "spine": 5,
    "ribs": 6,
    "liver": 7,
    "spleen": 8,
    "kidneys": 9,
    "aorta": 10,
    "heart": 11,
}
"""Values of the label map. `body` is all other tissue inside the skin."""

AIR_HU, FAT_HU, MUSCLE_HU, GAS_HU = -1000.0, -100.0, 55.0, -940.0
WAVE_MM = 24.0
"""Grid step of the smooth random fields that draw vessels and bowel."""

SPINE_KNOTS = ((-260, -58), (-200, -50), (-130, -46), (-50, -56), (40, -70), (110, -76), (180, -62), (240, -45))
"""Height and y of the vertebral bodies' centres: kyphosis above, lordosis below."""


@dataclass(frozen=True)
class Subject:
    """The properties of a subject besides its warp; lengths in mm, intensities in HU."""

    fat_mm: float
    muscle_mm: float
    visceral_fat: float
    breath_mm: float
    blood_hu: float
    liver_hu: float
    spleen_hu: float
    cortex_hu: float
    bone_hu: float
    lung_hu: float
    noise_hu: float
    table: bool

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Subject":
        """Draw a random subject; the contrast phase changes vessels, spleen, kidneys and liver together."""
        phase = rng.uniform(0, 1)
        return cls(
            fat_mm=float(rng.gamma(4, 4) + 5),
            muscle_mm=float(rng.uniform(9, 15)),
            visceral_fat=float(rng.uniform(-0.4, 0.5)),
            breath_mm=float(rng.uniform(-18, 12)),
            blood_hu=45 + 130 * phase,
            liver_hu=float(rng.normal(58, 8)) + 50 * phase,
            spleen_hu=float(rng.normal(50, 4)) + 70 * phase,
            cortex_hu=float(rng.normal(35, 4)) + 150 * phase,
            bone_hu=float(rng.uniform(160, 300)),
            lung_hu=float(rng.uniform(-870, -800)),
            noise_hu=float(rng.uniform(8, 22)),
            table=bool(rng.uniform() < 0.7),
        )


class Canvas:
    """The voxels of one subject in atlas coordinates, flat, painted organ over organ with soft edges."""

    def __init__(
        self,
        size_voxel: Sequence[int],
        spacing_mm: float,
        rng: np.random.Generator,
        *,
        emphysema_seed: int | None = None,
    ) -> None:
        self.size = tuple(size_voxel)
        self.spacing_mm = spacing_mm
        self.rng = rng
        self.emphysema_seed = emphysema_seed
        self.subject = Subject.drawn(rng)
        self.jitter = lambda sd: rng.normal(0, sd, 3).clip(-2 * sd, 2 * sd)
        self.point = self._warped()  # (3, voxel)
        self.hu = np.full(self.point.shape[1], AIR_HU, np.float32)
        self.label = np.zeros(self.point.shape[1], np.uint8)

    def _warped(self) -> Float32[np.ndarray, "3 voxel"]:
        axes = [(np.arange(n) - (n - 1) / 2) * self.spacing_mm for n in self.size]
        place = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1).astype(np.float32)
        angles = np.deg2rad(self.rng.normal(0, 3, 3).clip(-6, 6))
        turn = np.eye(3)
        for axis, angle in enumerate(angles):
            a, b = [i for i in range(3) if i != axis]
            step = np.eye(3)
            step[a, a] = step[b, b] = np.cos(angle)
            step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
            turn = turn @ step
        scale = 1 + self.rng.normal(0, 0.045, 3).clip(-0.09, 0.09)
        shift = self.rng.normal(0, [6, 5, 12]).clip(-20, 20)
        bend = np.stack([self.field(110.0) for _ in range(3)]) * np.array([[6.0], [6.0], [7.0]])
        point = (turn / scale[:, None]) @ (place - shift[:, None]) + bend
        return point.astype(np.float32)

    def field(self, wave_mm: float) -> Float32[np.ndarray, " voxel"]:
        """Draw a smooth random function of place, mean 0, deviation about 1: cubic B-splines on a grid of `wave_mm`."""
        knots = [int(np.ceil(n * self.spacing_mm / wave_mm)) + 4 for n in self.size]  # they reach beyond both ends
        values = self.rng.standard_normal(knots).astype(np.float32)
        for axis, (n, k) in enumerate(zip(self.size, knots, strict=True)):
            place = (np.arange(n) + 0.5) * self.spacing_mm / wave_mm + 1
            t = np.abs(place[:, None] - np.arange(k))
            weight = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6).astype(np.float32)
            values = np.moveaxis(np.tensordot(weight, values, axes=(1, axis)), 0, axis)
        return (values / 0.33).ravel()

    def near(self, low: Sequence[float], high: Sequence[float]) -> Int[np.ndarray, " some"]:
        """Return the indices of the voxels inside a box of atlas space."""
        inside = (self.point[2] > low[2]) & (self.point[2] < high[2])
        for axis in (0, 1):
            inside &= (self.point[axis] > low[axis]) & (self.point[axis] < high[axis])
        return np.flatnonzero(inside)

    def paint(
        self,
        where: Int[np.ndarray, " some"],
        distance_mm: Float[np.ndarray, " some"],
        hu: float | np.floating | Float[np.ndarray, " some"],
        label: str | None = None,
    ) -> None:
        """Mix `hu` in where `distance_mm` (negative inside) is under half a voxel: edges have partial volume."""
        share = np.clip(0.5 - distance_mm / self.spacing_mm, 0, 1).astype(np.float32)
        self.hu[where] += share * (hu - self.hu[where])
        if label is not None:
            inside = where[share > 0.5]
            self.label[inside] = np.uint8(LABELS[label])

    @cached_property
    def trunk(self) -> "Trunk":
        """The wall, diaphragm and spine of the subject at every voxel."""
        return Trunk.of(self.point, self.subject)


def curve(z: Float[np.ndarray, " n"], *knots: tuple[float, float]) -> Float32[np.ndarray, " n"]:
    """Return a smooth curve (cubic Hermite) through (z, value) knots in ascending z."""
    at, value = np.array(knots).T
    fine = np.linspace(at[0], at[-1], 1024)
    i = np.clip(np.searchsorted(at, fine) - 1, 0, len(at) - 2)
    step, slope = np.diff(at)[i], np.gradient(value, at)
    t = (fine - at[i]) / step
    rising, falling = slope[i] * step * t * (1 - t) ** 2, slope[i + 1] * step * t**2 * (1 - t)
    values = value[i] + (value[i + 1] - value[i]) * t**2 * (3 - 2 * t) + rising - falling
    return np.interp(z, fine, values).astype(np.float32)


@dataclass
class Trunk:
    """Coordinates along the trunk's wall, at every voxel.

    `beyond_mm` is the distance outwards from the rib cage, `beyond_muscle_mm` from the muscles around it,
    `beyond_skin_mm` from the skin; `angle` is 0 at the back and pi at the front, `spine_mm` the y of the vertebral
    bodies' centres, `diaphragm_mm` the height of the diaphragm.
    """

    beyond_mm: Float32[np.ndarray, " voxel"]
    beyond_muscle_mm: Float32[np.ndarray, " voxel"]
    beyond_skin_mm: Float32[np.ndarray, " voxel"]
    angle: Float32[np.ndarray, " voxel"]
    spine_mm: Float32[np.ndarray, " voxel"]
    diaphragm_mm: Float32[np.ndarray, " voxel"]

    @classmethod
    def of(cls, point: Float32[np.ndarray, "3 voxel"], subject: Subject) -> "Trunk":
        """Return the coordinates of atlas points."""
        x, y, z = point
        half_width = curve(
            z, (-260, 112), (-150, 118), (-60, 127), (20, 127), (80, 117), (130, 96), (165, 72), (200, 48), (240, 40)
        )
        half_depth = curve(
            z, (-260, 84), (-150, 88), (-60, 95), (20, 95), (80, 86), (130, 70), (165, 55), (200, 42), (240, 36)
        )
        centre = curve(z, (-260, 2), (-100, 0), (0, 0), (100, -8), (200, -26))
        radius = np.hypot(x, y - centre) + 1e-3
        cosine, sine = x / radius, (y - centre) / radius
        wall = (np.abs(cosine / half_width) ** 2.4 + np.abs(sine / half_depth) ** 2.4) ** np.float32(-1 / 2.4)
        angle = np.arctan2(np.abs(x), centre - y)
        back = np.exp(-((angle / 0.36) ** 2))
        side, front = np.sin(angle) ** 2, np.clip(-np.cos(angle), 0, 1)
        belly = 1 / (1 + np.exp((z + 70) / 25))
        shoulder = 1 / (1 + np.exp((125 - z) / 18))
        muscle = subject.muscle_mm * (0.75 + 0.5 * belly * side + 0.9 * np.exp(-((angle / 0.7) ** 2))) + shoulder * (
            15 + 52 * side
        )
        pectoral = np.exp(-(((angle - 2.35) / 0.4) ** 2) - ((z - 105) / 45) ** 2)
        muscle = muscle + 11 * pectoral
        fat = subject.fat_mm * (0.55 + 0.75 * belly * (0.6 * front + 0.5 * side) + 0.25 * side) + 2
        groove = 7 * np.exp(-((x / 14) ** 2)) * (y < 0)
        beyond = radius - (wall - 20 * back)
        spine = curve(z, *SPINE_KNOTS)
        breath = subject.breath_mm
        right = -(((x - 62) / 62) ** 2) * 26 - (((y - 8) / 78) ** 2) * 48
        left = -14 - (((x + 62) / 62) ** 2) * 26 - (((y - 8) / 78) ** 2) * 48
        blend = 1 / (1 + np.exp(-(x - 5) / 12))
        dome = np.maximum(blend * right + (1 - blend) * left, -110)
        return cls(
            beyond,
            radius - wall - muscle,
            radius - wall - muscle - fat + groove,
            angle,
            spine,
            (dome + breath).astype(np.float32),
        )


def ellipsoid(
    point: Float[np.ndarray, "3 n"],
    centre: Triple,
    radii: Triple,
    *,
    turn_deg: Sequence[float] = (0, 0, 0),
) -> Float[np.ndarray, " n"]:
    """Return the distance in mm to an ellipsoid turned about x, y, z in this order.

    The distance is exact at the surface to first order.
    """
    local = point - np.asarray(centre, dtype=np.float32)[:, None]
    for axis, angle in enumerate(np.deg2rad(turn_deg)):
        if angle:
            a, b = [i for i in range(3) if i != axis]
            cosine, sine = np.cos(angle), np.sin(angle)
            local[a], local[b] = cosine * local[a] + sine * local[b], cosine * local[b] - sine * local[a]
    inverse = (1 / np.asarray(radii, dtype=np.float32))[:, None]
    local *= inverse
    reach = length(local) + np.float32(1e-6)
    local *= inverse
    return reach * (reach - 1) / (length(local) + np.float32(1e-9))


def length(vector: Float[np.ndarray, "3 n"]) -> Float[np.ndarray, " n"]:
    """Return the Euclidean lengths of vectors."""
    x, y, z = vector  # several times faster than a reduction over the short axis
    return np.sqrt(x * x + y * y + z * z)


def tube(point: Float[np.ndarray, "3 n"], path: Sequence[Triple], radii: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Return the distance in mm to a tube along a broken line; its radius changes evenly between the corners."""
    best = np.full(point.shape[1], np.inf, np.float32)
    corners = np.asarray(path, dtype=np.float32)
    for a, b, ra, rb in zip(corners[:-1], corners[1:], radii[:-1], radii[1:], strict=True):
        along = b - a
        t = np.clip((along @ point - a @ along) / (along @ along), 0, 1)
        away = length(point - a[:, None] - along[:, None] * t)
        best = np.minimum(best, away - (ra + np.float32(rb - ra) * t))
    return best


def smooth_max(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], rounding_mm: float) -> Float[np.ndarray, " n"]:
    """Return the distance to the intersection of two solids, with a rounded edge."""
    h = np.clip(0.5 - 0.5 * (b - a) / rounding_mm, 0, 1)
    return b + (a - b) * h + rounding_mm * h * (1 - h)
