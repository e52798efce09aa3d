"""Scores of weighted subjects: a row of weights is the score of a table with each subject repeated as often."""

import numpy as np
import pytest
from lifelines.utils import concordance_index
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, balanced_accuracy_score, mean_absolute_error, roc_auc_score

from medssl.probing.scores import classification_scores, regression_scores, survival_scores

NUM = 40


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def counts(rng):
    """Once each, then three draws with replacement."""
    return np.concatenate([np.ones((1, NUM), int), rng.multinomial(NUM, np.full(NUM, 1 / NUM), size=3)])


def repeated(counts):
    return [np.repeat(np.arange(NUM), row) for row in counts]


def one_fold():
    return np.zeros(NUM, dtype=int)


def test_scores_of_numbers_are_those_of_scipy_and_sklearn_on_the_drawn_table(rng, counts):
    truth = rng.normal(size=NUM).round(1)  # with ties
    predicted = truth + rng.normal(size=NUM).round(1)
    scores = {name: score(counts) for name, score in regression_scores(truth, predicted, fold=one_fold()).items()}
    for number, rows in enumerate(repeated(counts)):
        assert scores["mae"][number] == pytest.approx(mean_absolute_error(truth[rows], predicted[rows]))
        assert scores["spearman"][number] == pytest.approx(spearmanr(truth[rows], predicted[rows]).statistic)
        total = ((truth[rows] - truth.mean()) ** 2).sum()
        assert scores["r2"][number] == pytest.approx(1 - ((truth - predicted)[rows] ** 2).sum() / total)


def test_r2_is_zero_for_the_mean_of_the_other_folds_and_ranks_count_within_folds(rng, counts):
    truth, fold = rng.normal(size=NUM), np.arange(NUM) % 4
    mean = np.array([truth[fold != own].mean() for own in fold])
    known_nothing = regression_scores(truth, mean, fold=fold)
    assert known_nothing["r2"](counts) == pytest.approx(np.zeros(4))
    assert np.isnan(known_nothing["spearman"](counts)).all()  # nothing is ordered within a fold
    predicted = truth + 10 * fold
    expected = np.mean([spearmanr(truth[fold == k], predicted[fold == k]).statistic for k in range(4)])
    assert regression_scores(truth, predicted, fold=fold)["spearman"](counts[:1]) == pytest.approx([expected])


def test_scores_of_classes_are_those_of_sklearn_on_the_drawn_table(rng, counts):
    truth = rng.integers(0, 3, NUM)
    probability = rng.dirichlet(np.ones(3), NUM).round(2) + 0.3 * np.eye(3)[truth]
    probability /= probability.sum(1, keepdims=True)
    grades = np.array([1, 2, 4])
    found = classification_scores(truth, probability, fold=one_fold(), grades=grades)
    scores = {name: score(counts) for name, score in found.items()}
    for number, rows in enumerate(repeated(counts)):
        chosen = probability.argmax(1)[rows]
        assert scores["accuracy"][number] == pytest.approx(accuracy_score(truth[rows], chosen))
        assert scores["balanced_accuracy"][number] == pytest.approx(balanced_accuracy_score(truth[rows], chosen))
        assert scores["auc"][number] == pytest.approx(roc_auc_score(truth[rows], probability[rows], multi_class="ovr"))
        near = [abs(grades[a] - grades[b]) <= 1 for a, b in zip(chosen, truth[rows], strict=True)]
        assert scores["within_one"][number] == pytest.approx(np.mean(near))


def test_two_classes_have_one_auc_and_a_draw_of_one_class_has_none(rng, counts):
    truth = (np.arange(NUM) < 12).astype(int)
    score = rng.uniform(size=NUM).round(1)
    found = classification_scores(truth, np.stack([1 - score, score], 1), fold=one_fold())
    assert "within_one" not in found
    assert found["auc"](counts)[0] == pytest.approx(roc_auc_score(truth, score))
    assert np.isnan(found["auc"](truth[None])[0])


def test_the_concordance_is_that_of_lifelines_on_the_drawn_table(rng, counts):
    time, risk = rng.exponential(size=NUM).round(1) + 0.1, rng.normal(size=NUM).round(1)
    event = rng.uniform(size=NUM) < 0.6
    found = survival_scores(time, event, risk, fold=one_fold())["concordance"](counts)
    for number, rows in enumerate(repeated(counts)):
        # a subject drawn twice makes pairs with itself, which lifelines counts too: tied times of two events
        assert found[number] == pytest.approx(concordance_index(time[rows], -risk[rows], event[rows]))


def test_the_concordance_compares_within_folds(rng):
    time, risk = rng.exponential(size=NUM), rng.normal(size=NUM)
    event, fold = np.ones(NUM, dtype=bool), np.arange(NUM) // 20
    ones = np.ones((1, NUM), dtype=int)
    parts = [concordance_index(time[fold == k], -risk[fold == k]) for k in (0, 1)]  # equally many pairs
    assert survival_scores(time, event, risk + 100 * fold, fold=fold)["concordance"](ones)[0] == pytest.approx(
        np.mean(parts)
    )
