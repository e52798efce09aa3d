"""A wrapper for networks whose axes differ from ours in order or direction."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

AXIS_OF = {"x": 0, "y": 1, "z": 2, "R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
TURNED = "LPI"
"""Directions opposite to ours: our indices grow to the right, to the front and upwards (RAS)."""
TARGET = "medssl.models.reoriented.Reoriented"


def along(recipe: dict[str, Any], axes: str) -> dict[str, Any]:
    """Return the recipe of a network that was trained with `axes`: inside a `Reoriented`, unless they are ours."""
    return recipe if directions(axes) == "RAS" else {"_target_": TARGET, "net": recipe, "axes": axes}


def directions(axes: str) -> str:
    """Return axes as directions: `xyz` as `RAS`, so that equal axes are equal words."""
    return axes.translate(str.maketrans("xyz", "RAS"))


class Reoriented(nn.Module):
    """Wrapper that gives a network images along the axes it was trained with and returns its maps along ours.

    Args:
        net: Encoder with `channels` and `strides`.
        axes: Axes of `net`, the first axis first: an order of the letters x, y and z (`"zyx"`; ours is `"xyz"`), or the
            directions in which its indices grow (`"SPL"`; ours is `"RAS"`), which may also reverse axes.
    """

    def __init__(self, net: nn.Module, *, axes: str) -> None:
        super().__init__()
        kinds = {letter.islower() for letter in axes}
        if len(kinds) != 1 or sorted(AXIS_OF.get(letter, -1) for letter in axes) != [0, 1, 2]:
            raise ValueError(
                "axes must be an order of the letters x, y and z, or three directions, one each of R or L, A or P, "
                f"S or I; got {axes!r}"
            )
        self.net, self.axes = net, axes
        self.channels, self.in_channels = net.channels, getattr(net, "in_channels", None)
        self.forth = [AXIS_OF[letter] for letter in axes]  # our axis under each of the net's
        self.back = [self.forth.index(axis) for axis in range(3)]
        self.turned = [2 + axis for axis, letter in enumerate(axes) if letter in TURNED]
        self.directions = [-1.0 if letter in axes else 1.0 for letter in TURNED]  # along our x, y and z
        self.strides = tuple(tuple(stride[axis] for axis in self.back) for stride in net.strides)  # type: ignore[union-attr]

        self.takes_coordinate = bool(getattr(net, "takes_coordinate", False))

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], coordinate: Tensor | None = None, index: Tensor | None = None
    ) -> list[Float[Tensor, "batch dim i j k"]]:
        """Return the maps of `net` along our axes.

        Coordinates of locations grow in the directions RAS. They change their sign where an axis of `net` runs the
        other way, and keep the order x, y, z. A map of coordinates, one for every voxel, is turned to the axes of `net`
        as the image is. Networks that take locations also get `index`.
        """
        maps = self.net(self._own(image), *self._where(coordinate, index))
        if self.turned:
            maps = [level.flip(self.turned) for level in maps]
        return [level.permute(0, 1, *(2 + axis for axis in self.back)) for level in maps]

    @property
    def represent(self) -> Callable[..., Tensor]:
        """The function `represent` of `net` for images along our axes; networks without it give an AttributeError."""
        inner: Callable[..., Tensor] = self.net.represent  # type: ignore[assignment]

        def represent(image: Tensor, coordinate: Tensor | None = None, index: Tensor | None = None) -> Tensor:
            return inner(self._own(image), *self._where(coordinate, index))

        return represent

    def _own(self, volume: Tensor) -> Tensor:
        """Return a batch of volumes along the axes of `net`."""
        own = volume.permute(0, 1, *(2 + axis for axis in self.forth))
        return own.flip(self.turned) if self.turned else own

    def _where(self, coordinate: Tensor | None, index: Tensor | None) -> tuple[Any, ...]:
        if coordinate is not None:
            signs = coordinate.new_tensor(self.directions)
            is_map = coordinate.ndim == 5
            coordinate = self._own(coordinate * signs.view(3, 1, 1, 1)) if is_map else coordinate * signs
        return (coordinate, index) if self.takes_coordinate else (coordinate,)
