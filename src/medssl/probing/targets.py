"""The targets of a probe: a table of cases, joined with their features."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from medssl.checks import choice
from medssl.data.text import read_text
from medssl.extraction.feature_file import Features
from medssl.probing.models import Classification, Regression, Survival, Task

MISSING = ("", "na", "nan", "none", "null")
TASKS = ("regression", "classification", "survival")
NAMED = 5
LEAST_OF_KIND = 4
"""Least number of cases of a class, or with an event, so that the inner training folds hold some."""


@dataclass(frozen=True)
class Columns:
    """The columns of the table, by their meaning.

    Args:
        target: Column of the target; for survival, of the time.
        case: Column of the names of the cases.
        event: Column that says whether the event happened, for survival.
        subject: Column of the subject of each case; None if every case is a subject.
    """

    target: str
    case: str = "case"
    event: str | None = None
    subject: str | None = None

    def values(self) -> list[str]:
        """Return the columns that need a value in each row."""
        return [column for column in (self.target, self.event, self.subject) if column is not None]


@dataclass(frozen=True)
class Joined:
    """The cases that have both features and targets, in the order of the features, and those that lack something."""

    cases: list[str]
    rows: list[Mapping[str, str]]
    lacking: dict[str, list[str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return the cases that are left out, a line per reason."""
        return [
            f"{len(cases)} left out, {reason}: {', '.join(cases[:NAMED])}{', ...' * (len(cases) > NAMED)}"
            for reason, cases in self.lacking.items()
            if cases
        ]

    def subject(self, column: str | None) -> Int[np.ndarray, " n"]:
        """Return the number of each case's subject."""
        names = self.cases if column is None else [row[column] for row in self.rows]
        return np.unique(names, return_inverse=True)[1]


def read_targets(path: Path, columns: Columns) -> dict[str, Mapping[str, str]]:
    """Return the rows of a table by the name of their case.

    Raises:
        ValueError: There is no such file or column, it is no table in UTF-8, or a case has two rows.
    """
    if not path.is_file():
        raise ValueError(f"there is no table targets={path}")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows: dict[str, Mapping[str, str]] = {}
    try:
        found = list(reader.fieldnames or [])
        if absent := [column for column in (columns.case, *columns.values()) if column not in found]:
            raise ValueError(f"{path} has no column {absent[0]!r}; it has {', '.join(found)}")
        for row in reader:
            case = (row[columns.case] or "").strip()
            if case in rows:
                raise ValueError(f"{path} has two rows of case {case}; keep one")
            rows[case] = {column: (row[column] or "").strip() for column in columns.values()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no table ({error})") from error
    return rows


def join(
    features: Sequence[Features],
    rows: Mapping[str, Mapping[str, str]],
    *,
    valid: Sequence[Bool[np.ndarray, " n"]],
) -> Joined:
    """Return the cases that all features and the table have, with a value in every column.

    Args:
        features: The features, or two of them to compare.
        rows: Rows of the table, by case.
        valid: For each of `features`, which of its cases have the feature that is probed.

    Raises:
        ValueError: There is no such case.
    """
    shown = [set(f.case[v].tolist()) for f, v in zip(features, valid, strict=True)]
    everywhere = set.intersection(*shown)
    first = features[0].case.tolist()
    filled = {case for case, row in rows.items() if all(value.lower() not in MISSING for value in row.values())}
    lacking = {
        "in the features and not in the targets": [case for case in first if case not in rows],
        "in the targets and not in the features": [case for case in rows if case not in set(first)],
        "without a value in the targets": [case for case in first if case in rows and case not in filled],
        "without this feature in all files": [c for c in first if c in filled and c not in everywhere],
    }
    cases = [case for case in first if case in everywhere and case in filled]
    if not cases:
        names = f"features have {', '.join(first[:3])}, ..., targets {', '.join(list(rows)[:3])}, ..."
        raise ValueError(f"no case has both features and a target; {names}")
    return Joined(cases, [rows[case] for case in cases], lacking)


def check_copies(features: Features, joined: Joined, subject: Int[np.ndarray, " n"]) -> None:
    """Check that cases of the same voxels are of one subject, which is never in training and test folds at once.

    Raises:
        ValueError: Two subjects share voxels.
    """
    hash_of = dict(zip(features.case.tolist(), features.voxel_hash.tolist(), strict=True))
    first: dict[str, tuple[str, int]] = {}
    for case, number in zip(joined.cases, subject.tolist(), strict=True):
        if hash_of[case]:
            name, other = first.setdefault(hash_of[case], (case, number))
            if other != number:
                ways = "drop one of them from the targets, or give both one subject (subject=COLUMN)"
                raise ValueError(f"cases {name} and {case} hold the same voxels, in training and test at once; {ways}")


def build_task(kind: str, joined: Joined, columns: Columns, *, num_folds: int = 5, max_components: int = 32) -> Task:
    """Return the task that predicts the target of the joined cases, with at least `num_folds` of each kind.

    Raises:
        ValueError: The task is unknown, a value is no number, or nothing can be learnt from the values.
    """
    choice("task", kind, TASKS)
    if (kind == "survival") != (columns.event is not None):
        raise ValueError("task=survival needs event=COLUMN (1 where the event happened), other tasks have none")
    if kind == "classification":
        return _classification(joined, columns.target, least=max(num_folds, LEAST_OF_KIND))
    truth = _numbers(joined, columns.target)
    if kind == "regression":
        if np.ptp(truth) == 0:
            raise ValueError(f"target={columns.target} is {truth[0]:g} for all cases; nothing can be predicted")
        return Regression(truth)
    assert columns.event is not None
    event = _numbers(joined, columns.event)
    if not np.isin(event, (0, 1)).all():
        raise ValueError(f"event={columns.event} must hold 1 where the event happened, else 0")
    if event.sum() < (least := max(num_folds, LEAST_OF_KIND)):
        raise ValueError(f"event={columns.event} holds {event.sum():g} events; {least} are needed at least")
    if truth.min() <= 0:
        raise ValueError(f"target={columns.target} holds a time of {truth.min():g}; times are above 0")
    if max_components < 1:
        raise ValueError(f"max_components={max_components} must be at least 1")
    return Survival(truth, event.astype(bool), max_components)


def _classification(joined: Joined, column: str, *, least: int) -> Classification:
    texts = [row[column] for row in joined.rows]
    numbers = [_number(text) for text in texts]
    grades = None
    if all(value is not None and value == round(value) for value in numbers):
        texts = [str(round(value)) for value in numbers if value is not None]  # 1 and 1.0 are one class
        classes = tuple(sorted(set(texts), key=int))
        grades = np.array([int(name) for name in classes])
    else:
        classes = tuple(sorted(set(texts)))
    counts = {name: texts.count(name) for name in classes}
    rare = {name: number for name, number in counts.items() if number < least}
    if len(classes) < 2 or rare:
        held = ", ".join(f"{name}: {number}" for name, number in list(counts.items())[:10])
        raise ValueError(
            f"target={column} needs two or more classes of at least {least} cases, it has {held}; "
            "merge rare ones, lower num_folds, or take task=regression for numbers"
        )
    return Classification(np.array([classes.index(text) for text in texts]), classes, grades)


def _numbers(joined: Joined, column: str) -> Float[np.ndarray, " n"]:
    values = []
    for case, row in zip(joined.cases, joined.rows, strict=True):
        value = _number(row[column])
        if value is None:
            raise ValueError(f"{column}={row[column]!r} of case {case} is no number; task=classification takes texts")
        values.append(value)
    return np.array(values)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
