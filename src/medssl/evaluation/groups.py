"""Groups of runs for a comparison: the runs of a group differ only in their seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from medssl.evaluation.results import mean_present, read_results

LEAKED = "†"
"""The mark of runs that saw evaluation cases in pre-training or training."""


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A finished run and the content of its metrics.json."""

    path: Path
    results: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """Return the run in the folder `path`.

        Raises:
            ValueError: The results are missing or broken, or do not state the entries that a comparison needs.
        """
        results = read_results(path)
        entries = {"split": ("hash", "evaluated_on", "name"), "labelled": ("count",), "setting": (), "seed": ()}
        for entry, keys in entries.items():
            kind = int if entry == "seed" else dict
            if not isinstance(results.get(entry), kind) or not all(key in results[entry] for key in keys):
                what = f"{entry} ({', '.join(keys)})" if keys else entry
                raise ValueError(f"{path}: metrics.json does not state {what}; evaluate the run with medssl.finetune")
        return cls(path, results)

    @property
    def count(self) -> int | None:
        """The number of labelled training cases."""
        return self.results["labelled"]["count"]

    @property
    def leakage(self) -> dict[str, Any]:
        """The statement of the results on evaluation cases in (pre-)training; empty where there is none."""
        return self.results.get("leakage") or {}

    @property
    def leaked(self) -> int:
        """The number of evaluation cases that were seen in pre-training, or as copies of other cases in training."""
        return (self.leakage.get("overlap") or 0) + len(self.leakage.get("same_voxels") or ())

    @cached_property
    def cases(self) -> list[str]:
        """The names of the evaluation cases, sorted."""
        return sorted(record["case"] for record in self.results["cases"])

    def scores(self, metric: str, classes: Sequence[str]) -> Float[np.ndarray, "cases classes"]:
        """Return the scores of `classes` in every case of `cases`."""
        by_case = {record["case"]: record[metric]["per_class"] for record in self.results["cases"]}
        return np.array([[by_case[case][name] for name in classes] for case in self.cases])


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one setting and one number of labelled cases, one per seed.

    Args:
        runs: The runs, in the order given.
        label: The label that distinguishes the group from the others.
        setting_label: The label that distinguishes its setting from others, without the number of labelled cases.
        classes: The classes that all runs of the comparison have.
    """

    runs: list[FinishedRun]
    label: str
    setting_label: str
    classes: list[str]

    @property
    def count(self) -> int | None:
        """The number of labelled training cases."""
        return self.runs[0].count

    @property
    def cases(self) -> list[str]:
        """The names of the evaluation cases, sorted."""
        return self.runs[0].cases

    @property
    def leaked(self) -> bool:
        """Whether one of the runs saw evaluation cases in pre-training or training."""
        return any(run.leaked for run in self.runs)

    def class_scores(self, metric: str) -> Float[np.ndarray, "seeds cases classes"]:
        """Return the scores of every seed, case and class."""
        return np.stack([run.scores(metric, self.classes) for run in self.runs])

    def case_means(self, metric: str) -> Float[np.ndarray, "seeds cases"]:
        """Return the mean of every seed and case over the classes that are not missing in it."""
        return mean_present(self.class_scores(metric), 2)


def read_groups(paths: Sequence[Path]) -> list[Group]:
    """Return the groups of the runs in the folders `paths`.

    The group of the first run comes first, then the others by setting and count.

    Raises:
        ValueError: The runs cannot be compared; the message says which, why, and what to do.
    """
    if len(paths) < 2:
        raise ValueError(f"a comparison takes two runs or more, got {len(paths)}: python -m medssl.compare RUN RUN ...")
    runs = [FinishedRun.read(path) for path in paths]
    for run in runs[1:]:
        _check_comparable(run, runs[0])
    classes = [name for name in runs[0].results["classes"] if all(name in run.results["classes"] for run in runs)]
    if not classes:
        raise ValueError("the runs have no class in common; compare runs that learnt the same classes")
    members: dict[str, list[FinishedRun]] = {}
    for run in runs:
        group = members.setdefault(json.dumps([run.results["setting"], run.count], sort_keys=True), [])
        if same := [other for other in group if other.results["seed"] == run.results["seed"]]:
            raise ValueError(
                f"{same[0].path} and {run.path} have one setting and one seed, {run.results['seed']}; "
                "a repetition needs another seed: leave one of them out"
            )
        group.append(run)
    firsts = [group[0] for group in members.values()]
    labels = _setting_labels([run.results["setting"] for run in firsts])
    counts_differ = len({run.count for run in firsts}) > 1
    groups = []
    for setting_label, group in zip(labels, members.values(), strict=True):
        labelled = f", {group[0].count} labelled" if counts_differ else ""
        mark = f" {LEAKED}" if any(run.leaked for run in group) else ""
        groups.append(Group(group, f"{setting_label}{labelled}{mark}", setting_label, classes))
    order = list(dict.fromkeys(labels))
    return [groups[0], *sorted(groups[1:], key=lambda group: (order.index(group.setting_label), group.count or 0))]


def _check_comparable(run: FinishedRun, first: FinishedRun) -> None:
    split, first_split = run.results["split"], first.results["split"]
    if split["hash"] != first_split["hash"]:
        named = [f"{one.path} is on {s['name']} [{s['hash']}]" for one, s in ((first, first_split), (run, split))]
        raise ValueError(f"the splits differ: {', '.join(named)}; only runs on one split can be paired by case")
    for what, found, expected in (
        ("evaluated_on", split["evaluated_on"], first_split["evaluated_on"]),
        ("tolerance_mm", run.results["tolerance_mm"], first.results["tolerance_mm"]),
        ("convention", run.results.get("convention"), first.results.get("convention")),
        ("content of the evaluation cases (voxels and labels)", split.get("content"), first_split.get("content")),
    ):
        if found != expected:
            raise ValueError(
                f"{what} differs: {expected} in {first.path}, {found} in {run.path}; evaluate both in one way"
            )
    if run.cases != first.cases:
        for one, other in ((run, first), (first, run)):
            if lacking := sorted(set(other.cases) - set(one.cases)):
                raise ValueError(
                    f"{one.path} lacks {len(lacking)} of the cases of {other.path}: {', '.join(lacking[:5])}; "
                    "evaluate both on the same cases"
                )
        raise ValueError(f"{first.path} or {run.path} names a case twice; evaluate the run again")


def differing_entries(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the entries that are not equal in all settings, in their order."""
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    return [name for name in names if any(_differ(setting, settings[0], name) for setting in settings)]


def _differ(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    return (name in one) != (name in other) or one.get(name) != other.get(name)


def _setting_labels(settings: Sequence[dict[str, Any]]) -> list[str]:
    names = differing_entries(settings) or [name for name in ("weights",) if name in settings[0]]
    return ["; ".join(entry_in_words(setting, name) for name in names) or "all runs" for setting in settings]


def entry_in_words(setting: dict[str, Any], name: str) -> str:
    """Return one entry of a setting as `name=value`."""
    value = setting.get(name)
    if name not in setting:
        return f"{name} not stated"
    return f"{name}={'null' if value is None else f'{value:g}' if isinstance(value, float) else value}"
