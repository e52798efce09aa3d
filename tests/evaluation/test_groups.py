"""Which runs form a group, what groups are called, and which runs are not compared."""

import json

import numpy as np
import pytest

from medssl.evaluation.groups import read_groups


def test_runs_that_differ_in_nothing_but_the_seed_are_one_group(finished_run):
    glmae = {"weights": "GL-MAE"}
    paths = [
        finished_run("a", seed=0),
        finished_run("b", seed=0, setting=glmae, gain=0.1),
        finished_run("c", seed=1),
        finished_run("d", seed=2, setting=glmae, gain=0.1),
    ]
    first, second = read_groups(paths)
    assert [[run.path.name for run in group.runs] for group in (first, second)] == [["a", "c"], ["b", "d"]]
    assert (first.label, second.label) == ("weights=scratch", "weights=GL-MAE")
    assert first.class_scores("dice").shape == (2, 8, 3)
    np.testing.assert_allclose(first.case_means("dice")[0], 0.63 + 0.02 * np.arange(8))


def test_the_first_run_names_the_reference_and_the_others_follow_by_setting_and_count(finished_run):
    paths = [finished_run("a", count=5)]
    for count in (10, 1):
        paths += [finished_run(f"b{count}", count=count, setting={"lr": 1e-4}), finished_run(f"a{count}", count=count)]
    groups = read_groups(paths)
    assert [group.label for group in groups] == [
        "lr not stated, 5 labelled",
        "lr not stated, 1 labelled",
        "lr not stated, 10 labelled",
        "lr=0.0001, 1 labelled",
        "lr=0.0001, 10 labelled",
    ]


def test_labels_hold_the_entries_that_differ_and_no_others(finished_run):
    settings = [{}, {"model": "resenc"}, {"model": "resenc", "decoder_lr": None}]
    paths = [finished_run(f"run{number}", setting=setting) for number, setting in enumerate(settings)]
    assert [group.label for group in read_groups(paths)] == [
        "model=unet; decoder_lr not stated",
        "model=resenc; decoder_lr not stated",
        "model=resenc; decoder_lr=null",
    ]
    groups = read_groups([finished_run("few", count=1), finished_run("many", count=9)])
    assert [group.label for group in groups] == ["weights=scratch, 1 labelled", "weights=scratch, 9 labelled"]


def test_cases_are_paired_by_name_not_by_their_order_in_the_file(finished_run):
    one, other = finished_run("one"), finished_run("other", setting={"weights": "GL-MAE"})
    results = json.loads((other / "metrics.json").read_text())
    results["cases"].reverse()
    (other / "metrics.json").write_text(json.dumps(results))
    first, second = read_groups([one, other])
    np.testing.assert_array_equal(first.case_means("nsd"), second.case_means("nsd"))


def test_only_common_classes_are_compared(finished_run):
    paths = [finished_run("a"), finished_run("b", classes=("aorta", "liver", "kidney"), seed=1)]
    (group,) = read_groups(paths)
    assert group.classes == ["liver", "aorta"]
    assert group.class_scores("dice")[0, 0].tolist() == pytest.approx([0.6, 0.66])


def test_leaked_runs_are_marked(finished_run):
    leak = {"checked": True, "overlap": 2, "allowed": True}
    groups = read_groups([finished_run("a"), finished_run("b", setting={"weights": "GL-MAE"}, leakage=leak)])
    assert [group.label for group in groups] == ["weights=scratch", "weights=GL-MAE †"]
    assert [group.leaked for group in groups] == [False, True]


def split(**change):
    return {"name": "5fold-0", "hash": "0123456789ab", "evaluated_on": "validation", "num_cases": 8} | change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": split(hash="ffff", name="5fold-1")}, ["splits differ", "5fold-0 [0123456789ab]", "5fold-1 [ffff]"]),
        ({"split": split(evaluated_on="test")}, ["evaluated_on differs: validation", "test in"]),
        ({"tolerance_mm": 2.0}, ["tolerance_mm differs: 1.0"]),
        ({"num_cases": 6}, ["b lacks 2 of the cases", "case_06, case_07"]),
        ({"num_cases": 9}, ["a lacks 1 of the cases", "case_08"]),
        ({"classes": ("heart",)}, ["no class in common"]),
        ({}, ["one setting and one seed, 0"]),
        ({"seed": 3, "labelled": {"hash": "x"}}, ["does not state labelled (count)"]),
        ({"seed": 3, "setting": None, "labelled": None}, ["does not state labelled"]),
        ({"split": None}, ["does not state split (hash, evaluated_on, name)"]),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_line(finished_run, change, words):
    with pytest.raises(ValueError) as caught:
        read_groups([finished_run("a"), finished_run("b", **change)])
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_one_run_is_no_comparison(finished_run):
    with pytest.raises(ValueError, match="two runs or more, got 1"):
        read_groups([finished_run("a")])


def test_a_folder_without_results_is_named(finished_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no metrics\.json"):
        read_groups([finished_run("a"), tmp_path / "empty"])
