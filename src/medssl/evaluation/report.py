"""The report of a comparison: Markdown, one self-contained HTML page, and a few lines for the terminal."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.evaluation.comparison import LARGER_IS_BETTER, Comparison, Pair
from medssl.evaluation.groups import LEAKED
from medssl.evaluation.plots import class_plot, difference_plot, efficiency_plot
from medssl.evaluation.results import mean_present
from medssl.evaluation.scores import METRICS
from medssl.evaluation.statistics import Interval

TITLE = "Comparison of segmentation runs"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
svg { width: 100%; height: auto; }
figure { display: inline-block; margin: 0.5rem 1rem 0.5rem 0; } figcaption { font-size: 0.85rem; }
figure img { margin-right: 4px; background: #000; } svg.histogram { width: 150px; height: 100px; fill: #4a6fa5; }
"""


@dataclass(frozen=True)
class Section:
    """A heading with its content: text, a list, a table (its first row is the header), a picture."""

    title: str
    text: str = ""
    points: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    picture: str = ""


def sections(comparison: Comparison, *, pictures: bool) -> list[Section]:
    """Return all parts of the report in their order, with pictures if these can be shown."""
    metric, level = metric_name(comparison, comparison.metric), f"{100 * comparison.resampling.confidence:g} %"
    better = "higher" if LARGER_IS_BETTER[comparison.metric] else "lower"
    parts = [Section("What is compared", points=_facts(comparison))]
    if comparison.notes:
        parts.append(Section("To be read with the numbers", points=comparison.notes))
    parts.append(
        Section(
            "Groups",
            f"Mean over cases of each case's mean over classes and seeds, with its {level} interval.",
            table=_group_table(comparison),
        )
    )
    if len({group.count for group in comparison.groups}) > 1:
        text = f"Mean {metric} with its {level} interval against the number of labelled training cases."
        plot = efficiency_plot(comparison) if pictures else ""
        parts.append(Section("Label efficiency", text, table=_efficiency_table(comparison), picture=plot))
    if comparison.pairs:
        text = (
            f"{metric}, {better} is better: group minus reference, paired by case, each case the mean over seeds. "
            "Wilcoxon signed-rank test, two-sided; Holm's correction for "
            f"{_counted(len(comparison.pairs), 'comparison')}. "
            "Wins, ties and losses count cases in which the group is better, equal, worse. The test takes the trained "
            "networks as they are; the interval also asks what other seeds would change."
        )
        plot = difference_plot(comparison) if pictures else ""
        parts.append(Section("Paired differences", text, table=_pair_table(comparison), picture=plot))
    text = f"Mean {metric} over the cases that have the class, and over seeds; {better} is better."
    plot = class_plot(comparison) if pictures else ""
    parts.append(Section("Classes", text, table=_class_table(comparison), picture=plot))
    text = f"{metric} of every case: mean over its classes, then over seeds."
    parts.append(Section("Cases", text, table=_case_table(comparison)))
    parts.append(Section("Runs", table=_run_table(comparison)))
    resampling = comparison.resampling
    parts.append(
        Section(
            "How the numbers are made",
            points=[
                comparison.results.get("convention", "The runs state no convention."),
                f"Intervals: percentiles of {resampling.num_bootstrap} bootstrap means (seed {resampling.seed}); cases "
                "and the seeds of each group are drawn anew together, and both groups of a pair get the same cases.",
            ],
        )
    )
    return parts


def _facts(comparison: Comparison) -> list[str]:
    results, split = comparison.results, comparison.results["split"]
    runs = [run for group in comparison.groups for run in group.runs]
    facts = [
        f"data: {', '.join(dict.fromkeys(data_name(run.results.get('data')) for run in runs))}",
        f"split: {split['name']} [{split['hash']}], {_counted(len(runs[0].cases), split['evaluated_on'] + ' case')}",
        f"classes: {len(comparison.groups[0].classes)}; tolerance of NSD: {results['tolerance_mm']:g} mm",
        f"runs: {len(runs)} in {_counted(len(comparison.groups), 'group')}; reference: {comparison.groups[0].label}",
    ]
    return (
        [*facts, f"equal in all runs: {'; '.join(comparison.shared_setting)}"] if comparison.shared_setting else facts
    )


def data_name(data: Any) -> str:
    """Return the name of the data as metrics.json states it, marked if they are procedural phantoms."""
    name, store = (data.get("name"), data.get("store", "")) if isinstance(data, dict) else (data, "")
    synthetic = any("phantom" in text for text in (str(name), Path(str(store)).name))
    return f"{name or 'not stated'}{' (synthetic data)' if synthetic else ''}"


