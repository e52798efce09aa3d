"""The network presets in configs/model."""

import pytest
import torch
from omegaconf import OmegaConf

from medssl.config import compose, config_dir
from medssl.models.segmenter import build_segmenter

PRESETS = {  # name: weights with one channel and 14 classes at 96 voxels, multiple of the sides
    "unet": (16_544_526, 16),
    "resenc": (62_800_526, 16),
    "resenc_l": (102_335_566, 32),
    "resenc_tiny": (79_086, 4),
    "unetr": (115_377_902, 16),
    "swinunetr": (27_186_576, 32),
    "nnformer": (9_728_462, 16),
    "nnformer_tiny": (2_376_350, 16),
    "kaf": (54_516_014, 16),
    "macl_unet": (22_579_598, 16),
    "macl_unet_tiny": (351_022, 8),
    "attention_unet": (22668330, 16),
}


def test_every_preset_is_listed_here():
    assert {path.stem for path in (config_dir() / "model").glob("*.yaml")} == {*PRESETS, "auto"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_its_network(name):
    facts = {"facts": {"num_channels": 1, "crop_voxel": [96, 96, 96]}}
    config = OmegaConf.merge(compose("finetune", [f"model={name}"]), facts)
    model = OmegaConf.to_container(config.model, resolve=True)
    assert model.keys() >= compose("finetune", ["model=auto"]).model.keys() - {"keypoints"}
    with torch.device("cpu" if name == "swinunetr" else "meta"):  # MONAI's Swin reads numbers off tensors
        network, recipes = build_segmenter(model["encoder"], model["decoder"], num_classes=14, in_channels=1)
    num_weights, multiple = PRESETS[name]
    assert sum(p.numel() for p in network.parameters()) == num_weights
    assert network.multiple_voxel == (multiple,) * 3
    assert recipes["encoder"]["in_channels"] == 1


def test_auto_names_no_network_but_that_of_the_file():
    model = compose("finetune", ["model=auto", "weights.path=runs/a/encoder.safetensors"]).model
    assert (model.encoder, model.decoder, model.like) == (None, None, "runs/a/encoder.safetensors")
