"""Pages that say how to add something of one's own work byte for byte, from an empty folder."""

import pytest
from pages import DOCS, follow, steps

PAGES = ["your-own-data.md", "your-own-method.md", "your-own-network.md"]


def test_every_page_about_something_of_ones_own_is_tried():
    assert sorted(page.name for page in DOCS.glob("your-own-*.md") if page.name != "your-own-loop.md") == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_the_page_works_from_an_empty_folder(page, tmp_path):
    done = list(steps(page))
    assert {step.kind for step in done} == {"file", "command", "program"}
    printed = follow(page, tmp_path)
    assert len(printed) == sum(step.kind != "file" for step in done)
    commands = [step.text for step in done if step.kind == "command"]
    assert all("python -m medssl." in command for command in commands)
    outputs = [word.partition("=")[2] for text in commands for word in text.split() if word.startswith("output_dir=")]
    assert outputs
    assert all(any((tmp_path / output).iterdir()) for output in outputs)
