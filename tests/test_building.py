from dataclasses import dataclass

import pytest
from torch.nn import ModuleDict, ModuleList

from medssl.building import build, build_network
from medssl.data.augment import ByModality, IntensityAugmentation
from medssl.methods.base import Method
from medssl.models.vit import VisionTransformer

RECIPE = {
    "_target_": "medssl.models.vit.VisionTransformer",
    "size_voxel": [12, 12, 12],
    "patch_voxel": [4, 4, 4],
    "dim": 24,
    "depth": 2,
    "num_heads": 4,
}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"_target_": "medssl.models.vit.checkpoint"}, "is no torch.nn.Module"),
        ({"_target_": "medssl.models.vit.torch.nn.Linear"}, "cannot be imported"),
        ({"_target_": "medssl.models.vit.Nothing"}, "cannot be imported"),
        ({**RECIPE, "dimension": 3}, "does not take what the recipe gives: .*dimension"),
        (
            {"_target_": "medssl.models.reoriented.Reoriented", "axes": "zyx", "net": {"_target_": "os.system"}},
            "os.system",
        ),
    ],
)
def test_a_card_that_names_no_network_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        build_network(recipe)


def test_networks_inside_networks_are_built():
    wrapped = build_network({"_target_": "medssl.models.reoriented.Reoriented", "net": RECIPE, "axes": "zyx"})
    assert isinstance(wrapped.net, VisionTransformer)


def test_objects_of_another_kind_are_built_from_their_own_packages():
    recipe = {"_target_": "medssl.data.augment.ByModality", "window_hu": [-100, 100]}
    built = build(recipe, packages=("medssl.data.augment",), base=IntensityAugmentation)
    assert isinstance(built, ByModality)
    assert tuple(built.window_hu) == (-100, 100)
    with pytest.raises(ValueError, match=r"which is no medssl.data.augment.base.IntensityAugmentation"):
        build({"_target_": "medssl.data.augment.Flip"}, packages=("medssl.data.augment",), base=IntensityAugmentation)
    with pytest.raises(ValueError, match=r"which is outside medssl.models, monai.networks"):
        build_network(recipe)


def test_settings_inside_networks_are_dataclasses_of_trusted_packages(monkeypatch):
    @dataclass(frozen=True)
    class Detector:
        contrast: float

        def find(self, image, *, mask, max_points):
            pytest.fail("building a network looks for no keypoints")

    monkeypatch.setattr("medssl.models.vit.Detector", Detector, raising=False)
    recipe = {
        "_target_": "medssl.models.kaf_unet.KAFEncoder",
        **{"base_channels": 4, "dim": 8, "num_layers": 1, "position_widths": [8]},
        "detector": {"_target_": "medssl.models.vit.Detector", "contrast": 0.5},
    }
    with pytest.raises(ValueError, match=r"names medssl.models.vit.Detector, which is no torch.nn.Module"):
        build_network(recipe)  # a dataclass that is only imported there
    Detector.__module__ = "medssl.models.vit"
    assert build_network(recipe).detector == Detector(0.5)
    with pytest.raises(ValueError, match=r"which is no torch.nn.Module"):
        build_network(recipe["detector"])


UNET = {
    "encoder": {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 6, 8], "in_channels": 2},
    "decoder": {"_target_": "medssl.models.unet.UNetDecoder"},
}


def test_what_a_network_needs_of_the_ones_before_it_is_taken_from_them():
    recipe = {"_target_": "medssl.models.partial_unet.PartialUNet", **UNET, "num_blocks": 1}
    built = build_network(recipe)
    assert built.decoder.channels == (4, 6)
    assert built.decoder.in_channels == 2
    head = {"_target_": "medssl.models.macl_heads.MACLHeads", "hidden_dim": 3}
    heads = build_network(head, before={"backbone": built})
    assert heads.auxiliary.fc[0].in_features == built.bottleneck_channels == 8
    stated = build_network({**head, "bottleneck_channels": 5}, before={"backbone": built})
    assert stated.auxiliary.fc[0].in_features == 5
    with pytest.raises(
        ValueError, match=r"MACLHeads does not take what the recipe gives: missing.*bottleneck_channels"
    ):
        build_network(head)


def test_a_method_is_built_the_same_way_and_an_error_names_its_key():
    recipe = {
        "_target_": "medssl.methods.macl.MACL",
        "backbone": {"_target_": "medssl.models.partial_unet.PartialUNet", **UNET},
        "heads": {"_target_": "medssl.models.macl_heads.MACLHeads"},
        "positions": {"_target_": "medssl.methods.positions.PositionRule"},
    }
    assert build(recipe, base=Method, where="method").heads.auxiliary.fc[0].in_features == 8
    wrong = {**recipe, "positions": {"_target_": "medssl.methods.positions.PositionRule", "treshold": 1}}
    with pytest.raises(ValueError, match=r"PositionRule does not take what method.positions gives: .*'treshold'"):
        build(wrong, base=Method, where="method")
    with pytest.raises(
        ValueError, match=r"method.heads has _partial_; it takes `_target_` and the keywords of .*Heads"
    ):
        build({**recipe, "heads": {**recipe["heads"], "_partial_": True}}, base=Method, where="method")
    with pytest.raises(ValueError, match=r"method.heads names the class medssl.Nothing, which cannot be imported"):
        build({**recipe, "heads": {"_target_": "medssl.Nothing"}}, base=Method, where="method")
    with pytest.raises(ValueError, match=r"which is no medssl.methods.base.Method"):
        build(recipe["heads"], base=Method, where="method")


def test_recipes_in_lists_and_settings_are_built_too():
    several = {"_target_": "torch.nn.ModuleList", "modules": [RECIPE, {**RECIPE, "dim": 12}]}
    assert [network.dim for network in build(several, base=ModuleList)] == [24, 12]
    named = {"_target_": "torch.nn.ModuleDict", "modules": {"one": RECIPE}}
    assert isinstance(build(named, base=ModuleDict)["one"], VisionTransformer)


def test_a_setting_of_another_type_stays_the_fault_that_it_is_unless_a_file_stated_it():
    wrong = {**RECIPE, "depth": "two"}
    with pytest.raises(TypeError):
        build(wrong, base=VisionTransformer)
    with pytest.raises(ValueError, match="VisionTransformer does not take what the recipe gives"):
        build_network(wrong)
