"""What metrics.json and cases.csv hold, against values worked out by hand."""

import csv
import json
import math

import numpy as np
import pytest

from medssl.evaluation.results import mean_present, read_results, summarise, write_results
from medssl.evaluation.scores import CaseScores

NAN = math.nan


def scores(dice, *, tolerance_mm=1.0):
    dice = np.array(dice, dtype=float)
    return CaseScores(dice, 10 * (1 - dice), dice / 2, tolerance_mm)


@pytest.fixture
def results():
    cases = [("b", scores([0.5, NAN, NAN])), ("a", scores([1.0, 0.0, NAN])), ("c", scores([NAN, NAN, NAN]))]
    return summarise(cases, ["liver", "aorta", "spleen"])


def test_the_mean_is_over_cases_of_the_mean_over_the_classes_that_a_case_has(results):
    assert results["dice"]["mean"] == pytest.approx((0.5 + (1.0 + 0.0) / 2) / 2)
    assert results["dice"]["per_class"]["liver"] == pytest.approx(0.75)
    assert results["dice"]["per_class"]["aorta"] == 0
    assert results["hd95_mm"]["mean"] == pytest.approx(5)
    assert results["nsd"]["mean"] == pytest.approx(0.25)
    assert results["cases_with_class"] == {"liver": 2, "aorta": 1, "spleen": 0}
    assert [record["case"] for record in results["cases"]] == ["b", "a", "c"]
    assert results["cases"][1]["dice"]["mean"] == 0.5
    assert math.isnan(results["dice"]["per_class"]["spleen"])
    assert math.isnan(results["cases"][2]["nsd"]["mean"])
    assert "absent in both" in results["convention"]


def test_a_missing_value_is_null_in_json_and_an_empty_cell_in_csv(results, tmp_path):
    write_results(tmp_path / "run", {**results, "seed": np.int64(3), "split": {"hash": "ab", "num_cases": 3}})
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert "NaN" not in text
    written = json.loads(text)
    assert list(written) == sorted(written)
    assert written["dice"]["per_class"]["spleen"] is None
    assert (written["seed"], written["tolerance_mm"]) == (3, 1.0)
    rows = list(csv.DictReader((tmp_path / "run" / "cases.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == ["b", "a", "c"]
    assert (rows[0]["dice"], rows[0]["dice:liver"], rows[0]["dice:aorta"]) == ("0.5", "0.5", "")
    assert (rows[2]["nsd"], rows[1]["hd95_mm:aorta"], rows[1]["tolerance_mm"]) == ("", "10.0", "1.0")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["cases.csv", "metrics.json"]


def test_results_are_read_back_as_they_were_written(results, tmp_path):
    write_results(tmp_path, results)
    for path in (tmp_path, tmp_path / "metrics.json"):
        read = read_results(path)
        np.testing.assert_equal(read, results)


def test_results_are_replaced_as_a_whole(results, tmp_path):
    write_results(tmp_path, {**results, "wall_s": 5})
    write_results(tmp_path, results)
    assert "wall_s" not in read_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no metrics.json"),
        ("{", "cannot be read as JSON"),
        ("[1]", "lacks"),
        ('{"dice": {}}', "lacks cases, classes, hd95_mm"),
        ('{"dice": {}, "hd95_mm": {}, "nsd": {}, "cases": [], "classes": [], "tolerance_mm": 1}', "damaged"),
        ('{"dice": 3, "hd95_mm": {}, "nsd": {}, "cases": 4, "classes": [], "tolerance_mm": 1}', "damaged"),
    ],
)
def test_a_missing_or_broken_file_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_results(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone does not exist"):
        read_results(tmp_path / "gone")


@pytest.mark.parametrize(
    ("cases", "classes", "words"),
    [
        ([], ["liver"], "no case"),
        ([("a", scores([1.0])), ("a", scores([1.0]))], ["liver"], "two case names are equal: a"),
        ([("a", scores([1.0, 0.5]))], ["liver", "liver"], "two class names are equal: liver"),
        ([("a", scores([1.0, 0.5]))], ["liver"], "case a"),
        ([("a", scores([1.0])), ("b", scores([1.0], tolerance_mm=2.0))], ["liver"], "tolerance_mm differs"),
    ],
)
def test_what_cannot_be_summarised_is_refused(cases, classes, words):
    with pytest.raises(ValueError, match=words):
        summarise(cases, classes)


def test_the_mean_of_what_is_present_warns_of_nothing():
    table = np.array([[1.0, NAN, 3.0], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(mean_present(table, 1), [2, NAN])
    np.testing.assert_array_equal(mean_present(table, 0), [1, NAN, 3])
