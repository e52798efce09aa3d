"""The view plan that a method states (`ViewPlan`) and the views that it gets (`View`)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from medssl.data.augment.base import IntensityAugmentation, Pose, SpatialAugmentation
from medssl.data.placements import GridCrop, ViewSpec
from medssl.data.randomness import counter_generator, counter_key
from medssl.data.scene import Placement, Scene
from medssl.data.store import Record, VolumeStore
from medssl.data.view_notes import other_size, other_window

INVERSE_STEPS = 20
INVERSE_TOLERANCE_VOXEL = 0.25


@dataclass
class View:
    """One group of a drawn batch: `b` samples with `v` views each, all of one size.

    Args:
        image: Grey values of the views.
        matrix: Map from view voxels to level-0 volume voxels.
        volume_to_mm: Map from volume voxels of the view's case to RAS mm.
        volume_shape: Number of voxels of the case's volume along x, y, z.
        case: Number of the case in the store.
        group: Number of the case's cohort, equal for equal cohorts.
        location_body: Body coordinate of the crop's centre before augmentation.
        crop_body: Lower and upper face of the crop before augmentation, in body coordinates.
        body_faces: Lower and upper face of the body box, in volume voxels.
        displacement: Displacement in view voxels, where a view is bent: voxel u shows `matrix @ (u + displacement[u])`.
        location_index: Number of the grid location, -1 where there is none.
        coordinate: Coordinate of the grid location, in [-1, 1] along each axis: the same for all cases.
        location_valid: Whether the case shows the grid location.
        valid: Mask of the voxels inside the volume.
        label: Nearest-neighbour labels.
        regions: Nearest-neighbour region numbers of a derived map, 0 beyond it.
        points: Points that travel with the view, in volume voxels.
        inside: Whether the points lie in the view.
        point_features: Further columns of the points' table.
    """

    image: Float[Tensor, "b v c x y z"]
    matrix: Float64[Tensor, "b v 4 4"]
    volume_to_mm: Float64[Tensor, "b v 4 4"]
    volume_shape: Int64[Tensor, "b v 3"]
    case: Int64[Tensor, "b v"]
    group: Int64[Tensor, "b v"]
    location_body: Float64[Tensor, "b v 3"]
    crop_body: Float64[Tensor, "b v 2 3"] | None = None
    body_faces: Float64[Tensor, "b v 2 3"] | None = None
    displacement: Float32[Tensor, "b v 3 x y z"] | None = None
    location_index: Int64[Tensor, "b v"] | None = None
    coordinate: Float32[Tensor, "b v 3"] | None = None
    location_valid: Bool[Tensor, "b v"] | None = None
    valid: Bool[Tensor, "b v 1 x y z"] | None = None
    label: Int[Tensor, "b v 1 x y z"] | None = None
    regions: Int[Tensor, "b v 1 x y z"] | None = None
    points: Float64[Tensor, "b v k 3"] | None = None
    inside: Bool[Tensor, "b v k"] | None = None
    point_features: Float32[Tensor, "b v k f"] | None = None

    def to_volume(self, points: Float[Tensor, "b v k 3"]) -> Float64[Tensor, "b v k 3"]:
        """Map view voxels to volume voxels, displacement included."""
        points = points.double()
        return apply_each(self.matrix, points + _displaced(points, self._field()))

    def to_view(self, points: Float[Tensor, "b v k 3"]) -> Float64[Tensor, "b v k 3"]:
        """Map volume voxels to view voxels; NaN where the inverse is off by more than 0.25 volume voxel."""
        straight = apply_each(torch.linalg.inv(self.matrix), points.double())
        if self.displacement is None:
            return straight
        found, field = straight, self._field()
        for _ in range(INVERSE_STEPS):
            found = straight - _displaced(found, field)
        residual = (apply_each(self.matrix, found + _displaced(found, field)) - points).norm(dim=-1, keepdim=True)
        return torch.where(residual <= INVERSE_TOLERANCE_VOXEL, found, torch.nan)

    def grid_mm(self) -> Float32[Tensor, "b v 3 x y z"]:
        """Return the RAS position of every voxel in millimetres, displacement included."""
        return self._grid(self.volume_to_mm @ self.matrix)

    def grid_body(self) -> Float32[Tensor, "b v 3 x y z"]:
        """Return the body coordinate of every voxel, 0 to 1 inside the body box, displacement included."""
        if self.body_faces is None:
            raise ValueError("this view does not know the body box of its case; make it with body_faces")
        lower, upper = self.body_faces.unbind(2)
        to_body = torch.diag_embed(F.pad(1 / (upper - lower), (0, 1), value=1.0))
        to_body[..., :3, 3] = -lower / (upper - lower)
        return self._grid(to_body @ self.matrix)

    def center_volume(self) -> Float64[Tensor, "b v 3"]:
        """Return the middle of each view in volume voxels."""
        middle = (torch.tensor(self.image.shape[3:], dtype=torch.float64, device=self.image.device) - 1) / 2
        return apply_each(self.matrix, middle.expand(*self.case.shape, 1, 3))[..., 0, :]

    def _grid(self, matrix: Float64[Tensor, "b v 4 4"]) -> Float32[Tensor, "b v 3 x y z"]:
        """Map every displaced view voxel through a matrix."""
        sides = self.image.shape[3:]
        axes = [torch.arange(n, dtype=torch.float64, device=self.image.device) for n in sides]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (3 x y z)
        grid = grid if self.displacement is None else grid + self.displacement
        grid = grid.expand(*self.case.shape, *grid.shape[-4:])
        moved = torch.einsum("bvij,bvjxyz->bvixyz", matrix[..., :3, :3], grid)
        return (moved + matrix[..., :3, 3, None, None, None]).float()

    def _field(self) -> Float64[Tensor, "b v 3 x y z"] | None:
        """Return the displacement in double precision; the conversion takes longer than looking up points in it."""
        return None if self.displacement is None else self.displacement.double()


def _displaced(
    points: Float64[Tensor, "b v k 3"], field: Float64[Tensor, "b v 3 x y z"] | None
) -> Float64[Tensor, "b v k 3"]:
    """Return the displacement at view voxels, trilinear, with the edge's value beyond the edge."""
    if field is None:
        return torch.zeros_like(points)
    sides = torch.tensor(field.shape[3:], device=points.device)
    grid = 2 * points / (sides - 1).clamp_min(1) - 1
    places = grid.flatten(0, 1).flip(-1)[:, :, None, None]
    found = F.grid_sample(field.flatten(0, 1), places, align_corners=True, padding_mode="border")  # (b*v 3 k 1 1)
    return found[..., 0, 0].mT.unflatten(0, points.shape[:2])


