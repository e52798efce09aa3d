"""The point rule of KAF: which keypoints the two views have, and which of them are the same."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from medssl import checks
from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.models.keypoints import DifferenceOfGaussians, Foerstner, detect
from medssl.ops.correspondence import choose_shared, descriptors_at, mutual_nearest, patch_descriptors

MATCHES = ("shared", "geometric", "descriptor", "carried")
CHOICES = ("random", "strongest", "grid")
PATCH_SIDE = 5
"""Side of the surroundings of a point that `carried` compares, in voxels of the volume."""


class PointPair(NamedTuple):
    """Keypoints of two views in voxels of each, which of them count, and pairs (sample, first, second); -1 is none."""

    first: Float[Tensor, "b n axis"]
    second: Float[Tensor, "b m axis"]
    first_valid: Bool[Tensor, "b n"]
    second_valid: Bool[Tensor, "b m"]
    pairs: Int64[Tensor, "pair 3"]

    def matched_share(self) -> Float[Tensor, ""]:
        """Return the share of the points of both views that have a partner."""
        number = self.first_valid.sum() + self.second_valid.sum()
        matched = (self.pairs[:, 1:] >= 0).all(1).sum()
        return 2 * matched / number.clamp(min=1)


class PointRule:
    """Rule by which keypoints of two views are chosen and put in correspondence.

    Args:
        match: `shared`: points of the volume's table, the same in both views by their number. `geometric`: points found
            in each view, matched to the nearest in the volume. `descriptor`: points found in each view, matched by
            similar surroundings within a gate, without a transform. `carried`: points found in each view, matched by
            similar surroundings within a gate, both as they lie in the volume: for slices, whose points no other slice
            shows.
        table: Name of the table that the views carry, for `shared`; null where they carry none.
        max_points: Largest number of points in a view.
        min_points: Smallest number of points in a view; random voxels without a partner fill it up.
        max_matched_fraction: Largest fraction of `max_points` that has a partner in crowded views, for `shared`.
        dropout: Share of the points that a view does not see, drawn for each view separately, for `shared`.
        choice: Which of the points that views show are taken in training, for `shared`: `random`, the `strongest`, or
            `grid`: the strongest of each cell of a grid, then the second of each, and so on, with cells of such a size
            that the first view has `max_points` of them.
        validation_choice: Which points are taken in validation, for `shared`: `strongest` or `grid`.
        radius_voxel: Largest distance of a pair in voxels of the first view, for `geometric`.
        gate_share: Largest distance of a pair, its components added, in shares of the view's side, for `descriptor` and
            `carried`. Distances are measured in the plane of slices.
        detector: Detector of points in views, for views in [0, 1]. Null is `Foerstner` for `geometric`, because it
            finds the same points again most often, and `DifferenceOfGaussians` for the others.

    Source: arXiv:2310.01680, section 3.3; repository zshyang/kaf, dataset/match_utils.py.
    """

    def __init__(
        self,
        *,
        match: str = "shared",
        table: str | None = "keypoints",
        max_points: int = 512,
        min_points: int = 8,
        max_matched_fraction: float = 0.9,
        dropout: float = 0.0,
        choice: str = "random",
        validation_choice: str = "strongest",
        radius_voxel: float = 2.0,
        gate_share: float = 20 / 512,
        detector: Any = None,
    ) -> None:
        checks.choice("match", match, MATCHES)
        if match == "shared" and table is None:
            raise ValueError(
                "method.points.match=shared takes points of a table: set views.groups.first.points=keypoints, or "
                "method.points.match=geometric"
            )
        for name, value, allowed in (
            ("choice", choice, CHOICES),
            ("validation_choice", validation_choice, CHOICES[1:]),
        ):
            checks.choice(name, value, allowed)
        if not 0 <= min_points <= max_points or max_points < 1:
            raise ValueError(f"0 <= min_points <= max_points is wanted, got {min_points} and {max_points}")
        if not 0 < max_matched_fraction <= 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"max_matched_fraction lies in (0, 1] and dropout in [0, 1), got {max_matched_fraction} and {dropout}"
            )
        self.match, self.max_points, self.min_points = match, max_points, min_points
        self.max_matched_fraction, self.dropout = max_matched_fraction, dropout
        self.choice, self.validation_choice = choice, validation_choice
        self.radius_voxel, self.gate_share, self.detector = radius_voxel, gate_share, detector

    def __call__(
        self, first: View, second: View, progress: Progress, *, is_random: bool, spatial_dims: int = 3
    ) -> PointPair:
        """Return the points of two views of one volume, chosen as in training or, if not random, as in validation.

        Views of two `spatial_dims` are slices of one voxel along z; their points have no z.
        """
        with torch.no_grad():
            found = (
                self._shared(first, second, progress, is_random=is_random)
                if self.match == "shared"
                else self._found(first, second, spatial_dims)
            )
            return self._filled(found, (first, second), progress)

    def _shared(self, first: View, second: View, progress: Progress, *, is_random: bool) -> PointPair:
        inside = []
        for name, view in (("first", first), ("second", second)):
            if view.points is None or view.inside is None:
                raise ValueError(
                    "KAF matches points of a table: give the views `points: keypoints`, made by "
                    "`python -m medssl.derive what=keypoints`, or set method.points.match=geometric"
                )
            seen = view.inside[:, 0]
            if self.dropout and is_random:
                noise = torch.rand(
                    seen.shape, generator=progress.generator(f"seen {name}", seen.device), device=seen.device
                )
                seen = seen & (noise >= self.dropout)
            inside.append(seen)
        choice = self.choice if is_random else self.validation_choice
        order = self._order(choice, first, inside, progress)
        limits = {"max_points": self.max_points, "max_matched_fraction": self.max_matched_fraction}
        chosen = choose_shared(inside[0], inside[1], order, **limits)  # type: ignore[arg-type]
        valids = (chosen.first_valid, chosen.second_valid)
        a, b = (
            _places(view, number) * valid[..., None]
            for view, number, valid in zip((first, second), (chosen.first, chosen.second), valids, strict=True)
        )
        return PointPair(a, b, *valids, chosen.pairs)

    def _order(
        self, choice: str, view: View, inside: list[Bool[Tensor, "b k"]], progress: Progress
    ) -> Float[Tensor, "b k"]:
        """Return a number in [0, 1) for each point of the table; points with small numbers are taken first."""
        shape, device = inside[0].shape, inside[0].device
        if choice == "random":
            return torch.rand(shape, generator=progress.generator("points", device), device=device)
        if choice == "strongest":  # tables list the strongest points first
            return torch.arange(shape[1], device=device).expand(shape) / shape[1]
        assert view.points is not None
        sides = [side for side in view.image.shape[3:] if side > 1]
        cell_voxel = (math.prod(sides) / self.max_points) ** (1 / len(sides))
        place = replace(view, displacement=None).to_view(view.points)[:, 0].nan_to_num()  # known beyond the view too
        return grid_order(place, inside[0] + 2 * inside[1], cell_voxel=cell_voxel)

    def _found(self, first: View, second: View, spatial_dims: int) -> PointPair:
        kind = Foerstner if self.match == "geometric" else DifferenceOfGaussians
        detector = self.detector or kind(value_range=(0, 1))
        images = [flat(view.image[:, 0], spatial_dims).float() for view in (first, second)]
        found = [detect(image, max_points=self.max_points, detector=detector) for image in images]
        (a, b), (a_valid, b_valid) = ([f.points.float() for f in found], [f.valid for f in found])
        sides = a.new_tensor(images[0].shape[2:])
        if self.match == "geometric":
            moved = first.to_view(_in_volume(second, b)[:, None])[:, 0, :, :spatial_dims].float()
            cost = torch.cdist(a, moved.nan_to_num(nan=1e6))
            allowed = cost < self.radius_voxel
        elif self.match == "carried":  # sec. 3.3: slices as they are, before augmentation
            placed = [_in_volume(view, points) for view, points in ((first, a), (second, b))]
            looks = [
                descriptors_at(image, _surroundings(view, points, spatial_dims))
                for view, image, points in zip((first, second), images, placed, strict=True)
            ]
            cost = torch.cdist(looks[0], looks[1])
            here, there = (points[..., :spatial_dims] for points in placed)
            allowed = ((here[:, :, None] - there[:, None]) / sides).abs().sum(-1) < self.gate_share
        else:
            cost = torch.cdist(patch_descriptors(images[0], a), patch_descriptors(images[1], b))
            allowed = ((a[:, :, None] - b[:, None]) / sides).abs().sum(-1) < self.gate_share
        pairs = mutual_nearest(cost, allowed, first_valid=a_valid, second_valid=b_valid)
        return PointPair(a, b, a_valid, b_valid, pairs)

    def _filled(self, found: PointPair, views: tuple[View, View], progress: Progress) -> PointPair:
        """Return the points, with random unmatched voxels where a view has fewer than `min_points`."""
        filled, pairs = [], [found.pairs]
        by_view = ((found.first, found.first_valid), (found.second, found.second_valid))
        for column, (view, (points, valid)) in enumerate(zip(views, by_view, strict=True)):
            missing = (self.min_points - valid.sum(1)).clamp(min=0)
            if missing.any():
                image = view.image[:, 0].float().mean(1).flatten(1)
                generator = progress.generator(f"filled {column}", image.device)
                noise = torch.rand(image.shape, generator=generator, device=image.device)
                noise = torch.where(image > image.amin(1, keepdim=True), noise, -1.0)  # voxels of the background last
                drawn = noise.topk(self.min_points, dim=1).indices
                place = torch.unravel_index(drawn, view.image.shape[3:])[: points.shape[2]]  # slices have no z
                extra = torch.stack(place, dim=2).to(points)
                extra_valid = torch.arange(self.min_points, device=drawn.device) < missing[:, None]
                sample, number = extra_valid.nonzero().unbind(1)
                row = torch.full((len(sample), 3), -1, device=sample.device)
                row[:, 0], row[:, 1 + column] = sample, points.shape[1] + number
                pairs.append(row)
                points, valid = torch.cat([points, extra], dim=1), torch.cat([valid, extra_valid], dim=1)
            filled.append((points, valid))
        (a, a_valid), (b, b_valid) = filled
        return PointPair(a, b, a_valid, b_valid, torch.cat(pairs))


def _places(view: View, number: Int64[Tensor, "b n"]) -> Float[Tensor, "b n 3"]:
    """Return where points of the view's table lie in the view; 0 where they have no place there."""
    assert view.points is not None
    points = view.points.gather(2, number[:, None, :, None].expand(-1, -1, -1, 3))
    return view.to_view(points)[:, 0].nan_to_num().float()  # only of the chosen points: displacements are slow


