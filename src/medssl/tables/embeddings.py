"""Embeddings of whole cases on disk, and a matcher that searches them for pairs during training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.data.atomic import write_text
from medssl.data.randomness import counter_generator
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.extraction.embedding import VolumeEmbedding, match_points
from medssl.tables.derived import Table, table_of
from medssl.tables.pairs import PairPoints

THRESHOLD_FILE = "threshold.json"
CALIBRATION_PAIRS, POINTS_A_PAIR = 25, 20
"""Number of volume pairs, and of points per pair that are looked up: their 500 scores give the threshold."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """The embedding of each case in half precision: megabytes per case, up to hundreds for a whole trunk.

    Table: `fine` (e, i, j, k) and `coarse` (e, a, b, c) float16, `cell_to_mm`, `volume_to_mm` (4, 4), `volume_shape`,
    `points_mm` (n, 3) body points.
    """

    points: PairPoints

    @property
    def name(self) -> str:
        """The name `embeddings`."""
        return "embeddings"

    def recipe(self) -> dict[str, Any]:
        """Return the recipe of the points."""
        return self.points.recipe()

    def needs(self) -> Sequence[PairPoints]:
        """Return the derivation of the points."""
        return [self.points]

    def check(self) -> None:
        """Load the network of the points now, so that an unusable file is refused early."""
        self.points.check()

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the embedding and the points."""
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
        """Return the number of body points."""
        return {"points": float(len(table["points_mm"]))}

    def report(self, store: VolumeStore, folder: Path) -> str:
        """Return a message with the median score of random matches between volumes, and save it next to the tables."""
        files = [folder / f"{record.case}.npz" for record in store.records()]
        if len(files) < 2:
            return "a store of one volume has no matches between volumes: score_threshold=auto will not work"
        kept = folder / THRESHOLD_FILE
        if not kept.is_file() or kept.stat().st_mtime_ns < max(file.stat().st_mtime_ns for file in files):
            write_text(kept, json.dumps({"median_score": median_score(files)}))
        threshold = json.loads(kept.read_text(encoding="utf-8"))["median_score"]
        return f"median score of random matches {threshold:.4f}: what Matched takes for score_threshold=auto"


class OnlineMatcher:
    """Search for a random body point of the first case in the second, for any two cases of the store.

    Every proposal costs a search through an embedding, which `TableMatcher` avoids. For published SAM weights, scores
    above 0.7 are meaningful. For others `Matched` takes `score_threshold="auto"`, the median score of
    random matches, which `derive what=embeddings` measures.

    Args:
        table: Name of the table that `python -m medssl.derive what=embeddings` made.
        num_cached: Number of embeddings that are kept in memory.
    """

    def __init__(self, *, table: str = "embeddings", num_cached: int = 8) -> None:
        if num_cached < 2:
            raise ValueError(f"OnlineMatcher: num_cached must be at least 2, query and key; got {num_cached}")
        self.table = table
        self.load = lru_cache(maxsize=num_cached)(_load)

    def propose(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
        """Return a pair of points (RAS mm) and its score."""
        query_case, key_case = scene.request.cases[:2]
        query, points_mm = self.load(scene.store.derived_file(self.table, query_case))
        key, _ = self.load(scene.store.derived_file(self.table, key_case))
        point_mm = points_mm[rng.integers(len(points_mm))]
        found_mm, scores = match_points(query, point_mm[None], key)
        return point_mm, found_mm[0], float(scores[0])

    def auto_threshold(self, scene: Scene) -> float:
        """Return the median score of random matches between volumes of the store.

        Raises:
            ValueError: The score has not been measured.
        """
        return _threshold(scene.store.derived_file(self.table, scene.request.cases[0]).parent)


def median_score(files: Sequence[Path]) -> float:
    """Return the median score of random points looked up in other random volumes; equal for equal files."""
    rng = counter_generator("median score", len(files))
    scores = []
    for _ in range(CALIBRATION_PAIRS):
        first, second = rng.choice(len(files), 2, replace=False)
        (query, points_mm), (key, _) = _load(files[first]), _load(files[second])
        drawn = points_mm[rng.permutation(len(points_mm))[:POINTS_A_PAIR]]
        scores.append(match_points(query, drawn, key)[1])
    return float(np.median(np.concatenate(scores)))


@lru_cache(maxsize=4)
def _threshold(folder: Path) -> float:
    file = folder / THRESHOLD_FILE
    if not file.is_file():
        raise ValueError(
            f"score_threshold=auto: there is no {file}; derive what=embeddings weights=FILE again, which measures it "
            "in a store of two volumes or more, or give a number"
        )
    return float(json.loads(file.read_text(encoding="utf-8"))["median_score"])


def _load(file: Path) -> tuple[VolumeEmbedding, np.ndarray]:
    with np.load(file) as table:
        x, y, z = table["volume_shape"].tolist()
        fine, coarse = torch.from_numpy(table["fine"]), torch.from_numpy(table["coarse"])
        return VolumeEmbedding(fine, coarse, table["cell_to_mm"], table["volume_to_mm"], (x, y, z)), table["points_mm"]
