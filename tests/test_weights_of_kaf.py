"""Files of KAF's code, all of them made up: only their names and shapes are published."""

import pytest
import torch
from oracles.kaf import Oracle, fill, published_shapes

import medssl
from medssl.config import compose
from medssl.models.kaf_heads import KAFHeads
from medssl.models.kaf_unet import KAFEncoder
from medssl.models.keypoint_matcher import KeypointMatcher
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


def test_a_matcher_of_slices_becomes_one_of_volumes_that_scores_points_of_a_plane_as_it_did(published):
    path, state = published
    sizes = {"dim": 16, "position_widths": [8, 8]}
    flat, deep = (KeypointMatcher(spatial_dims=dims, **sizes).eval() for dims in (2, 3))
    (report,) = load_parts(path, {"matcher": deep}, layout="kaf")
    assert "1 reshaped (position.mlp.0.weight)" in str(report)
    load_parts(path, {"matcher": flat}, layout="kaf")
    assert torch.equal(flat.dustbin, state["superglue.bin_score"])
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, 16, n, generator=generator) for n in (5, 7)]
    points = [15 * torch.rand(2, n, 3, generator=generator) for n in (5, 7)]
    valid = tuple(torch.ones(2, n, dtype=torch.bool) for n in (5, 7))
    wanted = flat(*tokens, points=tuple(p[..., :2] for p in points), valid=valid, size_voxel=(16, 16))
    scores = deep(*tokens, points=tuple(points), valid=valid, size_voxel=(16, 16, 16))
    assert torch.allclose(scores, wanted, atol=1e-5)
    assert scores.std() > 0.01


def test_the_head_of_single_keypoints_loads_where_there_is_one_and_is_reported_elsewhere(published):
    path, state = published
    sizes = {"bottleneck_channels": 128, "token_channels": 64, "dim": 16, "embed_dim": 6}
    local, plain = KAFHeads(local=True, **sizes), KAFHeads(**sizes)
    (report,) = load_parts(path, {"heads": local}, layout="kaf")
    assert not report.left_out
    assert torch.equal(local.local[3].weight, state["graph_local_head.3.weight"].squeeze(2))
    assert torch.equal(local.local[1].running_var, state["graph_local_head.1.running_var"])
    (report,) = load_parts(path, {"heads": plain}, layout="kaf")
    assert set(report.left_out) == {f"local.{key}" for key in local.local.state_dict()}
    assert torch.equal(plain.keypoint[3].weight, local.keypoint[3].weight)


def test_a_segmentation_of_slices_loads_with_decoder_and_output_layer(tmp_path, caplog):
    state = fill(published_shapes(**SIZES, classes=3), dtype=torch.float32)
    torch.save({"net": state}, tmp_path / "tuned.pth")
    recipe = {"_target_": "medssl.models.kaf_unet.KAFEncoder", **OPTIONS}
    flat, deep = (
        build_segmenter({**recipe, "spatial_dims": dims}, None, num_classes=3, in_channels=1)[0].eval()
        for dims in (2, 3)
    )
    with caplog.at_level("INFO"):
        reports = load_parts(tmp_path / "tuned.pth", flat.parts(), layout="kaf")
    assert [report.part for report in reports] == ["encoder", "decoder", "head"]
    assert all(report.fits and not report.left_out for report in reports)
    assert "tuned.pth: left out encoder.graph_1.superglue.final_proj.weight" in caplog.text
    image, nothing = torch.randn(1, 1, 16, 16, 16), torch.zeros(1, 0, 3)
    double = {name: tensor.double() for name, tensor in state.items()}
    oracle = Oracle(double, train=False, axis_swap=False, scatter="mean")
    bottleneck, skips, _ = oracle.encode(image[..., 7].double(), [nothing[0, :, :2]])
    wanted = torch.nn.functional.conv2d(oracle.decode(bottleneck, skips), double["decoder.head.0.weight"])
    found = flat.head[0](flat.decoder(image[..., 7], flat.encoder(image[..., 7], points=nothing[..., :2]))[0])
    assert torch.allclose(found.double(), wanted, atol=1e-4)

    reports = load_parts(tmp_path / "tuned.pth", deep.parts(), layout="kaf")
    assert reports[2].reshaped == ("0.weight",)
    assert torch.equal(deep.head[0].weight[..., 0], flat.head[0].weight)
    assert not deep.head[0].bias.any()
    maps = flat.encoder(image[..., 7])
    thick = [level[..., None].expand(*level.shape, 16 >> number) for number, level in enumerate(maps)]
    wanted = flat.head[0](flat.decoder(image[..., 7], maps)[0])
    assert torch.allclose(deep.head[0](deep.decoder(image, thick)[0])[..., 7], wanted, atol=1e-4)


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
