"""The results of one run: the content of metrics.json and cases.csv, and how they are written and read."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from medssl.data.atomic import write_text
from medssl.evaluation.scores import CONVENTION, METRICS, CaseScores


def summarise(cases: Sequence[tuple[str, CaseScores]], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the entries of metrics.json on the scores: of all cases, of each class, and of each case.

    `class_names` are the names of the class indices 1, 2, ...; the background is not scored. A missing value is NaN.

    Raises:
        ValueError: There is no case, a name comes twice, or scores have another number of classes or several
            tolerances.
    """
    names, scores = [name for name, _ in cases], [score for _, score in cases]
    if not cases:
        raise ValueError("there is no case to summarise; the list of cases to evaluate on is empty")
    for kind, given in (("case", names), ("class", list(class_names))):
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"two {kind} names are equal: {', '.join(twice)}; names tell them apart in every table")
    if wrong := [name for name, score in cases if len(score.dice) != len(class_names)]:
        raise ValueError(f"case {wrong[0]} has no scores for the {len(class_names)} classes {', '.join(class_names)}")
    if len(tolerances := {score.tolerance_mm for score in scores}) > 1:
        raise ValueError(f"tolerance_mm differs between cases: {sorted(tolerances)}; score all with one")
    tables = {metric: np.stack([getattr(score, metric) for score in scores]) for metric in METRICS}
    return {
        **{metric: _summary(table, class_names) for metric, table in tables.items()},
        "cases": [
            {"case": name, **{metric: _summary(table[[row]], class_names) for metric, table in tables.items()}}
            for row, name in enumerate(names)
        ],
        "classes": list(class_names),
        "cases_with_class": dict(zip(class_names, np.isfinite(tables["dice"]).sum(0).tolist(), strict=True)),
        "tolerance_mm": tolerances.pop(),
        "convention": CONVENTION,
    }


def mean_present(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Return the mean along `axis` of the values that are not NaN; NaN if there are none."""
    present = ~np.isnan(values)
    count = present.sum(axis)
    return np.where(count > 0, np.where(present, values, 0).sum(axis) / np.maximum(count, 1), np.nan)


def _summary(table: Float[np.ndarray, "cases classes"], class_names: Sequence[str]) -> dict[str, Any]:
    per_class = mean_present(table, 0).tolist()
    mean = float(mean_present(mean_present(table, 1), 0))
    return {"mean": mean, "per_class": dict(zip(class_names, per_class, strict=True))}


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write cases.csv and metrics.json into `folder`, each all or nothing; missing values are empty and null."""
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    classes = results["classes"]
    writer.writerow(["case", "tolerance_mm", *METRICS, *(f"{metric}:{name}" for metric in METRICS for name in classes)])
    for record in results["cases"]:
        means = [record[metric]["mean"] for metric in METRICS]
        values = [*means, *(record[metric]["per_class"][name] for metric in METRICS for name in classes)]
        writer.writerow(
            [record["case"], results["tolerance_mm"], *("" if math.isnan(value) else value for value in values)]
        )
    write_text(folder / "cases.csv", table.getvalue())
    text = json.dumps(_plain(results), indent=2, sort_keys=True, allow_nan=False)
    write_text(folder / "metrics.json", text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def read_results(path: Path) -> dict[str, Any]:
    """Return the results that `write_results` wrote, from a run folder or its metrics.json; missing scores are NaN.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    file = path / "metrics.json" if path.is_dir() or path.suffix != ".json" else path
    if not path.exists():
        raise ValueError(f"{path} does not exist; give the folder of a finished fine-tuning run")
    if not file.is_file():
        raise ValueError(f"{path} holds no metrics.json; give the folder of a fine-tuning run that has finished")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{file} cannot be read as JSON ({error}); evaluate the run again") from error
    needed = {*METRICS, "cases", "classes", "tolerance_mm"}
    if not isinstance(results, dict) or not needed <= set(results):
        lacking = sorted(needed - set(results)) if isinstance(results, dict) else sorted(needed)
        raise ValueError(f"{file} lacks {', '.join(lacking)}; is it the metrics.json of a fine-tuning run?")
    try:
        for record in (results, *results["cases"]):
            for metric in METRICS:
                record[metric]["mean"] = _number(record[metric]["mean"])
                record[metric]["per_class"] = {
                    name: _number(record[metric]["per_class"][name]) for name in results["classes"]
                }
        _ = [record["case"] for record in results["cases"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged: a score is not where it should be ({error!r}); evaluate the run again"
        ) from error
    return results


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
