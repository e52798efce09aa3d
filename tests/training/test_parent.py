"""Continued pre-training: the networks of a file, what was loaded, and what the new card says."""

import pytest
import torch

from medssl.config import main
from medssl.methods.build import build_method
from medssl.pretrain import run
from medssl.training.parent import Parent
from medssl.weights import load_encoder, read_card, save_weights

SETTINGS = {"path": None, "layout": None, "branch": "student", "parts": ["encoder"]}
REST = "backbone.reconstruction, teacher_backbone.reconstruction, teacher_head"
METHODS = {
    "glmae_tiny": ("decoder, head, teacher_head", "teacher_encoder"),
    "alice_tiny": (f"decoder, teacher_decoder, head, cafa, {REST}", "teacher_encoder"),
    "drasclr_tiny": ("head, key_head", "teacher_encoder"),
    "macl_tiny": ("decoder, heads", ""),
    "kaf_tiny": ("heads, matcher", ""),
    "sam_embed_tiny": ("", ""),
    "mae_tiny": ("decoder, head", ""),
    "mae_vit_tiny": ("decoder", ""),
    "simmim_tiny": ("head", ""),
    "models_genesis_tiny": ("decoder, head", ""),
    "simclr_tiny": ("projector", ""),
    "voco_tiny": ("projector", ""),
}
"""What starts from scratch and what is a copy, where the encoder comes from a file."""


def written(path, method, **card):
    save_weights(path, method.parts(), {"method": "medssl.methods.x.X", "step": 7, **card})
    return path


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_of_a_file_is_that_of_the_method_and_of_its_teacher(name, tmp_path):
    first, second = (build_method(name, num_cases=20, steps_per_round=4, seed=seed) for seed in (1, 2))
    path = written(tmp_path / "a.safetensors", first)
    parent = Parent.of({**SETTINGS, "path": str(path)})
    lines = parent.load(second)
    assert lines[0] == f"weights: {path}"
    fresh, copied = METHODS[name]
    said = dict(line.split(": ", 1) for line in lines[1].splitlines())
    assert said.pop("from the file").startswith("encoder: ")
    wanted = {"copied from what was loaded": copied, "from scratch": fresh}
    assert said == {key: value for key, value in wanted.items() if value}
    wanted = first.parts()["encoder"].state_dict()
    found = [second.parts()["encoder"], *(copy for copy, _ in second.copies_of_encoder())]
    assert len(found) == 1 + (name in ("glmae_tiny", "alice_tiny", "drasclr_tiny"))
    for network in found:
        state = getattr(network, "encoder", network).state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("name", "option", "copied"),
    [
        ("macl_tiny", "method.coupling=ema", "auxiliary_encoder"),
        ("voco_tiny", "method.teacher=ema", "teacher_encoder"),
    ],
)
def test_an_optional_second_encoder_starts_as_the_first(name, option, copied):
    method = build_method(name, overrides=[option])
    ((copy, original),) = method.copies_of_encoder()
    assert copy is getattr(method, copied)
    assert original is method.encoder


def test_a_teacher_that_is_named_is_that_of_the_file(tmp_path):
    first, second = (build_method("voco_tiny", overrides=["method.teacher=ema"], seed=seed) for seed in (1, 2))
    torch.nn.init.constant_(first.teacher_encoder.stem[0].weight, 3.0)
    path = written(tmp_path / "a.safetensors", first)
    lines = Parent.of({**SETTINGS, "path": str(path), "parts": ["encoder", "teacher_encoder"]}).load(second)
    for part in ("encoder", "teacher_encoder"):
        state = first.parts()[part].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in second.parts()[part].state_dict().items())
    assert "teacher_encoder: 27 tensors matched" in lines[1]
    assert lines[1].endswith("from scratch: projector, teacher_projector")
    assert "copied" not in lines[1]
    lines = Parent.of({**SETTINGS, "path": str(path)}).load(second)
    assert lines[1].endswith("copied from what was loaded: teacher_encoder\nfrom scratch: projector, teacher_projector")
    assert torch.equal(second.teacher_encoder.stem[0].weight, first.encoder.stem[0].weight)


