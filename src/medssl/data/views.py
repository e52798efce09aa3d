"""The view plan that a method states (`ViewPlan`) and the views that it gets (`View`)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

Given = Tensor | np.ndarray | Sequence[Any] | float | None
"""Value of a field for `View.of`: anything that a tensor can be built from."""
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

    @classmethod
    def of(
        cls,
        image: Float[Tensor, "b *v c x y z"],
        *,
        corner_voxel: Given = None,
        matrix: Given = None,
        volume_shape: Given = None,
        volume_to_mm: Given = None,
        case: Given = None,
        group: Given = 0,
        body_faces: Given = None,
        location_body: Given = None,
        crop_body: Given = None,
        displacement: Given = None,
        location_index: Given = None,
        coordinate: Given = None,
        location_valid: Given = True,
        valid: Given = None,
        label: Given = None,
        regions: Given = None,
        points: Given = None,
        inside: Given = None,
        point_features: Given = None,
    ) -> "View":
        """Return the user's own tensors as a group of views, for a method that is called without a store.

        An image alone is a whole volume with voxels of 1 mm, and the body fills the volume. Views of one sample show
        one case, different samples show different cases, and all belong to one cohort. An argument is stated once for
        all views, or has the leading dimensions of `image`, with 1 in place of b or v where views are alike.

        Args:
            image: Grey values. Without the dimension v each sample has one view.
            corner_voxel: Place of the view's first voxel in its volume, for views that were cut out unchanged.
            matrix: Place of all other views, as in `View`. Like `corner_voxel` it needs `volume_shape`.
            volume_shape: Shape of the volume, as in `View`; the shape of `image` if not given.
            volume_to_mm: Map from volume voxels to RAS mm, as in `View`; voxels of 1 mm if not given.
            case: Numbers of the cases, from 0 on if not given.
            group: Number of the cohort.
            body_faces: Faces of the body box; those of the volume if not given.
            location_body: Body coordinate of the centre. It follows from the place and `body_faces` if not given.
            crop_body: Faces of the crop about `location_body`. They follow from the same if not given.
            displacement: Displacement of bent views, in view voxels.
            location_index: Number of the grid location. It needs `coordinate`.
            coordinate: Coordinate of the grid location.
            location_valid: Whether the case shows the grid location.
            valid: Mask of voxels inside the volume. It follows from `corner_voxel` or `matrix` and `volume_shape` if
                not given.
            label: Label of each voxel.
            regions: Region number of each voxel.
            points: Points in voxels of the volume.
            inside: Whether the points lie in the view. It follows from the place if not given.
            point_features: Features of each point.

        Raises:
            ValueError: An argument has a wrong shape, or lacks another one that it needs.
        """
        lead, sides, is_whole = image.shape[:-4], image.shape[-3:], corner_voxel is None and matrix is None
        if len(lead) not in (1, 2):
            raise ValueError(
                f"an image has the dimensions b v c x y z or b c x y z; got the shape {tuple(image.shape)}"
            )
        if corner_voxel is not None and matrix is not None:
            raise ValueError("corner_voxel and matrix both say where a view lies; give one of them")
        if not is_whole and volume_shape is None:
            raise ValueError("a view with a corner_voxel or a matrix is cut from a volume; give volume_shape too")
        if (location_index is None) != (coordinate is None):
            raise ValueError("location_index and coordinate belong together; give both or none")

        def spread(name: str, given: Given, *inner: int, dtype: torch.dtype | None = torch.float64) -> Any:
            return None if given is None else _spread(name, given, lead, inner, dtype=dtype, device=image.device)

        eye = torch.eye(4, dtype=torch.float64, device=image.device)
        place = spread("matrix", eye if matrix is None else matrix, 4, 4)
        if corner_voxel is not None:
            corner = spread("corner_voxel", corner_voxel, 3)
            place = torch.cat([place[..., :3], F.pad(corner, (0, 1), value=1.0)[..., None]], dim=-1)
        shape = spread("volume_shape", list(sides) if volume_shape is None else volume_shape, 3, dtype=torch.int64)
        whole_volume = torch.stack([torch.full_like(shape, -0.5, dtype=torch.float64), shape - 0.5], dim=2)
        numbers = torch.arange(len(image)).view(-1, *[1] * (len(lead) - 1))
        is_shown = None if location_index is None else location_valid
        view = cls(
            image=image if len(lead) == 2 else image[:, None],
            matrix=place,
            volume_to_mm=spread("volume_to_mm", eye if volume_to_mm is None else volume_to_mm, 4, 4),
            volume_shape=shape,
            case=spread("case", numbers if case is None else case, dtype=torch.int64),
            group=spread("group", group, dtype=torch.int64),
            location_body=torch.full_like(shape, 0.5, dtype=torch.float64),
            body_faces=whole_volume if body_faces is None else spread("body_faces", body_faces, 2, 3),
            displacement=spread("displacement", displacement, 3, *sides, dtype=torch.float32),
            location_index=spread("location_index", location_index, dtype=torch.int64),
            coordinate=spread("coordinate", coordinate, 3, dtype=torch.float32),
            location_valid=spread("location_valid", is_shown, dtype=torch.bool),
            valid=spread("valid", valid, 1, *sides, dtype=torch.bool),
            label=spread("label", label, 1, *sides, dtype=None),
            regions=spread("regions", regions, 1, *sides, dtype=None),
            points=spread("points", points, -1, 3),
            inside=spread("inside", inside, -1, dtype=torch.bool),
            point_features=spread("point_features", point_features, -1, -1, dtype=torch.float32),
        )
        lower, upper = view.body_faces.unbind(2)  # type: ignore[union-attr]
        reach = place[..., :3, :3].abs() @ (torch.tensor(sides).to(place) / 2) / (upper - lower)
        center = (view.center_volume() - lower) / (upper - lower)
        view.location_body = center if location_body is None else spread("location_body", location_body, 3)
        around = torch.stack([view.location_body - reach, view.location_body + reach], dim=2)
        view.crop_body = around if crop_body is None else spread("crop_body", crop_body, 2, 3)
        if valid is None and not is_whole:
            at, last = view._grid(place), shape[..., None, None, None] - 0.5
            view.valid = ((at >= -0.5) & (at <= last)).all(2, keepdim=True)
        if view.points is not None and inside is None:
            view.inside = view.contains(view.points)
        return view

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

    def contains(self, points: Float[Tensor, "b v k 3"]) -> Bool[Tensor, "b v k"]:
        """Return which volume points lie among the voxel centres of the view."""
        found = self.to_view(points)
        last = torch.tensor(self.image.shape[3:], device=found.device) - 1
        return ((found >= 0) & (found <= last)).all(-1)

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


def _spread(
    name: str,
    given: Given,
    lead: Sequence[int],
    inner: Sequence[int],
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """Return an argument of `View.of` as a field (b v ...); -1 in `inner` is a side that the argument chooses."""
    value, full = torch.as_tensor(given, dtype=dtype, device=device), (*lead, *inner)
    try:
        if value.ndim not in (0, len(inner), len(full)):
            raise RuntimeError
        value = value.expand(full).contiguous()  # no two entries share memory
    except RuntimeError:
        raise ValueError(
            f"{name} has the shape {list(value.shape)}; give {list(inner)} for all views, or {list(full)} with 1 where "
            "views are alike (-1 is any number)"
        ) from None
    return value if len(lead) == 2 else value[:, None]


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
