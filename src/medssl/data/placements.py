"""Placements, which choose the region of a case that a view shows: from geometry and tables of points, not voxels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from medssl.data.augment.base import Augmentation
from medssl.data.geometry import Frame, apply
from medssl.data.scene import Locations, Placement, Region, Scene
from medssl.data.store import Record
from medssl.data.volume import SAME_SPACING, Box


@dataclass(frozen=True, kw_only=True)
class ViewSpec(ABC):
    """A group of `count` views of one size: where they lie (subclasses) and how they are drawn.

    Args:
        size: Number of voxels along x, y, z of the drawn view.
        count: Number of views of the group.
        slot: Number of the request's case that is shown.
        spacing_mm: Spacing of the view: "native" (one view voxel is one stored voxel), or one or three numbers of
            millimetres.
        outside: Value beyond the volume: "minimum" of the volume, "border" (the nearest voxel), or a number in file
            units (HU).
        context: Part of the volume that an augmented view may see: all of it ("volume"), or only its own un-augmented
            box, as if that were cut out first ("crop").
        augment: Augmentations in order, normalisation among them.
        valid: Whether to return the mask of voxels that lie inside the volume.
        label: Whether to return the label, drawn by nearest neighbour.
        points: Name of a derived table. Its `points_voxel` (k, 3) travel with the view; k must be the same in every
            case.
        regions: Name of a derived table. Its map `regions` (x y z) is drawn like a label; it has a grid of its own that
            `to_volume` (4, 4) maps to volume voxels.
    """

    size: Sequence[int] = ()
    count: int = 1
    slot: int = 0
    spacing_mm: str | float | Sequence[float] = "native"
    outside: str | float = "minimum"
    context: str = "volume"
    augment: Sequence[Augmentation] = field(default_factory=tuple)
    valid: bool = False
    label: bool = False
    points: str | None = None
    regions: str | None = None

    def __post_init__(self) -> None:
        """Check the settings that all placements share."""
        name = type(self).__name__
        if self.needs_size and (len(self.size) != 3 or min(self.size) < 1):
            raise ValueError(f"{name}: size must be three positive voxel counts [x, y, z], got {list(self.size)}")
        if isinstance(self.outside, str) and self.outside not in ("minimum", "border"):
            raise ValueError(f"{name}: outside must be minimum, border or a number, got {self.outside!r}")
        if self.count < 1:
            raise ValueError(f"{name}: count must be at least 1, got {self.count}")
        if not isinstance(self.spacing_mm, str) and np.min(self.spacing_mm) <= 0:
            raise ValueError(f"{name}: spacing_mm must be positive, got {self.spacing_mm}")
        if (within := getattr(self, "within", "body")) not in ("body", "volume"):
            raise ValueError(f"{name}: within must be body or volume, got {within!r}")
        if self.context not in ("volume", "crop"):
            raise ValueError(f"{name}: context must be volume or crop, got {self.context!r}")
        if isinstance(self.spacing_mm, str) and self.spacing_mm != "native":
            raise ValueError(f"{name}: spacing_mm must be native, a number or three numbers, got {self.spacing_mm!r}")

    @property
    def needs_size(self) -> bool:
        """Whether `size` must be stated."""
        return True

    @abstractmethod
    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return `count` places; `placed` holds the groups stated before this one, by name."""

    def step_voxel(self, record: Record, scale: float = 1.0) -> Float[np.ndarray, "3"]:
        """Return stored voxels per view voxel, for `scale` times the stated spacing.

        A spacing that equals the volume's up to rounding in the header counts as equal: such views are cut, not
        interpolated.
        """
        if isinstance(self.spacing_mm, str):
            return np.full(3, float(scale))
        stated = np.broadcast_to(np.asarray(self.spacing_mm, dtype=np.float64), 3)
        step = stated * scale / np.array(record.spacing_mm)
        return np.where(np.abs(step - 1) < SAME_SPACING, 1.0, step)

    def frame(self, center: Float[np.ndarray, "3"], step_voxel: Float[np.ndarray, "3"]) -> Frame:
        """Return the frame about `center`, on whole voxels along axes with one view voxel per stored voxel."""
        return Frame.at(center, self.size, step_voxel=step_voxel).on_voxels()

    def seen(self, placement: Placement) -> Frame | None:
        """Return the crop beyond which an augmented view sees nothing; None where it may see the whole volume."""
        return placement.frame if self.context == "crop" else None


