"""The layout of a kind of published checkpoint: how its files are named, built and fed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Recipe = Callable[[Mapping[str, Tensor], str], dict[str, Any]]
"""Renamed tensors and the name of their file -> the recipe of a network."""


Read = Callable[..., dict[str, Tensor]]
"""`read(checkpoint, source=NAME, branch=BRANCH)`: the content of a file, by `torch.load` -> tensors as `part.tensor`.

The names are those of our networks. It raises a ValueError if the file holds no such branch, or no encoder.
"""


@dataclass(frozen=True)
class Layout:
    """The names, networks and input of the files of a published code.

    Args:
        name: The name of the layout in `weights.layout`.
        read: The function that renames the tensors of a file.
        recipes: For each part that a segmenter starts from, the function that reads its recipe off the tensors' shapes.
        axes: The axes that the encoder was trained with: letters of R/L, A/P, S/I, or `xyz` for ours.
        reading: How images are read, in the form of a segmenter's card (`spacing_mm`, `crop_voxel`, `outside`,
            `normalise`); None where the code does not say.
        facts: Further entries of the card, read off the tensors.
    """

    name: str
    read: Read
    recipes: Mapping[str, Recipe]
    axes: str = "xyz"
    reading: Mapping[str, Any] | None = None
    facts: Callable[[Mapping[str, Tensor]], dict[str, Any]] = field(default=lambda tensors: {})

    def card(self, tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Any]:
        """Return the card of a file, read off the shapes of its renamed tensors.

        Raises:
            ValueError: The architecture cannot be read off the tensors.
        """
        held = {key.partition(".")[0] for key in tensors}
        recipes = {part: recipe(tensors, source) for part, recipe in self.recipes.items() if part in held}
        facts = self.facts(tensors)
        return {"method": self.name, **recipes, **facts, "transfers": list(recipes), "input_axes": self.axes}
