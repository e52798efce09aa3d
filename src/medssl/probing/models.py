"""The models of a probe: linear, on standardised features, each with one penalty to be chosen."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from medssl.probing.scores import Score, classification_scores, regression_scores, survival_scores

Predict = Callable[[Float[np.ndarray, "n dim"]], np.ndarray]
EXTRA = 'the probe needs scikit-learn and lifelines; install them with pip install "medssl[probe]"'
LEAST_PROBABILITY = 1e-12


@runtime_checkable
class Task(Protocol):
    """A target and the model that predicts it; rows are subjects."""

    @property
    def penalties(self) -> tuple[float, ...]:
        """The penalties to choose from, the least first."""

    def strata(self) -> Int[np.ndarray, " n"] | None:
        """Numbers that divide the subjects into kinds, which have similar shares in all folds; None for one kind."""

    def num_rarest(self, rows: Int[np.ndarray, " n"]) -> int:
        """Return the number of subjects of the rarest kind among some; every fold needs one of them."""

    def fit(self, features: Float[np.ndarray, "n dim"], rows: Int[np.ndarray, " n"], penalty: float) -> Predict:
        """Return the model fitted to some subjects (`rows`) with their features; it depends on them alone."""

    def loss(self, predicted: np.ndarray, rows: Int[np.ndarray, " n"]) -> float:
        """Return the loss by which the penalty is chosen; less is better."""

    def scores(self, predicted: np.ndarray, fold: Int[np.ndarray, " n"]) -> dict[str, Score]:
        """Return the scores of predictions for all subjects, each made in its fold."""


@dataclass(frozen=True, eq=False)
class Regression:
    """Ridge regression of a number."""

    truth: Float[np.ndarray, " n"]
    penalties: tuple[float, ...] = tuple(10.0**n for n in range(-2, 6))

    def strata(self) -> None:
        """The kinds of the subjects: None, since any subject may lie in any fold."""

    def num_rarest(self, rows: Int[np.ndarray, " n"]) -> int:
        """Return the number of all: they are of one kind."""
        return len(rows)

    def fit(self, features: Float[np.ndarray, "n dim"], rows: Int[np.ndarray, " n"], penalty: float) -> Predict:
        """Return the fitted model, see `Task`; the penalty is that of the squared coefficients."""
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), Ridge(alpha=penalty)).fit(features, self.truth[rows]).predict

    def loss(self, predicted: np.ndarray, rows: Int[np.ndarray, " n"]) -> float:
        """Return the mean squared error."""
        return float(np.mean((predicted - self.truth[rows]) ** 2))

    def scores(self, predicted: np.ndarray, fold: Int[np.ndarray, " n"]) -> dict[str, Score]:
        """Return the scores of `regression_scores`."""
        return dict(regression_scores(self.truth, predicted, fold=fold))


@dataclass(frozen=True, eq=False)
class Classification:
    """Logistic regression of a class, multinomial where there are several."""

    truth: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    grades: Int[np.ndarray, " k"] | None = None
    penalties: tuple[float, ...] = tuple(10.0**n for n in range(-2, 5))

    def strata(self) -> Int[np.ndarray, " n"]:
        """Return the classes of the subjects."""
        return self.truth

    def num_rarest(self, rows: Int[np.ndarray, " n"]) -> int:
        """Return the number of subjects of the rarest class among them."""
        return int(np.unique(self.truth[rows], return_counts=True)[1].min())

    def fit(self, features: Float[np.ndarray, "n dim"], rows: Int[np.ndarray, " n"], penalty: float) -> Predict:
        """Return the fitted model, see `Task`; the penalty is that of the squared coefficients."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=2000))
        known = np.unique(self.truth[rows])
        if len(known) == 1:
            return lambda features: np.tile(np.eye(len(self.classes))[known[0]], (len(features), 1))
        model.fit(features, self.truth[rows])

        def predict(features: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n k"]:
            probability = np.zeros((len(features), len(self.classes)))
            probability[:, known] = model.predict_proba(features)
            return probability

        return predict

    def loss(self, predicted: np.ndarray, rows: Int[np.ndarray, " n"]) -> float:
        """Return the cross-entropy."""
        found = predicted[np.arange(len(rows)), self.truth[rows]]
        return float(-np.log(np.maximum(found, LEAST_PROBABILITY)).mean())

    def scores(self, predicted: np.ndarray, fold: Int[np.ndarray, " n"]) -> dict[str, Score]:
        """Return the scores of `classification_scores`."""
        return dict(classification_scores(self.truth, predicted, fold=fold, grades=self.grades))


@dataclass(frozen=True, eq=False)
class Survival:
    """Cox's proportional hazards on the first principal components of the features.

    Args:
        time: Time until the event or the end of observation.
        event: Whether the event happened.
        max_components: Number of principal components; fewer if there are fewer subjects or features.
        penalties: Penalties of the squared coefficients, as `lifelines.CoxPHFitter` counts them.
    """

    time: Float[np.ndarray, " n"]
    event: Bool[np.ndarray, " n"]
    max_components: int = 32
    penalties: tuple[float, ...] = (0.01, 0.1, 1.0)

    def strata(self) -> Int[np.ndarray, " n"]:
        """Return whether the event happened."""
        return self.event.astype(np.int64)

    def num_rarest(self, rows: Int[np.ndarray, " n"]) -> int:
        """Return the number of subjects with an event, which all may have."""
        return int(self.event[rows].sum())

    def fit(self, features: Float[np.ndarray, "n dim"], rows: Int[np.ndarray, " n"], penalty: float) -> Predict:
        """Return the fitted model, see `Task`; it gives the log hazard relative to that of the mean subject.

        Raises:
            ValueError: The optimiser does not converge.
        """
        import pandas
        from lifelines import CoxPHFitter
        from lifelines.exceptions import ConvergenceError
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        num = min(self.max_components, len(rows) - 1, features.shape[1])
        components = make_pipeline(StandardScaler(), PCA(num, whiten=True, svd_solver="full"))
        with np.errstate(invalid="ignore"):  # features that are all alike have no variance to share out
            found = components.fit_transform(features)
        varies = found.std(0) > 0.5  # whitened: 1, except for components of features that hardly differ
        if not varies.any():
            return lambda features: np.zeros(len(features))
        table = pandas.DataFrame(found[:, varies]).add_prefix("component_")
        table["time"], table["event"] = self.time[rows], self.event[rows]
        model: Any = CoxPHFitter(penalizer=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on columns that separate the events; the penalty bounds those
            try:
                model.fit(table, "time", "event")
            except ConvergenceError as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"Cox's model does not converge ({reason}); lower max_components") from None

        def predict(features: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, " n"]:
            return components.transform(features)[:, varies] @ model.params_.to_numpy()

        return predict

    def loss(self, predicted: np.ndarray, rows: Int[np.ndarray, " n"]) -> float:
        """Return minus the concordance, which counts as one half if no pair can be ordered."""
        once = np.ones((1, len(rows)), dtype=np.int64)
        score = survival_scores(self.time[rows], self.event[rows], predicted, fold=np.zeros_like(rows))
        return -float(np.nan_to_num(score["concordance"](once)[0], nan=0.5))

    def scores(self, predicted: np.ndarray, fold: Int[np.ndarray, " n"]) -> dict[str, Score]:
        """Return the scores of `survival_scores`."""
        return dict(survival_scores(self.time, self.event, predicted, fold=fold))


def check_extra() -> None:
    """Check that the libraries of the probe are installed.

    Raises:
        ValueError: A library is not installed.
    """
    try:
        import lifelines  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from None
