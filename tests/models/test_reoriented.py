import pytest
import torch

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


def test_an_order_that_is_none_is_refused():
    with pytest.raises(ValueError, match="got 'xxz'"):
        Reoriented(VisionTransformer(size_voxel=16, dim=12, depth=1, num_heads=2), axes="xxz")
