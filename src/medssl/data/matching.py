"""Matched crops of two cases, and the matchers that propose corresponding points."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from medssl.data.placements import ViewSpec
from medssl.data.scene import Placement, Scene


@runtime_checkable
class Matcher(Protocol):
    """Proposes corresponding points of a request's two cases; it may be asked again."""

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """A point of the first case, its counterpart in the second (both RAS mm), and a score: higher is better."""


class BodyCoordinateMatcher:
    """Pairs points of one body coordinate: a random body voxel of the first case and its place in the second's box.

    The score falls from 1 as the counterpart lies farther from the second case's body: 1 / (1 + distance / `scale_mm`).
    """

    def __init__(self, *, scale_mm: float = 10.0) -> None:
        self.scale_mm = scale_mm

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """See `Matcher`."""
        (first, second), points = scene.records[:2], [scene.points(slot) for slot in (0, 1)]
        bodies = [p[p[:, 3] == -1, :3].astype(np.float64) for p in points]
        point = bodies[0][rng.integers(len(bodies[0]))]
        counterpart = second.body.to_volume(first.body.to_body(point))
        distance = np.linalg.norm((bodies[1] - counterpart) * np.array(second.spacing_mm), axis=1).min()
        to_mm = [r.volume_to_mm for r in (first, second)]
        in_mm = [m[:3, :3] @ p + m[:3, 3] for m, p in zip(to_mm, (point, counterpart), strict=True)]
        return in_mm[0], in_mm[1], float(1 / (1 + distance / self.scale_mm))


class SelfMatcher:
    """Gives a random body point of a case as its own counterpart, with score 1: for two crops of one place.

    It wants requests of a case and itself: sampler `Pairs(partner="self")`.
    """

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """See `Matcher`."""
        if len(set(scene.request.cases)) != 1:
            raise ValueError("SelfMatcher matches a case with itself; use sampler Pairs with partner=self")
        points = scene.points()
        bodies = points[points[:, 3] == -1, :3].astype(np.float64)
        to_mm = scene.record(0).volume_to_mm
        point_mm = to_mm[:3, :3] @ bodies[rng.integers(len(bodies))] + to_mm[:3, 3]
        return point_mm, point_mm, 1.0


class TableMatcher:
    """Draws from the pairs of points that `python -m medssl.derive what=pairs` found, for two cases that it matched.

    It wants the partners that the table knows: sampler `Pairs(partner="linked")` with the `num_links` of the table. A
    case that has no partner is matched with itself.

    Args:
        table: name of the derived table: `partner` (p) names of cases, `first` (p + 1) the row where each begins,
            `query_mm`, `key_mm` (row, 3) and `score` (row).
    """

    def __init__(self, *, table: str = "pairs") -> None:
        self.table = table

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """See `Matcher`."""
        query, key = scene.record(0).case, scene.record(1).case
        if query == key:
            return SelfMatcher().propose(scene, rng)
        table = scene.derived(self.table)
        found = np.flatnonzero(table["partner"] == key)
        if not len(found):
            raise ValueError(
                f"the table {self.table!r} of {query} knows no pairs with {key}; use sampler Pairs with partner=linked "
                f"and the table's num_links, and derive what={self.table} again where the store has changed"
            )
        first, last = table["first"][found[0] : found[0] + 2]
        row = rng.integers(first, last)
        return table["query_mm"][row], table["key_mm"][row], float(table["score"][row])


@dataclass(frozen=True, kw_only=True)
class Matched(ViewSpec):
    """Two crops about corresponding points of two cases: the query, then the key (`count` is 2).

    Along axes at native spacing the voxel nearest to the point is number `size // 2` of the crop.

    Args:
        matcher: proposes pairs of points.
        score_threshold: a proposal is taken once its score exceeds this.
        tries: proposals before giving up.
        on_fail: what is taken then: the "best" or the "last" proposal.
    """

    matcher: Matcher = field(default_factory=BodyCoordinateMatcher)
    score_threshold: float = 0.0
    tries: int = 101
    on_fail: str = "best"
    count: int = 2

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.on_fail not in ("best", "last"):
            raise ValueError(f"Matched: on_fail must be best or last, got {self.on_fail!r}")
        if self.tries < 1:
            raise ValueError(f"Matched: tries must be at least 1, got {self.tries}")

    def place(self, scene: Scene, placed: dict[str, list[Placement]], rng: np.random.Generator) -> list[Placement]:
        """Query and key."""
        if len(scene.records) != 2 or self.count != 2:
            raise ValueError(
                f"Matched places 2 views in 2 cases, got count {self.count} and {len(scene.records)}; use sampler Pairs"
            )
        chosen = self.matcher.propose(scene, rng)
        for _ in range(self.tries - 1):
            if chosen[2] > self.score_threshold:
                break
            proposal = self.matcher.propose(scene, rng)
            chosen = proposal if self.on_fail == "last" or proposal[2] >= chosen[2] else chosen
        placements = []
        for slot, point_mm in enumerate(chosen[:2]):
            record = scene.record(slot)
            step, sides = self.step_voxel(record), np.array(self.size)
            center = record.mm_to_volume[:3, :3] @ point_mm + record.mm_to_volume[:3, 3]
            center = center - np.where((step == 1) & (sides % 2 == 0), 0.5, 0.0)
            placements.append(Placement(slot, self.frame(center, step)))
        return placements