def apply_each(matrix: Float64[Tensor, "*#b 4 4"], points: Float64[Tensor, "*#b k 3"]) -> Float64[Tensor, "... k 3"]:
    """Return points after the affine maps of their samples: `geometry.apply` for batches."""
    return points @ matrix[..., :3, :3].mT + matrix[..., None, :3, 3]


@dataclass(frozen=True)
class PlacedView:
    """Everything that determines one view, before any voxel is read.

    Args:
        case: Number of the case in the store.
        record: Its index record.
        placement: Place of the view before augmentation.
        pose: Place of the view after augmentation.
        parameters: Parameters of each intensity augmentation of the group, in order.
        keys: Key of each intensity augmentation, for the numbers it draws by voxel.
    """

    case: int
    record: Record
    placement: Placement
    pose: Pose
    parameters: tuple[np.ndarray, ...]
    keys: tuple[int, ...]


class ViewPlan:
    """The groups of views a method asks for, by name, placed in the order in which they are stated.

    Args:
        groups: Specification of each group by its name: where its views lie and how they are drawn.
    """

    def __init__(self, *, groups: Mapping[str, ViewSpec]) -> None:
        if not groups:
            raise ValueError("a view plan needs at least one group under views.groups")
        self.groups = dict(groups)
        names = Counter(a.share for spec in self.groups.values() for a in spec.augment for _ in range(spec.count))
        for name, number in names.items():
            if name not in ("view", "group") and number == 1:
                raise ValueError(
                    f"share={name} is stated by one view only; use view, group, or one NAME in several groups"
                )

    @property
    def num_locations(self) -> int:
        """The number of grid locations of the group that states a grid; 0 where none does."""
        return max(getattr(spec, "num_locations", 0) for spec in self.groups.values())

    @property
    def first_size(self) -> list[int]:
        """The size of the first group's views in voxels along x, y, z."""
        return [int(side) for side in next(iter(self.groups.values())).size]

    @property
    def tables(self) -> set[str]:
        """The derived tables that hold locations."""
        return {table for spec in self.groups.values() if (table := getattr(spec, "table", None))}

    def locations_in(self, store: VolumeStore) -> int:
        """Return the number of grid locations, also where a table of the store holds them; 0 where there are none."""
        return max([self.num_locations, *(len(store.derived(table, 0)["centre_mm"]) for table in self.tables)])

    def check(self, store: VolumeStore) -> None:
        """Raise a ValueError where the store lacks a derived table that views carry."""
        for spec in self.groups.values():
            for name in (spec.points, spec.regions):
                if name is not None:
                    store.derived_file(name, 0)

    def notes(self, store: VolumeStore) -> list[str]:
        """Return notes on doubtful settings of the groups for this store, one line each."""
        found = [other_size(spec, store) for spec in self.groups.values() if isinstance(spec, GridCrop)]
        found += [other_window(spec, store) for spec in self.groups.values()]
        return [note for note in dict.fromkeys(found) if note is not None]

    def place(self, scene: Scene, *, seed: int, step: int) -> dict[str, list[PlacedView]]:
        """Return the views of one request, a pure function of (seed, step, the request's sample, view)."""
        sample = scene.request.sample
        places: dict[str, list[Placement]] = {}
        for name, spec in self.groups.items():
            places[name] = spec.place(scene, places, counter_generator("place", seed, step, sample, name))
        return {
            name: [
                self._placed(scene, place, name, number, (seed, step, sample))
                for number, place in enumerate(places[name])
            ]
            for name in self.groups
        }

    def _placed(
        self, scene: Scene, place: Placement, group: str, number: int, counter: tuple[int, int, int]
    ) -> PlacedView:
        record = scene.records[place.slot]
        pose, parameters, keys = Pose(place.frame, None), [], []
        seen: Counter[tuple[str, str]] = Counter()
        for order, augmentation in enumerate(self.groups[group].augment):
            kind = type(augmentation).__name__
            if augmentation.share == "view":
                key: tuple[int | str, ...] = ("view", group, number, order)
            elif augmentation.share == "group":
                key = ("group", group, order)
            else:
                key = ("shared", augmentation.share, kind, seen[augmentation.share, kind])
                seen[augmentation.share, kind] += 1
            rng = counter_generator("augment", *counter, *key)
            if isinstance(augmentation, SpatialAugmentation):
                pose = augmentation.move(pose, rng, record=record)
            elif isinstance(augmentation, IntensityAugmentation):
                parameters.append(augmentation.draw(rng, record))
                keys.append(counter_key("voxels", *counter, group, number, order))
        return PlacedView(scene.request.cases[place.slot], record, place, pose, tuple(parameters), tuple(keys))
