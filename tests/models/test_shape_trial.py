"""A crop is tried on a network before there is one."""

import pytest

from medssl.models.reconstructor import Reconstructor
from medssl.models.resenc import ResidualEncoder
from medssl.models.shape_trial import check_crop, check_multiple, check_strides
from medssl.models.vit import VisionTransformer


def test_sides_that_are_no_multiples_name_the_setting_and_the_next_size_that_fits():
    check_multiple([8, 12, 3], [4, 4, 3], setting="size", of="block")
    with pytest.raises(
        ValueError,
        match=r"^size=\[6, 8, 9\] is no multiple of block, which is \[4, 4, 4\]; what fits: size=\[8,8,12\]$",
    ):
        check_multiple([6, 8, 9], [4, 4, 4], setting="size", of="block")


def test_strides_of_all_maps_count_not_only_those_of_the_last():
    encoder = ResidualEncoder(widths=(4, 8), blocks=(1, 1))
    check_strides(encoder, [2, 4, 6], setting="size")
    encoder.strides = ((2, 2, 2), (3, 3, 1))
    check_strides(encoder, [6, 12, 2], setting="size")
    with pytest.raises(
        ValueError, match=r"coarsest stride of ResidualEncoder, which is \[6, 6, 2\]; .*size=\[12,6,2\]"
    ):
        check_strides(encoder, [9, 6, 2], setting="size")


def test_a_crop_is_refused_where_the_network_refuses_it_and_no_weight_is_used():
    encoder = ResidualEncoder(widths=(4, 8, 8), blocks=(1, 1, 1))
    network = Reconstructor(encoder, None)
    with pytest.raises(ValueError, match=r"size=\[4, 4, 4\] does not fit ResidualEncoder: .*single voxel"):
        check_crop(network, encoder, [4, 4, 4], setting="size")
    network.to("meta")
    check_crop(network, encoder, [8, 4, 4], setting="size")


def test_maps_of_one_grid_are_tried_too():
    encoder = VisionTransformer(size_voxel=8, patch_voxel=4, dim=12, depth=1, num_heads=2)
    check_crop(encoder, encoder, [4, 8, 12], setting="size")
    with pytest.raises(ValueError, match=r"coarsest stride of VisionTransformer, .* what fits: size=\[8,8,8\]"):
        check_crop(encoder, encoder, [6, 8, 8], setting="size")
