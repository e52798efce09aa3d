"""Files of Alice: no file is published, so they are made up from the names and shapes that its code gives."""

import pytest
import torch
from oracles.nnformer import fill, published_shapes, wave
from torch import nn

from medssl.models.alice_head import AliceHead
from medssl.models.nnformer import NnFormer
from medssl.weights import encoder_recipe, load_encoder, load_parts

SMALL = {"width": 24, "heads": (3, 6, 12, 24), "windows": (4, 4, 4, 2)}
OURS = {"feature_size": 24, "num_heads": (3, 6, 12, 24), "window_tokens": (4, 4, 4, 2), "size_voxel": 32, "ape": "none"}
HEAD = {"bottleneck_channels": 192, "decoded_channels": 96, "hidden_dim": 32, "bottleneck_dim": 16, "num_prototypes": 8}


def backbone_state(prefix="", *, offset=0.0, **options):
    shapes = published_shapes(**{**SMALL, **options})
    return {f"{prefix}{name}": fill(name, shape) + offset for name, shape in shapes.items()}


def head_state(prefix="", *, shared):
    shapes = {"mlp3": (192, 192), "mlp4": (192, 96), "mlp.0": (32, 192), "mlp.2": (32, 32), "mlp.4": (16, 32)}
    state = {}
    for name, (rows, columns) in shapes.items():
        state |= {f"{name}.weight": fill(name, (rows, columns)), f"{name}.bias": fill(name, (rows,))}
    for number, name in enumerate(("last_layer", "last_layer2")):
        state[f"{name}.weight_g"] = torch.ones(8, 1)
        state[f"{name}.weight_v"] = fill(name, (8, 16)) + (0 if shared else number)
    if shared:
        state["last_layer2.weight_v"] = state["last_layer.weight_v"]
    return {f"{prefix}head.{name}": tensor for name, tensor in state.items()}


@pytest.fixture
def training_file(tmp_path):
    student = backbone_state("module.backbone.") | head_state("module.", shared=False)
    teacher = backbone_state("backbone.", offset=0.01) | head_state(shared=True)
    centres = {"center": torch.zeros(1, 8), "center2": torch.zeros(1, 1, 8)}
    torch.save({"student": student, "teacher": teacher, "epoch": 3, "alice_loss": centres}, tmp_path / "alice.pth")
    return tmp_path / "alice.pth"


def features(network):
    with torch.no_grad():
        return network.eval()(wave((1, 1, 32, 32, 32), 0.001))


def test_a_training_file_gives_the_published_features(training_file):
    encoder = load_encoder(training_file, layout="alice")
    assert encoder.ape is None  # the random one of the training is in no file
    assert features(encoder)[-1].abs().sum().item() == pytest.approx(1276.60485, rel=1e-4)
    assert encoder.channels == (24, 48, 96, 192)
    recipe = encoder_recipe(training_file, layout="alice")
    assert recipe == {
        "_target_": "medssl.models.nnformer.NnFormerEncoder",
        **{"in_channels": 1, "feature_size": 24, "ape": "none", "size_voxel": 32, "depths": [2, 2, 2, 2]},
        **{"num_heads": [3, 6, 12, 24], "window_tokens": [4, 4, 4, 2]},
    }
    teacher = load_encoder(training_file, layout="alice", branch="teacher")
    assert torch.allclose(teacher.norm0.weight - encoder.norm0.weight, torch.tensor(0.01), atol=1e-6)


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_every_part_of_a_training_file_loads_strictly(training_file, branch):
    network, head = NnFormer(**OURS), AliceHead(**HEAD)
    parts = network.parts() | {"head": head if branch == "student" else head.teacher(shared=True)}
    reports = load_parts(training_file, parts, layout="alice", branch=branch)
    assert all(report.fits and not report.left_out for report in reports)
    if branch == "student":
        output = features(network)
        assert output.reconstruction.sum().item() == pytest.approx(-4476.70663, rel=1e-4)
        assert torch.equal(head.bottleneck_layer.weight, fill("mlp3", (192, 192)))
        assert torch.equal(head.projector.mlp[2].bias, fill("mlp.2", (32,)))
        assert torch.equal(head.token_layer.weight_v, fill("last_layer2", (8, 16)) + 1)


@pytest.mark.parametrize("form", ["student", "teacher", "bare"])
def test_both_kinds_of_extracted_files_load(tmp_path, form):
    state = backbone_state()
    without_outputs = {name: tensor for name, tensor in state.items() if not name.startswith("final.")}
    content = {"student": {**without_outputs, "state_dict": {}}, "teacher": {"state_dict": state}, "bare": state}[form]
    torch.save(content, tmp_path / "extracted.pth")
    encoder = load_encoder(tmp_path / "extracted.pth", layout="alice")
    assert features(encoder)[-1].abs().sum().item() == pytest.approx(1276.60485, rel=1e-4)


def test_other_files_and_branches_are_refused(training_file, tmp_path):
    with pytest.raises(ValueError, match="branch is 'mean', allowed are student, teacher"):
        load_encoder(training_file, layout="alice", branch="mean")
    for content, options, message in (
        (backbone_state(), {"branch": "teacher"}, "has no branch `teacher`; its entries are .'decoder"),
        ({"teacher": backbone_state()}, {}, "has no branch `student`; its entries are .'teacher'."),
        (nn.Linear(2, 2).state_dict(), {}, "holds no network of the layout `alice`; its first entries are weight"),
        ([1.0], {}, "holds no network of the layout `alice`"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            load_encoder(tmp_path / "other.pth", layout="alice", **options)


def test_a_network_of_another_home_size_says_which_tables_differ(training_file):
    encoder = NnFormer(**OURS | {"size_voxel": 64, "window_tokens": (4, 4, 4, 4)}).encoder
    with pytest.raises(
        ValueError, match=r"2 of another shape \(layers.3.blocks.0.attn.relative_position_bias_table is"
    ):
        load_parts(training_file, {"encoder": encoder}, layout="alice")
