"""The command that compares runs: what it writes, what it refuses."""

import subprocess
import sys

import pytest

from medssl.compare import run
from medssl.config import main

QUICK = ["num_bootstrap=200"]


@pytest.fixture
def two_runs(finished_run):
    return [str(finished_run("scratch")), str(finished_run("glmae", setting={"weights": "GL-MAE"}, gain=0.05))]


def compare(*arguments):
    main("compare", run, arguments=[*QUICK, *map(str, arguments)], positional="runs")


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        compare(*arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


def test_two_runs_are_compared_from_the_command_line(two_runs, tmp_path):
    command = [sys.executable, "-m", "medssl.compare", *two_runs, "num_bootstrap=200"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "+0.068" in done.stdout
    assert done.stdout.splitlines()[-2:] == ["wrote comparison/comparison.md", "wrote comparison/comparison.html"]
    assert "8/0/0" in (tmp_path / "comparison" / "comparison.md").read_text()
    assert "</html>" in (tmp_path / "comparison" / "comparison.html").read_text()


def test_the_metric_and_the_confidence_can_be_chosen(two_runs, tmp_path, capsys):
    compare(*two_runs, f"output_dir={tmp_path}/out", "metric=hd95_mm", "confidence=0.9")
    assert "difference of HD95 (mm)" in capsys.readouterr().out
    assert "90 % interval" in (tmp_path / "out" / "comparison.md").read_text()


def test_pages_are_replaced_only_when_that_is_asked_for(two_runs, tmp_path, capsys):
    out = f"output_dir={tmp_path}/out"
    compare(*two_runs, out)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "comparison.md already exists" in refusal(capsys, *two_runs, out)
    compare(*two_runs, out, "metric=nsd", "overwrite=true")
    assert "Mean NSD (1 mm)" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["metric=iou"], "metric is 'iou', allowed are dice"),
        (["num_bootstrap=3"], "num_bootstrap=3 must be at least 100"),
        (["num_bootstrap=many"], "num_bootstrap must be a whole number from 0 up; got 'many'"),
        (["confidence=95"], "confidence=95 must lie between 0 and 1"),
        (["gone"], "runs: there is no folder of a run gone"),
        (["metrics=dice"], "did you mean 'metric'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(two_runs, tmp_path, capsys, arguments, words):
    assert words in refusal(capsys, *two_runs, f"output_dir={tmp_path}/out", *arguments)
    assert not (tmp_path / "out").exists()


def test_one_run_or_none_is_refused(two_runs, capsys):
    assert "takes two runs or more, got 1" in refusal(capsys, two_runs[0])
    assert "got 0" in refusal(capsys)


def test_an_output_folder_that_is_a_file_is_refused(two_runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refusal(capsys, *two_runs, f"output_dir={tmp_path}/file")


def test_the_help_shows_where_the_runs_stand_and_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        compare("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m medssl.compare RUNS ... KEY=VALUE" in text
    for key in ("runs", "output_dir", "overwrite", "metric", "num_bootstrap", "confidence", "seed"):
        assert f"\n  {key} " in text
