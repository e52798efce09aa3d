"""Networks whose axes run otherwise than ours."""

from jaxtyping import Float
from torch import Tensor, nn


class Reoriented(nn.Module):
    """Gives a network the axis order it was trained with and returns its maps in ours.

    Args:
        net: an encoder with `channels` and `strides`.
        axes: the order that `net` expects, for instance `"zyx"`; ours is `"xyz"`.
    """

    def __init__(self, net: nn.Module, *, axes: str) -> None:
        super().__init__()
        if sorted(axes) != ["x", "y", "z"]:
            raise ValueError(f"axes must be an order of the letters x, y and z, got {axes!r}")
        self.net, self.axes = net, axes
        self.channels, self.in_channels = net.channels, getattr(net, "in_channels", None)
        self.strides = tuple(tuple(stride[axes.index(axis)] for axis in "xyz") for stride in net.strides)  # type: ignore[union-attr]

    def forward(
        self, image: Float[Tensor, "batch channel x y z"], location: Tensor | None = None
    ) -> list[Float[Tensor, "batch dim i j k"]]:
        """Feature maps of `net`, axes in x, y, z order; `location` is passed on as it is."""
        forth = [2 + "xyz".index(axis) for axis in self.axes]
        back = [2 + self.axes.index(axis) for axis in "xyz"]
        maps = self.net(image.permute(0, 1, *forth), location)
        return [level.permute(0, 1, *back) for level in maps]