def clamped(center: Float[np.ndarray, "3"], box: Box, side_voxel: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """Return the nearest centre of a crop inside the box; the box's middle along axes where the crop is larger."""
    slack = np.maximum(box.size - side_voxel, 0) / 2
    middle = (box.lower + box.upper) / 2
    return np.clip(center, middle - slack, middle + slack)


@dataclass(frozen=True, kw_only=True)
class RandomCrop(ViewSpec):
    """Crops at uniform places inside the body box or the volume, padded where they do not fit.

    Args:
        within: Region in which the crop has to lie.
        fraction: Range from which each side is drawn, as a share of the region's side, before the crop is resized to
            `size`. None cuts `size` voxels at `spacing_mm`.
        label_share: Share of the crops that are centred on a voxel of one of the case's labels (each equally often).
        foreground_share: Share of the remaining crops that are centred on a body voxel.
        labels: Label values that count for `label_share`; None for all that the case holds but the ignored one.
    """

    within: Region = "volume"
    fraction: Sequence[float] | None = None
    label_share: float = 0.0
    foreground_share: float = 0.0
    labels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.fraction is not None and not 0 < self.fraction[0] <= self.fraction[1]:
            raise ValueError(
                f"RandomCrop: fraction must be [low, high] with 0 < low <= high, got {list(self.fraction)}"
            )
        if not (0 <= self.label_share <= 1 and 0 <= self.foreground_share <= 1):
            shares = f"{self.label_share} and {self.foreground_share}"
            raise ValueError(f"RandomCrop: label_share and foreground_share must lie in [0, 1], got {shares}")
        if self.labels is not None and (not self.labels or min(self.labels) < 1):
            raise ValueError(f"RandomCrop: labels must be label values from 1 on, or null, got {list(self.labels)}")

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return independent crops."""
        return [Placement(self.slot, self._one(scene, rng)) for _ in range(self.count)]

    def _one(self, scene: Scene, rng: np.random.Generator) -> Frame:
        record, box = scene.record(self.slot), scene.box(self.slot, self.within)
        if self.fraction is None:
            step = self.step_voxel(record)
        else:
            low, high = self.fraction
            step = np.maximum(rng.uniform(low, high, 3) * box.size, 1.0) / np.array(self.size)
        side = step * np.array(self.size)
        share, position = rng.uniform(), rng.uniform(size=3)
        center = self._seed_point(scene, share, rng)
        if center is not None:
            return self.frame(clamped(center, Box.whole(record.shape), side), step)
        slack = box.size - side
        lower = np.where(slack > 0, box.lower + position * slack, (box.lower + box.upper - side) / 2)
        return self.frame(lower + side / 2, step)

    def _seed_point(self, scene: Scene, share: float, rng: np.random.Generator) -> np.ndarray | None:
        if share >= self.label_share + (1 - self.label_share) * self.foreground_share:
            return None
        points = scene.points(self.slot)
        value = -1
        if share < self.label_share:
            held = scene.record(self.slot).labels
            ignored = scene.store.ignored_label
            labels = [label for label in held if label != ignored and (self.labels is None or label in self.labels)]
            value = labels[rng.integers(len(labels))] if labels else -1
        chosen = points[points[:, 3] == value]
        return chosen[rng.integers(len(chosen)), :3].astype(np.float64) if len(chosen) else None


@dataclass(frozen=True, kw_only=True)
class GridCrop(ViewSpec):
    """The crop at the request's grid location, or those at the locations next to it.

    Args:
        grid: Number of locations along x, y, z: the centres of equal cells of the region. Locations are numbered with
            z fastest; their coordinates run from -1 to 1 from face to face of the region.
        within: The region that the grid divides.
        table: Name of a derived table with `centre_mm` (location, 3) instead of a grid. It may also hold `coordinate`
            (location, 3), `valid` (location) and, for neighbours, `neighbours` (location, k).
        neighbours: Whether to place the `count` nearest other locations that the case shows, instead of the request's
            own. Where there are fewer, invalid ones follow.
    """

    grid: Sequence[int] | None = None
    within: Region = "body"
    table: str | None = None
    neighbours: bool = False

    def __post_init__(self) -> None:
        """Check that there is exactly one source of locations."""
        super().__post_init__()
        if (self.grid is None) == (self.table is None):
            raise ValueError("GridCrop: give either grid: [nx, ny, nz] or table: NAME")
        if self.neighbours and self.grid is not None and self.count >= self.num_locations:
            raise ValueError(
                f"GridCrop: {self.count} neighbours, but grid {list(self.grid)} has {self.num_locations} locations"
            )

    @property
    def num_locations(self) -> int:
        """The number of locations of the grid (0 where a table holds them)."""
        return int(np.prod(self.grid)) if self.grid is not None else 0

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return the crop at each location; `count` copies of one crop at the request's own location."""
        location = scene.request.location
        if location is None:
            raise ValueError("GridCrop needs a request with a location; use sampler SameLocation")
        record = scene.record(self.slot)
        known = self.locations(scene)
        if location >= len(known.valid):
            raise ValueError(
                f"GridCrop: location {location} is not one of {len(known.valid)}; give the sampler that num_locations"
            )
        wanted = np.full(self.count, location)
        if self.neighbours:
            near = known.neighbours[location]
            if len(near) < self.count:
                raise ValueError(f"GridCrop: {self.count} neighbours, but the table {self.table!r} holds {len(near)}")
            wanted = near[np.argsort(~known.valid[near], kind="stable")][: self.count]
        step, placements = self.step_voxel(record), []
        for j in map(int, wanted):
            x, y, z = map(float, known.coordinate[j])
            frame = self.frame(known.center_voxel[j], step)
            placements.append(Placement(self.slot, frame, j, (x, y, z), bool(known.valid[j])))
        return placements

    def locations(self, scene: Scene) -> Locations:
        """Return all locations of the case in the slot."""
        record = scene.record(self.slot)
        if self.table is None:
            centers = scene.box(self.slot, self.within).to_volume(self.cells)
            return Locations(centers, 2 * self.cells - 1, self._nearest, np.ones(len(centers), dtype=bool))
        table = scene.derived(self.table, self.slot)
        matrix, num = record.mm_to_volume, len(table["centre_mm"])
        return Locations(
            apply(matrix, table["centre_mm"]),
            np.asarray(table.get("coordinate", np.zeros((num, 3))), dtype=np.float64),
            table.get("neighbours", np.empty((num, 0), int)),
            table.get("valid", np.ones(num, dtype=bool)),
        )

    @cached_property
    def cells(self) -> Float[np.ndarray, "location 3"]:
        """The centres of the grid's cells, as shares of the region."""
        assert self.grid is not None
        axes = [(np.arange(n) + 0.5) / n for n in self.grid]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)

    @cached_property
    def _nearest(self) -> Int[np.ndarray, "location near"]:
        distance = np.linalg.norm(self.cells[:, None] - self.cells[None], axis=-1)
        np.fill_diagonal(distance, -1)  # a location comes before those that lie on it
        return np.argsort(distance, axis=1, kind="stable")[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Same(ViewSpec):
    """The places of another group, drawn a second time; `size` may be left out, or resizes the same region.

    Args:
        of: Name of a group stated before.
    """

    of: str = ""

    @property
    def needs_size(self) -> bool:
        """False: the other group's size is the default."""
        return False

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return the other group's places; a single place is repeated `count` times."""
        found = group_of(placed, self.of, "Same")
        if len(found) not in (1, self.count):
            raise ValueError(
                f"Same: group {self.of!r} has {len(found)} views, this one {self.count}; give both the same count"
            )
        chosen = found * (self.count if len(found) == 1 else 1)
        return [replace(p, frame=self._resized(p.frame)) for p in chosen]

    def _resized(self, frame: Frame) -> Frame:
        if not self.size or tuple(self.size) == frame.shape:
            return frame
        ratio = np.array(frame.shape) / np.array(self.size)
        matrix = np.eye(4)
        matrix[:3, :3] = np.diag(ratio)
        matrix[:3, 3] = (ratio - 1) / 2
        x, y, z = self.size
        return frame.reindexed((x, y, z), matrix)


@dataclass(frozen=True, kw_only=True)
class Nearby(ViewSpec):
    """Crops about the centre of another group's first view, or about the request's anchor, with a small shift.

    Args:
        of: Name of a group stated before, or "anchor" for the request's anchor (a body coordinate).
        shift: Largest shift along each axis, as a share of the region's side.
        within: Region that shifts are shares of; the crop is moved to lie inside it.
    """

    of: str = "anchor"
    shift: float | Sequence[float] = 0.0
    within: Region = "body"

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return independently shifted crops."""
        record, box = scene.record(self.slot), scene.box(self.slot, self.within)
        if self.of == "anchor":
            if scene.request.anchor_body is None:
                raise ValueError("Nearby(of=anchor) needs a request with an anchor; use sampler Anchored")
            center = record.body.to_volume(np.array(scene.request.anchor_body))
        else:
            center = group_of(placed, self.of, "Nearby")[0].frame.center
        step = self.step_voxel(record)
        side = step * np.array(self.size)
        shifts = rng.uniform(-1, 1, (self.count, 3)) * np.array(self.shift) * box.size
        return [Placement(self.slot, self.frame(clamped(center + shift, box, side), step)) for shift in shifts]


@dataclass(frozen=True, kw_only=True)
class Containing(ViewSpec):
    """Crops that hold one common point, each with a scale of its own.

    Args:
        scale: Range of each crop's scale. Its spacing is `spacing_mm` times the scale.
        independent: Probability that the crops are placed independently of each other instead.
        within: Region in which the crops and the common point have to lie.
        margin_voxel: Least distance of the common point from the region's faces.
    """

    scale: Sequence[float] = (1.0, 1.0)
    independent: float = 0.0
    within: Region = "volume"
    margin_voxel: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"Containing: scale must be [low, high] with 0 < low <= high, got {list(self.scale)}")
        if not 0 <= self.independent <= 1:
            raise ValueError(f"Containing: independent must lie in [0, 1], got {self.independent}")
        if np.size(self.margin_voxel) not in (1, 3) or np.min(self.margin_voxel) < 0:
            raise ValueError(
                f"Containing: margin_voxel must be one number or three, all at least 0; got {self.margin_voxel}"
            )

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return `count` crops about one point, or independent ones."""
        record, box = scene.record(self.slot), scene.box(self.slot, self.within)
        apart = rng.uniform() < self.independent
        margin = np.minimum(np.broadcast_to(np.asarray(self.margin_voxel, dtype=np.float64), 3), box.size / 2)
        point = rng.uniform(box.lower + margin, box.upper - margin)
        placements = []
        for _ in range(self.count):
            step = self.step_voxel(record, rng.uniform(self.scale[0], self.scale[1]))
            side = step * np.array(self.size)
            lowest, highest = np.sort([box.lower, box.upper - side], axis=0)  # a crop larger than the box covers it
            if not apart:
                rounding = np.where(step == 1, 0.5, 0.0)  # native crops move to whole voxels
                lowest, highest = np.maximum(lowest, point - side + rounding), np.minimum(highest, point - rounding)
                highest = np.maximum(lowest, highest)
            placements.append(Placement(self.slot, self.frame(rng.uniform(lowest, highest) + side / 2, step)))
        return placements


@dataclass(frozen=True, kw_only=True)
class Fixed(ViewSpec):
    """The crop about a stated body or volume coordinate (0 to 1 along each axis), with nothing random.

    Args:
        center: Centre of the crop, in shares of the region along x, y, z.
        within: Region that the centre refers to.
    """

    center: Sequence[float] = (0.5, 0.5, 0.5)
    within: Region = "volume"

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return `count` equal crops."""
        center = scene.box(self.slot, self.within).to_volume(np.array(self.center, dtype=np.float64))
        frame = self.frame(center, self.step_voxel(scene.record(self.slot)))
        return [Placement(self.slot, frame)] * self.count


def group_of(placed: dict[str, list[Placement]], name: str, who: str) -> list[Placement]:
    """Return the places of a group stated before; a ValueError says that placement `who` finds none."""
    if name not in placed:
        raise ValueError(f"{who}: no group {name!r} is stated before this one; there are {sorted(placed)}")
    return placed[name]
