"""The pages of a comparison: what stands in them, and that they need nothing else."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from medssl.evaluation.comparison import compare_groups
from medssl.evaluation.groups import read_groups
from medssl.evaluation.plots import class_plot, difference_plot, efficiency_plot
from medssl.evaluation.report import data_name, to_html, to_markdown, to_terminal
from medssl.evaluation.statistics import Resampling

GLMAE = {"weights": "GL-MAE | <b>$x$</b>"}


@pytest.fixture
def comparison(finished_run):
    leak = {"checked": True, "overlap": 2, "allowed": True}
    paths = [finished_run(f"scratch-{count}", count=count, gain=0.02 * count) for count in (1, 4)]
    paths += [finished_run(f"glmae-{c}", count=c, setting=GLMAE, gain=0.02 * c + 0.04, leakage=leak) for c in (1, 4)]
    return compare_groups(read_groups(paths), metric="dice", resampling=Resampling(num_bootstrap=200))


def test_the_markdown_page_holds_every_number_with_its_unit_and_convention(comparison):
    text = to_markdown(comparison)
    for words in (
        "phantoms (synthetic data)",
        "5fold-0 [0123456789ab], 8 validation cases",
        "equal in all runs: max_steps=300; model=unet",
        "| group | labelled | seeds | cases | Dice | HD95 (mm) | NSD (1 mm) |",
        "95 % interval",
        "Holm's correction for 2 comparisons",
        "absent in both",
        "case_07",
        "subset4",
        r"GL-MAE \| <b>$x$</b>, 4 labelled †",
        "200 bootstrap means (seed 0)",
    ):
        assert words in text, words
    assert (
        len(re.findall(r"\| 8 \| \+0\.054 \[\+0\.0(?:47|48), \+0\.0(?:59|60)\] \| 0\.008 \| 0\.016 \| 8/0/0 \|", text))
        == 2
    )
    assert "nan" not in text


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(comparison):
    blocks = [block for block in to_markdown(comparison).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_html_page_is_well_formed_and_loads_nothing(comparison):
    page = to_html(comparison)
    assert page.count("<svg") == 3
    assert "<b>$x" not in page
    loading = re.findall(r'(?:src|href|data)="(?!#)[^"]*"|url\((?!#)[^)]*\)|@import|<script|<link|<metadata', page)
    assert not loading
    ElementTree.fromstring(re.sub(r"<meta[^>]*>", "", page).removeprefix("<!DOCTYPE html>"))

    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(page)
    assert tags.count("table") == 6
    assert {"h1", "h2", "svg", "style"} <= set(tags)


def test_the_same_comparison_gives_the_same_page(comparison):
    assert to_html(comparison) == to_html(comparison)


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (difference_plot, ["difference of Dice; better to the right"]),
        (class_plot, ["mean Dice of the class", "liver", "aorta"]),
        (efficiency_plot, ["labelled training cases", "mean Dice", ">1<", ">4<", "weights=scratch"]),
    ],
)
def test_a_plot_is_one_scalable_element_that_says_what_it_shows(comparison, plot, words):
    element = plot(comparison)
    assert element.startswith("<svg")
    assert element.endswith("</svg>")
    assert not re.search(r'<svg[^>]* (?:width|height)="', element)
    assert all(word in element for word in words), element[:500]


def test_a_dot_is_drawn_for_every_case(comparison):
    dots = re.findall(
        r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="[^"]*fill-opacity', difference_plot(comparison)
    )
    assert len(dots) == 2 * 8


def test_the_terminal_shows_groups_pairs_and_notes(comparison):
    lines = to_terminal(comparison).splitlines()
    assert any(line.startswith("group") and "HD95 (mm)" in line for line in lines)
    assert any("8/0/0" in line and "+0.054" in line for line in lines)
    assert any(line.startswith("note: † Leakage") for line in lines)


def test_seeds_of_one_setting_alone_make_a_page_without_pairs(finished_run):
    groups = read_groups([finished_run("a"), finished_run("b", seed=1)])
    page = to_html(compare_groups(groups, metric="nsd", resampling=Resampling(num_bootstrap=200)))
    assert page.count("<svg") == 1
    assert "Paired differences" not in page
    assert "Label efficiency" not in page


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"name": "btcv", "store": "stores/btcv-1"}, "btcv"),
        ({"name": "store", "store": "stores/phantoms-3f"}, "store (synthetic data)"),
        ("phantoms", "phantoms (synthetic data)"),
        (None, "not stated"),
    ],
)
def test_phantoms_are_called_synthetic(data, name):
    assert data_name(data) == name
