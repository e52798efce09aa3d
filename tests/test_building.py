from dataclasses import dataclass

import pytest

from medssl.building import build_network, build_trusted
from medssl.data.augment import ByModality, IntensityAugmentation
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
    built = build_trusted(recipe, ("medssl.data.augment",), IntensityAugmentation)
    assert isinstance(built, ByModality)
    assert tuple(built.window_hu) == (-100, 100)
    with pytest.raises(ValueError, match=r"which is no medssl.data.augment.base.IntensityAugmentation"):
        build_trusted({"_target_": "medssl.data.augment.Flip"}, ("medssl.data.augment",), IntensityAugmentation)
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
