"""The position rule of KAF and MACL: which views of a batch are positives by position, and which are compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from medssl.checks import choice
from medssl.data.views import View, apply_each
from medssl.ops.gather import gather_ranks

AXES = ("x", "y", "z")
FRAMES = ("volume", "body", "mm", "external", "reachable")
NORMS = ("linf", "l2", "overlap")
CROSS_GROUP = ("ignore", "negative", "compare")
SMALL_BATCH = 16
"""Samples of a process below which those of the other processes are gathered by default."""


@dataclass(frozen=True)
class Positions:
    """Positions of crops before augmentation, with what is needed to compare them.

    Args:
        center_voxel: Middles of the crops, in voxels of their volumes.
        volume_shape: Voxels of the volumes along each axis.
        volume_to_mm: Affine from volume voxels to RAS mm.
        body: Middles of the crops in the body box, 0 to 1.
        heights: Rows (volume voxel, score) of each case's table of heights; None where the views carry none.
        crop_body: Lower and upper faces of the crops in the body box; None where they are unknown.
    """

    center_voxel: Float64[Tensor, "b 3"]
    volume_shape: Int64[Tensor, "b 3"]
    volume_to_mm: Float64[Tensor, "b 4 4"]
    body: Float64[Tensor, "b 3"]
    heights: Float64[Tensor, "b row 4"] | None = None
    crop_body: Float64[Tensor, "b 2 3"] | None = None

    @classmethod
    def of_view(cls, view: View) -> "Positions":
        """Return the positions of the first view of each sample, which no spatial augmentation has moved."""
        heights = None
        if view.points is not None and view.point_features is not None:
            heights = torch.cat([view.points[:, 0], view.point_features[:, 0, :, :1].double()], dim=-1)
        return cls(
            view.center_volume()[:, 0],
            view.volume_shape[:, 0],
            view.volume_to_mm[:, 0],
            view.location_body[:, 0],
            heights,
            None if view.crop_body is None else view.crop_body[:, 0],
        )

    def along(self, frame: str) -> Float64[Tensor, "b 3"]:
        """Return positions along x, y, z in a frame, see `PositionRule`."""
        if frame == "volume":
            return (self.center_voxel + 1) / self.volume_shape
        if frame == "mm":
            return apply_each(self.volume_to_mm, self.center_voxel[:, None])[:, 0]
        if frame == "body":
            return self.body
        if frame == "reachable":
            return reachable(*self.faces().unbind(1))
        if self.heights is None:
            raise ValueError(
                "frame external needs heights: derive what=heights, and state points: heights for the views"
            )
        table = torch.stack(
            [apply_each(self.volume_to_mm, self.heights[..., :3])[..., 2], self.heights[..., 3]], dim=-1
        )
        score = height_score(table, apply_each(self.volume_to_mm, self.center_voxel[:, None])[:, 0, 2])
        return torch.cat([self.body[:, :2], score[:, None]], dim=1)

    def faces(self) -> Float64[Tensor, "b 2 3"]:
        """Return the lower and upper faces of the crops in the body box.

        Raises:
            ValueError: The faces are unknown.
        """
        if self.crop_body is None:
            raise ValueError(
                "positions need the faces of crops in the body, but the views do not know theirs; make them with "
                "crop_body, or compare their middles: frame body and norm linf"
            )
        return self.crop_body


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """Rule that two views are positives where their positions differ by less than a threshold.

    Args:
        axes: Axes that are compared.
        frame: Frame of the positions. `volume` counts voxels, (centre + 1) / sides, so that a single slice i of N has
            (i + 1) / N. `body` runs from face to face of the body box. `mm` is the RAS position. `external` has the
            score of a table of heights along z (`derive what=heights`) and the body box along x and y. `reachable` runs
            from the first to the last place that a crop of its size can have in the body box, see `reachable`.
        threshold: Threshold in the unit of the frame, one number or one for each axis.
        norm: `linf`: below the threshold along each axis. `l2`: inside the ellipsoid with these half axes. `overlap`:
            crops share more than the threshold of their union, in the frame `body`.
        cross_group: Views of different cohorts are not compared (`ignore`), never positives (`negative`), or compared
            like all others (`compare`).
        negative_threshold: Views this far apart or farther are negatives; for `overlap`, crops that share no more than
            this. Views between both thresholds are not compared. None: all that are no positives are negatives.

    Source: arXiv:2106.09157, section 2.2; arXiv:2309.11876, section III; one axis of `volume` and `linf` is repository
        stevezs315/MACL, loss/contrast_loss.py.
    """

    axes: Sequence[str] = AXES
    frame: str = "body"
    threshold: float | Sequence[float] = 0.1
    norm: str = "linf"
    cross_group: str = "ignore"
    negative_threshold: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the options and the thresholds."""
        for name, value, allowed in (
            ("frame", self.frame, FRAMES),
            ("norm", self.norm, NORMS),
            ("cross_group", self.cross_group, CROSS_GROUP),
        ):
            choice(f"positions: {name}", value, allowed)
        if not self.axes or not set(self.axes) <= set(AXES) or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"positions: axes must be some of x, y, z, got {list(self.axes)}")
        if self.norm == "overlap" and self.frame != "body":
            raise ValueError(f"positions: norm overlap compares crops in the frame body, got {self.frame}")
        thresholds = _numbers(self.threshold)
        counts = {1} if self.norm == "overlap" else {1, len(self.axes)}
        if len(thresholds) not in counts or min(thresholds) <= 0:
            raise ValueError(
                f"positions: threshold must be positive, one number or one for each of the axes {list(self.axes)}; "
                f"got {self.threshold}"
            )
        if self.negative_threshold is None:
            return
        bounds, side = _numbers(self.negative_threshold), "below" if self.norm == "overlap" else "above"
        if len(bounds) != len(thresholds) or any(
            b >= t if side == "below" else b <= t for b, t in zip(bounds, thresholds, strict=True)
        ):
            raise ValueError(
                f"negative_threshold={self.negative_threshold} must lie {side} threshold={self.threshold} for the norm "
                f"{self.norm}, number by number"
            )

    def __call__(self, *views: View, gather: bool = False) -> tuple[Bool[Tensor, "row row"], Bool[Tensor, "row row"]]:
        """Return positives and compared pairs of the samples, one view after the other; a sample is both of itself.

        With `gather` they are the samples of all ranks, for each view those of rank 0 first; every rank must call it.
        """
        positions, groups = [], []
        for view in views:
            position, group = self.positions(Positions.of_view(view)), view.group[:, 0]
            positions.append(gather_ranks(position) if gather else position)
            groups.append(gather_ranks(group) if gather else group)
        return self.masks(torch.cat(positions), torch.cat(groups))

    def positions(self, places: Positions) -> Float64[Tensor, "b number"]:
        """Return positions along the rule's axes; for the norm `overlap` all lower faces, then all upper ones.

        Raises:
            ValueError: A position is not finite, so that its crop would not even be a positive of itself.
        """
        columns = [AXES.index(axis) for axis in self.axes]
        if self.norm == "overlap":
            position = places.faces()[:, :, columns].flatten(1)
        else:
            position = places.along(self.frame)[:, columns]
        finite = position.isfinite().all(1)
        if not finite.all():
            samples = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"positions in the frame {self.frame} are not finite for samples {samples} of the batch; look at the "
                "affines of the volumes, and at their heights for the frame external"
            )
        return position

    def masks(
        self, position: Float64[Tensor, "b number"], group: Int64[Tensor, " b"]
    ) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return positives and compared pairs of given positions and cohorts."""
        eligible, compared = self.allowed(group[:, None] == group)
        positive = self._near(position, self.threshold) & eligible
        if self.negative_threshold is not None:
            compared = compared & (positive | ~self._near(position, self.negative_threshold))
        return positive, compared

    def _near(self, position: Float64[Tensor, "b number"], threshold: float | Sequence[float]) -> Bool[Tensor, "b b"]:
        if self.norm == "overlap":
            lower, upper = position.chunk(2, dim=1)
            return overlapping_boxes(lower, upper, threshold=_numbers(threshold)[0])
        return near_positions(position, threshold=threshold, norm=self.norm)

    def allowed(self, same: Bool[Tensor, "*pair"]) -> tuple[Bool[Tensor, "*pair"], Bool[Tensor, "*pair"]]:
        """Return which pairs can be positives and which are compared, given which are of the `same` cohort."""
        everything = torch.ones_like(same)
        if self.cross_group == "ignore":
            return same, same
        return (same if self.cross_group == "negative" else everything), everything

    def distance(
        self, position: Float64[Tensor, "*pair axis"], other: Float64[Tensor, "*pair axis"]
    ) -> Float64[Tensor, "*pair"]:
        """Return the distance of positions by the norm, all axes alike: pairs below t are near at the threshold t.

        Raises:
            ValueError: The norm is `overlap`, which has no distance.
        """
        if self.norm == "overlap":
            raise ValueError("threshold: auto measures distances, which norm overlap does not have; state a number")
        apart = (position - other).abs()
        return apart.amax(-1) if self.norm == "linf" else apart.norm(dim=-1)


def near_positions(
    position: Float64[Tensor, "row axis"], *, threshold: float | Sequence[float], norm: str = "linf"
) -> Bool[Tensor, "row row"]:
    """Return which rows lie closer than `threshold` to each other, strictly; a row is near itself.

    Args:
        position: Positions along each axis that is compared.
        threshold: Threshold in the unit of the positions, one number or one for each axis.
        norm: `linf`: below the threshold along each axis. `l2`: inside the ellipsoid with these half axes.

    Raises:
        ValueError: `position` is no table of rows, or `norm` is neither of these.

    Source: arXiv:2106.09157, section 2.2.
    """
    if position.ndim != 2:
        raise ValueError(
            f"position has the shape {tuple(position.shape)}, wanted are rows of coordinates, (row, axis); give "
            "position[:, None] where there is one axis"
        )
    choice("norm", norm, ("linf", "l2"))
    limit = torch.as_tensor(threshold, dtype=torch.float64, device=position.device)
    apart = (position[:, None] - position[None]).abs()
    return (apart < limit).all(-1) if norm == "linf" else (apart / limit).square().sum(-1) < 1


def overlapping_boxes(
    lower: Float64[Tensor, "row axis"], upper: Float64[Tensor, "row axis"], *, threshold: float
) -> Bool[Tensor, "row row"]:
    """Return which boxes share more than `threshold` of their union; a box shares all with itself."""
    inner = (torch.minimum(upper[:, None], upper) - torch.maximum(lower[:, None], lower)).clamp(min=0).prod(-1)
    volume = (upper - lower).prod(-1)
    return inner / (volume[:, None] + volume - inner) > threshold


def reachable(lower: Float64[Tensor, "row 3"], upper: Float64[Tensor, "row 3"]) -> Float64[Tensor, "row 3"]:
    """Return positions of crops with these faces, so that the places a crop of its size can have run from 0 to 1.

    A crop as large as the body has only one place, the middle.
    """
    free = 1 - (upper - lower)
    return torch.where(free > 1e-6, (lower / free.clamp(min=1e-6)).clamp(0, 1), 0.5)


def is_gathered(gather: bool | None, num_samples: int) -> bool:
    """Return whether samples of all processes are compared; None compares them where `num_samples` is small."""
    return num_samples < SMALL_BATCH if gather is None else gather


def height_score(table: Float64[Tensor, "b row 2"], z_mm: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """Return the score at a height of each sample: linear between the rows (z_mm, score), which rise from row to row.

    Below the first and above the last row it continues with the mean slope of the table. Last rows may be repeated.
    """
    height, score = table.unbind(-1)
    after = torch.searchsorted(height.contiguous(), z_mm[:, None].contiguous()).clamp(1, height.shape[1] - 1)
    low, high = height.gather(1, after - 1)[:, 0], height.gather(1, after)[:, 0]
    from_score, to_score = score.gather(1, after - 1)[:, 0], score.gather(1, after)[:, 0]
    share = ((z_mm - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
    slope = (score[:, -1] - score[:, 0]) / (height[:, -1] - height[:, 0])
    beyond = (z_mm - height[:, -1]).clamp(min=0) + (z_mm - height[:, 0]).clamp(max=0)
    return from_score + share * (to_score - from_score) + slope * beyond


def _numbers(threshold: float | Sequence[float]) -> list[float]:
    return [threshold] if isinstance(threshold, int | float) else list(threshold)
