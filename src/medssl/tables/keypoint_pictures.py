"""Pictures of keypoints: three planes of a volume with the keypoints next to them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from medssl.data.store import VolumeStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("sagittal", "coronal", "axial")
REACH_SIGMA = 1.0
"""Largest distance, in sigma, of a keypoint from a plane that it is drawn in, but at least half a step."""


class Plane(NamedTuple):
    """A plane of a volume in millimetres from the first voxel's outer corner.

    Args:
        name: Direction of the plane.
        values: Values of the voxels, with the first axis to the right and the second up.
        size_mm: Size of the plane.
        points_mm: Positions of the keypoints in the plane.
        sigma_mm: Sigma of the keypoints.
        bright: Whether the keypoints are brighter than their surroundings.
    """

    name: str
    values: np.ndarray
    size_mm: tuple[float, float]
    points_mm: Float[np.ndarray, "n 2"]
    sigma_mm: Float[np.ndarray, " n"]
    bright: np.ndarray


def planes_of(
    store: VolumeStore, case: int, points_voxel: Float[np.ndarray, "k 3"], features: Float[np.ndarray, "k 2"]
) -> list[Plane]:
    """Return the three planes of a case that show the most keypoints; only these are read from the store."""
    record = store.record(case)
    known = np.isfinite(points_voxel).all(axis=1)
    points, (sigma_mm, response) = points_voxel[known], features[known].T
    spacing = np.array(record.spacing_mm)
    planes = []
    for axis, name in enumerate(NAMES):
        near = np.abs(points[:, axis, None] - np.arange(record.shape[axis])) * spacing[axis]
        shown = near <= np.maximum(REACH_SIGMA * sigma_mm, spacing[axis] / 2)[:, None]
        place = int(shown.sum(axis=0).argmax()) if len(points) else record.shape[axis] // 2
        lower, upper = [0, 0, 0], list(record.shape)
        lower[axis], upper[axis] = place, place + 1
        values = record.values(store.read(case, 0, lower, upper).result())[0].take(0, axis=axis)
        others = [other for other in range(3) if other != axis]
        width, height = (float(record.shape[other] * spacing[other]) for other in others)
        rows = shown[:, place] if len(points) else np.zeros(0, dtype=bool)
        planes.append(
            Plane(
                name,
                values,
                (width, height),
                (points[rows][:, others] + 0.5) * spacing[others],
                sigma_mm[rows],
                response[rows] < 0,
            )
        )
    return planes


def keypoint_figure(planes: Sequence[Plane], *, low: float, high: float, title: str = "") -> "Figure":
    """Draw the planes side by side, with a circle of radius sigma times the root of 3 about each keypoint.

    This is the width of a blob with its largest response at this sigma. Bright blobs are yellow, dark ones blue.
    Anterior and superior point up.
    """
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    widths = [plane.size_mm[0] / max(plane.size_mm) for plane in planes]
    figure = Figure(figsize=(3.6 * len(planes), 3.9), layout="constrained")
    axes = figure.subplots(1, len(planes), squeeze=False, width_ratios=widths)[0]
    for panel, plane in zip(axes, planes, strict=True):
        extent = (0, plane.size_mm[0], 0, plane.size_mm[1])
        panel.imshow(plane.values.T, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=extent, origin="lower")
        size = 2 * np.sqrt(3) * plane.sigma_mm
        colours = np.where(plane.bright, "gold", "deepskyblue").tolist()
        circles = EllipseCollection(
            size,
            size,
            np.zeros(len(size)),
            units="x",
            offsets=plane.points_mm,
            offset_transform=panel.transData,
            facecolors="none",
            edgecolors=colours,
            linewidths=0.8,
        )
        panel.add_collection(circles)
        panel.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:], title=f"{plane.name}, {len(size)} keypoints")
    figure.suptitle(title)
    return figure