@pytest.mark.parametrize("source", ["mae_vit_tiny", "glmae_tiny"])
def test_simmim_starts_from_a_transformer_without_a_mask_token(source, tmp_path):
    path = written(tmp_path / "a.safetensors", first := build_method(source, seed=1))
    second = build_method("simmim_tiny", seed=2)
    token = second.encoder.mask_token.detach().clone()
    lines = Parent.of({**SETTINGS, "path": str(path)}).load(second)
    assert "1 left out (cls_token), 1 fresh (mask_token)" in lines[1]
    assert torch.equal(second.encoder.mask_token, token)
    assert torch.equal(second.encoder.blocks[0].mlp.fc1.weight, first.encoder.blocks[0].mlp.fc1.weight)


def test_further_networks_are_taken_by_name_and_unknown_ones_refused(tmp_path):
    first, second = (build_method("macl_tiny", seed=seed) for seed in (1, 2))
    path = written(tmp_path / "a.safetensors", first)
    Parent.of({**SETTINGS, "path": str(path), "parts": ["encoder", "decoder"]}).load(second)
    for part in ("encoder", "decoder"):
        state = second.parts()[part].state_dict()
        assert all(torch.equal(state[key], value) for key, value in first.parts()[part].state_dict().items())
    with pytest.raises(ValueError, match=r"weights\.parts names tail; MACL has encoder, decoder, heads"):
        Parent.of({**SETTINGS, "path": str(path), "parts": ["tail"]}).load(second)
    with pytest.raises(ValueError, match=r"weights\.parts takes names of networks such as \[encoder\]; got 'encoder'"):
        Parent.of({**SETTINGS, "parts": "encoder"})
    with pytest.raises(ValueError, match=r"weights\.branch is 'both'"):
        Parent.of({**SETTINGS, "branch": "both"})


def test_an_encoder_of_another_class_is_named(tmp_path):
    path = written(tmp_path / "a.safetensors", build_method("sam_embed_tiny"), encoder={"_target_": "a.b.SAMResNet"})
    with pytest.raises(ValueError, match="the file holds a SAMResNet, the method trains a VisionTransformer"):
        Parent.of({**SETTINGS, "path": str(path)}).load(build_method("glmae_tiny"))


def test_the_command_starts_from_a_file_and_its_card_names_the_parent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["method=glmae_tiny", "data.num_cases=3", "data.size_voxel=48", "batch_size=2", "figures_every=null"]
    small += ["store=s", "views.groups.local.count=1", "validate_every=null"]
    main("pretrain", run, arguments=[*small, "output_dir=a", "trainer.max_steps=1", "optimizer.lr=0"])
    main(
        "pretrain",
        run,
        arguments=[*small, "output_dir=b", "trainer.max_steps=1", "seed=5", "optimizer.lr=0", "data.seed=0",
                   "weights=a/encoder.safetensors"],
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "weights: a/encoder.safetensors" in printed
    assert "copied from what was loaded: teacher_encoder\nfrom scratch: decoder, head, teacher_head\n" in printed
    first, second = (load_encoder(f"{name}/encoder.safetensors").state_dict() for name in "ab")
    assert all(torch.equal(first[key], value) for key, value in second.items())
    cards = [read_card(f"{name}/encoder.safetensors") for name in "ab"]
    assert "parent" not in cards[0]
    parent = cards[1]["parent"]
    assert parent == {
        "file": "encoder.safetensors",
        "parts": ["encoder"],
        "method": "medssl.methods.glmae.GLMAE",
        "training": cards[0]["training"],
        "step": 1,
        "data": "phantoms",
    }
    assert cards[1]["data"]["voxel_hashes"] == cards[0]["data"]["voxel_hashes"]
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=[*small, "output_dir=c", "weights=none.safetensors"])
    assert stop.value.code == 2
    assert "there is no weight file none.safetensors" in capsys.readouterr().err
