"""Scores of predictions for weighted subjects: one value for each row of weights, so that a bootstrap is one product.

A row of `counts` says how often each subject was drawn; a row of ones is the score itself. NaN stands for a score that
a draw does not have (an AUC without both classes). Subjects are ordered and compared within the fold (`fold`) in which
they were predicted. Models of different folds lean away from the mean of their own test fold, so that predictions
without any information would be ordered worse than chance over all folds.
"""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Int, Num

Counts = Int[np.ndarray, "draw n"]
Scores = Float[np.ndarray, " draw"]
Score = Callable[[Counts], Scores]
LARGER_IS_BETTER = {
    "r2": True, "mae": False, "spearman": True,
    "accuracy": True, "balanced_accuracy": True, "within_one": True, "auc": True,
    "concordance": True,
}  # fmt: skip
PAIRS = 2**24
"""Pairs of subjects compared at once: 64 MB."""


def regression_scores(
    truth: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"], *, fold: Int[np.ndarray, " n"]
) -> Mapping[str, Score]:
    """Return R2, mean absolute error, and Spearman's rank correlation (its mean over the folds).

    R2 is 1 - sum of squared errors / sum of squared errors of the mean of the other folds, a prediction without
    features.
    """
    mean = np.array([truth[fold != own].mean() if (fold != own).any() else truth.mean() for own in fold])

    def r2(counts: Counts) -> Scores:
        return 1 - _ratio(_mean((truth - predicted) ** 2, counts), _mean((truth - mean) ** 2, counts))

    def spearman(counts: Counts) -> Scores:
        found, weight = [], []
        for rows in _parts(fold):
            drawn = counts[:, rows]
            a, b = (_ranks(values[rows], drawn) for values in (truth, predicted))
            a, b = (ranks - _mean(ranks, drawn)[:, None] for ranks in (a, b))
            found.append(_ratio(_mean(a * b, drawn), np.sqrt(_mean(a**2, drawn) * _mean(b**2, drawn))))
            weight.append(np.where(np.isnan(found[-1]), 0, drawn.sum(1)))
        return _ratio(np.nansum(np.multiply(found, weight), axis=0), np.sum(weight, axis=0).astype(float))

    return {"r2": r2, "mae": lambda counts: _mean(abs(truth - predicted), counts), "spearman": spearman}


def classification_scores(
    truth: Int[np.ndarray, " n"],
    probability: Float[np.ndarray, "n k"],
    *,
    fold: Int[np.ndarray, " n"],
    grades: Int[np.ndarray, " k"] | None = None,
) -> Mapping[str, Score]:
    """Return accuracy, its mean over classes, and the area under the ROC.

    For several classes the area is the mean over one class against the rest.

    Args:
        truth: Number of the class of each subject.
        probability: Probability of each class, for each subject.
        fold: The fold in which each subject was predicted.
        grades: The classes if they are whole numbers; with three or more, the share within one grade is given too.
    """
    num_classes = probability.shape[1]
    chosen = probability.argmax(1)

    def balanced(counts: Counts) -> Scores:
        recalls = [_mean((chosen == k).astype(float), counts * (truth == k)) for k in range(num_classes)]
        return np.mean(recalls, axis=0)

    def auc(counts: Counts) -> Scores:
        wanted = [1] if num_classes == 2 else range(num_classes)
        return np.mean([_auc(truth == k, probability[:, k], fold=fold, counts=counts) for k in wanted], axis=0)

    scores: dict[str, Score] = {
        "accuracy": lambda counts: _mean((chosen == truth).astype(float), counts),
        "balanced_accuracy": balanced,
    }
    if grades is not None and num_classes > 2:
        near = (abs(grades[chosen] - grades[truth]) <= 1).astype(float)
        scores["within_one"] = lambda counts: _mean(near, counts)
    return {**scores, "auc": auc}


def survival_scores(
    time: Float[np.ndarray, " n"],
    event: Bool[np.ndarray, " n"],
    risk: Float[np.ndarray, " n"],
    *,
    fold: Int[np.ndarray, " n"],
) -> Mapping[str, Score]:
    """Return Harrell's concordance: the share of pairs of known order in which the earlier event has the higher risk.

    A pair counts if one had its event before the other's time, or at the time at which the other was censored. Equal
    risks count one half. In one fold it equals `lifelines.utils.concordance_index`, which has no weights.
    """

    def concordance(counts: Counts) -> Scores:
        won, known = np.zeros(len(counts)), np.zeros(len(counts))
        for rows in _parts(fold):
            weight = counts[:, rows].astype(np.float32)
            height = max(1, PAIRS // len(rows))
            for start in range(0, len(rows), height):
                some = rows[start : start + height, None]
                at_once = (time[some] == time[rows]) & ~event[rows]
                pairs = event[some] & ((time[some] < time[rows]) | at_once)
                right = pairs * (0.5 * (risk[some] == risk[rows]) + (risk[some] > risk[rows]))
                for total, table in ((won, right), (known, pairs)):
                    first = weight[:, start : start + height]
                    total += (first * (weight @ table.T.astype(np.float32))).sum(1, dtype=np.float64)
        return _ratio(won, known)

    return {"concordance": concordance}


def _auc(
    positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"], *, fold: Int[np.ndarray, " n"], counts: Counts
) -> Scores:
    """Return the share of pairs, a positive and a negative of one fold, in which the positive has the higher score."""
    won, known = np.zeros(len(counts)), np.zeros(len(counts))
    for rows in _parts(fold):
        drawn, first = counts[:, rows], positive[rows]
        num_positive, num_negative = (drawn[:, which].sum(1).astype(float) for which in (first, ~first))
        won += (_ranks(score[rows], drawn) * drawn)[:, first].sum(1) - num_positive * (num_positive + 1) / 2
        known += num_positive * num_negative
    return _ratio(won, known)


def _parts(fold: Int[np.ndarray, " n"]) -> list[Int[np.ndarray, " rows"]]:
    return [np.flatnonzero(fold == number) for number in np.unique(fold)]


def _ranks(values: Float[np.ndarray, " n"], counts: Counts) -> Float[np.ndarray, "draw n"]:
    """Return the mean rank of each subject's copies among all that were drawn, from 1 on."""
    _, level = np.unique(values, return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.flatnonzero(np.diff(level[order], prepend=-1))
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)
    return (drawn.cumsum(1) - drawn + (drawn + 1) / 2)[:, level]


def _mean(values: Num[np.ndarray, "*some n"], counts: Counts) -> Scores:
    return _ratio((counts * values).sum(1).astype(float), counts.sum(1).astype(float))


def _ratio(part: Scores, whole: Scores) -> Scores:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
