"""Frames: where the voxels of a view lie in a volume, and the smooth displacements that may bend them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Float64, Num

Vector = Sequence[float] | np.ndarray

ALIGNED_TOLERANCE_VOXEL = 1e-6


def apply(matrix: Float64[np.ndarray, "4 4"], points: Num[np.ndarray, "*points 3"]) -> Float64[np.ndarray, "*points 3"]:
    """Return points after an affine map, such as voxels in millimetres."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


@dataclass(frozen=True)
class Frame:
    """The place of a view: `matrix @ (u, 1)` is the level-0 volume voxel (centres at integers) of view voxel u.

    Args:
        shape: Number of voxels of the view along its own axes.
        matrix: Affine map (4, 4) from view voxels to volume voxels, float64.
    """

    shape: tuple[int, int, int]
    matrix: Float[np.ndarray, "4 4"]

    @classmethod
    def at(cls, center: Vector, shape: Sequence[int], *, step_voxel: Vector) -> "Frame":
        """Return the axis-aligned frame about `center` (volume voxels) with one view voxel every `step_voxel`."""
        matrix = np.diag([*map(float, step_voxel), 1.0])
        middle = (np.array(shape) - 1) / 2
        matrix[:3, 3] = np.asarray(center, dtype=np.float64) - middle * matrix.diagonal()[:3]
        x, y, z = map(int, shape)
        return cls((x, y, z), matrix)

    @property
    def linear(self) -> Float[np.ndarray, "3 3"]:
        """The matrix without its translation."""
        return self.matrix[:3, :3]

    @property
    def center(self) -> Float[np.ndarray, "3"]:
        """The middle of the view, in volume voxels."""
        return self.to_volume((np.array(self.shape) - 1) / 2)

    @property
    def faces(self) -> Float[np.ndarray, "2 3"]:
        """Lower and upper face of the smallest box along the volume's axes that holds the view, in volume voxels."""
        reach = np.abs(self.linear) @ (np.array(self.shape) / 2)
        return np.stack([self.center - reach, self.center + reach])

    @cached_property
    def inverse(self) -> Float[np.ndarray, "4 4"]:
        """The map from volume voxels to view voxels."""
        return np.linalg.inv(self.matrix)

    def to_volume(self, points: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """Map view voxels to volume voxels."""
        return apply(self.matrix, points)

    def to_view(self, points: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """Map volume voxels to view voxels."""
        return apply(self.inverse, points)

    def contains(self, points: Float[np.ndarray, "*points 3"]) -> np.ndarray:
        """Return whether volume points lie in the view (up to the outer faces of its voxels)."""
        inside = self.to_view(points)
        return np.all((inside >= -0.5) & (inside <= np.array(self.shape) - 0.5), axis=-1)

    def moved(self, affine: Float[np.ndarray, "4 4"]) -> "Frame":
        """Return the frame after a map of volume voxels to volume voxels."""
        return Frame(self.shape, affine @ self.matrix)

    def reindexed(self, shape: tuple[int, int, int], matrix: Float[np.ndarray, "4 4"]) -> "Frame":
        """Return the frame with other view axes (flipped, permuted); `matrix` maps new view voxels to old ones."""
        return Frame(shape, self.matrix @ matrix)

    def on_voxels(self) -> "Frame":
        """Return an upright frame moved by up to half a voxel, so that views of one stored voxel a step are cut out."""
        matrix, native = self.matrix.copy(), self.linear.diagonal() == 1
        matrix[:3, 3] = np.where(native, np.floor(matrix[:3, 3] + 0.5), matrix[:3, 3])
        return Frame(self.shape, matrix)

    def overlap(self, other: "Frame") -> float:
        """Return the share of this view, in [0, 1], that lies in `other`; sampled on at most 16 cells per axis."""
        cells = [(np.arange(min(n, 16)) + 0.5) * n / min(n, 16) - 0.5 for n in self.shape]
        grid = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1)
        return float(other.contains(self.to_volume(grid)).mean())

    def bounds(self, margin_view_voxel: float = 0.0) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
        """Return the lowest and highest volume voxel of all view voxel centres; a margin covers displaced centres."""
        middle = (np.array(self.shape) - 1) / 2
        reach = np.abs(self.linear) @ (middle + margin_view_voxel)
        return self.center - reach, self.center + reach

    @cached_property
    def axes(self) -> tuple[int, int, int] | None:
        """The volume axis that each view axis runs along; None where the frame is oblique."""
        axes = []
        for column, side in zip(self.linear.T.tolist(), self.shape, strict=True):  # lists: ten times as fast as arrays
            lengths = [abs(entry) for entry in column]
            axis = lengths.index(max(lengths))
            if (sum(lengths) - lengths[axis]) * (side - 1) > ALIGNED_TOLERANCE_VOXEL:
                return None
            axes.append(axis)
        return (axes[0], axes[1], axes[2]) if len(set(axes)) == 3 else None

    @property
    def is_aligned(self) -> bool:
        """Whether every view voxel is a volume voxel: whole shifts, flips and quarter turns only."""
        return self.axes is not None and bool(
            np.all(np.abs(self.matrix - np.rint(self.matrix)) < ALIGNED_TOLERANCE_VOXEL)
        )

    @property
    def step_voxel(self) -> Float[np.ndarray, "3"]:
        """Stored voxels per view voxel along each volume axis: the view shows waves down to twice this length."""
        return np.abs(self.linear).max(axis=1)


def affine_about(
    center: Float[np.ndarray, "3"],
    linear: Float[np.ndarray, "3 3"],
    *,
    translation: Float[np.ndarray, "3"],
    to_space: Float[np.ndarray, "3 3"],
) -> Float[np.ndarray, "4 4"]:
    """Return the map of volume voxels that turns and scales about `center` in another space and then shifts.

    Args:
        center: The fixed point, in volume voxels.
        linear: Rotation, scale and shear in the other space; a scale above 1 makes a view cover more.
        translation: Shift, in units of the other space.
        to_space: Linear map from volume voxels to that space (the volume's affine for millimetres).
    """
    back = np.linalg.inv(to_space)
    matrix = np.eye(4)
    matrix[:3, :3] = back @ linear @ to_space
    matrix[:3, 3] = center - matrix[:3, :3] @ center + back @ translation
    return matrix


def rotation_matrix(angles_rad: Vector) -> Float[np.ndarray, "3 3"]:
    """Return the rotation about x, then y, then z, right-handed, with angles in radians."""
    (ca, cb, cg), (sa, sb, sg) = np.cos(angles_rad), np.sin(angles_rad)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cg, -sg, 0], [sg, cg, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@dataclass(frozen=True)
class Displacement:
    """A smooth displacement of a view: cubic B-splines on a lattice of control points, in view voxels.

    Args:
        nodes: Coefficients (3, nx, ny, nz). The field never exceeds the largest one.
        node_spacing_voxel: Distance of control points. The spline smooths like a Gaussian of 0.58 of this width.
    """

    nodes: Float32[np.ndarray, "3 nx ny nz"]
    node_spacing_voxel: float

    @staticmethod
    def num_nodes(side: int, node_spacing_voxel: float) -> int:
        """Return the number of control points that an axis of `side` voxels needs."""
        return int(np.floor((side - 1) / node_spacing_voxel)) + 4

    @property
    def bound_voxel(self) -> float:
        """A bound on the absolute value of every component of the field."""
        return float(np.abs(self.nodes).max())

    def weights(self, axis: int, side: int) -> Float32[np.ndarray, "side nodes"]:
        """Return the spline weights of one axis for each of its voxels: the field is their product over the axes."""
        return spline_weights(side, node_spacing_voxel=self.node_spacing_voxel, num_nodes=self.nodes.shape[1 + axis])


def spline_weights(
    side: int, *, node_spacing_voxel: float, num_nodes: int
) -> Float32[np.ndarray, "{side} {num_nodes}"]:
    """Return cubic B-spline weights of an axis' voxels for equally spaced control points, the second at voxel 0."""
    position = np.arange(side) / node_spacing_voxel + 1
    offset = np.abs(position[:, None] - np.arange(num_nodes))
    near = 2 / 3 - offset**2 + offset**3 / 2
    far = np.clip(2 - offset, 0, None) ** 3 / 6
    return np.where(offset < 1, near, far).astype(np.float32)


SPLINE_ENERGY = 151 / 315
"""Integral of the squared cubic B-spline: per axis, independent unit coefficients give a field of this variance."""
