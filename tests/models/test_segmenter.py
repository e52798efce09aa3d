from typing import ClassVar

import pytest
import torch
from torch import nn

from medssl.models.reoriented import Reoriented
from medssl.models.segmenter import Segmenter, build_segmenter, segmentation_recipe
from medssl.models.unet import UNetDecoder, UNetEncoder
from medssl.models.unetr import UNETRDecoder
from medssl.models.vit import skip_depths

UNET = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 6, 8]}
VIT = {
    "_target_": "medssl.models.vit.VisionTransformer",
    "size_voxel": [8, 8, 8],
    "patch_voxel": [4, 4, 4],
    "dim": 12,
    "depth": 3,
    "num_heads": 2,
}


def test_a_u_net_gives_logits_for_every_voxel_and_class():
    network, recipes = build_segmenter(UNET, None, num_classes=3, in_channels=2)
    assert isinstance(network.decoder, UNetDecoder)
    image = torch.randn(2, 2, 8, 12, 16)
    assert network(image).shape == (2, 3, 8, 12, 16)
    assert network.multiple_voxel == (4, 4, 4)
    assert [tuple(head.weight.shape) for head in network.head] == [(3, 4, 1, 1, 1)]
    assert recipes == {
        "encoder": {**UNET, "in_channels": 2},
        "decoder": {"_target_": "medssl.models.unet.UNetDecoder"},
        "num_classes": 3,
        "deep_supervision": 0,
    }


def test_deep_supervision_adds_heads_that_the_logits_do_not_use():
    network, recipes = build_segmenter(UNET, None, num_classes=3, in_channels=1, deep_supervision=1)
    image = torch.randn(1, 1, 8, 8, 16)
    outputs = network.outputs(image)
    assert [tuple(level.shape) for level in outputs] == [(1, 3, 8, 8, 16), (1, 3, 4, 4, 8)]
    assert torch.equal(outputs[0], network(image))
    assert recipes["deep_supervision"] == 1
    with pytest.raises(ValueError, match="deep_supervision is 2, this decoder allows 0 to 1"):
        build_segmenter(UNET, None, num_classes=3, in_channels=1, deep_supervision=2)


def test_a_transformer_gets_a_unetr_decoder_and_loses_its_class_token():
    network, recipes = build_segmenter(VIT, None, num_classes=2, in_channels=1)
    assert isinstance(network.decoder, UNETRDecoder)
    assert network.encoder.cls_token is None
    assert recipes["encoder"] == {**VIT, "in_channels": 1, "class_token": False, "feature_depths": [2, 3]}
    assert recipes["decoder"] == {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 16}
    kept, recipes = build_segmenter(
        {**VIT, "class_token": True, "feature_depths": [1, 2, 3]}, None, num_classes=2, in_channels=1
    )
    assert kept.encoder.cls_token is not None
    assert kept.encoder.feature_depths == (1, 2, 3)
    assert recipes["encoder"]["feature_depths"] == [1, 2, 3]


def test_the_decoder_of_a_transformer_is_a_sixteenth_as_wide_within_limits():
    widths = {}
    for dim in (96, 384, 768, 1152):
        with torch.device("meta"):
            network, _ = build_segmenter({**VIT, "dim": dim}, None, num_classes=2, in_channels=1)
        widths[dim] = network.decoder.channels[0]
    assert widths == {96: 16, 384: 24, 768: 48, 1152: 48}


def test_skips_of_a_transformer_come_after_the_first_block_of_each_later_part():
    assert skip_depths(12, 4) == [4, 7, 10, 12]  # those of UNETR
    assert skip_depths(24, 4) == [7, 13, 19, 24]
    assert skip_depths(12, 3) == [5, 9, 12]
    assert skip_depths(3, 4) == [1, 2, 3, 3]
    assert skip_depths(2, 1) == [2]


def test_completed_recipes_build_the_same_network_again():
    wrapped = {"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zyx"}
    for encoder in (VIT, UNET, wrapped):
        first, recipes = build_segmenter(encoder, None, num_classes=2, in_channels=2)
        again, same = build_segmenter(
            recipes["encoder"], recipes["decoder"], num_classes=recipes["num_classes"], in_channels=2
        )
        assert same == recipes
        again.load_state_dict(first.state_dict())
        image = torch.randn(1, 2, 8, 8, 16)
        assert torch.equal(first.eval()(image), again.eval()(image))


def test_a_reoriented_transformer_sees_its_own_axes():
    wrapped = {
        "_target_": "medssl.models.reoriented.Reoriented",
        "net": {**VIT, "patch_voxel": [4, 4, 2]},
        "axes": "zyx",
    }
    network, recipes = build_segmenter(wrapped, None, num_classes=2, in_channels=3)
    assert isinstance(network.encoder, Reoriented)
    assert network.multiple_voxel == (2, 4, 4)
    assert recipes["encoder"]["net"]["class_token"] is False
    assert recipes["encoder"]["net"]["in_channels"] == 3
    assert network(torch.randn(1, 3, 6, 8, 8)).shape == (1, 2, 6, 8, 8)


def test_building_leaves_the_recipes_that_were_given_as_they_were():
    encoder, decoder = dict(VIT), {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}
    network, recipes = build_segmenter(encoder, decoder, num_classes=2, in_channels=1)
    assert encoder == VIT
    assert recipes["decoder"] == decoder == {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}
    assert network.decoder.channels == (4, 8)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 8, 10), r"an image of \(8, 8, 10\) voxels .* multiples of \(4, 4, 4\); .* for instance \(8, 8, 12\)"),
        ((4, 4, 4), "leaves a single voxel"),
    ],
)
def test_an_image_of_a_size_that_does_not_fit_is_refused(size, message):
    network, _ = build_segmenter(UNET, None, num_classes=2, in_channels=1)
    with pytest.raises(ValueError, match=message):
        network(torch.randn(1, 1, *size))


