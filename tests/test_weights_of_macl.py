"""Files of MACL's code and of its relatives, all of them made up: only their names and shapes are published."""

import logging

import pytest
import torch
from oracles.macl_network import fill, published_shapes

import medssl
from medssl.config import compose
from medssl.layouts import macl as layout
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.weights import card_of, encoder_recipe, load_parts

ENCODER = {
    "_target_": "medssl.models.macl_unet.MACLUNetEncoder",
    "in_channels": 1,
    "base_channels": 4,
    "num_levels": 4,
}


@pytest.fixture
def state():
    return fill(published_shapes(base=4, proj_dim=4), dtype=torch.float32)


@pytest.fixture
def published(tmp_path, state):
    torch.save({"net": state}, tmp_path / "MACL.pth")
    return tmp_path / "MACL.pth"


def networks_of_slices(**options):
    encoder = MACLUNetEncoder(spatial_dims=2, base_channels=4, **options)
    fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
    return {"encoder": encoder, "decoder": MACLUNetDecoder(in_channels=encoder.in_channels, **fitted)}


@pytest.mark.parity
def test_all_names_and_shapes_are_the_published_ones():
    shapes = published_shapes()
    assert len(shapes) == 146
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_620_946
    trained = {name: shape for name, shape in shapes.items() if name.endswith(("weight", "bias"))}
    assert sum(torch.Size(shape).numel() for shape in trained.values()) == 8_616_576
    parts = layout.macl({"net": {k: torch.empty(s) for k, s in shapes.items()}}, source="made up", branch="student")
    with torch.device("meta"):
        encoder = MACLUNetEncoder(spatial_dims=2)
        fitted = {"encoder_channels": encoder.channels, "encoder_strides": encoder.strides}
        networks = {"encoder": encoder, "decoder": MACLUNetDecoder(in_channels=1, **fitted)}
    ours = {f"{part}.{key}": tensor.shape for part, net in networks.items() for key, tensor in net.state_dict().items()}
    assert len(ours) == 124
    assert {name: tensor.shape for name, tensor in parts.items() if not name.startswith("heads.")} == ours
    heads = {name.rpartition(".")[0] for name in parts if name.startswith("heads.")}
    assert heads == {
        *(f"heads.{branch}.fc.{layer}" for branch in ("auxiliary", "dominant") for layer in (0, 2)),
        *(f"heads.auxiliary_pixel.{block}.{layer}" for block in (0, 1) for layer in ("conv", "norm")),
    }


@pytest.mark.parity
def test_a_file_gives_a_network_of_slices_its_124_tensors(published, state):
    networks = networks_of_slices()
    reports = load_parts(published, networks, layout="macl")
    assert [str(report) for report in reports] == ["encoder: 60 tensors matched", "decoder: 64 tensors matched"]
    loaded = networks["encoder"].stages[2][1].conv.weight, networks["decoder"].ups[3].weight
    wanted = "share_encoder.contr_3_2.0.weight", "online_decoder.upscale5.weight"
    for ours, name in zip(loaded, wanted, strict=True):
        assert torch.equal(ours, state[name])
    assert torch.equal(networks["decoder"].stages[0][1].conv.weight, state["online_decoder.expand_1_2.0.weight"])


def test_a_file_of_slices_becomes_a_network_of_volumes(published):
    assert encoder_recipe(published, layout="macl") == ENCODER
    flat = networks_of_slices()["encoder"]
    load_parts(published, {"encoder": flat}, layout="macl")
    volume = torch.randn(1, 1, 16, 32, 1).expand(-1, -1, -1, -1, 16)
    deep = medssl.load_encoder(published, layout="macl")(volume)[-1]
    assert torch.allclose(deep[..., 0], flat.eval()(volume[..., 0])[-1], atol=1e-6)
    assert deep.abs().sum() > 0


@pytest.mark.parametrize("wrapped", ["net", "model_state_dict", "module", "bare"])
def test_all_ways_to_wrap_a_state_dict_are_read(wrapped, state):
    held = {f"module.{key}": tensor for key, tensor in state.items()} if wrapped == "module" else state
    checkpoint = {wrapped: held, "epoch": 3} if wrapped in ("net", "model_state_dict") else held
    parts = layout.macl(checkpoint, source="made up", branch="student")
    assert len(parts) == 146
    assert torch.equal(parts["encoder.center.2.weight"], state["share_encoder.center.2.weight"])


def test_output_layers_are_left_out_and_said(tmp_path, state, caplog):
    torch.save({"net": {**state, "online_decoder.head.0.weight": torch.zeros(8, 4, 1, 1)}}, tmp_path / "more.pth")
    with caplog.at_level(logging.INFO):
        reports = load_parts(tmp_path / "more.pth", networks_of_slices(), layout="macl")
    assert all(report.fits for report in reports)
    assert "more.pth: left out online_decoder.head.0.weight" in caplog.text


