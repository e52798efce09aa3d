"""Spatial augmentations, which move frames: any number costs one interpolation, or none where voxels stay voxels."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from medssl.data.augment.base import Pose, SpatialAugmentation, check_axes, check_range, uniform
from medssl.data.geometry import SPLINE_ENERGY, Displacement, affine_about, rotation_matrix
from medssl.data.store import Record


@dataclass(frozen=True, kw_only=True)
class Flip(SpatialAugmentation):
    """Mirror `axes` (0 left-right, 1 front-back, 2 feet-head) exactly, each with `probability`."""

    axes: Sequence[int] = (0, 1, 2)
    probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the axes."""
        super().__post_init__()
        check_axes("Flip: axes", self.axes)

    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the moved pose."""
        matrix = np.eye(4)
        for axis in self.axes:
            if rng.uniform() < self.probability:
                matrix[axis, axis] = -1
                matrix[axis, 3] = pose.frame.shape[axis] - 1
        return Pose(pose.frame.reindexed(pose.frame.shape, matrix), pose.displacement)


@dataclass(frozen=True, kw_only=True)
class Rotate90(SpatialAugmentation):
    """Turn the view exactly by 0, 90, 180 or 270 degrees in one of `planes` (pairs of axes of equal length)."""

    planes: Sequence[Sequence[int]] = ((0, 1), (0, 2), (1, 2))
    probability: float = 0.5

    def __post_init__(self) -> None:
        """Check the planes."""
        super().__post_init__()
        for plane in self.planes:
            check_axes("Rotate90: planes", plane)

    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the moved pose."""
        acts, plane, turns = rng.uniform() < self.probability, rng.integers(len(self.planes)), rng.integers(4)
        if not acts:
            return pose
        first, second = self.planes[int(plane)]
        shape = pose.frame.shape
        if shape[first] != shape[second]:
            raise ValueError(f"Rotate90: plane {[first, second]} needs equal sides, got {list(shape)}; leave it out")
        quarter = np.eye(4)
        quarter[first, first] = quarter[second, second] = 0
        quarter[first, second], quarter[first, 3] = -1, shape[first] - 1
        quarter[second, first] = 1
        return Pose(pose.frame.reindexed(shape, np.linalg.matrix_power(quarter, int(turns))), pose.displacement)


@dataclass(frozen=True, kw_only=True)
class Affine(SpatialAugmentation):
    """Turn, scale and shift the view about its centre.

    Args:
        rotation_deg: Largest angle either way: one number, one per axis, or [low, high] per axis. The view turns about
            x, then y, then z.
        scale: Range of the sampling scale; above 1 the view covers more (content shrinks).
        per_axis: Whether to draw a scale for each axis instead of one for all.
        balanced: Whether to draw scales below and above 1 equally often, uniformly on each side.
        translation: Largest shift either way along each axis, one number or one per axis.
        space: Space in which the view turns, scales and shifts: "mm", or "voxel" (the view's own voxels).
    """

    rotation_deg: float | Sequence[float] | Sequence[Sequence[float]] = 0.0
    scale: Sequence[float] = (1.0, 1.0)
    per_axis: bool = False
    balanced: bool = False
    translation: float | Sequence[float] = 0.0
    space: str = "mm"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_range("Affine: scale", self.scale, low=1e-3)
        if self.space not in ("mm", "voxel"):
            raise ValueError(f"Affine: space must be mm or voxel, got {self.space!r}")
        if self.balanced and not self.scale[0] <= 1 <= self.scale[1]:
            raise ValueError(f"Affine: balanced needs a scale range around 1, got {list(self.scale)}")

    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the moved pose."""
        acts, angles, scale, side, shift = (
            rng.uniform(),
            rng.uniform(size=3),
            rng.uniform(size=3),
            rng.uniform(size=3),
            rng.uniform(-1, 1, 3),
        )
        if acts >= self.probability:
            return pose
        limits = np.asarray(self.rotation_deg, dtype=np.float64)
        limits = limits if limits.ndim == 2 else np.stack([-np.broadcast_to(limits, 3), np.broadcast_to(limits, 3)], 1)
        turn = rotation_matrix(np.deg2rad(limits[:, 0] + angles * (limits[:, 1] - limits[:, 0])))
        low, high = self.scale
        if self.balanced:
            scales = np.where(side < 0.5, low + scale * (1 - low), 1 + scale * (high - 1))
        else:
            scales = low + scale * (high - low)
        scales = scales if self.per_axis else np.full(3, scales[0])
        to_space = record.volume_to_mm[:3, :3] if self.space == "mm" else pose.frame.inverse[:3, :3]
        translation = shift * np.asarray(self.translation, dtype=np.float64)
        affine = affine_about(pose.frame.center, turn @ np.diag(scales), translation=translation, to_space=to_space)
        return Pose(pose.frame.moved(affine), pose.displacement)


@dataclass(frozen=True, kw_only=True)
class Elastic(SpatialAugmentation):
    """Bend the view by a smooth random displacement (cubic B-splines on random control points); at most one per view.

    A slice, which has one voxel along an axis, is bent within its plane.

    Args:
        sigma_voxel: Range of the smoothness: the field is as smooth as white noise after a Gaussian of this width, in
            view voxels.
        rms_voxel: Range of the expected root-mean-square displacement of each component, in view voxels.
    """

    sigma_voxel: Sequence[float] = (8.0, 10.0)
    rms_voxel: Sequence[float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_range("Elastic: sigma_voxel", self.sigma_voxel, low=1.0)
        check_range("Elastic: rms_voxel", self.rms_voxel, low=0.0)

    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the moved pose."""
        if pose.displacement is not None:
            raise ValueError("a view can be bent once: leave one Elastic in its augmentations")
        acts, spacing = (
            rng.uniform(),
            uniform(rng, self.sigma_voxel) * np.sqrt(3),
        )  # a cubic B-spline has variance spacing^2 / 3
        amplitude = uniform(rng, self.rms_voxel) / np.sqrt(SPLINE_ENERGY**3)
        if acts >= self.probability or amplitude == 0:
            return pose
        lattice = [Displacement.num_nodes(side, spacing) for side in pose.frame.shape]
        nodes = np.clip(rng.standard_normal((3, *lattice)), -3, 3) * amplitude
        nodes[np.array(pose.frame.shape) == 1] = 0
        return Pose(pose.frame, Displacement(nodes.astype(np.float32), float(spacing)))


@dataclass(frozen=True, kw_only=True)
class Sometimes(SpatialAugmentation):
    """Apply all of some spatial augmentations with one probability, else none of them; `share` is stated here."""

    augment: Sequence[SpatialAugmentation] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        """Check the augmentations."""
        super().__post_init__()
        for augmentation in self.augment:
            if not isinstance(augmentation, SpatialAugmentation) or augmentation.share != "view":
                kind = type(augmentation).__name__
                raise ValueError(f"Sometimes holds spatial augmentations without a share of their own, got {kind}")

    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the moved pose."""
        if rng.uniform() < self.probability:
            for augmentation in self.augment:
                pose = augmentation.move(pose, rng, record=record)
        return pose
