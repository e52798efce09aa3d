"""The reading of images for a network: the part of a segmenter's card that inference needs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medssl.building import build, named_class
from medssl.checks import modalities
from medssl.data.augment.base import Augmentation, IntensityAugmentation, Normalisation
from medssl.data.store import Record
from medssl.layouts import catalogue

Normalise = Callable[[Tensor], Tensor]
AUGMENTATIONS = ("medssl.data.augment",)


@dataclass(frozen=True)
class Reading:
    """The rules by which images are read and cut for a network.

    Args:
        spacing_mm: Spacing of the grid the network works on, along x, y, z, or "native" for the image's own.
        crop_voxel: Sides of the window, as in training.
        outside: Value beyond the volume: "minimum", "border" or a number in file units.
        normalise: The steps that make network input of file units, in order.
        channels: The channels that are taken from files with several, as `read_volume` understands it.
        modality: Modality of all channels or of each, if all training images had it; None if they were mixed.
    """

    spacing_mm: str | tuple[float, float, float]
    crop_voxel: tuple[int, int, int]
    outside: str | float = "minimum"
    normalise: tuple[IntensityAugmentation, ...] = ()
    channels: str | int | None = None
    modality: tuple[str, ...] | None = None

    @classmethod
    def from_card(cls, card: Mapping[str, Any], *, allow_modules: Sequence[str] = ()) -> "Reading":
        """Return the reading that the entry `reading` of a segmenter's card describes.

        Raises:
            ValueError: An entry is missing, or names a class that is no normalisation or is not trusted.
        """
        missing = [key for key in ("spacing_mm", "crop_voxel", "outside", "normalise") if key not in card]
        if missing:
            raise ValueError(f"the card's reading lacks {', '.join(missing)}; it holds {', '.join(sorted(card))}")
        packages = (*AUGMENTATIONS, *allow_modules)
        base: type[IntensityAugmentation] = IntensityAugmentation  # type: ignore[type-abstract]
        normalise = [build(recipe, base=base, packages=packages) for recipe in card["normalise"]]
        for step in normalise:
            if not isinstance(step, Normalisation):
                raise ValueError(f"the card's reading normalises by {type(step).__name__}, which is no normalisation")
        spacing = card["spacing_mm"]
        if isinstance(spacing, str) and spacing != "native":
            raise ValueError(f"the card's reading has spacing_mm={spacing!r}; it takes native or three numbers")
        return cls(
            spacing_mm=spacing if isinstance(spacing, str) else _three(spacing, float),
            crop_voxel=_three(card["crop_voxel"], int),
            outside=card["outside"],
            normalise=tuple(normalise),
            channels=card.get("channels"),
            modality=modalities("the modality of the card's reading", card.get("modality")),
        )

    @classmethod
    def from_layout(cls, name: str) -> "Reading | None":
        """Return the reading of published files of a layout; None where their code does not say it."""
        stated = catalogue.get(name).reading
        return None if stated is None else cls.from_card(stated)

    def normaliser(self, record: Record) -> Normalise:
        """Return a function that normalises windows (b c x y z) of a case, each as one view of training.

        It may work in place.
        """
        rng = np.random.default_rng(0)  # normalisations draw nothing
        rows = [np.concatenate([[1.0], step.parameters(rng, record)]) for step in self.normalise]

        def normalise(windows: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
            views = windows[:, None]
            num = len(windows)
            for step, row in zip(self.normalise, rows, strict=True):
                parameters = np.broadcast_to(row, (num, 1, len(row)))
                views = step.apply(views, parameters, np.zeros((num, 1), dtype=np.int64))
            return views[:, 0]

        return normalise


def normalising(
    steps: Sequence[Mapping[str, Any]], reading: Mapping[str, Any], *, allow_modules: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return those recipes of a view's `augment` that are normalisations.

    The entry `reading` of a card names their classes. Where it does not, the classes themselves are looked at.

    Args:
        steps: Recipes of augmentations, in order.
        reading: The entry `reading` of a card of pre-training.
        allow_modules: Packages whose augmentations a card may name, besides ours.

    Raises:
        ValueError: A class has to be looked at, and is not trusted.
    """
    known = reading.get("normalisations")
    if known is not None:
        return [dict(step) for step in steps if step["_target_"] in known]
    base: type[Augmentation] = Augmentation  # type: ignore[type-abstract]
    packages = (*AUGMENTATIONS, *allow_modules)
    return [dict(step) for step in steps if issubclass(named_class(step, packages, base=base), Normalisation)]


def with_defaults(step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of one of our augmentations with the defaults of what it leaves out, and tuples as lists.

    A class from elsewhere is not looked at: its recipe is returned as it is stated.
    """
    base: type[Augmentation] = Augmentation  # type: ignore[type-abstract]
    found: dict[str, Any] = {}
    if str(step["_target_"]).startswith(tuple(f"{package}." for package in AUGMENTATIONS)):
        parameters = inspect.signature(named_class(step, AUGMENTATIONS, base=base)).parameters.values()
        found = {one.name: one.default for one in parameters if one.default is not one.empty}
    found |= step
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _three(values: Any, kind: type) -> tuple[Any, Any, Any]:
    x, y, z = (kind(v) for v in np.broadcast_to(np.asarray(values), 3))
    return x, y, z
