"""Anchors: the table of anatomical locations in one reference volume, and their places in a subject.

A location's number is its row in the table. A location's coordinate lies in [-1, 1]^3 and is the same for all subjects.
"""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64, Shaped

from medssl.checks import choice
from medssl.data.formats import open_image, reasons_for
from medssl.data.geometry import apply

NORMS = ("minmax", "official_max")
PATCH_ANCHORS = ("centre", "corner")
NUM_NEIGHBOURS = 26
ATLAS_FILES = ("atlas_patch_loc.npy", "atlas_lung_mask.nii.gz")
"""File names of the anchors and the mask in the released atlas."""
OFFICIAL_LIMIT = 999


@dataclass(frozen=True, eq=False)
class AnchorTable:
    """The locations of a reference volume.

    Args:
        index_voxel: Lower corner of each patch on the reference's grid, in the order of its axes.
        grid_to_mm: Map from an index on that grid to RAS mm. Its columns are the directions of the patches' axes.
        patch_voxel: Side of a patch, in voxels of that grid.
        coordinate: Coordinate of each location, in [-1, 1]. It grows to the right, front and top (RAS) on any grid.
        neighbours: Other locations near each one, nearest first. Among equally near ones the first row comes first.
        roi_fraction: Share of each patch that lies in the mask by which it was chosen, NaN where unknown.
        reference: Name of the volume that the anchors were found in.
        norm: Rule by which coordinates follow from corners or middles.
    """

    index_voxel: Int64[np.ndarray, "location 3"]
    grid_to_mm: Float64[np.ndarray, "4 4"]
    patch_voxel: int
    coordinate: Float32[np.ndarray, "location 3"]
    neighbours: Int64[np.ndarray, "location near"]
    roi_fraction: Float64[np.ndarray, " location"]
    reference: str
    norm: str

    @classmethod
    def of_corners(
        cls,
        index_voxel: Int[np.ndarray, "location 3"],
        grid_to_mm: Float64[np.ndarray, "4 4"],
        *,
        patch_voxel: int = 32,
        norm: str = "minmax",
        roi_fraction: Float64[np.ndarray, " location"] | None = None,
        reference: str = "",
    ) -> "AnchorTable":
        """Return the table of given corners; coordinates and neighbours follow from them."""
        index_voxel = index_voxel.astype(np.int64)
        direction = np.where(grid_to_mm.diagonal()[:3] < 0, -1, 1).astype(np.float32)
        unknown = np.full(len(index_voxel), np.nan)
        return cls(
            index_voxel,
            grid_to_mm,
            patch_voxel,
            coordinates(index_voxel, norm=norm) * direction,
            neighbours_of(index_voxel),
            unknown if roi_fraction is None else roi_fraction,
            reference,
            norm,
        )

    def __len__(self) -> int:
        """Return the number of locations."""
        return len(self.index_voxel)

    @property
    def spacing_mm(self) -> Float64[np.ndarray, "3"]:
        """Spacing of the reference's grid."""
        return np.linalg.norm(self.grid_to_mm[:3, :3], axis=0)

    @property
    def patch_mm(self) -> Float64[np.ndarray, "3"]:
        """Sides of a patch in mm."""
        return self.patch_voxel * self.spacing_mm

    @property
    def corner_mm(self) -> Float64[np.ndarray, "location 3"]:
        """Middles of the patches' first voxels in the reference, RAS."""
        return apply(self.grid_to_mm, self.index_voxel)

    @property
    def centre_mm(self) -> Float64[np.ndarray, "location 3"]:
        """Middles of the patches in the reference, RAS."""
        return self.corner_mm + self._half_mm

    @property
    def _half_mm(self) -> Float64[np.ndarray, "3"]:
        return self.grid_to_mm[:3, :3] @ np.full(3, (self.patch_voxel - 1) / 2)

    def moved_mm(
        self, reference_to_subject: Float64[np.ndarray, "4 4"], *, patch_anchor: str = "centre"
    ) -> Float64[np.ndarray, "location 3"]:
        """Return the middles of the patches in a subject, RAS; patches themselves are neither turned nor scaled.

        With `patch_anchor` "corner" the affine moves the first voxel of a patch, as in the released code. The rest of
        the patch then lies beside it along the axes of the reference.
        """
        choice("patch_anchor", patch_anchor, PATCH_ANCHORS)
        if patch_anchor == "corner":
            return apply(reference_to_subject, self.corner_mm) + self._half_mm
        return apply(reference_to_subject, self.centre_mm)

    def save(self, path: str | Path) -> None:
        """Write the table as an npz file."""
        np.savez(Path(path), **{field.name: np.asarray(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> "AnchorTable":
        """Return the table that `save` wrote.

        Raises:
            ValueError: There is no such file, or it is not a table of anchors.
        """
        path = Path(path)
        try:
            with np.load(path) as archive:
                arrays = dict(archive)
            values = {f.name: arrays[f.name] for f in fields(cls)}
        except FileNotFoundError as error:
            raise ValueError(f"there is no table of anchors {path}") from error
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is no table of anchors ({error}); medssl.derive what=locations writes one"
            ) from error
        scalars = {name: values[name].item() for name in ("patch_voxel", "reference", "norm")}
        return cls(**{**values, **scalars})


def find_anchors(
    mask: Bool[np.ndarray, "x y z"],
    *,
    patch_voxel: int = 32,
    step_voxel: int = 26,
    accept: float = 0.1,
    max_anchors: int = OFFICIAL_LIMIT,
) -> tuple[Int64[np.ndarray, "location 3"], Float64[np.ndarray, " location"]]:
    """Return lower corners of the patches that hold more than `accept` of the mask, and the share that they hold.

    Corners lie every `step_voxel` from 0 to below side - `patch_voxel` (x varies slowest). While there are more than
    `max_anchors`, `accept` rises by 0.1; once it reaches 1, the step grows by an eighth of a patch.

    Raises:
        ValueError: No patch holds enough of the mask, or the volume is smaller than a patch.
    Source: preprocess/1_*.py of the code released with arXiv:2302.10390: patches of 32 voxels every 26, fewer than
        1000 (its search ends without anchors where ours takes wider steps).
    """
    if patch_voxel < 1 or step_voxel < 1 or max_anchors < 1 or not 0 <= accept < 1:
        raise ValueError(
            f"patch_voxel={patch_voxel}, step_voxel={step_voxel} and max_anchors={max_anchors} must be at least 1, "
            f"accept={accept} in [0, 1)"
        )
    while True:
        starts = [np.arange(0, side - patch_voxel, step_voxel) for side in mask.shape]
        counts: Shaped[np.ndarray, ...] = mask
        for axis, first in enumerate(starts):
            windows = [
                counts.take(range(at, at + patch_voxel), axis=axis).sum(axis=axis, dtype=np.int64) for at in first
            ]
            counts = np.stack(windows, axis=axis) if windows else np.zeros(0)
            if not windows:
                raise ValueError(
                    f"the reference has {' x '.join(map(str, mask.shape))} voxels, and a patch of {patch_voxel} fits "
                    "into more than that only; take smaller patches or a finer spacing"
                )
        share, threshold = counts / patch_voxel**3, accept
        while (kept := counts > threshold * patch_voxel**3).sum() > max_anchors and threshold + 0.1 < 1:
            threshold += 0.1
        if kept.sum() <= max_anchors:
            break
        step_voxel += max(1, patch_voxel // 8)
    if not kept.any():
        raise ValueError(f"no patch of {patch_voxel} voxels holds {accept:g} of the mask; take smaller ones")
    grid = np.stack(np.meshgrid(*starts, indexing="ij"), axis=-1)
    return grid[kept].astype(np.int64), share[kept]


def coordinates(index_voxel: Int64[np.ndarray, "location 3"], *, norm: str) -> Float32[np.ndarray, "location 3"]:
    """Return coordinates in [-1, 1] of the locations, along the axes of their grid.

    "minmax" runs from -1 at the first to 1 at the last along each axis, and is 0 where there is only one.
    "official_max" is 2 * corner / largest corner - 1, which the published weights were trained with.

    Source: data/copd_patch.py of the code released with arXiv:2302.10390.
    """
    choice("coordinate", norm, NORMS)
    low = index_voxel.min(axis=0) if norm == "minmax" else np.zeros(3, dtype=np.int64)
    span = index_voxel.max(axis=0) - low
    return np.where(span > 0, 2 * (index_voxel - low) / np.maximum(span, 1) - 1, 0).astype(np.float32)


def neighbours_of(
    index_voxel: Int64[np.ndarray, "location 3"], num: int = NUM_NEIGHBOURS
) -> Int64[np.ndarray, "location near"]:
    """Return up to `num` other locations near each one, by distance and, where that is equal, by row."""
    squared = ((index_voxel[:, None] - index_voxel[None]) ** 2).sum(-1)  # whole numbers: ties are exact
    np.fill_diagonal(squared, -1)
    return np.argsort(squared, axis=1, kind="stable")[:, 1 : num + 1].astype(np.int64)


def shown(
    centre_voxel: Float[np.ndarray, "location 3"],
    *,
    patch_mm: Float[np.ndarray, "3"],
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, int, int],
    min_share: float = 0.5,
) -> Bool[np.ndarray, " location"]:
    """Return whether at least `min_share` of the patch about each voxel lies in the volume."""
    half = patch_mm / np.array(spacing_mm) / 2
    lower, upper = np.maximum(centre_voxel - half, -0.5), np.minimum(centre_voxel + half, np.array(shape) - 0.5)
    share = np.clip((upper - lower) / (2 * half), 0, 1).prod(axis=1)
    return share >= min_share - 1e-9


def roi_on_grid(
    mask: Bool[np.ndarray, "x y z"],
    affine: Float64[np.ndarray, "4 4"],
    *,
    shape: tuple[int, int, int],
    volume_affine: Float64[np.ndarray, "4 4"],
    spacing_mm: float,
) -> tuple[Bool[np.ndarray, "x2 y2 z2"], Float64[np.ndarray, "4 4"]]:
    """Return a mask on the cubic grid of `spacing_mm` that covers a volume along its axes, and that grid's affine.

    Args:
        mask: Mask of any spacing and size, with axes along those of the volume. Beyond its faces it counts as empty.
        affine: Map from an index of the mask to RAS mm.
        shape: Shape of the volume. Its first face is the grid's first face.
        volume_affine: Map from an index of the volume to RAS mm.
        spacing_mm: Spacing of the grid.

    Raises:
        ValueError: The axes of mask and volume differ.
    """
    spacing = np.linalg.norm(volume_affine[:3, :3], axis=0)
    ratio = spacing_mm / spacing
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = (ratio - 1) / 2
    grid = volume_affine @ step
    to_mask = np.linalg.inv(affine) @ grid
    if np.abs(to_mask[:3, :3] - np.diag(np.diag(to_mask)[:3])).max() > 0.01:
        raise ValueError("the mask of the reference has other axes than the reference; resample it to its grid")
    out = mask
    for axis, (side, voxel) in enumerate(zip(shape, spacing, strict=True)):
        at = np.arange(max(1, round(side * voxel / spacing_mm))) * to_mask[axis, axis] + to_mask[axis, 3]
        near = np.rint(at).astype(np.int64)
        inside = (near >= 0) & (near < mask.shape[axis])
        taken = out.take(np.clip(near, 0, mask.shape[axis] - 1), axis=axis)
        out = taken & inside.reshape([-1 if a == axis else 1 for a in range(3)])
    return out, grid


def atlas_files(folder: str | Path) -> tuple[Path, Path]:
    """Return the files of a released atlas in `folder`: anchors and mask.

    Raises:
        ValueError: One of the files is missing.
    """
    corners, mask = (Path(folder).expanduser() / name for name in ATLAS_FILES)
    for file in (corners, mask):
        if not file.is_file():
            raise ValueError(f"there is no {file}; an atlas is a folder with {' and '.join(ATLAS_FILES)}")
    return corners, mask


def read_atlas(
    folder: str | Path, *, norm: str = "official_max", patch_voxel: int = 32
) -> tuple[AnchorTable, Int[np.ndarray, "x y z"]]:
    """Return the anchors of a released atlas, and its lung mask (0 and two values) in the order of the file.

    The folder holds `atlas_patch_loc.npy` (location, 3), lower corners along the axes of the mask's file, and
    `atlas_lung_mask.nii.gz`. Rows keep their order: queues and neighbours of published weights refer to their numbers.

    Raises:
        ValueError: A file is missing, they do not belong together, or the mask's axes are not x, y, z.
    """
    corners_file, mask_file = atlas_files(folder)
    with reasons_for(mask_file):
        header, load = open_image(mask_file)
        mask = load(None)[..., 0]
    runs = [int(axis) for axis in np.abs(header.affine[:3, :3]).argmax(axis=0)]
    if runs != [0, 1, 2]:
        raise ValueError(
            f"the axes of {mask_file} run along {', '.join('xyz'[axis] for axis in runs)}; an atlas has x, y, z in "
            f"either direction: reorder the axes of the mask, and the columns of {corners_file.name} with them"
        )
    try:
        corners = np.load(corners_file)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{corners_file} is no array ({error})") from error
    if corners.ndim != 2 or corners.shape[1] != 3 or corners.dtype.kind not in "iu" or not len(corners):
        raise ValueError(f"{corners_file} must hold whole numbers (location, 3), got {corners.dtype} {corners.shape}")
    if corners.min() < 0 or (corners.max(axis=0) + patch_voxel > mask.shape).any():
        raise ValueError(f"{corners_file} has patches beyond the {mask.shape} voxels of {mask_file.name}")
    mask = np.rint(mask).astype(np.int32)
    share = [
        float((mask[x : x + patch_voxel, y : y + patch_voxel, z : z + patch_voxel] > 0).mean()) for x, y, z in corners
    ]
    table = AnchorTable.of_corners(
        corners,
        header.affine,
        patch_voxel=patch_voxel,
        norm=norm,
        roi_fraction=np.array(share),
        reference=str(mask_file.name),
    )
    return table, mask
