"""The recorder of ten steps: what it prints, and that it writes only where it is asked to."""

import json

import pytest
import record
from recorded_steps import GOLDEN, TenSteps, read_recorded, recorded_file

TERMS = ("image", "points")
LOSSES = [[1.0, 0.5 + step] for step in range(10)]


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Runs the recorder on one configuration, `toy`, whose steps give `losses` now, and returns its golden file."""
    file = recorded_file("toy", tmp_path)
    record.write_losses(file, TERMS, LOSSES)
    toy = TenSteps(name="toy", values=dict, batch=lambda step: {}, rel=5e-3)

    def run(losses, *arguments):
        monkeypatch.setattr(record, "take", lambda steps, terms: losses)
        record.main(arguments, folder=tmp_path, every=[toy])
        return file

    return run


def test_steps_that_give_the_same_losses_leave_the_file_as_it_is(again, tmp_path, capsys):
    before = recorded_file("toy", tmp_path).read_bytes()
    file = again([[image + 4e-7, points] for image, points in LOSSES], "toy", "--write")
    assert capsys.readouterr().out == "toy: no loss moved\n"
    assert file.read_bytes() == before


def test_what_moved_is_printed_a_term_and_written_only_on_request(again, tmp_path, capsys):
    moved = [[image, points + 0.001 * (step == 3)] for step, (image, points) in enumerate(LOSSES)]
    before = recorded_file("toy", tmp_path).read_bytes()
    file = again(moved, "toy")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["toy:", "  image: did not move"]
    assert said[2].startswith("  points: moved by up to 0.001 (step 3: 3.5 -> 3.501), relatively by up to 0.000286;")
    assert said[2].endswith("its test allows that")
    assert said[3].startswith("nothing was written; python -m tests.record toy --write")
    assert file.read_bytes() == before
    again(moved, "toy", "--write")
    assert "nothing was written" not in capsys.readouterr().out
    assert read_recorded("toy", tmp_path)["losses"] == moved
    assert read_recorded("toy", tmp_path)["terms"] == list(TERMS)
    again(moved)
    assert capsys.readouterr().out == "toy: no loss moved\n"


def test_a_loss_outside_the_tolerance_of_its_test_is_said_so(again, capsys):
    again([[image * 1.01, points] for image, points in LOSSES])
    assert "its test FAILS" in capsys.readouterr().out


def test_a_file_of_terms_alone_is_recorded_for_the_first_time(again, tmp_path, capsys):
    recorded_file("toy", tmp_path).write_text(json.dumps({"terms": TERMS, "losses": []}))
    again(LOSSES, "toy", "--write")
    assert "not recorded before" in capsys.readouterr().out
    assert read_recorded("toy", tmp_path)["losses"] == LOSSES


def test_an_unknown_configuration_and_a_writing_without_names_are_refused(again, capsys):
    with pytest.raises(SystemExit) as stop:
        again(LOSSES, "tox")
    assert stop.value.code == 2
    assert "no ten steps are recorded of tox; allowed are toy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        again(LOSSES, "--write")
    assert "name the configurations that it may replace" in capsys.readouterr().err


def test_every_recorded_configuration_is_found():
    names = {file.name.removesuffix("_ten_steps.json") for file in GOLDEN.glob("*_ten_steps.json")}
    assert {steps.name for steps in record.find_steps()} == names
