"""Means, intervals and tests over cases and seeds: a table has a row per seed and a column per case; NaN is missing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from medssl.evaluation.results import mean_present

EQUAL = 1e-9
"""Differences up to this are ties: two equal scores may differ in the last digits of their sums."""


@dataclass(frozen=True)
class Interval:
    """A mean with its interval; the bounds are NaN if nothing can be resampled."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Resampling:
    """The bootstrap behind intervals: percentiles of `num_bootstrap` means over resampled cases and seeds."""

    num_bootstrap: int = 10_000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_bootstrap < 100:
            raise ValueError(f"num_bootstrap={self.num_bootstrap} must be at least 100; percentiles need many draws")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence} must lie between 0 and 1, such as 0.95")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")

    def mean(self, scores: Float[np.ndarray, "seeds cases"]) -> Interval:
        """Return the mean over cases of each case's mean over seeds."""
        return self._interval([scores])

    def difference(
        self, scores: Float[np.ndarray, "seeds cases"], reference: Float[np.ndarray, "reference_seeds cases"]
    ) -> Interval:
        """Return the mean over cases of `scores` - `reference`, where each is a mean over seeds.

        Both take the same resampled cases; each resamples its own seeds.
        """
        return self._interval([scores, reference])

    def of_score(
        self, score: Callable[[Int[np.ndarray, "num items"]], Float[np.ndarray, " num"]], num_items: int
    ) -> Interval:
        """Return a score of weighted items with its interval.

        `score` gets how often each item is drawn, a row per draw, and gives NaN for draws without a score. For one
        number of items the draws are the same whatever the score, so that differences are paired.
        """
        value = float(score(np.ones((1, num_items), dtype=np.int64))[0])
        generator = np.random.default_rng(self.seed)
        drawn = np.concatenate([score(_times_drawn(num_items, n, generator)) for n in self._portions(num_items)])
        if num_items < 2 or np.isnan(drawn).all():
            return Interval(value, np.nan, np.nan)
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail])
        return Interval(value, float(low), float(high))

    def _interval(self, tables: Sequence[Float[np.ndarray, "_ cases"]]) -> Interval:
        values = _difference([mean_present(table, 0) for table in tables])
        tables = [table[:, ~np.isnan(values)] for table in tables]
        mean = float(mean_present(values, 0))
        if tables[0].shape[1] < 2:  # one case says nothing about others
            return Interval(mean, np.nan, np.nan)
        generator = np.random.default_rng(self.seed)
        means = [self._resampled(tables, num, generator) for num in self._portions(tables[0].shape[1])]
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(np.concatenate(means), [tail, 1 - tail])
        return Interval(mean, float(low), float(high))

    def _portions(self, num_cases: int) -> list[int]:
        portion = max(1, 4_000_000 // num_cases)  # 32 MB a table of doubles, however many cases there are
        return [min(portion, self.num_bootstrap - done) for done in range(0, self.num_bootstrap, portion)]

    def _resampled(
        self, tables: Sequence[Float[np.ndarray, "_ cases"]], num: int, generator: np.random.Generator
    ) -> Float[np.ndarray, " num"]:
        cases = _times_drawn(tables[0].shape[1], num, generator)  # (num, cases)
        drawn = []
        for table in tables:
            seeds = _times_drawn(table.shape[0], num, generator).astype(float)  # (num, seeds)
            present = ~np.isnan(table)
            count = seeds @ present
            drawn.append(np.where(count > 0, seeds @ np.where(present, table, 0) / np.maximum(count, 1), np.nan))
        values = _difference(drawn)  # (num, cases)
        weights = np.where(np.isnan(values), 0, cases)
        total = weights.sum(1)
        return np.where(total > 0, (weights * np.nan_to_num(values)).sum(1) / np.maximum(total, 1), np.nan)


def _difference(tables: Sequence[Float[np.ndarray, "*shape"]]) -> Float[np.ndarray, "*shape"]:
    return tables[0] if len(tables) == 1 else tables[0] - tables[1]


def _times_drawn(num_items: int, num: int, generator: np.random.Generator) -> Int[np.ndarray, "num items"]:
    """Return how often each item is drawn when `num_items` are drawn with replacement, a row per draw."""
    return generator.multinomial(num_items, np.full(num_items, 1 / num_items), size=num)


def wilcoxon_p(differences: Float[np.ndarray, " cases"]) -> float:
    """Return the two-sided p of the Wilcoxon signed-rank test; zeros are dropped, and p is 1 if all are zero.

    The test is exact if there are few differences, see `scipy.stats.wilcoxon`.
    """
    from scipy.stats import wilcoxon

    rounded = np.round(differences, 9)  # equal ranks for differences that are equal but for their last digits
    rounded = rounded[rounded != 0]
    return float(wilcoxon(rounded).pvalue) if len(rounded) else 1.0


def smallest_p(num_cases: int, num_comparisons: int) -> float:
    """Return the smallest Holm-corrected p that a signed-rank test can give with so many cases and comparisons."""
    return min(1.0, num_comparisons * 2.0 ** (1 - num_cases))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values with Holm's step-down correction for several comparisons, in their order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def wins_ties_losses(differences: Float[np.ndarray, " cases"], *, larger_is_better: bool) -> tuple[int, int, int]:
    """Return the numbers of cases in which a score is better than, equal to and worse than the reference."""
    gains = differences if larger_is_better else -differences
    wins, losses = int((gains > EQUAL).sum()), int((gains < -EQUAL).sum())
    return wins, len(differences) - wins - losses, losses
