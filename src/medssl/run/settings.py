"""The settings of a training run: checked before the data are known, resolved once afterwards, and never changed."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf

from medssl import checks
from medssl.config import to_yaml, with_values
from medssl.moved import refuse_moved

Settings = TypeVar("Settings", bound="RunSettings")
_EVERY = partial(checks.whole, least=1, or_null="for never")
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("seed", "data.fold", "data.labelled_seed", "deep_supervision"), checks.whole),
    **dict.fromkeys(
        ("batch_size", "accumulate", "checkpoint_every", "trainer.max_steps", "window_batch"),
        partial(checks.whole, least=1),
    ),
    **dict.fromkeys(("export_every", "figures_every", "validate_every"), _EVERY),
    "threads": partial(checks.whole, least=1, or_null="for the CPUs that a process may use"),
    **dict.fromkeys(
        ("overwrite", "compile", "checkpoint_activations", "logger.offline", "allow_leakage", "scratch_twin"),
        checks.switch,
    ),
    **dict.fromkeys(
        ("optimizer.lr", "optimizer.weight_decay", "optimizer.warmup_steps", "optimizer.final_fraction"), checks.number
    ),
    **dict.fromkeys(("layer_decay", "tolerance_mm"), checks.number),
    **dict.fromkeys(
        ("optimizer.clip_norm", "decoder_lr"),
        lambda name, value: value if value is None else checks.number(name, value),
    ),
    **dict.fromkeys(("optimizer.least_fraction", "label_share"), checks.share),
}
"""The check of each setting, by its name; settings that a command does not have are not checked."""
MAY_CHANGE = {"output_dir", "overwrite", "resume", "store", "data", "logger", "max_rejected_fraction"}
MAY_CHANGE |= {"checkpoint_every", "export_every", "figures_every"}
"""Settings that the course of a run does not depend on; `facts` describe the data."""


def check_settings(config: DictConfig) -> None:
    """Check the settings that need no data; those that follow from other values are checked once they are resolved.

    Raises:
        ValueError: A count is no whole number or too small, a rate is no number, a switch is neither true nor false.
    """
    for name, check in CHECKS.items():
        above, _, key = name.rpartition(".")
        parent = OmegaConf.select(config, above) if above else config
        if parent is not None and key in parent and not OmegaConf.is_interpolation(parent, key):
            check(name, parent[key])


@dataclass(frozen=True)
class RunSettings:
    """The settings that every training run has, resolved and checked; those of one command are a subclass.

    Args:
        seed: Everything random follows from it.
        batch_size: Samples of an optimiser step, over all processes and micro-batches.
        accumulate: Micro-batches of an optimiser step.
        max_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps in which every volume comes once.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations; None for never.
        compile: Whether `torch.compile` takes the networks.
        optimizer: The `optimizer` part of the configuration.
        trainer: Arguments of the trainer.
        logger: The logger, as a recipe; None for none.
        values: All settings as plain values, for the files that a run writes.
    """

    seed: int
    batch_size: int
    accumulate: int
    max_steps: int
    steps_per_epoch: float
    checkpoint_every: int
    validate_every: int | None
    compile: bool
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    logger: dict[str, Any] | None
    values: dict[str, Any]

    @classmethod
    def of(cls: type[Settings], config: DictConfig, facts: Mapping[str, Any]) -> Settings:
        """Return the settings of a configuration, resolved with the `facts` of the data.

        Raises:
            ValueError: A setting is missing or wrong.
        """
        values = resolved(config, facts)
        known = {
            **values,
            "max_steps": values["trainer"]["max_steps"],
            "steps_per_epoch": values["facts"]["steps_per_epoch"],
            "values": values,
        }
        return cls(**{field.name: known[field.name] for field in fields(cls)})


def resolved(config: DictConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings as plain values; the configuration stays as it is.

    A setting `auto` of the method that `facts_from` computes gets its number.

    Raises:
        ValueError: A setting is missing or wrong.
    """
    found = {place: facts[name] for name in config.get("facts_from") or () for place in awaiting(config, name)}
    known = with_values(with_facts(config, facts), found)
    values: dict[str, Any] = OmegaConf.to_container(known, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    check_settings(OmegaConf.create(values))
    return values


def with_facts(config: DictConfig, facts: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a configuration that holds these facts of the data."""
    return with_values(config, {"facts": {**config.facts, **facts}})


def awaiting(config: DictConfig, fact: str) -> list[str]:
    """Return the dotted names of the method's settings that are called `fact` and are `auto`."""
    settings = flat(OmegaConf.to_container(config.method, resolve=False), "method")
    return [name for name, value in settings.items() if name.rpartition(".")[2] == fact and value == "auto"]


def changes(earlier: Path, now: dict[str, Any] | DictConfig) -> list[str]:
    """Return the differences of settings from those in `earlier`, the `config.yaml` of another run, a line each.

    Raises:
        ValueError: `earlier` names a class at a place that it has left.
    """
    if not earlier.is_file():
        return []
    before = yaml.safe_load(earlier.read_text(encoding="utf-8"))
    refuse_moved(before, source=str(earlier))
    old, new = flat(before), flat(yaml.safe_load(to_yaml(OmegaConf.create(now) if isinstance(now, dict) else now)))
    return [
        f"{key} was {old.get(key)}, is now {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.partition(".")[0] not in MAY_CHANGE
    ]


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under dotted names."""
    if not isinstance(values, dict):
        return {prefix: values}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def short_hash(values: Any) -> str:
    """Return six hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:6]
