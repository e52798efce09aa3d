"""The probe command, from features and a CSV to a table, JSON, predictions and a picture."""

import csv
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from medssl.config import main
from medssl.extraction.feature_file import Features, load_features
from medssl.probe import run

FAST = ("num_repeats=2", "num_folds=3", "num_inner_folds=2", "num_bootstrap=200", "max_components=4")


@pytest.fixture
def folder(tmp_path):
    """Features `a` know the severity of 30 subjects, features `b` do not; subject 4 lacks location 1."""
    rng = np.random.default_rng(0)
    severity = rng.uniform(size=30)
    for name, gain in (("a", 5.0), ("b", 0.0)):
        feature = rng.normal(size=(30, 2, 4)).astype(np.float32)
        feature[..., 0] += gain * severity[:, None]
        valid = np.ones((30, 2), dtype=bool)
        valid[4, 1], feature[4, 1] = False, np.nan
        rows = [
            {"feature": f, "valid": v, "centre_mm": np.zeros((2, 3), np.float32), "voxel_hash": f"h{n}"}
            for n, (f, v) in enumerate(zip(feature, valid, strict=True))
        ]
        (tmp_path / name).mkdir()
        cases = [f"s{number:02d}" for number in range(30)]
        found = Features.of(cases, rows, coordinate=np.zeros((2, 3), np.float32))
        found.save(tmp_path / name, {"origin": {"weights": name}})
    lines = ["case,severity,grade,days,died,person"]
    for number, value in enumerate(severity[:-1]):
        days = rng.exponential(np.exp(-4 * value))
        lines.append(f"s{number:02d},{value:.4f},{int(3 * value)},{days:.4f},{int(number % 4 > 0)},p{number // 2}")
    lines[3] = "s02,,,,,"
    (tmp_path / "t.csv").write_text("\n".join([*lines, "stranger,1,1,1,1,p"]))
    return tmp_path


def probe(folder, *words, code=None):
    arguments = [f"features={folder / 'a'}", f"targets={folder / 't.csv'}", f"output_dir={folder / 'out'}", *FAST]
    if code is None:
        main("probe", run, arguments=[*arguments, *words])
        return json.loads((folder / "out" / "probe.json").read_text())
    with pytest.raises(SystemExit) as stop:
        main("probe", run, arguments=[*arguments, *words])
    assert stop.value.code == code
    return {}


def test_two_files_of_features_are_compared_on_the_same_folds(folder, capsys):
    found = probe(folder, "target=severity", f"reference={folder / 'b'}")
    printed = capsys.readouterr().out
    assert "1 left out, in the features and not in the targets: s29" in printed
    assert "1 left out, in the targets and not in the features: stranger" in printed
    assert "1 left out, without a value in the targets: s02" in printed
    assert "28 cases, 2 x 3 folds" in printed
    assert re.search(r"R2 +0\.\d{3} \[.*\] +-?0\.\d{3} \[.*\] +0\.\d{3} \[", printed)
    own, other = (found[name]["scores"]["r2"]["mean"] for name in ("features", "reference"))
    assert own > 0.5 > other
    assert found["difference"]["r2"]["mean"] == pytest.approx(own - other)
    assert found["difference"]["r2"]["low"] > 0
    assert found["inputs"]["features"]["card"] == {"origin": {"weights": "a"}}
    assert len(found["inputs"]["targets"]["sha256"]) == 64
    assert (folder / "out" / "probe.png").stat().st_size > 5000
    rows = list(csv.DictReader((folder / "out" / "predictions.csv").read_text().splitlines()))
    assert len(rows) == 2 * 28
    error = [abs(float(row["truth"]) - float(row["features"])) for row in rows if row["repeat"] == "0"]
    assert np.mean(error) == pytest.approx(found["features"]["repeats"][0]["mae"], rel=1e-3)
    folds = [int(row["fold"]) for row in rows if row["repeat"] == "1"]
    assert folds == found["fold"][1]


def test_equal_commands_write_equal_results(folder):
    first = probe(folder, "target=severity")
    assert probe(folder, "target=severity", "overwrite=true") | {"settings": 0} == first | {"settings": 0}


