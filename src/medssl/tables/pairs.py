"""Pair mining: tables of corresponding points of a store's volumes, which an anatomical embedding finds.

Three derivations follow each other. `PairPoints` embeds each volume and keeps the vectors of some of its body points,
`PairMatches` embeds it again and looks up the points of its partners, `PairTable` keeps what scores well. A volume is
therefore embedded twice for any number of partners, and no embedding is ever stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.data.body_points import draw_body_points
from medssl.data.geometry import apply
from medssl.data.randomness import counter_generator
from medssl.data.sampling import NUM_LINKS, linked_cases
from medssl.data.store import VolumeStore
from medssl.extraction.embedder import Embedder
from medssl.inference.device import find_device
from medssl.tables.derived import Table, folder_of, table_of

CALIBRATION_CASES = 64
"""Number of volumes, evenly spread over the store, with the matches that give the median score."""


@dataclass(frozen=True, kw_only=True)
class PairPoints:
    """Body points of each case and their vectors.

    Table: `points_mm` (n, 3), and `descriptors` (n, 2, e) float16, the fine and the coarse vector.

    Args:
        weights: File of the embedding.
        layout: Layout of a published file.
        num_candidates: Number of points per case.
        low_hu: Points of CT lie in voxels above this value.
        margin_voxel: Least distance of points from the faces of the volume, at most a quarter of a side.
        device: Device of the embedding: "auto", "cpu" or "cuda".
        tile_voxel: Number of slices along z per call of the network, for less memory; None for all.
        allow_modules: Packages that a file may name networks of.
    """

    weights: str | None
    layout: str | None = None
    num_candidates: int = 256
    low_hu: float = -125.0
    margin_voxel: int = 10
    device: str = "cpu"
    tile_voxel: int | None = None
    allow_modules: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.weights is None:
            raise ValueError("weights is missing; give the file of an anatomical embedding, weights=PATH")
        if self.num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {self.num_candidates}")
        if not Path(self.weights).expanduser().is_file():
            raise ValueError(f"there is no weight file {self.weights}")
        find_device(self.device)

    @property
    def name(self) -> str:
        """The name `pair_points`."""
        return "pair_points"

    def recipe(self) -> dict[str, Any]:
        """Return the content of the weight file, and the settings by which points are drawn."""
        return {
            "weights": self.digest,
            "layout": self.layout,
            "num_candidates": self.num_candidates,
            "low_hu": self.low_hu,
            "margin_voxel": self.margin_voxel,
        }

    @cached_property
    def digest(self) -> str:
        """The digest of the content of the weight file."""
        assert self.weights is not None
        path = Path(self.weights).expanduser()
        return _digest(path, path.stat().st_mtime_ns)

    @property
    def embedder(self) -> Embedder:
        """The embedding, loaded once per process."""
        path, device = str(Path(str(self.weights)).expanduser()), find_device(self.device).type
        return _embedder(path, self.digest, self.layout, device, self.tile_voxel, tuple(self.allow_modules))

    def check(self) -> None:
        """Load the network now, so that an unusable file is refused before processes start and volumes are read.

        Raises:
            ValueError: The file cannot be loaded, or holds no embedding.
        """
        _ = self.embedder

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the points and their vectors."""
        record = store.record(case)
        rng = counter_generator("pair points", record.case)
        voxels = draw_body_points(
            store, case, self.num_candidates, rng=rng, low_hu=self.low_hu, margin_voxel=self.margin_voxel
        )
        points_mm = apply(record.volume_to_mm, voxels)
        embedding = self.embedder.of_case(store, case)
        descriptors = embedding.descriptors(embedding.cells(points_mm))
        return {"points_mm": points_mm, "descriptors": descriptors.half().cpu().numpy()}

    def quality(self, table: Table) -> dict[str, float]:
        """Return the number of points."""
        return {"points": float(len(table["points_mm"]))}


