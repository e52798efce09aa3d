"""Networks whose axes run otherwise than ours."""

from jaxtyping import Float
from torch import Tensor, nn

AXIS_OF = {"x": 0, "y": 1, "z": 2, "R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
TURNED = "LPI"
"""Directions opposite to ours: our indices grow to the right, to the front and upwards (RAS)."""


class Reoriented(nn.Module):
    """Gives a network the axes it was trained with and returns its maps in ours.

    Args:
        net: an encoder with `channels` and `strides`.
        axes: what the axes of `net` are, the first of them first: an order of the letters x, y and z (`"zyx"`; ours is
            `"xyz"`), or the directions in which its indices grow (`"SPL"`; ours is `"RAS"`), which may also turn axes
            round.
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
        self.strides = tuple(tuple(stride[axis] for axis in self.back) for stride in net.strides)  # type: ignore[union-attr]

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], location: Tensor | None = None
    ) -> list[Float[Tensor, "batch dim i j k"]]:
        """The maps of `net` along our axes; `location` is passed on as it is."""
        own = image.permute(0, 1, *(2 + axis for axis in self.forth))
        maps = self.net(own.flip(self.turned) if self.turned else own, location)
        if self.turned:
            maps = [level.flip(self.turned) for level in maps]
        return [level.permute(0, 1, *(2 + axis for axis in self.back)) for level in maps]
