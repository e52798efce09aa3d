"""Differences between how a segmentation run and the pre-training before it read their images."""

from collections.abc import Mapping, Sequence
from typing import Any

from medssl.data.modality import parsed_modalities
from medssl.inference.reading import normalising, with_defaults


def other_reading(card: Mapping[str, Any] | None, reading: Mapping[str, Any]) -> list[str]:
    """Return the differences between how this run and pre-training read their images, a line each.

    A recipe that leaves a keyword out has its default. If all channels of `reading` are CT, or none is, the range that
    `ByModality` has for the others does not count.
    """
    stated = (card or {}).get("reading", {})
    groups = stated.get("views", {}).get("groups", {})
    modality = parsed_modalities(reading.get("modality")) or ()
    kinds = {word == "ct" for word in modality}
    idle = ("percentiles" if kinds.pop() else "window_hu") if len(kinds) == 1 else None

    def counted(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in step.items() if key != idle} for step in steps]

    lines = []
    for key in ("spacing_mm", "outside", "normalise"):
        here, before = counted(reading[key] or ()) if key == "normalise" else reading[key], []
        for group in groups.values():
            steps = normalising(group.get("augment", ()), stated)
            default = {"spacing_mm": "native"}.get(key, "minimum")
            before.append(counted(steps) if key == "normalise" else group.get(key, default))
        if before and all(_filled(value) != _filled(here) for value in before):
            lines.append(f"{key}: {_short(before[0], here)} in pre-training, {_short(here, before[0])} here")
    return lines


def _filled(value: Any) -> Any:
    """Return a list of recipes with the defaults of their classes; anything else as it is."""
    return [with_defaults(step) for step in value] if _are_recipes(value) else value


def _are_recipes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _short(value: Any, other: Any) -> str:
    """Return a setting in words; of recipes what they state, and defaults that are no defaults in `other`."""
    if not _are_recipes(value):
        return str(value)
    others = {step["_target_"]: step for step in (_filled(other) if _are_recipes(other) else ())}
    words = []
    for step, filled in zip(value, _filled(value), strict=True):
        known = others.get(step["_target_"], filled)
        differing = {key: default for key, default in filled.items() if default != known.get(key)}
        shown = {**step, **{key: default for key, default in differing.items() if key not in step}}
        stated = [f"{key}={one}" for key, one in shown.items() if key != "_target_"]
        words.append(" ".join([str(step["_target_"]).rpartition(".")[2], *stated]))
    return "; ".join(words)
