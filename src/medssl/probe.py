"""Probe features: how well does a linear model on them predict a target, in subjects it has not seen?

Examples:
    python -m medssl.probe features=features/drasclr targets=targets.csv target=severity
    python -m medssl.probe features=features/a reference=features/b targets=t.csv target=gold task=classification
    python -m medssl.probe features=features/a targets=t.csv target=days event=died task=survival
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from medssl.config import main

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Read the features, probe them, print the table, and write the results."""
    import numpy as np
    from tqdm import tqdm

    from medssl.data.atomic import write_text
    from medssl.extraction.feature_file import load_features
    from medssl.probing.cross_validation import assign_folds, probe
    from medssl.probing.models import check_extra
    from medssl.probing.report import (
        interval_values,
        predictions_csv,
        probe_figure,
        score_table,
        score_values,
    )
    from medssl.probing.settings import OUTPUTS, ProbeSettings
    from medssl.probing.targets import build_task, check_copies, join, read_targets

    check_extra()
    settings = ProbeSettings.of(config)
    validation, resampling, columns = settings.validation, settings.resampling, settings.columns
    loaded = {name: load_features(path) for name, path in settings.features.items()}
    wanted = {name: f.of_location(settings.location) for name, f in loaded.items()}
    valid = [~np.isnan(values).any(1) for values in wanted.values()]
    joined = join(list(loaded.values()), read_targets(settings.targets, columns), valid=valid)
    num_folds, num_repeats = validation.num_folds, validation.num_repeats
    task = build_task(settings.task, joined, columns, num_folds=num_folds, max_components=settings.max_components)
    subject = joined.subject(columns.subject)
    for name, features in loaded.items():
        check_copies(features, joined, subject)
        if not any(features.voxel_hash.tolist()):
            print(f"{name} hold no hashes of voxels: images under two names are not looked for")
    every = np.arange(len(subject))
    assign_folds(task, subject, every, num_folds=num_folds, seed=validation.seed)  # too many folds are refused now
    for note in joined.notes():
        print(note)
    people = "" if columns.subject is None else f" of {subject.max() + 1} subjects"
    print(f"{len(joined.cases)} cases{people}, {num_repeats} x {num_folds} folds", flush=True)
    with tqdm(total=len(loaded) * num_repeats * num_folds, desc="probing", unit=" folds", leave=False) as bar:
        probes = {}
        for name, features in loaded.items():
            rows = [features.case.tolist().index(case) for case in joined.cases]
            probes[name] = probe(
                wanted[name][rows], task, subject=subject, validation=validation, on_fold=lambda: bar.update(1)
            )
    intervals = {name: found.intervals(resampling) for name, found in probes.items()}
    inputs = {**settings.features, "targets": settings.targets}
    values: dict[str, Any] = {
        "settings": settings.values,
        "inputs": {name: _described(path) for name, path in inputs.items()},
        "cases": {"used": joined.cases, "left_out": joined.lacking},
        "fold": probes["features"].fold.tolist(),
        **{name: score_values(found, intervals[name]) for name, found in probes.items()},
    }
    shown = dict(intervals)
    if "reference" in probes:
        shown["difference"] = probes["features"].intervals(resampling, probes["reference"])
        values["difference"] = interval_values(shown["difference"])
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.csv", predictions_csv(probes, joined))
    probe_figure(probes, intervals, columns.target).savefig(folder / "probe.png", dpi=120)
    write_text(folder / "probe.json", json.dumps(values, indent=1, sort_keys=True))
    print(score_table(shown, confidence=resampling.confidence))
    print("\n".join(f"wrote {folder / name}" for name in OUTPUTS))


def _described(path: Path) -> dict[str, Any]:
    """Return the hash of an input file and, for features, the card that says what they were made from."""
    from medssl.extraction.feature_file import FILE, read_feature_card

    file = path / FILE if path.is_dir() else path
    described = {"path": str(path), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return described if file.suffix == ".csv" else {**described, "card": read_feature_card(path)}


if __name__ == "__main__":
    main("probe", run)
