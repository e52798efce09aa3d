import csv

import pytest

from medssl.training.metrics import MetricsTable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_as_soon_as_they_are_added(path):
    table = MetricsTable(path)
    for step in (1, 2):
        table.add({"step": step, "loss": step / 2})
        assert len(read(path)) == step
    assert path.read_text().splitlines() == ["step,loss", "1,0.5", "2,1.0"]


def test_a_new_column_keeps_the_rows_before_it(path):
    table = MetricsTable(path)
    table.add({"step": 1, "loss": 0.5})
    table.add({"step": 2, "loss": 0.4, "late": 7})
    table.add({"step": 3, "loss": 0.3})
    assert [row["late"] for row in read(path)] == ["", "7", ""]
    assert [row["loss"] for row in read(path)] == ["0.5", "0.4", "0.3"]


def test_amending_changes_the_last_row_only(path):
    table = MetricsTable(path)
    table.add({"step": 1, "loss": 0.5, "validation_loss": ""})
    table.add({"step": 2, "loss": 0.25, "validation_loss": ""})
    table.amend(validation_loss=0.125)
    table.add({"step": 3, "loss": 0.1, "validation_loss": ""})
    assert [tuple(row.values()) for row in read(path)] == [("1", "0.5", ""), ("2", "0.25", "0.125"), ("3", "0.1", "")]


def test_going_on_drops_later_rows_and_a_line_that_was_cut_off(path):
    path.write_text("step,loss,lr\n1,0.5,1\n2,0.4,1\n3,0.3,1\n4,0.")
    table = MetricsTable(path)
    table.take_back(step=2)
    table.add({"step": 3, "loss": 0.35, "lr": 2})
    assert path.read_text().splitlines() == ["step,loss,lr", "1,0.5,1", "2,0.4,1", "3,0.35,2"]


def test_taking_back_to_the_start_of_a_file_that_does_not_exist_is_fine(path):
    MetricsTable(path).take_back(step=0)
    assert not path.exists()
