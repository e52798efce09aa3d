"""Probe features: how well does a linear model on them predict a target, in subjects it has not seen?

Examples:
    python -m medssl.probe features=features/drasclr targets=targets.csv target=severity
    python -m medssl.probe features=features/a reference=features/b targets=t.csv target=gold task=classification
    python -m medssl.probe features=features/a targets=t.csv target=days event=died task=survival
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medssl.config import main

if TYPE_CHECKING:
    from omegaconf import DictConfig

OUTPUTS = ("probe.json", "predictions.csv", "probe.png")


def run(config: DictConfig) -> None:
    """Read, probe, print the table, and write what was found."""
    import numpy as np
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from medssl.data.atomic import write_text
    from medssl.evaluation.statistics import Resampling
    from medssl.extraction.feature_file import load_features
    from medssl.probing.cross_validation import CrossValidation, assign_folds, probe
    from medssl.probing.models import check_extra
    from medssl.probing.report import (
        interval_values,
        predictions_csv,
        probe_figure,
        score_table,
        score_values,
    )
    from medssl.probing.targets import Columns, build_task, join, read_targets

    check_extra()
    folder = _claimed(Path(config.output_dir).expanduser(), overwrite=config.overwrite)
    counts = ("num_folds", "num_repeats", "num_inner_folds", "seed", "num_bootstrap", "max_components")
    for name in (*counts, *(["location"] if config.location is not None else [])):
        if isinstance(config[name], bool) or not isinstance(config[name], int):
            raise ValueError(f"{name}={config[name]} must be a whole number")
    if isinstance(config.confidence, bool) or not isinstance(config.confidence, int | float):
        raise ValueError(f"confidence={config.confidence} must be a number")
    validation = CrossValidation(config.num_folds, config.num_repeats, config.num_inner_folds, config.seed)
    resampling = Resampling(config.num_bootstrap, config.confidence, config.seed)
    columns = Columns(str(config.target), config.case, config.event, config.subject)
    paths = {"features": Path(config.features).expanduser()}
    if config.reference is not None:
        paths["reference"] = Path(config.reference).expanduser()
    loaded = {name: load_features(path) for name, path in paths.items()}
    wanted = {name: f.of_location(config.location) for name, f in loaded.items()}
    targets = Path(config.targets).expanduser()
    valid = [~np.isnan(values).any(1) for values in wanted.values()]
    joined = join(list(loaded.values()), read_targets(targets, columns), valid=valid)
    task = build_task(config.task, joined, columns, num_folds=config.num_folds, max_components=config.max_components)
    subject = joined.subject(columns.subject)
    every = np.arange(len(subject))
    assign_folds(task, subject, every, num_folds=config.num_folds, seed=config.seed)  # too many are told at once
    for note in joined.notes():
        print(note)
    people = "" if columns.subject is None else f" of {subject.max() + 1} subjects"
    print(f"{len(joined.cases)} cases{people}, {config.num_repeats} x {config.num_folds} folds", flush=True)
    total = len(paths) * config.num_repeats * config.num_folds
    with tqdm(total=total, desc="probing", unit=" folds", leave=False) as bar:
        probes = {}
        for name, features in loaded.items():
            rows = [features.case.tolist().index(case) for case in joined.cases]
            probes[name] = probe(
                wanted[name][rows], task, subject=subject, validation=validation, on_fold=lambda: bar.update(1)
            )
    intervals = {name: found.intervals(resampling) for name, found in probes.items()}
    values: dict[str, Any] = {
        "settings": OmegaConf.to_container(config, resolve=True),
        "inputs": {name: _described(path) for name, path in {**paths, "targets": targets}.items()},
        "cases": {"used": joined.cases, "left_out": joined.lacking},
        "fold": probes["features"].fold.tolist(),
        **{name: score_values(found, intervals[name]) for name, found in probes.items()},
    }
    shown = dict(intervals)
    if "reference" in probes:
        shown["difference"] = probes["features"].intervals(resampling, probes["reference"])
        values["difference"] = interval_values(shown["difference"])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "predictions.csv", predictions_csv(probes, joined))
    probe_figure(probes, intervals, columns.target).savefig(folder / "probe.png", dpi=120)
    write_text(folder / "probe.json", json.dumps(values, indent=1, sort_keys=True))
    print(score_table(shown, confidence=config.confidence))
    print("\n".join(f"wrote {folder / name}" for name in OUTPUTS))


def _claimed(folder: Path, *, overwrite: bool) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder} is a file; name a folder")
    if there := [name for name in OUTPUTS if (folder / name).exists() and not overwrite]:
        raise ValueError(
            f"{folder / there[0]} already exists; replace it by overwrite=true, or give another output_dir"
        )
    return folder


def _described(path: Path) -> dict[str, Any]:
    """The hash of an input, and what features were made from."""
    from medssl.extraction.feature_file import FILE, read_feature_card

    file = path / FILE if path.is_dir() else path
    described = {"path": str(path), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return described if file.suffix == ".csv" else {**described, "card": read_feature_card(path)}


if __name__ == "__main__":
    main("probe", run)
