"""Frames: where the voxels of a view lie in a volume, and the smooth displacements that may bend them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Float64, Num

Vector = Sequence[float] | np.ndarray

ALIGNED_TOLERANCE_VOXEL = 1e-6


def apply(matrix: Float64[np.ndarray, "4 4"], points: Num[np.ndarray, "*points 3"]) -> Float64[np.ndarray, "*points 3"]:
    """Points after an affine map, such as voxels in millimetres."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


@dataclass(frozen=True)
class Frame:
    """A view's place: `matrix @ (u, 1)` is the level-0 volume voxel (centres at integers) of view voxel u.

    Args:
        shape: voxels of the view along its own axes.
        matrix: (4, 4), float64.
    """

    shape: tuple[int, int, int]
    matrix: Float[np.ndarray, "4 4"]

    @classmethod
    def at(cls, center: Vector, shape: Sequence[int], *, step_voxel: Vector) -> "Frame":
        """The axis-aligned frame about `center` (volume voxels) with one view voxel every `step_voxel`."""
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
        """Volume voxel -> view voxel."""
        return np.linalg.inv(self.matrix)

    def to_volume(self, points: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """View voxels -> volume voxels."""
        return apply(self.matrix, points)

    def to_view(self, points: Float[np.ndarray, "*points 3"]) -> Float[np.ndarray, "*points 3"]:
        """Volume voxels -> view voxels."""
        return apply(self.inverse, points)

    def contains(self, points: Float[np.ndarray, "*points 3"]) -> np.ndarray:
        """Whether volume points lie in the view (up to the outer faces of its voxels)."""
        inside = self.to_view(points)
        return np.all((inside >= -0.5) & (inside <= np.array(self.shape) - 0.5), axis=-1)

    def moved(self, affine: Float[np.ndarray, "4 4"]) -> "Frame":
        """The frame after a map of volume voxels to volume voxels."""
        return Frame(self.shape, affine @ self.matrix)

    def reindexed(self, shape: tuple[int, int, int], matrix: Float[np.ndarray, "4 4"]) -> "Frame":
        """The frame with other view axes (flipped, permuted): `matrix` maps the new view voxels to the old ones."""
        return Frame(shape, self.matrix @ matrix)

    def overlap(self, other: "Frame") -> float:
        """Share of this view, in [0, 1], that lies in `other`; sampled on at most 16 cells an axis."""
        cells = [(np.arange(min(n, 16)) + 0.5) * n / min(n, 16) - 0.5 for n in self.shape]
        grid = np.stack(np.meshgrid(*cells, indexing="ij"), axis=-1)
        return float(other.contains(self.to_volume(grid)).mean())

    def bounds(self, margin_view_voxel: float = 0.0) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
        """Lowest and highest volume voxel that a view voxel centre reaches; displaced centres with a margin."""
        middle = (np.array(self.shape) - 1) / 2
        reach = np.abs(self.linear) @ (middle + margin_view_voxel)
        return self.center - reach, self.center + reach

    @cached_property
    def axes(self) -> tuple[int, int, int] | None:
        """For each view axis the one volume axis that it runs along; None where the frame is oblique."""
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
        """Stored voxels per view voxel along each volume axis: waves along it are seen down to twice this length."""
        return np.abs(self.linear).max(axis=1)


def affine_about(
    center: Float[np.ndarray, "3"],
    linear: Float[np.ndarray, "3 3"],
    *,
    translation: Float[np.ndarray, "3"],
    to_space: Float[np.ndarray, "3 3"],
) -> Float[np.ndarray, "4 4"]:
    """The map of volume voxels that turns and scales about `center` in another space and then shifts.

    Args:
        center: the fixed point, volume voxels.
        linear: rotation, scale and shear in the other space; a scale above 1 makes a view cover more.
        translation: in units of the other space.
        to_space: linear map from volume voxels to that space (the volume's affine for millimetres).
    """
    back = np.linalg.inv(to_space)
    matrix = np.eye(4)
    matrix[:3, :3] = back @ linear @ to_space
    matrix[:3, 3] = center - matrix[:3, :3] @ center + back @ translation
    return matrix


def rotation_matrix(angles_rad: Vector) -> Float[np.ndarray, "3 3"]:
    """Rotation about x, then y, then z, right-handed, angles in radians."""
    (ca, cb, cg), (sa, sb, sg) = np.cos(angles_rad), np.sin(angles_rad)
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cg, -sg, 0], [sg, cg, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@dataclass(frozen=True)
class Displacement:
    """A smooth displacement of a view: cubic B-splines on a lattice of control points, in view voxels.

    Args:
        nodes: (3, nx, ny, nz) coefficients; the field never exceeds the largest one.
        node_spacing_voxel: distance of control points; the spline smooths like a Gaussian of 0.58 of it.
    """

    nodes: Float32[np.ndarray, "3 nx ny nz"]
    node_spacing_voxel: float

    @staticmethod
    def num_nodes(side: int, node_spacing_voxel: float) -> int:
        """Control points that an axis of `side` voxels needs."""
        return int(np.floor((side - 1) / node_spacing_voxel)) + 4

    @property
    def bound_voxel(self) -> float:
        """No component of the field is larger than this."""
        return float(np.abs(self.nodes).max())

    def weights(self, axis: int, side: int) -> Float32[np.ndarray, "side nodes"]:
        """Spline weights of the control points for each voxel of one axis: the field is their product over the axes."""
        return spline_weights(side, node_spacing_voxel=self.node_spacing_voxel, num_nodes=self.nodes.shape[1 + axis])


def spline_weights(
    side: int, *, node_spacing_voxel: float, num_nodes: int
) -> Float32[np.ndarray, "{side} {num_nodes}"]:
    """Cubic B-spline weights of equally spaced control points, the second at voxel 0, for each voxel of an axis."""
    position = np.arange(side) / node_spacing_voxel + 1
    offset = np.abs(position[:, None] - np.arange(num_nodes))
    near = 2 / 3 - offset**2 + offset**3 / 2
    far = np.clip(2 - offset, 0, None) ** 3 / 6
    return np.where(offset < 1, near, far).astype(np.float32)


SPLINE_ENERGY = 151 / 315
"""Integral of the squared cubic B-spline: independent unit coefficients give a field of this variance, an axis."""
