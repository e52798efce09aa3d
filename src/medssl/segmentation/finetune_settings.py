"""The settings of a segmentation run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medssl.run.settings import RunSettings


@dataclass(frozen=True)
class FinetuneSettings(RunSettings):
    """The settings of a segmentation run, resolved and checked; recipes are mappings that name a class.

    Args:
        data: The `data` part of the configuration.
        model: Recipes of the encoder and of the decoder.
        loss: Recipe of the loss.
        normalise: Recipes of the normalisations of crops and windows.
        augment: Recipes of the augmentations: `spatial`, and `intensity` after the normalisations.
        outside: Value beyond the volume, see `ViewSpec`.
        label_share: Share of the crops that are centred on a labelled voxel.
        crop_voxel: Sides of a crop as they were given; None where they follow from the data.
        deep_supervision: Number of coarser resolutions that have a loss too.
        freeze: Parts of the network that are not trained.
        layer_decay: Factor of the learning rate from one layer to the one before.
        decoder_lr: Learning rate of the decoder; None is that of the encoder.
        report: Weights that are evaluated: `auto`, `best` or `last`.
        allow_modules: Packages besides medssl whose classes a file may name.
    """

    data: dict[str, Any]
    model: dict[str, Any]
    loss: dict[str, Any]
    normalise: list[dict[str, Any]]
    augment: dict[str, list[dict[str, Any]]]
    outside: str | float
    label_share: float
    crop_voxel: list[int] | None
    deep_supervision: int
    freeze: str
    layer_decay: float
    decoder_lr: float | None
    report: str
    allow_modules: Sequence[str]

    @property
    def decoder_lr_scale(self) -> float:
        """The learning rate of the decoder over that of the encoder.

        Raises:
            ValueError: The learning rate of the encoder is 0.
        """
        if self.decoder_lr is None:
            return 1.0
        if not self.optimizer["lr"]:
            raise ValueError("decoder_lr counts relative to optimizer.lr, which is 0; freeze=encoder keeps the encoder")
        return self.decoder_lr / self.optimizer["lr"]
