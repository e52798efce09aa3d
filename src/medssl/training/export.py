"""The exports of a run: the networks of a method with the card that says how to rebuild and feed them."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import get_class

from medssl.data.augment.base import Normalisation
from medssl.data.module import Batch
from medssl.data.store import VolumeStore
from medssl.methods.base import Method
from medssl.run.settings import short_hash
from medssl.training.callback import StepCallback
from medssl.training.method_module import MethodModule
from medssl.training.parent import Parent
from medssl.weights import save_weights

COURSE = ("method", "views", "sampler", "optimizer", "batch_size", "accumulate")
"""Settings that distinguish one training from another, besides data, length and seed; the card holds their hash."""


def build_card(
    method: Method,
    config: Mapping[str, Any],
    store: VolumeStore,
    cases: Sequence[int],
    parent: Parent | None = None,
) -> dict[str, Any]:
    """Return the card of a run: architecture, reading recipe, data, versions.

    `transfers` names the parts that a segmenter starts from, as the method says. The fingerprint of the data covers
    the volumes that are trained on, `cases` and those of the parent, and no held-out ones.

    Args:
        method: The method that is trained.
        config: The resolved settings of the run.
        store: The data.
        cases: Numbers of the cases that are trained on.
        parent: The file that the run starts from.
    """
    settings, data, transfer = config["method"], config["data"], method.transfers()
    places = {"encoder": "encoder", "decoder": "decoder", **transfer.recipes}
    recipes = {part: _recipe_at(settings, place) for part, place in places.items()}
    networks = {part: recipe for part, recipe in recipes.items() if isinstance(recipe, Mapping)}
    seen = [] if parent is None else parent.voxel_hashes
    own = {store.record(case).voxel_hash[:16] for case in cases}
    return {
        **networks,
        "transfers": [part for part in transfer.recipes if part in networks],
        **transfer.facts,
        "method": settings["_target_"],
        "training": short_hash({key: config[key] for key in COURSE} | {"steps": config["trainer"]["max_steps"]}),
        "reading": {
            "channels": data.get("channels"),
            "spacing_mm": data.get("spacing_mm"),
            "views": config["views"],
            "normalisations": normalisations(config["views"]),
        },
        "data": {
            "name": data["name"],
            "num_cases": len(cases),
            "voxel_hashes": None if seen is None else sorted({*own, *seen}),  # to find overlap by
        },
        **({} if parent is None else {"parent": parent.entries()}),
        "versions": {package: version(package) for package in ("medssl", "torch", "monai", "numpy")},
    }


def normalisations(views: Mapping[str, Any]) -> list[str]:
    """Return the classes in a view plan's recipe that normalise images, sorted; nothing else is needed to read them."""
    groups = views.get("groups", {}).values()
    targets = {step["_target_"] for group in groups for step in group.get("augment") or ()}
    return sorted(target for target in targets if issubclass(get_class(target), Normalisation))


def _recipe_at(settings: Any, place: str) -> Any:
    """Return the entry of nested settings at a dotted place; None where there is nothing."""
    for key in place.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings


class Export(StepCallback):
    """Writes `encoder.safetensors` at the end of a run, and `encoder-STEP.safetensors` every `every` steps."""

    def __init__(self, path: Path, card: dict[str, Any], *, every: int | None) -> None:
        self.path, self.card, self.every = path, card, every

    def after_step(self, trainer: L.Trainer, module: MethodModule, batch: Batch) -> None:
        """Export if this step is due."""
        if self.every and self.step % self.every == 0:
            self._write(trainer, module, self.path.with_stem(f"{self.path.stem}-{self.step:07d}"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the state in which training ended, even if it was asked to stop."""
        assert isinstance(pl_module, MethodModule)
        self._write(trainer, pl_module, self.path)

    def _write(self, trainer: L.Trainer, module: MethodModule, path: Path) -> None:
        if trainer.is_global_zero:
            save_weights(path, module.method.parts(), {**self.card, "step": self.step})
