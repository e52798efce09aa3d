import itertools

import pytest
import torch
from torch import nn

from medssl.models.reoriented import Reoriented
from medssl.models.vit import VisionTransformer


@pytest.mark.parametrize("axes", ["zyx", "yzx", "xyz"])
def test_a_reoriented_network_sees_its_own_order_and_answers_in_ours(axes):
    net = VisionTransformer(size_voxel=(8, 8, 8), patch_voxel=(2, 4, 8), dim=12, depth=2, num_heads=2)
    wrapped = Reoriented(net, axes=axes)
    own_size = dict(zip(axes, (8, 8, 16), strict=True))  # a size that the net takes in its own order
    image = torch.randn(1, 1, *(own_size[axis] for axis in "xyz"))
    native = net(torch.einsum(f"ncxyz->nc{axes}", image))
    for level, expected, stride in zip(wrapped(image), native, wrapped.strides, strict=True):
        assert torch.equal(level, torch.einsum(f"nc{axes}->ncxyz", expected))
        assert level.shape[2:] == tuple(side // step for side, step in zip(image.shape[2:], stride, strict=True))
    assert wrapped.channels == net.channels


class Kept(nn.Module):
    """Keeps the image that it was given, and gives it back, whole and halved along its first axis, as a tuple."""

    channels, strides = (1, 1), ((1, 1, 1), (2, 1, 1))

    def forward(self, image, coordinate=None):
        self.image = image
        return image, image[:, :, ::2]


ORDERS = [
    "".join(order) for letters in itertools.product("RL", "AP", "SI") for order in itertools.permutations(letters)
]


@pytest.mark.parametrize("axes", ORDERS)
def test_directions_say_where_the_indices_of_the_network_grow(axes):
    image = torch.arange(2.0 * 4 * 6).reshape(1, 1, 2, 4, 6)  # a voxel's value tells its place
    wrapped = Reoriented(net := Kept(), axes=axes)
    same, halved = wrapped(image)
    seen = net.image[0, 0]
    for axis, letter in enumerate(axes):
        step = (seen.select(axis, 1) - seen.select(axis, 0)).flatten()[0].item()
        assert step == {"R": 24, "L": -24, "A": 6, "P": -6, "S": 1, "I": -1}[letter]
    assert torch.equal(same, image)
    first = "RAS".find(axes[0]) if axes[0] in "RAS" else "LPI".find(axes[0])
    start = 0 if axes[0] in "RAS" else 1  # of an even side, the kept voxels are those counted from the other end
    expected = image.index_select(2 + first, torch.arange(start, image.shape[2 + first], 2))
    assert torch.equal(halved, expected)
    assert wrapped.strides[1] == tuple(2 if axis == first else 1 for axis in range(3))


def test_ras_is_our_own_order():
    image = torch.randn(1, 1, 2, 4, 6)
    Reoriented(net := Kept(), axes="RAS")(image)
    assert torch.equal(net.image, image)


@pytest.mark.parametrize("axes", ["xxz", "SPS", "RLA", "xyS", "ras", "zy", ""])
def test_an_order_that_is_none_is_refused(axes):
    with pytest.raises(ValueError, match=f"three directions.*got '{axes}'"):
        Reoriented(VisionTransformer(size_voxel=16, dim=12, depth=1, num_heads=2), axes=axes)


def test_a_network_without_representation_or_locations_has_none_behind_the_wrapper():
    wrapped = Reoriented(net := Kept(), axes="SPL")
    assert not hasattr(wrapped, "represent")
    assert not wrapped.takes_coordinate
    wrapped(torch.zeros(1, 1, 2, 4, 6), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))
    assert net.image.shape == (1, 1, 6, 4, 2), "its forward knows of no index"
