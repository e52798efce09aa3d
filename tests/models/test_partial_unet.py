import pytest
import torch

from medssl.building import build_network
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.partial_unet import PartialUNet, ScaleLaw
from medssl.models.segmenter import names_of_blocks
from medssl.models.swin import SwinEncoder
from medssl.models.unet import UNetDecoder, UNetEncoder

FOUR_LEVELS = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8))


def plain(**options):
    encoder = UNetEncoder(widths=(4, 4, 8), **options)
    return encoder, UNetDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)


@pytest.mark.parametrize(
    ("bottleneck", "num_blocks", "size", "reduced"),
    [
        (16, 2, 128, 32),
        (16, 2, 64, 16),
        (16, 1, 96, 48),
        (16, 4, 256, 16),
    ],
)
def test_the_decoded_map_of_the_small_image_is_as_large_as_the_bottleneck_of_the_crop(
    bottleneck, num_blocks, size, reduced
):
    law = ScaleLaw((bottleneck,) * 3, FOUR_LEVELS, num_blocks)
    assert law.reduced([size] * 3) == (reduced,) * 3
    assert reduced // FOUR_LEVELS[-num_blocks][0] == size // bottleneck


def test_axes_have_factors_of_their_own():
    law = ScaleLaw((16, 16, 4), ((1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 2)), 2)
    assert (law.factor, law.multiple_voxel) == ((4, 4, 4), (64, 64, 16))
    assert law.reduced((128, 64, 16)) == (32, 16, 4)
    flat = ScaleLaw((16, 16, 1), ((1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 1)), 2)
    assert flat.reduced((128, 128, 5)) == (32, 32, 5)


def test_a_crop_that_does_not_fit_is_refused_with_what_does():
    with pytest.raises(ValueError, match="does not fit") as caught:
        ScaleLaw((16,) * 3, FOUR_LEVELS, 2).reduced([96, 96, 96], setting="views.groups.still.size")
    said = str(caught.value)
    assert "views.groups.still.size=[96, 96, 96] does not fit num_blocks=2" in said
    assert "multiples of [64, 64, 64]" in said
    assert "method.backbone.num_blocks=1 with this network" in said
    assert "with (model.encoder.num_levels, method.backbone.num_blocks) (" in said
    assert "(4, 1)" in said
    assert "(3, 2)" in said
    assert "(4, 2)" not in said
    assert "views.groups.still.size=[128,128,128]" in said
    with pytest.raises(ValueError, match="blocks 1 to 4"):
        ScaleLaw((16,) * 3, FOUR_LEVELS, 5)
    with pytest.raises(ValueError, match="has 2 axes"):
        ScaleLaw((16,) * 3, FOUR_LEVELS, 2).reduced([64, 64])


@pytest.mark.parametrize(
    ("size", "proposed"),
    [((60, 64), "size=[64,64,1]"), ((80, 64), "size=[128,64,1]"), ((80,) * 3, "size=[128,128,128]")],
)
def test_the_proposed_crop_is_the_next_larger_one_and_has_a_third_side_for_slices(size, proposed):
    law = ScaleLaw((16,) * len(size), tuple(level[: len(size)] for level in FOUR_LEVELS), 2)
    stated = [*size, 1][:3]
    with pytest.raises(ValueError, match="does not fit") as caught:
        law.reduced(size, setting="size")
    assert str(caught.value).startswith(f"size={stated} does not fit")
    assert str(caught.value).partition("What fits: ")[2].partition(";")[0] == proposed


@pytest.mark.parametrize("side", [8, 16])
def test_a_small_image_of_a_single_coarsest_voxel_is_refused_where_it_would_be_normalised(side):
    net = PartialUNet(*plain(), num_blocks=1)
    if side == 16:
        net.check_crop([16, 16, 16])
        return
    with pytest.raises(ValueError, match=r"size=\[8, 8, 8\] is \[4, 4, 4\] .*leaves a single voxel at the coarsest"):
        net.check_crop([8, 8, 8], setting="size")


def test_a_single_voxel_may_be_where_nothing_normalises_it():
    encoder = MACLUNetEncoder(base_channels=2, num_levels=2, norm="instance")
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides, "norm": "instance"}
    net = PartialUNet(encoder, MACLUNetDecoder(in_channels=1, **fitted), num_blocks=1)
    net.check_crop([8, 8, 8])
    before = [tensor.clone() for tensor in net.state_dict().values()]
    assert net(torch.rand(1, 1, 4, 4, 4))[1].std() > 0
    encoder.center.append(torch.nn.InstanceNorm3d(8))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        net.check_crop([8, 8, 8])
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_a_network_that_needs_values_is_left_to_the_first_batch():
    class Reading(UNetEncoder):
        def forward(self, image, coordinate=None):
            assert image.sum().item() < 1e9
            return super().forward(image)

    encoder = Reading(widths=(4, 4, 8))
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    PartialUNet(encoder, UNetDecoder(in_channels=1, **fitted), num_blocks=1).check_crop([8, 8, 8])


def test_maps_that_are_compared_have_equal_size_and_idle_blocks_are_frozen():
    torch.manual_seed(0)
    net = PartialUNet(*plain(), num_blocks=1)
    image = torch.rand(1, 1, 16, 16, 16)
    small, decoded = net(torch.rand(1, 1, *net.law.reduced(image.shape[2:])))
    whole, _ = net(image)
    assert decoded.shape[2:] == whole.shape[2:] == (4, 4, 4)
    assert small.shape[2:] == (2, 2, 2)
    assert (net.bottleneck_channels, net.decoded_channels) == (8, 4)
    assert decoded.shape[1] == 4
    decoded.sum().backward()
    for name, parameter in net.decoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == (".1." in name[:9])


@pytest.mark.parametrize(("patch", "first"), [(2, 5), (4, 5)])
def test_the_stem_of_a_decoder_over_the_image_belongs_to_the_finest_blocks(patch, first):
    """It runs with block `first` and trains from then on; block 6 of 6 for patches of 4 needs it too."""
    encoder = SwinEncoder(feature_size=3, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), patch_voxel=patch)
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    decoder = UNetDecoder(in_channels=1, **fitted)
    stem = {name for name in decoder.state_dict() if name.startswith("image_levels")}
    assert stem
    assert not stem & names_of_blocks(decoder, first - 1)
    assert stem <= names_of_blocks(decoder, first)
    assert names_of_blocks(decoder, len(decoder.channels)) == set(decoder.state_dict())


def test_networks_are_built_from_the_recipes_of_a_segmenter():
    encoder = {"_target_": "medssl.models.macl_unet.MACLUNetEncoder", "base_channels": 2, "num_levels": 2}
    decoder = {"_target_": "medssl.models.macl_unet.MACLUNetDecoder"}

    def built(encoder, decoder, **options):
        partial = "medssl.models.partial_unet.PartialUNet"
        return build_network({"_target_": partial, "encoder": encoder, "decoder": decoder, **options})

    assert built({**encoder, "spatial_dims": 2}, decoder, num_blocks=1).spatial_dims == 2
    assert built(encoder, None, num_blocks=2).decoded_channels == 2
    with pytest.raises(ValueError, match="outside"):
        built({"_target_": "os.system"}, decoder)
