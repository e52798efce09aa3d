"""Pages that say how to add something of one's own work byte for byte, from an empty folder."""

import pytest
from pages import DOCS, follow, follow_here, steps

PAGES = ["your-own-data.md", "your-own-method.md", "your-own-network.md"]


def test_every_page_about_something_of_ones_own_is_tried():
    assert sorted(page.name for page in DOCS.glob("your-own-*.md") if page.name != "your-own-loop.md") == PAGES


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_by_its_own_command_lines(page, tmp_path):
    check(page, tmp_path, follow(page, tmp_path))


@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_in_one_process(page, tmp_path, monkeypatch):
    check(page, tmp_path, follow_here(page, tmp_path, monkeypatch))


def check(page, folder, num_done):
    """All kinds of steps were done, and each command left its results."""
    done = list(steps(page))
    assert {step.kind for step in done} == {"file", "command", "program"}
    assert num_done == sum(step.kind != "file" for step in done)
    commands = [step.text for step in done if step.kind == "command"]
    assert all("python -m medssl." in command for command in commands)
    outputs = [word.partition("=")[2] for text in commands for word in text.split() if word.startswith("output_dir=")]
    assert outputs
    assert all(any((folder / output).iterdir()) for output in outputs)
