"""Pair mining while training: whole embeddings on disk, and a matcher that searches them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.data.derived import Table, table_of
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.inference.embedding import Embedding, match_points
from medssl.inference.pairs import PairPoints


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The embedding of each case in half precision: megabytes a case, up to hundreds for a whole trunk.

    Table: `fine` (e, i, j, k) and `coarse` (e, a, b, c) float16, `cell_to_mm`, `volume_to_mm` (4, 4), `volume_shape`,
    `points_mm` (n, 3) body points.
    """

    points: PairPoints

    @property
    def name(self) -> str:
        """`embeddings`."""
        return "embeddings"

    def recipe(self) -> dict[str, Any]:
        """That of the points."""
        return self.points.recipe()

    def needs(self) -> Sequence[PairPoints]:
        """The points."""
        return [self.points]

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Embedding and points."""
        embedding = self.points.embedder.of_case(store, case).half()
        return {
            "fine": embedding.fine.cpu().numpy(),
            "coarse": embedding.coarse.cpu().numpy(),
            "cell_to_mm": embedding.cell_to_mm,
            "volume_to_mm": embedding.volume_to_mm,
            "volume_shape": np.array(embedding.volume_shape),
            "points_mm": table_of(store, self.points, case)["points_mm"],
        }

    def quality(self, table: Table) -> dict[str, float]:
        """Number of body points."""
        return {"points": float(len(table["points_mm"]))}


class OnlineMatcher:
    """Searches for a random body point of the first case in the second, for any two cases of the store.

    Every proposal costs a search through an embedding; `TableMatcher` has done that before. The scores of published
    SAM weights mean something above 0.7, those of others what `derive what=pairs` prints as threshold.

    Args:
        table: name of the table that `python -m medssl.derive what=embeddings` made.
        num_cached: embeddings that are kept in memory.
    """

    def __init__(self, *, table: str = "embeddings", num_cached: int = 8) -> None:
        if num_cached < 2:
            raise ValueError(f"OnlineMatcher: num_cached must be at least 2, query and key; got {num_cached}")
        self.table = table
        self.load = lru_cache(maxsize=num_cached)(_load)

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """See `Matcher`."""
        query_case, key_case = scene.request.cases[:2]
        query, points_mm = self.load(scene.store.derived_file(self.table, query_case))
        key, _ = self.load(scene.store.derived_file(self.table, key_case))
        point_mm = points_mm[rng.integers(len(points_mm))]
        found_mm, scores = match_points(query, point_mm[None], key)
        return point_mm, found_mm[0], float(scores[0])


def _load(file: Path) -> tuple[Embedding, np.ndarray]:
    with np.load(file) as table:
        x, y, z = table["volume_shape"].tolist()
        fine, coarse = torch.from_numpy(table["fine"]), torch.from_numpy(table["coarse"])
        return Embedding(fine, coarse, table["cell_to_mm"], table["volume_to_mm"], (x, y, z)), table["points_mm"]
