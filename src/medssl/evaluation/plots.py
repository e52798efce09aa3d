"""The pictures of a comparison, as SVG without outside resources."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medssl.evaluation.comparison import LARGER_IS_BETTER, Comparison, Summary
from medssl.evaluation.groups import LEAKED, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d5d5d", "#8c6d1f")
"""Colours that readers with colour blindness can distinguish."""
AXES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD"}


def _figure(height_inch: float, *, grid: Literal["x", "y"] = "x") -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height_inch), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """Return the SVG element alone, without prologue and links to vocabularies; it shrinks with the page."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # equal bytes for equal numbers; text stays text
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue()
    element = element[element.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.S)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element))


def _colours(comparison: Comparison) -> dict[Group, tuple[float, ...]]:
    """Return the colour of each group: one colour for a setting, paler for fewer labelled cases."""
    from matplotlib.colors import to_rgb

    settings = list(dict.fromkeys(group.setting_label for group in comparison.groups))
    counts = sorted({group.count or 0 for group in comparison.groups})
    colours = {}
    for group in comparison.groups:
        full = np.array(to_rgb(COLOURS[settings.index(group.setting_label) % len(COLOURS)]))
        strength = 0.4 + 0.6 * (counts.index(group.count or 0) + 1) / len(counts)
        colours[group] = tuple((1 - strength * (1 - full)).tolist())
    return colours


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 34)).replace("$", r"\$")  # no formula


def difference_plot(comparison: Comparison) -> str:
    """Return a plot with a row per pair: a dot for the difference of each case, a bar for the mean and its interval."""
    pairs = comparison.pairs
    figure, axes = _figure(1.2 + 0.8 * len(pairs))
    colours = _colours(comparison)
    for row, pair in enumerate(pairs):
        colour = colours[pair.group]
        spread = np.arange(len(pair.cases)) * 0.618 % 1  # neither in lines nor at random
        axes.plot(pair.differences, row + 0.3 * spread, "o", color=colour, alpha=0.6, markersize=4)
        axes.plot([pair.interval.low, pair.interval.high], [row - 0.22] * 2, color=colour, linewidth=3)
        axes.plot(pair.interval.mean, row - 0.22, "D", color=colour, markersize=7, markeredgecolor="white")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [_wrapped(f"{pair.group.label} − {pair.reference.label}") for pair in pairs])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    side = "right" if LARGER_IS_BETTER[comparison.metric] else "left"
    axes.set_xlabel(f"difference of {AXES[comparison.metric]}; better to the {side}")
    return _svg(figure, "differences")


def class_plot(comparison: Comparison) -> str:
    """Return a plot of the mean of every class, with a bar for each group."""
    summaries, classes = comparison.summaries, comparison.groups[0].classes
    figure, axes = _figure(1.2 + len(classes) * (0.12 + min(0.16 * len(summaries), 0.8)))
    height, colours = 0.8 / len(summaries), _colours(comparison)
    for number, summary in enumerate(summaries):
        places = np.arange(len(classes)) + (number - (len(summaries) - 1) / 2) * height
        values = np.nan_to_num([summary.per_class[name] for name in classes])
        axes.barh(places, values, height=0.9 * height, color=colours[summary.group], label=summary.group.label)
    axes.set_yticks(range(len(classes)), list(map(_wrapped, classes)))
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlabel(f"mean {AXES[comparison.metric]} of the class")
    _legend(figure, axes)
    return _svg(figure, "classes")


def efficiency_plot(comparison: Comparison) -> str:
    """Return a plot of the mean with its interval against the number of labelled cases, a line for each setting."""
    lines: dict[str, list[Summary]] = {}
    for summary in comparison.summaries:
        lines.setdefault(summary.group.setting_label, []).append(summary)
    counts = sorted({group.count for group in comparison.groups if group.count is not None})
    figure, axes = _figure(4, grid="y")
    for number, (label, summaries) in enumerate(lines.items()):
        points: Sequence[Any] = sorted(
            (summary.group.count, summary.means[comparison.metric])
            for summary in summaries
            if summary.group.count is not None
        )
        # a little apart on the logarithmic axis, so that intervals at one count do not cover each other
        places = [count * 1.03 ** (number - (len(lines) - 1) / 2) for count, _ in points]
        means = np.array([interval.mean for _, interval in points])
        bounds = [(interval.mean - interval.low, interval.high - interval.mean) for _, interval in points]
        colour, marker = COLOURS[number % len(COLOURS)], "os^Dv<>P"[number % 8]
        mark = f" {LEAKED}" if any(summary.group.leaked for summary in summaries) else ""
        errors = np.nan_to_num(np.array(bounds).reshape(-1, 2).T).clip(min=0)
        axes.errorbar(places, means, errors, color=colour, marker=marker, capsize=3, label=f"{label}{mark}")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("labelled training cases")
    axes.set_ylabel(f"mean {AXES[comparison.metric]}")
    _legend(figure, axes)
    return _svg(figure, "efficiency")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, list(map(_wrapped, labels)), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
