"""What leaves a run: the networks of a method with the card that says how to rebuild and feed them."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L

from medssl.data.store import VolumeStore
from medssl.training.pretrain_module import PretrainModule
from medssl.weights import save_weights


def build_card(config: Mapping[str, Any], store: VolumeStore) -> dict[str, Any]:
    """The card of a run from its resolved configuration: architecture, reading recipe, data, versions."""
    method, data = config["method"], config["data"]
    networks = {part: method[part] for part in ("encoder", "decoder") if isinstance(method.get(part), Mapping)}
    hashes = "".join(sorted(record.voxel_hash for record in store.records()))
    return {
        **networks,
        "method": method["_target_"],
        "reading": {"channels": data.get("channels"), "spacing_mm": data.get("spacing_mm"), "views": config["views"]},
        "data": {
            "name": data["name"],
            "num_cases": len(store),
            "voxel_hashes_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        },
        "versions": {package: version(package) for package in ("medssl", "torch", "monai", "numpy")},
    }


class Export(L.Callback):
    """Writes `encoder.safetensors` at the end of a run, and `encoder-STEP.safetensors` every `every` steps."""

    def __init__(self, path: Path, card: dict[str, Any], *, every: int | None) -> None:
        self.path, self.card, self.every = path, card, every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run stands."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: PretrainModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export where it is time to."""
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.every and self.step % self.every == 0:
                self._write(trainer, pl_module, self.path.with_stem(f"{self.path.stem}-{self.step:07d}"))

    def on_train_end(self, trainer: L.Trainer, pl_module: PretrainModule) -> None:
        """Export the state in which training ended, also where it was asked to stop."""
        self._write(trainer, pl_module, self.path)

    def _write(self, trainer: L.Trainer, pl_module: PretrainModule, path: Path) -> None:
        if trainer.is_global_zero:
            save_weights(path, pl_module.method.parts(), {**self.card, "step": trainer.global_step})