def test_an_image_of_other_channels_is_refused():
    for encoder in (UNET, {"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zyx"}):
        network, _ = build_segmenter(encoder, None, num_classes=2, in_channels=2)
        with pytest.raises(ValueError, match="the network reads 2 channels, the image has 1"):
            network(torch.randn(1, 1, 8, 8, 8))


@pytest.mark.parametrize(
    ("encoder", "decoder", "options", "message"),
    [
        (UNET, None, {"num_classes": 1}, "num_classes is 1; a segmenter needs the background"),
        ({"_target_": "medssl.models.reoriented.Reoriented"}, None, {}, "names the class None"),
        ({"_target_": "os.system"}, None, {}, "names the class os.system, which is outside medssl.models"),
        (UNET, {"_target_": "os.system"}, {}, "names the class os.system"),
        (UNET, {"_target_": "medssl.models.unetr.UNETRDecoder"}, {}, "takes maps of one stride"),
        (VIT, {"_target_": "medssl.models.unet.UNetDecoder"}, {}, r"step from \(4, 4, 4\) to \(4, 4, 4\)"),
        (
            UNET,
            {"_target_": "medssl.models.unet.UNetDecoder", "widths": [2]},
            {},
            "does not take what the recipe gives",
        ),
        ({**UNET, "width": 3}, None, {}, "does not take what the recipe gives"),
    ],
)
def test_networks_that_make_no_segmenter_are_refused(encoder, decoder, options, message):
    with pytest.raises(ValueError, match=message):
        build_segmenter(encoder, decoder, **{"num_classes": 2, "in_channels": 1, **options})


def test_a_network_that_does_not_describe_its_maps_is_refused():
    with pytest.raises(ValueError, match="Conv3d cannot be part of a segmenter: it needs the attributes `channels`"):
        Segmenter(
            nn.Conv3d(1, 1, 1),
            UNetDecoder(in_channels=1, encoder_channels=[2, 2], encoder_strides=[(1, 1, 1), (2, 2, 2)]),
            2,
        )


class Plain(nn.Module):
    """An encoder that takes no `in_channels` and no coordinate."""

    def __init__(self, *, width):
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(1, width, 3, padding=1), nn.Conv3d(width, 2 * width, 2, stride=2)
        self.channels, self.strides = (width, 2 * width), (1, 2)

    def forward(self, image):
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


class Answering(Plain):
    """An encoder that has an opinion on its decoder, and on how a segmenter takes it."""

    usual_decoder: ClassVar = {"_target_": "medssl.models.unet.UNetDecoder", "convs_per_stage": 1}

    @classmethod
    def segmentation_recipe(cls, recipe, decoder, *, wider=False):
        return {**recipe, "width": 6} if wider else {**recipe, "width": 4}


def test_a_network_of_one_s_own_is_given_what_it_takes():
    recipe = {"_target_": f"{__name__}.Plain", "width": 2}
    network, recipes = build_segmenter(recipe, None, num_classes=3, in_channels=1, allow_modules=[__name__])
    assert recipes["encoder"] == recipe
    assert network.decoder.in_channels == 1
    assert network(torch.randn(1, 1, 4, 4, 4)).shape == (1, 3, 4, 4, 4)
    with pytest.raises(ValueError, match="Plain reads 1 channels, the images have 2; give it a keyword `in_channels`"):
        build_segmenter(recipe, None, num_classes=3, in_channels=2, allow_modules=[__name__])
    with pytest.raises(ValueError, match=rf"pass allow_modules=\['{__name__}'\]"):
        build_segmenter(recipe, None, num_classes=3, in_channels=1)


def test_an_encoder_says_how_a_segmenter_takes_it():
    recipe = {"_target_": f"{__name__}.Answering", "width": 2}
    network, recipes = build_segmenter(recipe, None, num_classes=3, in_channels=1, allow_modules=[__name__])
    assert network.encoder.channels == (4, 8)
    assert recipes["encoder"]["width"] == 4
    assert recipes["decoder"] == {"_target_": "medssl.models.unet.UNetDecoder", "convs_per_stage": 1}
    assert segmentation_recipe(recipe, packages=None, wider=True)["width"] == 6
    wrapped = {"_target_": "medssl.models.reoriented.Reoriented", "net": recipe, "axes": "zyx"}
    assert segmentation_recipe(wrapped, packages=None, wider=True)["net"]["width"] == 6
    with pytest.raises(ValueError, match="the network of a file knows no keypoints; leave it out"):
        segmentation_recipe(recipe, packages=None, where="the network of a file", keypoints="use")


def test_a_segmenter_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    network, _ = build_segmenter({**UNET, "widths": [4, 8]}, None, num_classes=2, in_channels=1, deep_supervision=0)
    image = torch.nn.functional.interpolate(torch.randn(2, 1, 4, 4, 4), size=(8, 8, 8))
    label = (image[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(image), label)
        loss.backward()
        optimizer.step()
    assert (network.eval()(image).argmax(1) == label).float().mean() > 0.98


def test_a_bare_encoder_and_decoder_make_a_segmenter():
    encoder = UNetEncoder(widths=[4, 8])
    decoder = UNetDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
    network = Segmenter(encoder, decoder, 5)
    assert list(network.parts()) == ["encoder", "decoder", "head"]
    assert {key.partition(".")[0] for key in network.state_dict()} == set(network.parts())