def test_grades_are_classes_in_order_and_subjects_stay_together(folder):
    found = probe(folder, "target=grade", "task=classification", "subject=person")
    assert list(found["features"]["scores"]) == ["accuracy", "auc", "balanced_accuracy", "within_one"]
    assert found["features"]["scores"]["auc"]["low"] > 0.5
    people = [int(case[1:]) // 2 for case in found["cases"]["used"]]
    assert all(len({(p, f) for p, f in zip(people, fold, strict=True)}) == len(set(people)) for fold in found["fold"])
    header = (folder / "out" / "predictions.csv").read_text().splitlines()[0]
    assert header.endswith("truth,features_class,features_probability_0,features_probability_1,features_probability_2")


def test_survival_is_probed_by_time_and_event(folder, capsys):
    found = probe(folder, "target=days", "event=died", "task=survival")
    assert found["features"]["scores"]["concordance"]["mean"] > 0.6
    assert "concordance" in capsys.readouterr().out


def test_one_location_is_probed_in_the_subjects_that_show_it(folder):
    found = probe(folder, "target=severity", "location=1")
    assert "s04" not in found["cases"]["used"]
    assert found["cases"]["left_out"]["without this feature in all files"] == ["s04"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=nothing"], r"has no column 'nothing'; it has case, severity"),
        (["target=person"], r"person='p0' of case s00 is no number"),
        (["target=person", "task=classification"], "classes of at least 4 cases"),
        (["target=severity", "task=survival"], "event=COLUMN"),
        (["target=days", "event=grade", "task=survival"], "must hold 1 where the event happened"),
        (["target=severity", "task=ranking"], "regression, classification, survival"),
        (["target=severity", "location=2"], "there are 2, from 0 on"),
        (["target=severity", "num_folds=1"], "num_folds=1 must be at least 2"),
        (["target=severity", "num_folds=40"], "28 subjects do not fill 40 folds"),
        (["target=severity", "reference=nowhere"], "reference: there is no folder or features.npz nowhere"),
        (["target=severity", "targets=nowhere.csv"], "there is no table"),
        (["target=severity", "case=person"], "two rows of case p0"),
    ],
)
def test_a_wrong_setting_is_one_line(folder, capsys, words, message):
    probe(folder, *words, code=2)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1, "before the progress bar"
    assert re.search(message, error[0])
    assert error[0].startswith("error: ")
    assert not (folder / "out").exists()


def test_results_are_not_replaced_unasked(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "probe.png").write_text("mine")
    probe(folder, "target=severity", code=2)
    assert "overwrite=true" in capsys.readouterr().err


def test_the_missing_extra_is_named_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lifelines", None)
    probe(folder, "target=severity", code=2)
    assert 'pip install "medssl[probe]"' in capsys.readouterr().err


def test_a_table_of_another_encoding_or_none_at_all_is_refused_in_one_line(folder, capsys):
    for name, content, said in (
        ("latin1.csv", "case,severity,höhe\ns00,0.5,1\n".encode("latin-1"), "line 1: not UTF-8; save the table with"),
        ("long.csv", b"case,severity\ns00," + b"1" * 200_000 + b"\n", "line 1: no table (field larger"),
    ):
        (folder / name).write_bytes(content)
        probe(folder, "target=severity", f"targets={folder / name}", code=2)
        error = capsys.readouterr().err
        assert error.startswith(f"error: {folder / name}, {said}"), error
        assert error.count("\n") == 1


def test_one_image_under_two_names_is_never_in_training_and_test_at_once(folder, capsys):
    features = load_features(folder / "a")
    copied = replace(features, voxel_hash=np.where(np.arange(30) == 7, "h6", features.voxel_hash))
    copied.save(folder / "a", {})
    probe(folder, "target=severity", code=2)
    assert "cases s06 and s07 hold the same voxels, in training and test at once" in capsys.readouterr().err
    probe(folder, "target=severity", "subject=person")
    with np.load(folder / "a" / "features.npz") as arrays:
        earlier = {name: arrays[name] for name in arrays if name != "voxel_hash"}
    np.savez(folder / "a" / "features.npz", **earlier)
    capsys.readouterr()
    probe(folder, "target=severity", "overwrite=true")
    assert "features hold no hashes of voxels: images under two names are not looked for\n" in capsys.readouterr().out
