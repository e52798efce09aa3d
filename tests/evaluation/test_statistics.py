"""Intervals against cases with a known answer, tests against tables worked out by hand."""

import math

import numpy as np
import pytest

from medssl.evaluation.statistics import Resampling, holm, smallest_p, wilcoxon_p, wins_ties_losses

NAN = math.nan


def test_holm_agrees_with_a_table_worked_out_by_hand():
    # sorted .005 .01 .03 .04 are multiplied by 4 3 2 1, and none may fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_the_signed_rank_test_is_exact_for_few_cases():
    assert wilcoxon_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 2**5)
    # of the 32 sign patterns, rank sums <= 3 have 1 + 1 + 1 + 2 members
    assert wilcoxon_p(np.array([0.1, 0.2, -0.3, 0.4, 0.5])) == pytest.approx(2 * 5 / 2**5)


def test_the_signed_rank_test_is_scipys_for_many_cases():
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(0).normal(0.2, 1, 60)
    assert wilcoxon_p(differences) == pytest.approx(wilcoxon(differences).pvalue)


def test_differences_of_zero_warn_of_nothing():
    assert wilcoxon_p(np.zeros(7)) == 1
    assert wilcoxon_p(np.zeros(0)) == 1
    assert wilcoxon_p(np.array([0.3 - 0.1 - 0.2, 0.1, 0.2])) == wilcoxon_p(np.array([0.1, 0.2]))
    assert wilcoxon_p(np.array([0.1] * 9 + [-0.1, 0.0])) < 0.05


@pytest.mark.parametrize(("num_cases", "p"), [(4, 0.125), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_p_is_reached_when_all_differences_have_one_sign(num_cases, p):
    assert smallest_p(num_cases, 1) == p == wilcoxon_p(np.arange(1.0, num_cases + 1))
    assert smallest_p(num_cases, 3) == pytest.approx(min(1, 3 * p))


def test_wins_and_losses_follow_what_is_better():
    differences = np.array([0.1, 0.0, 0.3 - 0.1 - 0.2, -0.2, 0.4])
    assert wins_ties_losses(differences, larger_is_better=True) == (2, 2, 1)
    assert wins_ties_losses(differences, larger_is_better=False) == (1, 2, 2)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    scores = np.random.default_rng(1).normal(0.8, 0.1, (1, 200))
    interval = Resampling(num_bootstrap=20_000).mean(scores)
    assert interval.mean == pytest.approx(scores.mean())
    half = 1.96 * scores.std() / math.sqrt(200)
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.05 * half)


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    resampling = Resampling(num_bootstrap=400, confidence=0.9)
    intervals = [resampling.mean(rng.normal(0, 1, (1, 40))) for _ in range(400)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.85 < covered < 0.93  # percentiles of 40 cases fall short by about 0.015; the draw itself varies by 0.015


def test_seeds_are_resampled_together_with_the_cases():
    # a score that is the sum of a seed's and a case's part has the sum of their two variances
    rng = np.random.default_rng(3)
    seeds, cases = rng.normal(0, 1, (30, 1)), rng.normal(0, 1, (1, 50))
    interval = Resampling(num_bootstrap=20_000).mean(seeds + cases)
    half = 1.96 * math.sqrt(seeds.var() / 30 + cases.var() / 50)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_a_difference_is_paired_by_case_and_resamples_the_seeds_of_both():
    rng = np.random.default_rng(4)
    cases = rng.normal(0, 5, (1, 60))  # cancels in the pairs
    gains = rng.normal(0.3, 1, (1, 60))
    paired = Resampling(num_bootstrap=20_000).difference(cases + gains, cases)
    assert paired.mean == pytest.approx(gains.mean())
    assert (paired.high - paired.low) / 2 == pytest.approx(1.96 * gains.std() / math.sqrt(60), rel=0.05)

    first, second = rng.normal(0, 1, (20, 1)), rng.normal(0, 2, (25, 1))
    paired = Resampling(num_bootstrap=20_000).difference(first + cases, second + cases)
    assert paired.mean == pytest.approx(first.mean() - second.mean())
    half = 1.96 * math.sqrt(first.var() / 20 + second.var() / 25)
    assert (paired.high - paired.low) / 2 == pytest.approx(half, rel=0.05)


def test_missing_scores_do_not_enter():
    scores = np.array([[0.2, NAN, 0.6, NAN], [0.4, 0.8, NAN, NAN]])
    interval = Resampling(num_bootstrap=200).mean(scores)
    assert interval.mean == pytest.approx((0.3 + 0.8 + 0.6) / 3)
    assert 0.2 <= interval.low <= interval.mean <= interval.high <= 0.8
    assert Resampling(num_bootstrap=200).difference(scores, scores[:1]).mean == pytest.approx((0.1 + 0) / 2)


def test_an_interval_is_the_same_every_time_and_however_it_is_portioned(monkeypatch):
    scores = np.random.default_rng(5).normal(0, 1, (2, 9))
    resampling = Resampling(num_bootstrap=3000)
    once = resampling.mean(scores)
    assert once == resampling.mean(scores)
    assert once != Resampling(num_bootstrap=3000, seed=1).mean(scores)
    monkeypatch.setattr(Resampling, "_portions", lambda self, num_cases: [1000, 1000, 1000])
    assert resampling.mean(scores).low == pytest.approx(once.low, abs=0.1)
    monkeypatch.undo()
    assert resampling._portions(4_000_000 // 1300) == [1300, 1300, 400]


def test_one_case_has_a_mean_and_no_interval():
    interval = Resampling().mean(np.array([[0.5], [0.7]]))
    assert interval.mean == pytest.approx(0.6)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_two_equal_tables_differ_by_nothing():
    scores = np.random.default_rng(6).random((1, 8))
    interval = Resampling(num_bootstrap=500).difference(scores, scores)
    assert (interval.mean, interval.low, interval.high) == (0, 0, 0)


@pytest.mark.parametrize("wrong", [{"num_bootstrap": 5}, {"confidence": 95.0}, {"confidence": 0.0}, {"seed": -1}])
def test_settings_that_make_no_interval_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Resampling(**wrong)