@dataclass(frozen=True, kw_only=True)
class PairMatches:
    """The places of the partners' points in each case, which is the key.

    Table: `partner` (p) numbers of cases, `key_mm` (p, n, 3), `score` (p, n), NaN where a partner has fewer points;
    with `keep_descriptors` also `descriptors` (p, n, 2, e) float16, the vectors found.
    """

    points: PairPoints
    num_links: int = NUM_LINKS
    keep_descriptors: bool = False

    @property
    def name(self) -> str:
        """The name `pair_matches`."""
        return "pair_matches"

    def recipe(self) -> dict[str, Any]:
        """Return the recipe of the points, and the rule of the partners."""
        return {**self.points.recipe(), "num_links": self.num_links, "keep_descriptors": self.keep_descriptors}

    def needs(self) -> Sequence[PairPoints]:
        """Return the derivation of the points."""
        return [self.points]

    def rests_on(self, store: VolumeStore, case: int) -> Sequence[int]:
        """Return the partners of the case."""
        return partners_of(store, case, self.num_links)

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the matches of all partners."""
        partners, num = partners_of(store, case, self.num_links), self.points.num_candidates
        embedding = self.points.embedder.of_case(store, case)
        key_mm, score = np.full((len(partners), num, 3), np.nan), np.full((len(partners), num), np.nan, np.float32)
        found = np.zeros((len(partners), num, 2, len(embedding.fine)), np.float16)
        for row, partner in enumerate(partners):
            descriptors = torch.from_numpy(table_of(store, self.points, partner)["descriptors"]).float()
            cells, scores = embedding.search(descriptors)
            key_mm[row, : len(cells)], score[row, : len(cells)] = embedding.to_mm(cells), scores
            if self.keep_descriptors:
                found[row, : len(cells)] = embedding.descriptors(cells).half().cpu().numpy()
        table = {"partner": np.array(partners, dtype=np.int64), "key_mm": key_mm, "score": score}
        return {**table, "descriptors": found} if self.keep_descriptors else table

    def quality(self, table: Table) -> dict[str, float]:
        """Return the mean score."""
        return {"score": _mean(table["score"][np.isfinite(table["score"])])}


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Pairs of points of each case, as the query, with its partners, for `TableMatcher` to draw from.

    Table: `partner` (p) names of cases, `first` (p + 1) the row where each begins, `query_mm`, `key_mm` (row, 3) RAS,
    `score` (row), `threshold`. A partner without a good match keeps its best one.

    Args:
        points: Derivation that embeds volumes and draws points.
        num_points: Largest number of pairs that are kept for a partner.
        num_links: Number of links. Partners are the cases 1, 2, 4, ... 2^(num_links - 1) places before and after in the
            store.
        score_threshold: Value that the scores of pairs exceed. "auto" takes the median over random matches between
            volumes, because scores of different networks cannot be compared.
        cycle_mm: Distance within which a point matched forth and back returns to itself; None does not check. The check
            costs a third embedding of each volume.
    """

    points: PairPoints
    num_points: int = 64
    num_links: int = NUM_LINKS
    score_threshold: float | str = "auto"
    cycle_mm: float | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if isinstance(self.score_threshold, str) and self.score_threshold != "auto":
            raise ValueError(f"score_threshold must be auto or a number, got {self.score_threshold!r}")
        if not 1 <= self.num_points <= self.points.num_candidates or self.num_links < 1:
            raise ValueError(
                f"num_points={self.num_points} must lie between 1 and num_candidates={self.points.num_candidates}, and "
                f"num_links={self.num_links} must be at least 1"
            )
        if self.cycle_mm is not None and self.cycle_mm <= 0:
            raise ValueError(f"cycle_mm must be positive or null, got {self.cycle_mm}")

    @property
    def name(self) -> str:
        """The name `pairs`."""
        return "pairs"

    def check(self) -> None:
        """Load the network of the points now, so that an unusable file is refused early."""
        self.points.check()

    @property
    def matches(self) -> PairMatches:
        """The derivation of the matches, which comes before this one."""
        return PairMatches(points=self.points, num_links=self.num_links, keep_descriptors=self.cycle_mm is not None)

    def recipe(self) -> dict[str, Any]:
        """Return the recipe of the matches, and the settings by which some are kept."""
        kept = {"num_points": self.num_points, "score_threshold": self.score_threshold, "cycle_mm": self.cycle_mm}
        return {**self.matches.recipe(), **kept}

    def needs(self) -> Sequence[PairMatches]:
        """Return the derivation of the matches."""
        return [self.matches]

    def rests_on(self, store: VolumeStore, case: int) -> Sequence[int]:
        """Return the partners, and the cases with the matches that give the median score."""
        cases = set(partners_of(store, case, self.num_links))
        if self.score_threshold == "auto":
            for number in _calibration_cases(store):
                cases |= {number, *partners_of(store, number, self.num_links)}
        return sorted(cases)

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the pairs of a case with all its partners."""
        threshold = self.threshold(store)
        points_mm = table_of(store, self.points, case)["points_mm"]
        partners = partners_of(store, case, self.num_links)
        embedding = self.points.embedder.of_case(store, case) if self.cycle_mm is not None else None
        rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for partner in partners:
            table = table_of(store, self.matches, partner)
            row = table["partner"].tolist().index(case)
            key_mm, score = table["key_mm"][row, : len(points_mm)], table["score"][row, : len(points_mm)]
            good = score > threshold
            if embedding is not None:
                found = torch.from_numpy(table["descriptors"][row, : len(points_mm)]).float()
                back_mm = embedding.to_mm(embedding.search(found)[0])
                good &= np.linalg.norm(back_mm - points_mm, axis=1) <= self.cycle_mm
            kept = np.flatnonzero(good)[: self.num_points] if good.any() else [int(score.argmax())]
            rows.append((points_mm[kept], key_mm[kept], score[kept]))
        nothing = (np.empty((0, 3)), np.empty((0, 3)), np.empty(0, np.float32))  # a store of one case
        query_mm, key_mm, score = (np.concatenate(columns) for columns in zip(nothing, *rows, strict=True))
        return {
            "partner": np.array([store.record(partner).case for partner in partners], dtype=np.str_),
            "first": np.cumsum([0, *(len(scores) for _, _, scores in rows)]),
            "query_mm": query_mm,
            "key_mm": key_mm,
            "score": score,
            "threshold": np.array(threshold),
        }

    def threshold(self, store: VolumeStore) -> float:
        """Return the score that pairs have to exceed."""
        if not isinstance(self.score_threshold, str):
            return self.score_threshold
        folder = folder_of(store.root, self.matches)
        files = [folder / f"{store.record(number).case}.npz" for number in _calibration_cases(store)]
        return _median_score(tuple((file, file.stat().st_mtime_ns) for file in files))

    def quality(self, table: Table) -> dict[str, float]:
        """Return the numbers of partners and pairs, mean score, share above the threshold, and the threshold."""
        above = table["score"] > table["threshold"]
        return {
            "partners": float(len(table["partner"])),
            "pairs": float(len(above)),
            "score": _mean(table["score"]),
            "above": _mean(above),
            "threshold": float(table["threshold"]),
        }


def partners_of(store: VolumeStore, case: int, num_links: int) -> list[int]:
    """Return the cases of a store that a case is matched with."""
    return [other for other in linked_cases(case, num_links) if other < len(store)]


def _calibration_cases(store: VolumeStore) -> list[int]:
    num = min(len(store), CALIBRATION_CASES)
    return [number * len(store) // num for number in range(num)]


@lru_cache(maxsize=4)
def _median_score(files: tuple[tuple[Path, int], ...]) -> float:
    """Return the median score of tables of matches, given with their file times; -1 where they hold none."""
    found = []
    for file, _ in files:
        with np.load(file) as table:
            found.append(table["score"].ravel())
    scores = np.concatenate(found)
    scores = scores[np.isfinite(scores)]
    return float(np.median(scores)) if len(scores) else -1.0


@lru_cache(maxsize=1)
def _embedder(
    path: str, digest: str, layout: str | None, device: str, tile_voxel: int | None, allow_modules: tuple[str, ...]
) -> Embedder:
    return Embedder.load(path, layout=layout, device=device, tile_voxel=tile_voxel, allow_modules=allow_modules)


@lru_cache(maxsize=4)
def _digest(path: Path, modified: int) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
