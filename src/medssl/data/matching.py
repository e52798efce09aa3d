"""Matched crops of two cases, and the matchers that propose corresponding points."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from medssl.data.body_points import draw_body_point
from medssl.data.geometry import apply
from medssl.data.placements import ViewSpec
from medssl.data.scene import Placement, Scene
from medssl.data.store import Record

ON_FAIL = ("best", "last")


@runtime_checkable
class Matcher(Protocol):
    """A matcher, which proposes corresponding points of a request's two cases, as often as it is asked.

    With a method `auto_threshold(scene)` it gives the threshold for `Matched(score_threshold="auto")`.
    """

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a point of the first case, its counterpart in the second (both RAS mm), and a score (high is good)."""


class BodyCoordinateMatcher:
    """Pair points of one body coordinate: a random body voxel of the first case and its place in the second's box.

    The score falls from 1 as the counterpart lies farther from the second case's body: 1 / (1 + distance / `scale_mm`).

    Args:
        scale_mm: Distance at which the score is one half.
        low_hu: Points of CT lie in voxels above this value, where the body has any. None takes any body voxel.
        margin_voxel: Least distance of points from the faces of the first volume, at most a quarter of a side.
    """

    def __init__(self, *, scale_mm: float = 10.0, low_hu: float | None = None, margin_voxel: float = 0) -> None:
        if scale_mm <= 0:
            raise ValueError(f"BodyCoordinateMatcher: scale_mm must be positive, got {scale_mm}")
        _check_bounds("BodyCoordinateMatcher", margin_voxel)
        self.scale_mm, self.low_hu, self.margin_voxel = scale_mm, low_hu, margin_voxel

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a pair of points (RAS mm) and its score."""
        (first, second), case = scene.records[:2], scene.request.cases[0]
        point = draw_body_point(scene.store, case, rng=rng, low_hu=self.low_hu, margin_voxel=self.margin_voxel)
        counterpart = second.body.to_volume(first.body.to_body(point))
        points = scene.points(1)
        body = points[points[:, 3] == -1, :3].astype(np.float64)
        distance = np.linalg.norm((body - counterpart) * np.array(second.spacing_mm), axis=1).min()
        to_mm = [r.volume_to_mm for r in (first, second)]
        in_mm = [apply(m, p) for m, p in zip(to_mm, (point, counterpart), strict=True)]
        return in_mm[0], in_mm[1], float(1 / (1 + distance / self.scale_mm))


class SelfMatcher:
    """Return a random body point of a case as its own counterpart, with score 1: for two crops of one place.

    It needs requests that pair a case with itself: sampler `Pairs(partner="self")`.

    Args:
        low_hu: Same as in `BodyCoordinateMatcher`.
        margin_voxel: Same as in `BodyCoordinateMatcher`.
    """

    def __init__(self, *, low_hu: float | None = None, margin_voxel: float = 0) -> None:
        _check_bounds("SelfMatcher", margin_voxel)
        self.low_hu, self.margin_voxel = low_hu, margin_voxel

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a pair of points (RAS mm) and its score."""
        if len(set(scene.request.cases)) != 1:
            raise ValueError("SelfMatcher matches a case with itself; use sampler Pairs with partner=self")
        case, to_mm = scene.request.cases[0], scene.record(0).volume_to_mm
        point = draw_body_point(scene.store, case, rng=rng, low_hu=self.low_hu, margin_voxel=self.margin_voxel)
        point_mm = apply(to_mm, point)
        return point_mm, point_mm, 1.0