def _in_volume(view: View, points: Float[Tensor, "b n axis"]) -> Float64[Tensor, "b n 3"]:
    """Return where points of a view lie in its volume; those of slices lie in their plane."""
    return view.to_volume(F.pad(points, (0, 3 - points.shape[2]))[:, None])[:, 0]


def _surroundings(view: View, points: Float64[Tensor, "b n 3"], spatial_dims: int) -> Float64[Tensor, "b n voxel axis"]:
    """Return the voxels of the volume around its points, in voxels of the view; those of slices lie in their plane."""
    reach = torch.arange(PATCH_SIDE, device=points.device) - PATCH_SIDE // 2
    offsets = torch.cartesian_prod(*[reach] * spatial_dims)
    around = points[:, :, None] + F.pad(offsets, (0, 3 - spatial_dims))
    placed = view.to_view(around.flatten(1, 2)[:, None])[:, 0].nan_to_num()
    return placed.unflatten(1, around.shape[1:3])[..., :spatial_dims]


def flat(image: Float[Tensor, "b c x y z"], spatial_dims: int) -> Float[Tensor, "b c *spatial"]:
    """Return images for a network of `spatial_dims` axes: slices without their third one.

    Raises:
        ValueError: A network of slices is given thicker images.
    """
    if spatial_dims == 3:
        return image
    if image.shape[-1] != 1:
        raise ValueError(f"a 2D network takes slices, (x, y, 1) voxels; got {tuple(image.shape[2:])}")
    return image[..., 0]


def grid_order(
    place: Float64[Tensor, "b k 3"], kind: Int64[Tensor, "b k"], *, cell_voxel: float
) -> Float[Tensor, "b k"]:
    """Return numbers in [0, 1) that order the first point of each cell first, then the second of each, and so on.

    Args:
        place: Places of the points, in the order that holds within a cell.
        kind: Kind of each point; points of different kinds are in different cells.
        cell_voxel: Side of the cells, in voxels.
    """
    b, number = kind.shape
    sample = torch.arange(b, device=kind.device)[:, None, None].expand(b, number, 1)
    cell = torch.cat([sample, kind[..., None], ((place + 0.5) / cell_voxel).floor().long()], dim=2).flatten(0, 1)
    group = cell.unique(dim=0, return_inverse=True)[1]
    order, count = group.argsort(stable=True), group.bincount()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[group[order]]
    return rank.view(b, number).argsort(dim=1, stable=True).argsort(dim=1) / number
