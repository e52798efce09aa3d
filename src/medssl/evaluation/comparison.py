"""The comparison of groups of runs, paired by case, with intervals and corrected tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from medssl.checks import choice
from medssl.evaluation.groups import LEAKED, Group, differing_entries, entry_in_words
from medssl.evaluation.results import mean_present
from medssl.evaluation.scores import METRICS
from medssl.evaluation.statistics import Interval, Resampling, holm, smallest_p, wilcoxon_p, wins_ties_losses

SIGNIFICANT = 0.05
LARGER_IS_BETTER = {"dice": True, "hd95_mm": False, "nsd": True}


@dataclass(frozen=True)
class Summary:
    """The means of one group: each metric's over cases and seeds, each class's in the metric of the comparison."""

    group: Group
    means: dict[str, Interval]
    per_class: dict[str, float]


@dataclass(frozen=True)
class Pair:
    """One group against its reference: `differences` are group - reference by case, each a mean over seeds."""

    group: Group
    reference: Group
    cases: list[str]
    differences: Float[np.ndarray, " cases"]
    interval: Interval
    p: float
    corrected_p: float
    wins_ties_losses: tuple[int, int, int]


@dataclass(frozen=True)
class Comparison:
    """The content of the report of a comparison."""

    metric: str
    resampling: Resampling
    summaries: list[Summary]
    pairs: list[Pair]
    notes: list[str]

    @property
    def groups(self) -> list[Group]:
        """The groups, the reference first."""
        return [summary.group for summary in self.summaries]

    @property
    def results(self) -> dict[str, Any]:
        """The results of the first run; split, tolerance and convention are those of all runs."""
        return self.groups[0].runs[0].results

    @property
    def shared_setting(self) -> list[str]:
        """The entries of the setting that are equal in all runs."""
        settings = [group.runs[0].results["setting"] for group in self.groups]
        differing = differing_entries(settings)
        return [entry_in_words(settings[0], name) for name in settings[0] if name not in differing]


def compare_groups(groups: Sequence[Group], *, metric: str, resampling: Resampling) -> Comparison:
    """Return the comparison of `groups` in `metric`; the first group is the reference.

    A group of another setting is paired with the reference's setting at its own number of labelled cases, or with
    the reference if that was not run. Groups of the reference's own setting are paired if there is no other.

    Raises:
        ValueError: There is no such metric.
    """
    choice("metric", metric, METRICS)
    summaries = [_summary(group, metric=metric, resampling=resampling) for group in groups]
    paired = []
    for group, reference in partners(groups):
        scores, expected = group.case_means(metric), reference.case_means(metric)
        differences = mean_present(scores, 0) - mean_present(expected, 0)
        both = ~np.isnan(differences)
        cases = [case for case, common in zip(group.cases, both, strict=True) if common]
        interval = resampling.difference(scores, expected)
        paired.append((group, reference, cases, differences[both], interval))
    p_values = [wilcoxon_p(differences) for *_, differences, _ in paired]
    pairs = [
        Pair(*pair, p, corrected, wins_ties_losses(pair[3], larger_is_better=LARGER_IS_BETTER[metric]))
        for pair, p, corrected in zip(paired, p_values, holm(p_values), strict=True)
    ]
    return Comparison(metric, resampling, summaries, pairs, _notes(groups, pairs))


def _summary(group: Group, *, metric: str, resampling: Resampling) -> Summary:
    means = {name: resampling.mean(group.case_means(name)) for name in METRICS}
    per_class = mean_present(mean_present(group.class_scores(metric), 0), 0)
    return Summary(group, means, dict(zip(group.classes, per_class.tolist(), strict=True)))


def partners(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """Return pairs of a compared group and the group that it is compared with, by the rule of `compare_groups`."""
    reference = groups[0]
    own = [group for group in groups if group.runs[0].results["setting"] == reference.runs[0].results["setting"]]
    if len(own) == len(groups):
        return [(group, reference) for group in groups[1:]]
    at_count = {group.count: group for group in own}
    return [(group, at_count.get(group.count, reference)) for group in groups if group not in own]


def _notes(groups: Sequence[Group], pairs: Sequence[Pair]) -> list[str]:
    """Return notes that a reader of the numbers needs, of one or two sentences each."""
    runs = [run for group in groups for run in group.runs]
    notes = []
    if leaked := [f"{run.path} ({run.leaked})" for run in runs if run.leaked]:
        notes.append(
            f"{LEAKED} Leakage: evaluation cases were seen in (pre-)training and allowed: {', '.join(leaked)} of "
            f"{len(runs[0].cases)} cases. These numbers flatter."
        )
    if unchecked := [str(run.path) for run in runs if not run.leakage.get("checked", True)]:
        notes.append(f"Whether evaluation cases were seen in pre-training is not known: {', '.join(unchecked)}.")
    if flattered := [str(run.path) for run in runs if run.results.get("selected_on_evaluation")]:
        notes.append(
            f"Weights were selected on the very cases they are evaluated on: {', '.join(flattered)}. "
            "These numbers flatter."
        )
    if len({run.results.get("report") for run in runs}) > 1:
        choices = [f"{run.path}: {run.results.get('report', 'not stated')}" for run in runs]
        notes.append(f"The runs report different weights (best or last): {', '.join(choices)}.")
    for count in dict.fromkeys(run.count for run in runs):
        hashes = {run.results["labelled"].get("hash") for run in runs if run.count == count}
        if len(hashes) > 1:
            notes.append(f"Runs with {count} labelled cases were trained on {len(hashes)} different subsets.")
    for pair in pairs:
        if pair.group.count != pair.reference.count:
            notes.append(
                f"{pair.group.label} is compared with another number of labelled cases: {pair.reference.label}."
            )
    classes = list(dict.fromkeys(name for run in runs for name in run.results["classes"]))
    if left_out := [name for name in classes if name not in groups[0].classes]:
        notes.append(f"Classes that not all runs have are left out: {', '.join(left_out)}.")
    if single := [group.label for group in groups if len(group.runs) == 1]:
        notes.append(
            f"One seed only: {' | '.join(single)}. Such intervals say what other cases would change, not what training "
            "again would."
        )
    num_cases = min((len(pair.cases) for pair in pairs), default=len(groups[0].cases))
    if pairs and (p := smallest_p(num_cases, len(pairs))) > SIGNIFICANT:
        cases = "one case" if num_cases == 1 else f"{num_cases} cases"
        comparisons = f"and {len(pairs)} comparisons " if len(pairs) > 1 else ""
        notes.append(
            f"With {cases} {comparisons}the signed-rank test cannot give a p below {p:.2g}, however large "
            f"the differences are, and {'there is no interval' if num_cases == 1 else 'intervals are too narrow'}."
        )
    return notes
