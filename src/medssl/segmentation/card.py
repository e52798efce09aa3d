"""The self-description of a segmentation run: the card of its network, and the setting that its numbers belong to."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from medssl.data.store import VolumeStore
from medssl.models.segmenter import Segmenter
from medssl.run.settings import flat, short_hash
from medssl.segmentation.initial_weights import Initial
from medssl.segmentation.plan import Plan

PACKAGES = ("medssl", "torch", "monai", "numpy")
COURSE = (
    *("freeze", "layer_decay", "decoder_lr", "deep_supervision", "batch_size", "accumulate", "window_hu", "outside"),
    *("label_share", "overlap", "optimizer", "loss", "normalise", "augment"),
)
"""Settings that distinguish one experiment from another, besides network, weights, data and length."""


def build_card(plan: Plan, store: VolumeStore, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card of the segmenter that a plan trains; `recipe` is the recipe of its networks."""
    return {
        "kind": "segmenter",
        **recipe,
        "classes": [{"value": value, "name": name} for value, name in plan.classes.items()],
        "reading": plan.reading,
        "method": plan.initial.name,
        "data": {
            "name": plan.settings.data["name"],
            "num_cases": len(plan.subset.cases),
            "split": {"name": plan.split.name, "hash": plan.split.hash},
            "labelled": plan.subset.hash,
            "voxel_hashes": fingerprint(plan.initial, store, plan.subset.cases),
        },
        "versions": {package: version(package) for package in PACKAGES},
    }


def setting(plan: Plan, segmenter: Segmenter, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that distinguish a run; runs that agree in them and differ in their seed are repetitions."""
    values, spacing = plan.settings.values, plan.spacing_mm
    weights = sum(parameter.numel() for parameter in segmenter.parameters())
    kinds = [type(getattr(part, "net", part)).__name__ for part in (segmenter.encoder, segmenter.decoder)]
    return {
        "weights": plan.initial.name,
        "model": f"{kinds[0]} + {kinds[1]}, {weights / 1e6:.2f} M [{short_hash(recipe)}]",
        "max_steps": plan.settings.max_steps,
        "precision": str(plan.settings.trainer.get("precision")),
        "crop_voxel": "x".join(map(str, plan.crop_voxel)),
        "spacing_mm": spacing if isinstance(spacing, str) else "x".join(f"{s:g}" for s in spacing),
        "classes": len(plan.class_names),
        **{key: value for name in COURSE for key, value in flat(values[name], name).items()},
    }


def fingerprint(initial: Initial, store: VolumeStore, cases: Sequence[int]) -> list[str] | None:
    """Return hashes of the volumes that the network has seen, in this run and in the run of its file.

    The result is None if that file does not state them.
    """
    before = [] if initial.card is None else initial.card.get("data", {}).get("voxel_hashes")
    if before is None:
        return None
    return sorted({*before, *(store.record(case).voxel_hash[:16] for case in cases)})
