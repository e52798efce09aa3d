"""What a segmentation run takes from a file: its network, and the weights of the parts that transfer."""

import json
import sys

import pytest
import torch

import medssl
from medssl.building import build_network
from medssl.config import compose, main
from medssl.data.store import VolumeStore
from medssl.finetune import run
from medssl.methods.alice import Alice
from medssl.methods.glmae import GLMAE
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.training.export import COURSE, build_card
from medssl.weights import save_weights

ENCODER = {
    "_target_": "medssl.models.nnformer.NnFormerEncoder",
    **{
        "in_channels": 1,
        "size_voxel": 32,
        "feature_size": 12,
        "num_heads": [2, 2, 4, 4],
        "window_tokens": [4, 4, 4, 2],
    },
}
DECODER = {
    "_target_": "medssl.models.nnformer.NnFormerDecoder",
    **{"size_voxel": 32, "num_heads": [2, 2, 4], "window_tokens": [4, 4, 4]},
}
BACKBONE = {"_target_": "medssl.models.alice_backbones.Backbone", "encoder": ENCODER, "decoder": DECODER}
UNET = {"_target_": "medssl.models.unet.UNetDecoder", "convs_per_stage": 1, "image_width": 4}


def card(**networks):
    """The card of a run on no case at all."""
    settings = {key: {} for key in (*COURSE, "views", "trainer")}
    settings |= {
        "method": {"_target_": "some.Alice", **networks},
        "data": {"name": "others"},
        "trainer": {"max_steps": 7},
    }
    method = object.__new__(Alice if "backbone" in networks else GLMAE)  # which says what transfers
    return build_card(method, settings, object.__new__(VolumeStore), [])


@pytest.fixture
def alice_file(tmp_path):
    torch.manual_seed(0)
    student, teacher = (build_network(BACKBONE) for _ in range(2))
    parts = {"encoder": student.encoder, "decoder": student.decoder}
    parts |= {"teacher_encoder": teacher.encoder, "teacher_decoder": teacher.decoder}
    save_weights(tmp_path / "encoder.safetensors", parts, card(backbone=BACKBONE) | {"step": 7})
    return tmp_path / "encoder.safetensors", student, teacher


def load(path, **settings):
    config = compose("finetune", [f"weights.path={path}", *(f"{key}={value}" for key, value in settings.items())])
    initial = find_initial(config)
    model = initial.completed(config).model
    network, _ = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)
    return network, "\n".join(load_initial(initial, network))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_decoder_of_a_backbone_transfers_and_one_of_its_own_does_not():
    assert card(backbone={"encoder": ENCODER, "decoder": DECODER})["transfers"] == ["encoder", "decoder"]
    assert card(encoder=ENCODER, decoder=UNET)["transfers"] == ["encoder"]


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_both_halves_of_a_backbone_come_from_the_file(alice_file, branch):
    path, student, teacher = alice_file
    network, said = load(path, **{"weights.branch": branch})
    chosen = student if branch == "student" else teacher
    assert equal(network.encoder, chosen.encoder)
    assert equal(network.decoder, chosen.decoder)
    assert "decoder: 90 tensors matched" in said
    assert said.endswith("from scratch: head")


def test_a_decoder_of_another_class_starts_anew(alice_file):
    path, student, _ = alice_file
    network, said = load(path, **{"model.decoder": json.dumps(UNET).replace('"', "")})
    assert type(network.decoder).__name__ == "UNetDecoder"
    assert equal(network.encoder, student.encoder)
    assert said.endswith("from scratch: decoder, head")


def test_the_network_of_a_file_is_built_without_its_weights(alice_file):
    config = compose("finetune", [f"model.like={alice_file[0]}"])
    initial = find_initial(config)
    assert initial.name == "scratch"
    assert initial.completed(config).model.decoder._target_ == "medssl.models.nnformer.NnFormerDecoder"


def test_a_file_that_does_not_say_what_transfers_gives_its_encoder(tmp_path):
    backbone = build_network(BACKBONE)
    path = tmp_path / "old.safetensors"
    save_weights(
        path, {"encoder": backbone.encoder, "decoder": backbone.decoder}, {"encoder": ENCODER, "decoder": DECODER}
    )
    network, said = load(path)
    assert equal(network.encoder, backbone.encoder)
    assert type(network.decoder).__name__ == "UNetDecoder"
    assert said.endswith("from scratch: decoder, head")


def test_a_published_file_gives_both_halves_too(tmp_path):
    backbone = build_network({**BACKBONE, "encoder": {**ENCODER, "ape": "none"}})
    names = {"encoder.": "model_down.", "decoder.": "decoder.", "reconstruction.": "final.0.up."}
    state = {}
    for name, tensor in backbone.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        state[f"backbone.{names[start]}{name.removeprefix(start)}".replace("upsample", "Upsample")] = tensor
    torch.save({"teacher": state}, tmp_path / "alice.pth")
    network, said = load(tmp_path / "alice.pth", **{"weights.layout": "alice", "weights.branch": "teacher"})
    assert equal(network.encoder, backbone.encoder)
    assert equal(network.decoder, backbone.decoder)
    assert said.endswith("from scratch: head")


def test_a_segmentation_run_starts_from_both_halves(alice_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = {
        **{"weights.path": alice_file[0], "data": "phantoms", "data.num_cases": 6, "data.size_voxel": 32},
        **{"data.phantom_spacing_mm": 12, "data.labelled": 2, "data.classes": "[7]", "crop_voxel": "[32,32,32]"},
        **{
            "store": tmp_path / "store",
            "output_dir": tmp_path / "run",
            "trainer.max_steps": 2,
            "validate_every": "null",
        },
    }
    main("finetune", run, arguments=[f"{key}={value}" for key, value in settings.items()])
    assert "decoder: 90 tensors matched" in capsys.readouterr().out
    network, _ = medssl.load_segmenter(tmp_path / "run" / "segmenter.safetensors")
    assert type(network.decoder).__name__ == "NnFormerDecoder"
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert results["setting"]["weights"].startswith("alice (7 steps")
    moved = network.decoder.layers[0].upsample.up.weight - alice_file[1].decoder.layers[0].upsample.up.weight
    assert 0 < moved.abs().max() < 0.01