class TableMatcher:
    """Draw from the pairs of points that `python -m medssl.derive what=pairs` found for two matched cases.

    It needs the partners that the table knows: sampler `Pairs(partner="linked")` with the `num_links` of the table. A
    case that has no partner is matched with itself.

    Args:
        table: Name of the derived table. It holds `partner` (p), the names of cases, `first` (p + 1), the row where
            each begins, `query_mm` and `key_mm` (row, 3), and `score` (row).
    """

    def __init__(self, *, table: str = "pairs") -> None:
        self.table = table

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a pair of points (RAS mm) and its score."""
        query, key = scene.record(0).case, scene.record(1).case
        if query == key:
            return SelfMatcher().propose(scene, rng)
        table = scene.derived(self.table)
        found = np.flatnonzero(table["partner"] == key)
        if not len(found):
            raise ValueError(
                f"the table {self.table!r} of {query} knows no pairs with {key}; use sampler Pairs with partner=linked "
                f"and the table's num_links, and run `python -m medssl.derive what={self.table} weights=FILE "
                f"store={scene.store.root}` again where the store has changed"
            )
        first, last = table["first"][found[0] : found[0] + 2]
        row = rng.integers(first, last)
        return table["query_mm"][row], table["key_mm"][row], float(table["score"][row])


@dataclass(frozen=True, kw_only=True)
class Matched(ViewSpec):
    """Two crops about corresponding points of two cases: the query, then the key (`count` is 2).

    Along axes at native spacing the voxel nearest to the point is number `size // 2` of the crop. A point beyond the
    volume moves to its nearest voxel, and is refused where it lies more than half a crop away from it.

    Args:
        matcher: Matcher that proposes pairs of points.
        score_threshold: A proposal is taken once its score exceeds this value. "auto" asks the matcher (`OnlineMatcher`
            knows the median score of random matches).
        tries: Number of proposals before giving up.
        on_fail: Proposal that is taken after that: the "best" or the "last" one.
    """

    matcher: Matcher = field(default_factory=BodyCoordinateMatcher)
    score_threshold: float | str = 0.0
    tries: int = 101
    on_fail: str = "best"
    count: int = 2

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        who, threshold = type(self.matcher).__name__, self.score_threshold
        if self.on_fail not in ON_FAIL:
            raise ValueError(f"Matched: on_fail must be best or last, got {self.on_fail!r}")
        if isinstance(self.tries, bool) or not isinstance(self.tries, int) or self.tries < 1:
            raise ValueError(f"Matched: tries must be a whole number of at least 1, got {self.tries!r}")
        if isinstance(threshold, bool) or (threshold != "auto" and not isinstance(threshold, int | float)):
            raise ValueError(f"Matched: score_threshold must be a number, or auto; got {threshold!r}")
        if threshold == "auto" and not hasattr(self.matcher, "auto_threshold"):
            raise ValueError(
                f"Matched: score_threshold=auto is for OnlineMatcher, {who} knows no scores of random matches; give "
                "a number (0 for a table, which holds selected pairs: its own threshold is what.score_threshold of "
                "derive what=pairs)"
            )

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Return the query and the key."""
        if len(scene.records) != 2 or self.count != 2:
            raise ValueError(
                f"Matched places 2 views in 2 cases, got count {self.count} and {len(scene.records)}; use sampler Pairs"
            )
        threshold = self.score_threshold
        if isinstance(threshold, str):
            threshold = self.matcher.auto_threshold(scene)  # type: ignore[attr-defined]
        chosen = self.matcher.propose(scene, rng)
        for _ in range(self.tries - 1):
            if chosen[2] > threshold:
                break
            proposal = self.matcher.propose(scene, rng)
            chosen = proposal if self.on_fail == "last" or proposal[2] >= chosen[2] else chosen
        return [self._about(scene.record(slot), np.asarray(chosen[slot], np.float64), slot) for slot in (0, 1)]

    def _about(self, record: Record, point_mm: np.ndarray, slot: int) -> Placement:
        step, sides = self.step_voxel(record), np.array(self.size)
        proposed = apply(record.mm_to_volume, point_mm)
        center = np.clip(proposed, 0, np.array(record.shape) - 1)
        if np.any(np.abs(proposed - center) > step * sides / 2) or not np.isfinite(proposed).all():
            point = ", ".join(f"{value:.1f}" for value in point_mm)
            raise ValueError(
                f"{type(self.matcher).__name__} proposes [{point}] for {record.case}, {extent_text(record)}; "
                "points are RAS millimetres in the space of the file, no voxel numbers and no LPS"
            )
        center = center - np.where((step == 1) & (sides % 2 == 0), 0.5, 0.0)
        return Placement(slot, self.frame(center, step))


def extent_text(record: Record) -> str:
    """Return, in words, which millimetres a volume covers."""
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * np.array(record.shape) - 0.5
    in_mm = apply(record.volume_to_mm, corners)
    ranges = [f"{name} {a:.0f} to {b:.0f}" for name, a, b in zip("xyz", in_mm.min(0), in_mm.max(0), strict=True)]
    return f"which covers {', '.join(ranges)} mm (RAS)"


def _check_bounds(who: str, margin_voxel: float) -> None:
    if margin_voxel < 0:
        raise ValueError(f"{who}: margin_voxel must be at least 0, got {margin_voxel}")
