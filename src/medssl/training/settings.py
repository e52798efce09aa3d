"""Checks of a run's settings that need no data, and the comparison of a resumed run with its beginning."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from medssl.config import to_yaml

LEAST = {"seed": 0, "batch_size": 1, "accumulate": 1, "checkpoint_every": 1, "trainer.max_steps": 1}
INTERVALS = ("export_every", "figures_every", "validate_every")
MAY_CHANGE = {"output_dir", "overwrite", "resume", "store", "data", "logger", "max_rejected_fraction"}
MAY_CHANGE |= {"checkpoint_every", "export_every", "figures_every"}
"""Settings that the course of a run does not depend on; of the data, `facts` tell."""


def check_settings(config: DictConfig) -> None:
    """Raises: ValueError: a count of the run is no whole number, or too small."""
    for key in (*LEAST, *INTERVALS):
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if OmegaConf.is_interpolation(node, name):
            continue
        value, least = node[name], LEAST.get(key, 1)
        if key in INTERVALS and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            never = ", or null for never" if key in INTERVALS else ""
            raise ValueError(f"{key} must be a whole number from {least} up{never}; got {value!r}")


def changes(earlier: Path, config: DictConfig) -> list[str]:
    """What `config` does otherwise than the run whose `config.yaml` is `earlier`, a line each."""
    if not earlier.is_file():
        return []
    old, new = _flat(yaml.safe_load(earlier.read_text())), _flat(yaml.safe_load(to_yaml(config)))
    return [
        f"{key} was {old.get(key)}, is now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.partition(".")[0] not in MAY_CHANGE
    ]


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    parts = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
