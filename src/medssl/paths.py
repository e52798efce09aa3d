"""The settings that name files and folders: what a command line makes of them, checked before a command looks at them.

A folder called 2024_01 is the number 202401 on a command line, `null` would be a folder called None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

PATHS: dict[str, tuple[str, ...]] = {
    "data.root": (),
    "data.split": ("finetune",),
    "features": ("probe",),
    "file": (),
    "input": ("predict",),
    "model.like": (),
    "output": ("match",),
    "output_dir": ("compare", "features", "predict", "probe"),
    "query": ("match",),
    "reference": ("derive", "match"),
    "resume": (),
    "runs": ("compare",),
    "store": ("derive",),
    "targets": ("probe",),
    "weights.path": (),
    "what.anchors": (),
    "what.masks": (),
    "what.roi": ("derive",),
    "what.transforms": (),
}
"""Settings that are paths, or paths or names, each with the commands in which it cannot be null."""
LISTS = (("compare", "runs"), ("predict", "weights.path"))
"""Commands and settings that may be several paths."""


def with_paths(config: DictConfig, command: str) -> DictConfig:
    """Return the configuration of a command after a check that all paths are texts.

    Raises:
        ValueError: A path is a number, a switch, a list or a mapping, or null where the command needs one.
    """
    from omegaconf import OmegaConf

    for name, needed in PATHS.items():
        above, _, key = name.rpartition(".")
        parent = OmegaConf.select(config, above) if above else config
        if not OmegaConf.is_dict(parent) or key not in parent or OmegaConf.is_missing(parent, key):
            continue
        if OmegaConf.is_interpolation(parent, key):  # another setting, which is checked itself
            continue
        given: Any = OmegaConf.to_container(parent[key]) if OmegaConf.is_config(parent[key]) else parent[key]
        several = isinstance(given, list) and (command, name) in LISTS
        if given is None and command not in needed and not (name == "data.root" and _reads_root(config)):
            continue
        shown = name.removesuffix(".path")
        found = [path_text(shown, one) for one in given] if several else path_text(shown, given)
        if found != given:
            OmegaConf.update(config, name, found, merge=False)
    return config


def path_text(name: str, value: Any) -> str:
    """Return a path as text.

    Raises:
        ValueError: The value is no text, or an empty one; a number has lost the zeros of the name that was typed.
    """
    if isinstance(value, str) and value:
        return value
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    ways = f"give {name}=PATH, and ./ before a name that looks like a number or a word of YAML: {name}=./2024"
    raise ValueError(f"{name} is {shown}, which is no path; {ways}")


def _reads_root(config: DictConfig) -> bool:
    """Return whether the images come from `data.root` by a source of ours."""
    source = config.data.get("source")
    return source is not None and "root" in source and str(source.get("_target_")).startswith("medssl.")
