"""Cross-validated probes: what is there is found, what is not is not, and no subject is seen before its fold."""

import numpy as np
import pytest
from lifelines.utils import concordance_index
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from medssl.evaluation.statistics import Resampling
from medssl.probing.cross_validation import CrossValidation, assign_folds, probe
from medssl.probing.models import Classification, Regression, Survival

SMALL = CrossValidation(num_folds=4, num_repeats=2, num_inner_folds=2)
FEW = Resampling(500)


def subjects(num=48, *, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng, rng.normal(size=(num, dim)) * 10.0 ** np.arange(dim), np.arange(num)


def test_a_planted_signal_is_found_and_beats_noise_by_a_paired_difference():
    rng, features, subject = subjects()
    truth = features[:, 1] / 10 + 0.3 * rng.normal(size=48)
    found = probe(features, Regression(truth), subject=subject, validation=SMALL)
    scores = found.intervals(FEW)
    assert scores["r2"].low > 0.6
    assert scores["mae"].high < 0.5
    noise = probe(rng.normal(size=(48, 6)), Regression(truth), subject=subject, validation=SMALL)
    assert np.array_equal(found.fold, noise.fold)
    difference = found.intervals(FEW, noise)
    assert difference["r2"].low > 0.5
    assert difference["mae"].high < 0
    assert difference["r2"].mean == pytest.approx(scores["r2"].mean - noise.intervals(FEW)["r2"].mean)


def test_intervals_of_noise_cover_what_knows_nothing():
    rng, features, subject = subjects(60)
    scores = probe(features, Regression(rng.normal(size=60)), subject=subject, validation=SMALL).intervals(FEW)
    assert scores["r2"].low < 0 < scores["r2"].high + 0.01
    assert scores["spearman"].low < 0 < scores["spearman"].high
    truth = np.arange(60) % 2
    scores = probe(features, Classification(truth, ("a", "b")), subject=subject, validation=SMALL).intervals(FEW)
    assert scores["auc"].low < 0.5 < scores["auc"].high


def test_ridge_regression_of_a_fold_is_that_of_a_loop_with_the_same_folds_and_penalties():
    rng, features, subject = subjects(32)
    task = Regression(features[:, 0] + rng.normal(size=32))
    found = probe(features, task, subject=subject, validation=SMALL)
    for repeat, fold in enumerate(found.fold):
        for number in range(4):
            train, test = fold != number, fold == number
            inner = assign_folds(task, subject, np.flatnonzero(train), num_folds=2, seed=0)
            losses = []
            for penalty in task.penalties:
                errors = np.empty(train.sum())
                for part in (0, 1):
                    x, y = features[train][inner != part], task.truth[train][inner != part]
                    scale = StandardScaler().fit(x)
                    model = Ridge(alpha=penalty).fit(scale.transform(x), y)
                    held = scale.transform(features[train][inner == part])
                    errors[inner == part] = model.predict(held) - task.truth[train][inner == part]
                losses.append(np.mean(errors**2))
            assert found.penalty[repeat, number] == task.penalties[int(np.argmin(losses))]
            x = (features[train] - features[train].mean(0)) / features[train].std(0)
            y = task.truth[train] - task.truth[train].mean()
            weight = np.linalg.solve(x.T @ x + found.penalty[repeat, number] * np.eye(6), x.T @ y)
            held = (features[test] - features[train].mean(0)) / features[train].std(0)
            assert found.predicted[repeat, test] == pytest.approx(held @ weight + task.truth[train].mean())


def test_probabilities_of_grades_are_those_of_logistic_regression_and_near_misses_count():
    rng, features, subject = subjects(60)
    truth = np.digitize(features[:, 0] + 0.3 * rng.normal(size=60), [-0.6, 0.6])
    task = Classification(truth, ("1", "2", "3"), np.array([1, 2, 3]))
    found = probe(features, task, subject=subject, validation=SMALL)
    scores = found.intervals(FEW)
    assert scores["auc"].low > 0.75
    assert scores["within_one"].mean > scores["accuracy"].mean > 0.6
    train, test = found.fold[0] != 1, found.fold[0] == 1
    scale = StandardScaler().fit(features[train])
    model = LogisticRegression(C=1 / found.penalty[0, 1], max_iter=2000)
    model.fit(scale.transform(features[train]), truth[train])
    assert found.predicted[0, test] == pytest.approx(model.predict_proba(scale.transform(features[test])))
    for fold in found.fold:
        shares = [np.bincount(truth[fold == number], minlength=3) for number in range(4)]
        assert np.ptp(shares, axis=0).max() <= 1  # alike in all folds


def test_survival_is_ordered_by_a_planted_hazard():
    rng, features, subject = subjects(60, dim=4)
    time = rng.exponential(np.exp(-1.5 * features[:, 0]))
    task = Survival(time, rng.uniform(size=60) < 0.8, penalties=(0.1,))
    validation = CrossValidation(num_folds=3, num_repeats=1, num_inner_folds=2)
    found = probe(features, task, subject=subject, validation=validation)
    scores = found.intervals(FEW)["concordance"]
    assert scores.low > 0.5
    known = concordance_index(time, -features[:, 0], task.event)  # what the hazard that was planted gives
    assert scores.mean == pytest.approx(known, abs=0.05)
    still = probe(np.zeros((60, 4)), task, subject=subject, validation=validation)
    assert still.intervals(FEW)["concordance"].mean == pytest.approx(0.5)


def test_scans_of_a_subject_stay_in_one_fold_and_are_drawn_together():
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(12), 4)
    features = rng.normal(size=(12, 5))[subject]  # a model knows whom it has seen
    truth = rng.normal(size=12)[subject]
    task = Regression(truth)
    found = probe(features, task, subject=subject, validation=SMALL)
    for fold in found.fold:
        assert all(len(set(fold[subject == one])) == 1 for one in range(12))
    leaking = probe(features, task, subject=np.arange(48), validation=SMALL)
    assert leaking.repeat_scores()[0]["r2"] > 0.2 > found.repeat_scores()[0]["r2"]
    own_error = abs(found.predicted - truth).mean(0).reshape(12, 4).mean(1)  # of each subject
    expected = FEW.of_score(lambda counts: counts @ own_error / counts.sum(1), 12)
    drawn = found.intervals(FEW)["mae"]
    assert (drawn.mean, drawn.low, drawn.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_fold_scores_are_those_of_the_subjects_of_a_fold():
    rng, features, subject = subjects(32)
    task = Regression(rng.normal(size=32))
    found = probe(features, task, subject=subject, validation=SMALL)
    error = abs(found.predicted[1] - task.truth)
    expected = [error[found.fold[1] == number].mean() for number in range(4)]
    assert found.fold_scores()[1]["mae"] == pytest.approx(expected)


def test_too_few_subjects_and_wrong_numbers_are_refused():
    _, features, subject = subjects(3)
    with pytest.raises(ValueError, match="3 subjects do not fill 4 folds"):
        probe(features, Regression(np.arange(3.0)), subject=subject, validation=SMALL)
    with pytest.raises(ValueError, match="num_folds=1 must be at least 2"):
        CrossValidation(num_folds=1)
