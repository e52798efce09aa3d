"""Checks of a run's settings that need no data, and the comparison of a resumed run with its beginning."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from medssl.config import to_yaml

LEAST = {"seed": 0, "batch_size": 1, "accumulate": 1, "checkpoint_every": 1, "trainer.max_steps": 1}
LEAST |= {"data.fold": 0, "data.labelled_seed": 0, "deep_supervision": 0, "window_batch": 1}
RATES = tuple(f"optimizer.{name}" for name in ("lr", "weight_decay", "warmup_steps", "final_fraction", "clip_norm"))
RATES += ("optimizer.least_fraction", "decoder_lr", "layer_decay", "label_share", "tolerance_mm")
SHARES = ("optimizer.least_fraction", "label_share")
MAY_BE_NULL = ("optimizer.clip_norm", "decoder_lr")
SWITCHES = ("overwrite", "compile", "checkpoint_activations", "logger.offline", "allow_leakage", "scratch_twin")
INTERVALS = ("export_every", "figures_every", "validate_every")
MAY_CHANGE = {"output_dir", "overwrite", "resume", "store", "data", "logger", "max_rejected_fraction"}
MAY_CHANGE |= {"checkpoint_every", "export_every", "figures_every"}
"""Settings that the course of a run does not depend on; of the data, `facts` tell."""


def check_settings(config: DictConfig) -> None:
    """Raises: ValueError: a count of the run is no whole number, or too small; a switch is neither true nor false.

    What follows from other values is looked at once it is resolved.
    """
    for key, value in _given(config, SWITCHES).items():
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false; got {value!r}")
    for key, value in _given(config, (*LEAST, *INTERVALS)).items():
        least = LEAST.get(key, 1)
        if key in INTERVALS and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            never = ", or null for never" if key in INTERVALS else ""
            raise ValueError(f"{key} must be a whole number from {least} up{never}; got {value!r}")
    for key, value in _given(config, RATES).items():
        if value is None and key in MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{key} must be a number from 0 up; got {value!r}")
        if key in SHARES and value > 1:
            raise ValueError(f"{key} is a share, from 0 to 1; got {value!r}")


def _given(config: DictConfig, keys: Iterable[str]) -> dict[str, Any]:
    """The values of those `keys` that exist and do not follow from others."""
    parents = {key: OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config for key in keys}
    names = {key: key.rpartition(".")[2] for key in keys}
    return {
        key: parent[names[key]]
        for key, parent in parents.items()
        if parent is not None and names[key] in parent and not OmegaConf.is_interpolation(parent, names[key])
    }


def changes(earlier: Path, config: DictConfig) -> list[str]:
    """What `config` does otherwise than the run whose `config.yaml` is `earlier`, a line each."""
    if not earlier.is_file():
        return []
    old, new = flat(yaml.safe_load(earlier.read_text())), flat(yaml.safe_load(to_yaml(config)))
    return [
        f"{key} was {old.get(key)}, is now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.partition(".")[0] not in MAY_CHANGE
    ]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings under dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def short_hash(values: Any) -> str:
    """Six hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:6]
