"""Files of KAF's code, all of them made up: only their names and shapes are published."""

import pytest
import torch
from oracles.kaf import Oracle, fill, published_shapes

import medssl
from medssl.config import compose
from medssl.models.kaf_unet import KAFEncoder
from medssl.models.keypoints import DifferenceOfGaussians
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.weights import encoder_recipe, load_parts, save_weights

SIZES = {"base": 4, "pairs": 1, "dim": 16, "hidden": 8, "code_widths": (8, 8)}
OPTIONS = {"base_channels": 4, "num_layers": 1, "dim": 16, "hidden": 8, "position_widths": [8, 8]}


@pytest.fixture
def published(tmp_path):
    state = fill(published_shapes(**SIZES, embed=6), dtype=torch.float32)
    torch.save({"net": state}, tmp_path / "latest.pth")
    return tmp_path / "latest.pth", state


def test_a_file_of_slices_loads_into_a_network_of_slices(published):
    path, state = published
    encoder = KAFEncoder(spatial_dims=2, **OPTIONS).eval()
    (report,) = load_parts(path, {"encoder": encoder}, layout="kaf")
    assert str(report) == "encoder: 304 tensors matched"
    image = torch.linspace(0, 30, 512, dtype=torch.float64).sin().view(1, 1, 16, 32)
    points = torch.tensor([[[3.0, 30], [14, 5], [8, 8]]])
    double = {name: tensor.double() for name, tensor in state.items()}
    wanted, _, _ = Oracle(double, train=False, axis_swap=False, scatter="mean").encode(image, list(points))
    assert torch.allclose(encoder(image.float(), points=points)[-1].double(), wanted, atol=1e-5)


def test_a_file_of_slices_becomes_a_network_of_volumes_whose_planes_are_those_slices(published):
    path, _ = published
    recipe = encoder_recipe(path, layout="kaf")
    detector = {"_target_": "medssl.models.keypoints.DifferenceOfGaussians", "value_range": [0, 1]}
    assert recipe == {
        "_target_": "medssl.models.kaf_unet.KAFEncoder",
        "in_channels": 1,
        "detector": detector,
        **OPTIONS,
    }
    flat, deep = KAFEncoder(spatial_dims=2, **OPTIONS).eval(), medssl.load_encoder(path, layout="kaf")
    load_parts(path, {"encoder": flat}, layout="kaf")
    image, nothing = torch.randn(1, 1, 16, 16, 16), torch.zeros(1, 0, 3)
    first = deep(image, points=nothing)[0]
    wanted = flat(image[..., 7], points=nothing[..., :2])[0]
    assert torch.allclose(first[..., 7], wanted, atol=1e-5)
    assert deep.detector == DifferenceOfGaussians(value_range=[0, 1])
    assert deep.kaf["0"].position.mlp[0].weight[:, 2].abs().sum() == 0


def test_a_network_of_other_depth_is_refused_instead_of_loaded_in_part(published):
    with pytest.raises(ValueError, match=r"does not fit; nothing was loaded.*missing \(kaf.0.attention.2"):
        load_parts(published[0], {"encoder": KAFEncoder(spatial_dims=2, **{**OPTIONS, "num_layers": 2})}, layout="kaf")


def test_files_of_other_networks_are_refused(tmp_path):
    torch.save({"net": {"encoder.conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no encoder of the layout `kaf`; its first entries are encoder.conv"):
        medssl.load_encoder(tmp_path / "other.pth", layout="kaf")
    with pytest.raises(ValueError, match="hold one network only"):
        medssl.load_encoder(tmp_path / "other.pth", layout="kaf", branch="teacher")


@pytest.mark.parametrize("keypoints", [None, "use", "duplicate", "zero"])
def test_a_segmenter_starts_from_a_file_with_or_without_its_keypoints(tmp_path, keypoints):
    torch.manual_seed(0)
    encoder = KAFEncoder(**OPTIONS)
    recipe = {"_target_": "medssl.models.kaf_unet.KAFEncoder", **OPTIONS}
    save_weights(tmp_path / "encoder.safetensors", {"encoder": encoder}, {"encoder": recipe})
    chosen = [] if keypoints is None else [f"model.keypoints={keypoints}"]
    config = compose("finetune", [f"weights.path={tmp_path / 'encoder.safetensors'}", *chosen])
    initial = find_initial(config)
    model = initial.completed(config).model
    network, recipes = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=2)
    said = "\n".join(load_initial(initial, network))
    assert network.encoder.mode == (keypoints or "use")
    assert len(network.encoder.kaf) == (0 if keypoints in ("duplicate", "zero") else 4)
    assert torch.equal(network.encoder.stages[1][0].conv.weight, encoder.stages[1][0].conv.weight)
    assert recipes["decoder"] == {"_target_": "medssl.models.kaf_unet.KAFDecoder", "norm": "batch"}
    assert "1 reshaped (stages.0.0.conv.weight)" in said
    assert ("left out" in said) == (keypoints in ("duplicate", "zero"))


def test_networks_without_keypoints_refuse_the_choice(tmp_path):
    recipe = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8]}
    network, _ = build_segmenter(recipe, None, num_classes=2, in_channels=1)
    save_weights(tmp_path / "unet.safetensors", {"encoder": network.encoder}, {"encoder": recipe})
    with pytest.raises(ValueError, match=r"unet.safetensors knows no keypoints; leave it out"):
        find_initial(compose("finetune", [f"weights.path={tmp_path / 'unet.safetensors'}", "model.keypoints=zero"]))
    with pytest.raises(ValueError, match="give weights=FILE, or a model that has them, too"):
        find_initial(compose("finetune", ["model.keypoints=zero"]))
