"""The report of a probe, for people and programs: a table, predictions as CSV, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl.evaluation.statistics import Interval
from medssl.probing.cross_validation import Probe
from medssl.probing.models import Classification, Regression, Survival

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medssl.probing.targets import Joined

NAMES = {
    "r2": "R2",
    "mae": "MAE",
    "spearman": "Spearman",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "within_one": "within one grade",
    "auc": "AUC",
    "concordance": "concordance",
}
COLOURS = ("#0072b2", "#e69f00", "#d55e00")


def score_table(columns: Mapping[str, Mapping[str, Interval]], *, confidence: float) -> str:
    """Return a table with a row per score and a column per entry of `columns`: mean and interval."""
    names = list(next(iter(columns.values())))
    rows = [["", *columns]]
    rows += [[NAMES[name], *(_text(scores[name]) for scores in columns.values())] for name in names]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"means over the repeats, {confidence:.0%} intervals over subjects"])


def score_values(probe: Probe, intervals: Mapping[str, Interval]) -> dict[str, Any]:
    """Return scores with intervals, of repeats and of folds, and the chosen penalties, as JSON values."""
    return {
        "scores": interval_values(intervals),
        "repeats": _plain(probe.repeat_scores()),
        "folds": _plain(probe.fold_scores()),
        "penalty": probe.penalty.tolist(),
    }


def interval_values(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    """Return intervals as JSON values; undefined values are null."""
    return {name: _plain({"mean": i.mean, "low": i.low, "high": i.high}) for name, i in intervals.items()}


def predictions_csv(probes: Mapping[str, Probe], joined: Joined) -> str:
    """Return a CSV table with a row per repeat and case: the fold, the truth, and each probe's prediction."""
    first = next(iter(probes.values()))
    task, text = first.task, io.StringIO()
    truth: list[np.ndarray]
    if isinstance(task, Classification):
        titles, truth = ["truth"], [np.array(task.classes)[task.truth]]
    elif isinstance(task, Survival):
        titles, truth = ["time", "event"], [task.time, task.event.astype(int)]
    else:
        assert isinstance(task, Regression)
        titles, truth = ["truth"], [task.truth]
    predicted = []
    for name, probe in probes.items():
        if isinstance(task, Classification):
            titles += [f"{name}_{kind}" for kind in ("class", *(f"probability_{label}" for label in task.classes))]
            chosen = np.array(task.classes)[probe.predicted.argmax(-1)]
            predicted += [chosen, *np.moveaxis(probe.predicted, -1, 0)]
        else:
            titles.append(name)
            predicted.append(probe.predicted)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["repeat", "case", "fold", *titles])
    for repeat, fold in enumerate(first.fold):
        for number, case in enumerate(joined.cases):
            values = [*(column[number] for column in truth), *(column[repeat, number] for column in predicted)]
            writer.writerow([repeat, case, fold[number], *(_cell(value) for value in values)])
    return text.getvalue()


def probe_figure(probes: Mapping[str, Probe], intervals: Mapping[str, Mapping[str, Interval]], target: str) -> Figure:
    """Return a figure, a panel per probe: predicted against true, a confusion matrix, or survival of thirds by risk."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(probes), 4.4), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(probes), squeeze=False)[0]
    for panel, (name, probe) in zip(panels, probes.items(), strict=True):
        if isinstance(probe.task, Classification):
            _draw_confusion(panel, probe, probe.task)
        elif isinstance(probe.task, Survival):
            _draw_survival(panel, probe, probe.task)
        else:
            assert isinstance(probe.task, Regression)
            _draw_scatter(panel, probe, probe.task)
        first = next(iter(intervals[name]))
        panel.set_title(f"{target}, {name}: {NAMES[first]} {_text(intervals[name][first])}", fontsize=9)
    return figure


def _draw_scatter(panel: Axes, probe: Probe, task: Regression) -> None:
    predicted = probe.predicted.mean(0)
    low, high = min(task.truth.min(), predicted.min()), max(task.truth.max(), predicted.max())
    panel.plot([low, high], [low, high], color="#5d5d5d", linewidth=0.8)
    panel.plot(task.truth, predicted, "o", color=COLOURS[0], alpha=0.6, markersize=4)
    panel.set(xlabel="true", ylabel="predicted, mean over the repeats")


def _draw_confusion(panel: Axes, probe: Probe, task: Classification) -> None:
    num = len(task.classes)
    table = np.zeros((num, num))
    for predicted in probe.predicted:
        np.add.at(table, (task.truth, predicted.argmax(1)), 1 / len(probe.predicted))
    share = table / table.sum(1, keepdims=True)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(num, num):
        dark = "white" if share[row, column] > 0.5 else "black"
        panel.text(column, row, f"{table[row, column]:.1f}", ha="center", va="center", color=dark, fontsize=8)
    panel.set_xticks(range(num), task.classes)
    panel.set_yticks(range(num), task.classes)
    panel.set(xlabel="predicted, cases a repeat", ylabel="true")


def _draw_survival(panel: Axes, probe: Probe, task: Survival) -> None:
    from lifelines import KaplanMeierFitter

    third = np.argsort(np.argsort(probe.predicted.mean(0))) * 3 // len(task.time)
    for number, name in enumerate(("low", "middle", "high")):
        if (rows := third == number).any():
            found = KaplanMeierFitter().fit(task.time[rows], task.event[rows]).survival_function_
            label = f"{name} risk, {rows.sum()} cases"
            panel.step(found.index, found.iloc[:, 0], where="post", color=COLOURS[number], label=label)
    panel.set(xlabel="time", ylabel="share without the event", ylim=(0, 1.02))
    panel.legend(fontsize=8, frameon=False)


def _text(interval: Interval) -> str:
    if np.isnan(interval.mean):
        return "undefined"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _plain(value: Any) -> Any:
    """Return the value with null in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and np.isnan(value) else value