def test_unknown_tensors_of_a_network_are_not_passed_over(tmp_path, state):
    torch.save({"net": {**state, "share_encoder.graph_1.bias": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"nothing was loaded.*1 unexpected \(graph_1.bias\)"):
        load_parts(tmp_path / "other.pth", networks_of_slices(), layout="macl")


def test_files_of_pcl_give_an_encoder_and_fine_tuned_ones_a_decoder_too(tmp_path, state):
    encoder = {
        key.replace("share_encoder", "encoder"): tensor for key, tensor in state.items() if key.startswith("share")
    }
    torch.save({"net": {**encoder, "head.2.weight": torch.zeros(64, 64)}}, tmp_path / "PCL.pth")
    card = card_of(tmp_path / "PCL.pth", layout="macl")
    assert card == {"method": "macl", "encoder": ENCODER, "transfers": ["encoder"], "input_axes": "xyz"}
    assert load_parts(tmp_path / "PCL.pth", {"encoder": networks_of_slices()["encoder"]}, layout="macl")[0].fits
    tuned = {key.replace("share_", "").replace("online_", ""): t for key, t in state.items() if "projector" not in key}
    torch.save({**tuned, "decoder.head.0.weight": torch.zeros(3, 4, 1, 1)}, tmp_path / "tuned.pth")
    assert card_of(tmp_path / "tuned.pth", layout="macl")["transfers"] == ["encoder", "decoder"]
    assert all(report.fits for report in load_parts(tmp_path / "tuned.pth", networks_of_slices(), layout="macl"))


@pytest.mark.parametrize("model", ["auto", "macl_unet"])
def test_a_segmenter_starts_from_encoder_and_decoder_of_a_file(published, model):
    chosen = ["model=macl_unet", "model.encoder.base_channels=4", "+facts.num_channels=2"] if model != "auto" else []
    config = compose("finetune", [f"weights.path={published}", "weights.layout=macl", *chosen])
    initial = find_initial(config)
    model = initial.completed(config).model
    network, recipes = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=2)
    said = "\n".join(load_initial(initial, network))
    assert "encoder: 60 tensors matched" in said
    assert "decoder: 64 tensors matched" in said
    assert "from scratch: head" in said
    kernel = network.encoder.stages[0][0].conv.weight
    assert torch.equal(kernel[:, 0], kernel[:, 1])  # of one channel's kernel, half each
    assert recipes["decoder"]["_target_"] == "medssl.models.macl_unet.MACLUNetDecoder"


def test_of_a_published_decoder_the_two_trained_blocks_can_be_taken_alone(published, state, tmp_path):
    config = compose("finetune", [f"weights.path={published}", "weights.layout=macl", "weights.decoder=trained"])
    initial = find_initial(config)
    model = initial.completed(config).model
    assert initial.card["decoder_blocks"] == 2
    network, _ = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)
    fresh = {name: tensor.clone() for name, tensor in network.decoder.state_dict().items()}
    said = load_initial(initial, network)
    assert said[-1] == "of the decoder the first 2 blocks; 32 other tensors start from scratch"
    for level, number in ((0, 1), (1, 2), (2, 3), (3, 4)):
        found, name = network.decoder.stages[level][0].conv.weight, f"stages.{level}.0.conv.weight"
        wanted = state[f"online_decoder.expand_{number}_1.0.weight"]
        assert torch.equal(found[..., 1], wanted) == (level >= 2)  # the middle plane
        assert torch.equal(found, fresh[name]) == (level < 2)
    tuned = {key.replace("share_", "").replace("online_", ""): t for key, t in state.items() if "projector" not in key}
    torch.save(tuned, tmp_path / "tuned.pth")
    config.weights.path = str(tmp_path / "tuned.pth")
    with pytest.raises(ValueError, match="does not say which blocks of a decoder were trained; give all or none"):
        find_initial(config)


@pytest.mark.parity
def test_the_width_of_the_dominant_head_tells_the_trained_blocks():
    tensors = {"heads.dominant.fc.0.weight": torch.empty(128, 128), "encoder.center.2.weight": torch.empty(512, 512, 3)}
    assert layout.macl_trained_blocks(tensors) == {"decoder_blocks": 2}
    tensors["heads.dominant.fc.0.weight"] = torch.empty(128, 256)
    assert layout.macl_trained_blocks(tensors) == {"decoder_blocks": 1}


def test_files_of_other_networks_are_refused(tmp_path):
    torch.save({"net": {"encoder.conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no encoder of the layout `macl`; its first entries are encoder.conv"):
        medssl.load_encoder(tmp_path / "other.pth", layout="macl")
    with pytest.raises(ValueError, match="hold one network only"):
        medssl.load_encoder(tmp_path / "other.pth", layout="macl", branch="teacher")
