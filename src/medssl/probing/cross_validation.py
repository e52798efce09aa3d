"""Cross-validated probes of features: how well a linear model predicts a target of subjects it has not seen."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from medssl.evaluation.statistics import Interval, Resampling
from medssl.probing.models import Task
from medssl.probing.scores import Score


@dataclass(frozen=True)
class CrossValidation:
    """The cross-validation of a probe.

    Args:
        num_folds: Number of folds of the outer cross-validation; a subject is in one fold.
        num_repeats: Number of cross-validations, each with folds of its own.
        num_inner_folds: Number of folds of the training subjects, by which the penalty is chosen.
        seed: Seed of the folds.
    """

    num_folds: int = 5
    num_repeats: int = 5
    num_inner_folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, least in {"num_folds": 2, "num_repeats": 1, "num_inner_folds": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, eq=False)
class Probe:
    """The results of a probe.

    Args:
        task: The task, with the targets.
        subject: The subject of each row; rows of one subject are in one fold and are drawn together.
        fold: The fold in which each row was predicted, for each repeat.
        predicted: The predictions of each repeat; for classes, their probabilities.
        penalty: The penalty that was chosen in each repeat and fold.
    """

    task: Task
    subject: Int[np.ndarray, " n"]
    fold: Int[np.ndarray, "repeat n"]
    predicted: Float[np.ndarray, "repeat n *k"]
    penalty: Float[np.ndarray, "repeat fold"]

    def intervals(self, resampling: Resampling, reference: "Probe | None" = None) -> dict[str, Interval]:
        """Return each score's mean over the repeats and its interval over subjects; differences with `reference`."""

        def by_subject(score: Score) -> Score:
            return lambda counts: score(counts[:, self.subject])

        own = self._mean_scores()
        if reference is not None:
            other = reference._mean_scores()
            own = {name: _less(score, other[name]) for name, score in own.items()}
        num = int(self.subject.max()) + 1
        return {name: resampling.of_score(by_subject(score), num) for name, score in own.items()}

    def repeat_scores(self) -> list[dict[str, float]]:
        """Return the scores of each repeat."""
        once = np.ones((1, len(self.subject)), dtype=np.int64)
        return [{name: float(score(once)[0]) for name, score in scores.items()} for scores in self._scores()]

    def fold_scores(self) -> list[dict[str, list[float]]]:
        """Return the scores of each fold of each repeat."""
        found = []
        for fold, scores in zip(self.fold, self._scores(), strict=True):
            inside = (fold == np.arange(fold.max() + 1)[:, None]).astype(np.int64)  # a row a fold
            found.append({name: score(inside).tolist() for name, score in scores.items()})
        return found

    def _scores(self) -> list[dict[str, Score]]:
        return [self.task.scores(*repeat) for repeat in zip(self.predicted, self.fold, strict=True)]

    def _mean_scores(self) -> dict[str, Score]:
        repeats = self._scores()
        return {name: _mean_of([scores[name] for scores in repeats]) for name in repeats[0]}


def probe(
    features: Float[np.ndarray, "n dim"],
    task: Task,
    *,
    subject: Int[np.ndarray, " n"],
    validation: CrossValidation,
    on_fold: Callable[[], None] | None = None,
) -> Probe:
    """Predict each row from models that have seen no row of its subject.

    In every fold the penalty is the one with the least loss over inner folds of the training subjects. The model is
    then fitted to all training subjects. The folds follow from the targets and the seed alone, so that probes of
    different features are paired.

    Raises:
        ValueError: There are too few subjects, or too few of a class.
    """
    features = np.asarray(features, dtype=np.float64)
    folds, predictions, penalties = [], [], []
    for repeat in range(validation.num_repeats):
        fold = assign_folds(
            task, subject, np.arange(len(subject)), num_folds=validation.num_folds, seed=validation.seed + repeat
        )
        predicted, chosen = None, []
        for number in range(validation.num_folds):
            train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            penalty = _best_penalty(features, task, train, subject=subject, validation=validation)
            found = task.fit(features[train], train, penalty)(features[test])
            predicted = np.empty((len(fold), *found.shape[1:])) if predicted is None else predicted
            predicted[test] = found
            chosen.append(penalty)
            if on_fold is not None:
                on_fold()
        assert predicted is not None
        folds.append(fold)
        predictions.append(predicted)
        penalties.append(chosen)
    return Probe(task, subject, np.stack(folds), np.stack(predictions), np.array(penalties))


def assign_folds(
    task: Task, subject: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"], *, num_folds: int, seed: int
) -> Int[np.ndarray, " m"]:
    """Return the fold of each of some rows: those of one subject together, classes or events in similar shares.

    Raises:
        ValueError: There are fewer subjects than folds.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    groups: np.ndarray | None = subject[rows]
    strata = task.strata()
    num = len(np.unique(subject[rows]))
    if num < num_folds:
        raise ValueError(f"{num} subjects do not fill {num_folds} folds; lower num_folds")
    if strata is None:
        splitter = GroupKFold(num_folds, shuffle=True, random_state=seed)
        strata = np.zeros(len(subject), dtype=np.int64)
    else:
        kind = StratifiedKFold if num == len(rows) else StratifiedGroupKFold
        splitter = kind(num_folds, shuffle=True, random_state=seed)
        groups = None if num == len(rows) else groups
    fold = np.full(len(rows), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few of a kind: the kinds that every fold needs were checked
        for number, (_, test) in enumerate(splitter.split(rows, strata[rows], groups)):
            fold[test] = number
    if len(np.unique(fold)) < num_folds:
        raise ValueError(f"{num} subjects cannot be shared out to {num_folds} folds alike; lower num_folds")
    return fold


def _best_penalty(
    features: Float[np.ndarray, "n dim"],
    task: Task,
    train: Int[np.ndarray, " m"],
    *,
    subject: Int[np.ndarray, " n"],
    validation: CrossValidation,
) -> float:
    """Return the penalty with the least mean loss over inner folds; the larger one if several have it."""
    num_folds = min(validation.num_inner_folds, max(2, task.num_rarest(train)), len(np.unique(subject[train])))
    fold = assign_folds(task, subject, train, num_folds=num_folds, seed=validation.seed)
    losses = np.zeros(len(task.penalties))
    for number in range(num_folds):
        inner, held = train[fold != number], train[fold == number]
        for place, penalty in enumerate(task.penalties):
            predicted = task.fit(features[inner], inner, penalty)(features[held])
            losses[place] += task.loss(predicted, held) * len(held)
    return task.penalties[len(losses) - 1 - int(np.argmin(losses[::-1]))]


def _less(score: Score, other: Score) -> Score:
    return lambda counts: score(counts) - other(counts)


def _mean_of(scores: Sequence[Score]) -> Score:
    return lambda counts: np.mean([score(counts) for score in scores], axis=0)
