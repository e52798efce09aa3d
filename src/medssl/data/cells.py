"""Placements that follow boxes: cells of a field, crops inside a field, and crops beside those of another group."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medssl.data.geometry import Frame
from medssl.data.placements import ViewSpec, clamped, group_of
from medssl.data.scene import Placement, Region, Scene
from medssl.data.volume import Box

TOLERANCE = 1e-6
"""Largest difference that counts as rounding: of two volumes, relative to one of them, and of two places in voxels."""


@dataclass(frozen=True, kw_only=True)
class Cells(ViewSpec):
    """All cells of a grid over a field, one view each, numbered with z fastest.

    Each cell is resized to `size`, so that cells of another shape than `size` are stretched.

    Args:
        grid: Number of cells along x, y, z; their product is `count`, which need not be stated.
        within: Region that is the field, or in which the field lies.
        of: Name of a group stated before whose single view is the field; None takes `within`.
        extent_voxel: Size of the field in voxels of `spacing_mm`. It is placed uniformly in the region, about its
            middle along axes where it does not fit. None makes the whole region the field.
    """

    grid: Sequence[int] = (1, 1, 1)
    within: Region = "volume"
    of: str | None = None
    extent_voxel: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the settings, and set `count`."""
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(f"Cells: grid must be three positive numbers of cells [x, y, z], got {list(self.grid)}")
        number = int(np.prod(self.grid))
        if self.count not in (1, number):
            raise ValueError(
                f"Cells: grid {list(self.grid)} has {number} cells, count is {self.count}; leave count out"
            )
        object.__setattr__(self, "count", number)
        super().__post_init__()
        if self.of is not None and self.extent_voxel is not None:
            raise ValueError("Cells: the group that `of` names is the field; leave extent_voxel out")
        if self.extent_voxel is not None and (len(self.extent_voxel) != 3 or min(self.extent_voxel) < 1):
            raise ValueError(
                f"Cells: extent_voxel must be three positive voxel counts [x, y, z] or null, got {self.extent_voxel}"
            )

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return the cells in the order of their numbers."""
        field = self._field(scene, placed, rng)
        slot = self.slot if self.of is None else placed[self.of][0].slot
        grid = np.array(self.grid)
        side = field.size / grid
        step = side / np.array(self.size)
        corners = np.stack(np.meshgrid(*map(np.arange, self.grid), indexing="ij"), axis=-1).reshape(-1, 3)
        centers = field.lower + (corners + 0.5) * side
        return [Placement(slot, Frame.at(center, self.size, step_voxel=step)) for center in centers]

    def _field(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> Box:
        if self.of is not None:
            found = group_of(placed, self.of, "Cells")
            if len(found) != 1:
                raise ValueError(f"Cells: group {self.of!r} has {len(found)} views; the field is a group of one view")
            return union(found)
        region = scene.box(self.slot, self.within)
        if self.extent_voxel is None:
            return region
        step = self.step_voxel(scene.record(self.slot))
        return drawn(region, step * np.array(self.extent_voxel), step, rng)


@dataclass(frozen=True, kw_only=True)
class Inside(ViewSpec):
    """Crops at uniform places inside the box that another group's crops fill, each as large as one of these.

    Args:
        of: Name of a group stated before, such as `Cells`; `size` may be left out, and is then that of its views.
    """

    of: str = ""

    @property
    def needs_size(self) -> bool:
        """False: the other group's size is the default."""
        return False

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return independent crops."""
        found = group_of(placed, self.of, "Inside")
        field = union(found)
        first = found[0].frame
        filled = sum(np.prod(np.diff(p.frame.faces, axis=0)) for p in found)
        if abs(filled / np.prod(field.size) - 1) > TOLERANCE:
            raise ValueError(f"Inside: the crops of group {self.of!r} do not fill a box without overlap; use Cells")
        side, size = first.linear.diagonal() * np.array(first.shape), tuple(self.size) or first.shape
        step = side / np.array(size)
        boxes = [drawn(field, side, step, rng) for _ in range(self.count)]
        return [Placement(found[0].slot, Frame.at((box.lower + box.upper) / 2, size, step_voxel=step)) for box in boxes]


@dataclass(frozen=True, kw_only=True)
class Shifted(ViewSpec):
    """Each crop of another group, shifted by whole voxels.

    Args:
        of: Name of a group stated before, with as many views; `size` may be left out, and is then that of its views.
        shift_voxel: Largest shift either way along each axis, in voxels of the other group's views: one number or one
            for each axis.
        within: Region in which the shifted crop has to lie; it is moved back where it does not.
    """

    of: str = ""
    shift_voxel: int | Sequence[int] = 0
    within: Region = "volume"

    def __post_init__(self) -> None:
        """Check the shift."""
        super().__post_init__()
        if np.size(self.shift_voxel) not in (1, 3) or np.min(self.shift_voxel) < 0:
            raise ValueError(
                f"Shifted: shift_voxel must be one number or three, all at least 0, got {self.shift_voxel}"
            )

    @property
    def needs_size(self) -> bool:
        """False: the other group's size is the default."""
        return False

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return the shifted crops in the order of the other group."""
        found = group_of(placed, self.of, "Shifted")
        if len(found) != self.count:
            raise ValueError(
                f"Shifted: group {self.of!r} has {len(found)} views, this one {self.count}; give both the same count"
            )
        most = np.broadcast_to(np.asarray(self.shift_voxel, dtype=np.int64), 3)
        shifts = rng.integers(-most, most + 1, size=(self.count, 3))
        return [self._moved(scene, placement, shift) for placement, shift in zip(found, shifts, strict=True)]

    def _moved(self, scene: Scene, placement: Placement, shift: np.ndarray) -> Placement:
        frame, box = placement.frame, scene.box(placement.slot, self.within)
        step, size = frame.linear.diagonal(), tuple(self.size) or frame.shape
        side = step * np.array(size)
        center = clamped(frame.center + shift * step, box, side)
        return Placement(placement.slot, Frame.at(center, size, step_voxel=step).on_voxels())


def union(placements: Sequence[Placement]) -> Box:
    """Return the smallest box that holds all places, in voxel faces."""
    faces = np.stack([placement.frame.faces for placement in placements])
    return Box(faces[:, 0].min(0), faces[:, 1].max(0))


def drawn(
    region: Box, side_voxel: Float[np.ndarray, "3"], step_voxel: Float[np.ndarray, "3"], rng: np.random.Generator
) -> Box:
    """Return a box of a size at a uniform place in a region.

    Along axes whose step is one voxel the box lies on whole voxels, and each offset at which it lies inside the region
    is equally likely.
    """
    slack = region.size - side_voxel
    position = rng.uniform(size=3)
    lower = np.where(slack > 0, region.lower + position * slack, (region.lower + region.upper - side_voxel) / 2)
    on_voxels = np.floor(lower + 1) - 0.5  # faces lie half a voxel beside centres
    first = np.ceil(region.lower + 0.5 - TOLERANCE) - 0.5
    last = np.floor(region.lower + slack + 0.5 + TOLERANCE) - 0.5
    offset = np.minimum(np.floor(position * (last - first + 1)), last - first)
    on_voxels = np.where(last >= first, first + offset, on_voxels)
    lower = np.where(step_voxel == 1, on_voxels, lower)
    return Box(lower, lower + side_voxel)