def metric_name(comparison: Comparison, metric: str) -> str:
    """Return the name of a metric with its unit or tolerance."""
    return {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": f"NSD ({comparison.results['tolerance_mm']:g} mm)"}[metric]


def _group_table(comparison: Comparison) -> list[list[str]]:
    names = [metric_name(comparison, metric) for metric in METRICS]
    rows = [["group", "labelled", "seeds", "cases", *names]]
    for summary in comparison.summaries:
        group, count = summary.group, summary.group.count
        counts = ["–" if count is None else str(count), str(len(group.runs)), str(len(group.cases))]
        rows.append([group.label, *counts, *(_interval(summary.means[metric], metric) for metric in METRICS)])
    return rows


def _pair_table(comparison: Comparison) -> list[list[str]]:
    name = metric_name(comparison, comparison.metric)
    rows = [["group", "reference", "cases", f"difference of {name}", "p", "p (Holm)", "wins/ties/losses"]]
    return [
        *rows,
        *([pair.group.label, pair.reference.label, *_pair_cells(comparison, pair)] for pair in comparison.pairs),
    ]


def _pair_cells(comparison: Comparison, pair: Pair) -> list[str]:
    difference = _interval(pair.interval, comparison.metric, sign="+")
    tally = "/".join(map(str, pair.wins_ties_losses))
    return [str(len(pair.cases)), difference, _p(pair.p), _p(pair.corrected_p), tally]


def _class_table(comparison: Comparison) -> list[list[str]]:
    scored = [~np.isnan(group.class_scores(comparison.metric)).all(0) for group in comparison.groups]
    num_cases = np.any(scored, axis=0).sum(0)  # with the class in the truth or in a prediction
    rows = [["class", "cases", *(group.label for group in comparison.groups)]]
    for name, num in zip(comparison.groups[0].classes, num_cases, strict=True):
        values = [_number(summary.per_class[name], comparison.metric) for summary in comparison.summaries]
        rows.append([name, str(num), *values])
    means = [_number(summary.means[comparison.metric].mean, comparison.metric) for summary in comparison.summaries]
    return [*rows, ["mean over cases", str(len(comparison.groups[0].cases)), *means]]


def _case_table(comparison: Comparison) -> list[list[str]]:
    means = [mean_present(group.case_means(comparison.metric), 0) for group in comparison.groups]
    rows = [["case", *(group.label for group in comparison.groups)]]
    for case, values in zip(comparison.groups[0].cases, zip(*means, strict=True), strict=True):
        rows.append([case, *(_number(value, comparison.metric) for value in values)])
    return rows


def _efficiency_table(comparison: Comparison) -> list[list[str]]:
    counts = sorted({group.count for group in comparison.groups if group.count is not None})
    found = {
        (summary.group.setting_label, summary.group.count): _interval(
            summary.means[comparison.metric], comparison.metric
        )
        for summary in comparison.summaries
    }
    rows = [["setting", *(f"{count} labelled" for count in counts)]]
    for label in dict.fromkeys(group.setting_label for group in comparison.groups):
        mark = f" {LEAKED}" if any(g.leaked for g in comparison.groups if g.setting_label == label) else ""
        rows.append([f"{label}{mark}", *(found.get((label, count), "–") for count in counts)])
    return rows


def _run_table(comparison: Comparison) -> list[list[str]]:
    rows = [["run", "group", "seed", "labelled", "weights", *(metric_name(comparison, m) for m in METRICS)]]
    for group in comparison.groups:
        for run in group.runs:
            labelled, mark = run.results["labelled"], f" {LEAKED}" if run.leaked else ""
            subset = f"{labelled['count']} [{labelled.get('hash', '–')}]"
            means = [_number(run.results[metric]["mean"], metric) for metric in METRICS]
            cells = [group.label, str(run.results["seed"]), subset, str(run.results.get("report", "–"))]
            rows.append([f"{run.path}{mark}", *cells, *means])
    return rows


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float, metric: str, sign: str = "") -> str:
    return "–" if value != value else f"{value:{sign}.{2 if metric == 'hd95_mm' else 3}f}"


def _interval(interval: Interval, metric: str, sign: str = "") -> str:
    mean, low, high = (_number(value, metric, sign) for value in (interval.mean, interval.low, interval.high))
    return mean if low == "–" else f"{mean} [{low}, {high}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def to_markdown(comparison: Comparison) -> str:
    """Return the report as Markdown, without its pictures."""
    lines = [f"# {TITLE}"]
    for part in sections(comparison, pictures=False):
        lines += ["", f"## {part.title}"]
        lines += ["", part.text] if part.text else []
        lines += ["", *(f"- {point}" for point in part.points)] if part.points else []
        for number, row in enumerate(part.table):
            lines += [""] if number == 0 else []
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
            lines += [f"|---{'|---:' * (len(row) - 1)}|"] if number == 0 else []
    return "\n".join(lines) + "\n"


def to_html(comparison: Comparison) -> str:
    """Return the whole report as one page that loads nothing."""
    lines: list[str] = []
    for part in sections(comparison, pictures=True):
        lines.append(f"<h2>{html.escape(part.title)}</h2>")
        lines += [f"<p>{html.escape(part.text)}</p>"] if part.text else []
        lines += ["<ul>", *(f"<li>{html.escape(point)}</li>" for point in part.points), "</ul>"] if part.points else []
        lines += [html_table(part.table)] if part.table else []
        lines += [part.picture] if part.picture else []
    return html_page(TITLE, lines)


def html_page(title: str, lines: Sequence[str]) -> str:
    """Return a page with a heading and the given lines of HTML, which loads nothing."""
    head = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *lines, "</body>\n</html>\n"])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML, its first row the heading; cells are escaped."""

    def line(row: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"

    lines = [f"<thead>{line(rows[0], 'th')}</thead>", "<tbody>", *(line(row, "td") for row in rows[1:]), "</tbody>"]
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def to_terminal(comparison: Comparison) -> str:
    """Return groups, pairs and notes as plain lines."""
    tables = [_group_table(comparison)]
    if comparison.pairs:
        tables.append(_pair_table(comparison))
    lines = _facts(comparison)
    for table in tables:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += [""]
        for row in table:
            cells = [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells))
    return "\n".join([*lines, "", *(f"note: {note}" for note in comparison.notes)])
