"""What a comparison says about runs whose scores are known."""

import json

import numpy as np
import pytest

from medssl.evaluation.comparison import compare_groups
from medssl.evaluation.groups import read_groups
from medssl.evaluation.statistics import Resampling

QUICK = Resampling(num_bootstrap=300)
GLMAE = {"weights": "GL-MAE"}


def compared(*paths, metric="dice"):
    return compare_groups(read_groups(paths), metric=metric, resampling=QUICK)


def test_a_gain_is_found_in_every_case(finished_run):
    comparison = compared(finished_run("a"), finished_run("b", setting=GLMAE, gain=0.05))
    (pair,) = comparison.pairs
    np.testing.assert_allclose(pair.differences, 0.05 * (1 + 0.1 * np.arange(8)))
    assert pair.interval.mean == pytest.approx(0.05 * 1.35)
    assert pair.interval.low > 0.05
    assert pair.wins_ties_losses == (8, 0, 0)
    assert pair.p == pair.corrected_p == pytest.approx(2 / 2**8)
    assert comparison.summaries[0].means["dice"].mean == pytest.approx(0.7)
    assert comparison.summaries[0].means["hd95_mm"].mean == pytest.approx(6)
    assert comparison.summaries[1].per_class["spleen"] == pytest.approx(0.7 + 0.0675)


def test_a_smaller_distance_is_a_win(finished_run):
    comparison = compared(finished_run("a"), finished_run("b", setting=GLMAE, gain=0.05), metric="hd95_mm")
    (pair,) = comparison.pairs
    assert pair.interval.mean == pytest.approx(-20 * 0.0675)
    assert pair.wins_ties_losses == (8, 0, 0)


def test_equal_runs_tie_and_have_a_p_of_one(finished_run):
    (pair,) = compared(finished_run("a"), finished_run("b", setting=GLMAE)).pairs
    assert (pair.p, pair.wins_ties_losses, pair.interval.low, pair.interval.high) == (1, (0, 8, 0), 0, 0)


def test_seeds_of_a_group_are_averaged_by_case_before_they_are_paired(finished_run):
    reference = finished_run("a")
    paths = [finished_run(f"b{seed}", setting=GLMAE, seed=seed, gain=0.02) for seed in (0, 1, 2)]
    comparison = compared(reference, *paths)
    (pair,) = comparison.pairs
    expected = pair.group.case_means("dice").mean(0) - pair.reference.case_means("dice")[0]
    np.testing.assert_allclose(pair.differences, expected)
    assert len(comparison.summaries[1].group.runs) == 3


def test_p_values_are_corrected_over_all_comparisons(finished_run):
    gains = {"a": 0.0, "b": 0.05, "c": -0.03, "d": 0.0}
    comparison = compared(*(finished_run(n, setting={"weights": n}, gain=g) for n, g in gains.items()))
    smallest = 2 / 2**8
    assert [pair.p for pair in comparison.pairs] == pytest.approx([smallest, smallest, 1])
    assert [pair.corrected_p for pair in comparison.pairs] == pytest.approx([3 * smallest, 3 * smallest, 1])
    assert comparison.pairs[1].wins_ties_losses == (0, 0, 8)


def test_groups_are_paired_at_their_own_number_of_labelled_cases(finished_run):
    paths = [finished_run(f"s{count}", count=count) for count in (5, 1)]
    paths += [finished_run(f"g{count}", count=count, setting=GLMAE, gain=0.01) for count in (1, 5, 20)]
    comparison = compared(*paths)
    assert [(pair.group.count, pair.reference.count) for pair in comparison.pairs] == [(1, 1), (5, 5), (20, 5)]
    (note,) = [note for note in comparison.notes if "another number of labelled cases" in note]
    assert note.startswith("weights=GL-MAE, 20 labelled")


def test_without_another_setting_numbers_of_labelled_cases_are_paired_with_the_first(finished_run):
    comparison = compared(*(finished_run(f"s{count}", count=count) for count in (5, 1, 9)))
    assert [(pair.group.count, pair.reference.count) for pair in comparison.pairs] == [(1, 5), (9, 5)]


def test_seeds_of_one_setting_have_a_mean_and_no_comparison(finished_run):
    comparison = compared(finished_run("a"), finished_run("b", seed=1))
    assert (len(comparison.summaries), comparison.pairs) == (1, [])


def test_few_cases_are_said_to_be_too_few_for_a_test(finished_run):
    def notes(num_cases, num_groups):
        paths = [
            finished_run(f"{num_cases}-{number}", num_cases=num_cases, setting={"lr": number}, gain=0.01 * number)
            for number in range(num_groups)
        ]
        return [note for note in compared(*paths).notes if "signed-rank" in note]

    assert "With 5 cases the signed-rank test cannot give a p below 0.062" in notes(5, 2)[0]
    assert "With 6 cases and 2 comparisons the signed-rank test cannot give a p below 0.062" in notes(6, 3)[0]
    assert "With one case the" in notes(1, 2)[0]
    assert "there is no interval" in notes(1, 2)[0]
    assert not notes(6, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"leakage": {"checked": True, "overlap": 3, "allowed": True}}, "b (3) of 8 cases"),
        ({"leakage": {"checked": False, "overlap": 0, "allowed": False}}, "not known"),
        ({"labelled": {"count": 4, "hash": "other"}}, "4 labelled cases were trained on 2 different subsets"),
        ({"report": "best"}, "different weights"),
        ({"selected_on_evaluation": True}, "selected on the very cases"),
        ({"classes": ("liver", "spleen")}, "left out: aorta"),
        ({}, "One seed only: weights=scratch | weights=GL-MAE."),
    ],
)
def test_what_a_reader_has_to_know_is_in_the_notes(finished_run, change, words):
    paths = finished_run("a"), finished_run("b", setting=GLMAE, **change)
    assert any(words in note for note in compared(*paths).notes)
    if change:
        plain = finished_run("plain", setting=GLMAE)
        assert not any(words in note for note in compared(paths[0], plain).notes)


def test_an_unknown_metric_is_refused(finished_run):
    with pytest.raises(ValueError, match="metric is 'iou', allowed are dice, hd95_mm, nsd"):
        compared(finished_run("a"), finished_run("b", seed=1), metric="iou")


def test_a_case_without_a_score_is_left_out_of_the_pairs(finished_run):
    one, other = finished_run("a"), finished_run("b", setting=GLMAE, gain=0.05)
    results = json.loads((other / "metrics.json").read_text())
    for name in results["classes"]:
        results["cases"][2]["dice"]["per_class"][name] = None
    (other / "metrics.json").write_text(json.dumps(results))
    (pair,) = compared(one, other).pairs
    assert pair.cases == [f"case_{number:02d}" for number in (0, 1, 3, 4, 5, 6, 7)]
    assert pair.interval.mean == pytest.approx(0.05 * (1 + 0.1 * np.mean([0, 1, 3, 4, 5, 6, 7])))
    assert pair.wins_ties_losses == (7, 0, 0)
