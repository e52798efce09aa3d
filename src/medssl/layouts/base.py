"""What is known of a kind of published checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Recipe = Callable[[Mapping[str, Tensor], str], dict[str, Any]]
"""Renamed tensors and the name of their file -> the recipe of a network."""


Read = Callable[..., dict[str, Tensor]]
"""`read(checkpoint, source=NAME, branch=BRANCH)`: what `torch.load` gave for a file -> tensors as `part.tensor`.

The names are those of our networks. It raises a ValueError where the file holds no such branch, or no encoder.
"""


@dataclass(frozen=True)
class Layout:
    """How the files of a published code are named, built and fed.

    Args:
        name: what `weights.layout` calls it.
        read: renames the tensors of a file.
        recipes: for each part that a segmenter starts from, what reads its recipe off the shapes of the tensors.
        axes: the axes that the encoder was trained with: letters of R/L, A/P, S/I, or `xyz` for ours.
        reading: how images are read, in the form of a segmenter's card (`spacing_mm`, `crop_voxel`, `outside`,
            `normalise`); None where the code does not say.
        facts: further entries of the card, read off the tensors.
    """

    name: str
    read: Read
    recipes: Mapping[str, Recipe]
    axes: str = "xyz"
    reading: Mapping[str, Any] | None = None
    facts: Callable[[Mapping[str, Tensor]], dict[str, Any]] = field(default=lambda tensors: {})

    def card(self, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
        """The card of a file, read off the shapes of its renamed tensors.

        Raises: ValueError: the architecture cannot be read off them.
        """
        held = {key.partition(".")[0] for key in tensors}
        recipes = {part: recipe(tensors, source) for part, recipe in self.recipes.items() if part in held}
        facts = self.facts(tensors)
        return {"method": self.name, **recipes, **facts, "transfers": list(recipes), "input_axes": self.axes}
