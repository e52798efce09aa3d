import argparse
import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medssl.models.heads import ProjectionHead
from medssl.models.reoriented import Reoriented
from medssl.models.vit import MaskedDecoder, VisionTransformer, resize_positions
from medssl.weights import build_network, load_encoder, load_parts, read_card, save_weights

RECIPE = {
    "_target_": "medssl.models.vit.VisionTransformer",
    "size_voxel": [12, 12, 12],
    "patch_voxel": [4, 4, 4],
    "dim": 24,
    "depth": 2,
    "num_heads": 4,
}
CARD = {"method": "medssl.methods.glmae.GLMAE", "encoder": RECIPE, "step": 7}


def network(seed=0, **changes):
    torch.manual_seed(seed)
    return build_network({**RECIPE, **changes})


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_weights(path, {"encoder": network(0), "teacher_encoder": network(1)}, CARD)
    return path


def test_an_encoder_comes_back_as_it_was(own):
    encoder = load_encoder(own)
    assert equal(encoder, network(0))
    assert not encoder.training
    assert not encoder.pos_embed.requires_grad
    image = torch.randn(1, 1, 8, 12, 16)  # another size than it was trained with
    assert [tuple(level.shape) for level in encoder(image)] == [(1, 24, 2, 3, 4)] * 4
    assert torch.equal(encoder(image)[-1], network(0).eval()(image)[-1])
    assert equal(load_encoder(own, branch="teacher"), network(1))


def test_the_card_comes_back_with_its_format(own):
    assert read_card(own) == {**CARD, "format": 2}


def test_equal_weights_give_equal_bytes_and_no_leftovers(own, tmp_path):
    second = tmp_path / "new" / "again.safetensors"
    save_weights(second, {"teacher_encoder": network(1), "encoder": network(0)}, dict(reversed(CARD.items())))
    assert second.read_bytes() == own.read_bytes()
    assert list(second.parent.iterdir()) == [second]
    (plain := tmp_path / "plain").touch()
    assert own.stat().st_mode == plain.stat().st_mode


def test_compiling_leaves_no_trace_in_the_names(own, tmp_path):
    path = tmp_path / "compiled.safetensors"
    save_weights(path, {"encoder": torch.compile(network(0), backend="eager"), "teacher_encoder": network(1)}, CARD)
    assert path.read_bytes() == own.read_bytes()


def test_a_network_of_other_axes_is_wrapped(tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_weights(path, {"encoder": network(0)}, {**CARD, "input_axes": "zyx"})
    encoder = load_encoder(path)
    assert isinstance(encoder, Reoriented)
    image = torch.randn(1, 1, 4, 8, 12)
    own_order = image.permute(0, 1, 4, 3, 2)
    assert torch.equal(encoder(image)[0], network(0).eval()(own_order)[0].permute(0, 1, 4, 3, 2))


def wrong_files(folder):
    good = folder / "encoder.safetensors"
    names = (
        "missing",
        "folder",
        "text",
        "empty",
        "checkpoint",
        "pickle",
        "cut_header",
        "cut_tensors",
        "no_card",
        "other_card",
        "future",
    )
    paths = {name: folder / name for name in names}
    paths["folder"].mkdir()
    paths["text"].write_text("step,loss\n1,0.5\n" * 20)
    paths["empty"].write_bytes(b"")
    torch.save({"model": network().state_dict()}, paths["checkpoint"])
    paths["pickle"].write_bytes(pickle.dumps({"model": [1, 2]}))
    paths["cut_header"].write_bytes(good.read_bytes()[:100])
    paths["cut_tensors"].write_bytes(good.read_bytes()[:-1000])
    save_file({"weight": torch.zeros(2)}, paths["no_card"])
    save_file({"weight": torch.zeros(2)}, paths["future"], metadata={"card": json.dumps({"format": 9})})
    save_file({"weight": torch.zeros(2)}, paths["other_card"], metadata={"card": "[ace of"})
    return paths


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no weight file .*missing"),
        ("folder", "there is no weight file .*folder"),
        ("text", "text is not a whole safetensors file .* copy it again"),
        ("empty", "empty is not a whole safetensors file"),
        ("checkpoint", "checkpoint is a PyTorch pickle, not a safetensors file; .* its layout .glmae."),
        ("pickle", "pickle is a PyTorch pickle"),
        ("cut_header", "cut_header is not a whole safetensors file"),
        ("cut_tensors", "cut_tensors is not a whole safetensors file"),
        ("no_card", "no_card is a safetensors file without a medssl card"),
        ("other_card", "other_card is a safetensors file without a medssl card"),
        ("future", "future has format 9, this version reads 1 and 2; update medssl"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(own, tmp_path, name, message):
    path = wrong_files(tmp_path)[name]
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "medssl.modelsx.Evil", "builtins.eval", "None"])
def test_a_class_outside_the_trusted_packages_is_refused(tmp_path, target):
    path = tmp_path / "encoder.safetensors"
    save_weights(path, {"encoder": nn.Linear(2, 3)}, {"encoder": {"_target_": target, "in_features": 2}})
    with pytest.raises(ValueError, match=f"the recipe names the class {target}, which is outside medssl.models"):
        load_encoder(path)


def test_a_class_is_taken_from_a_package_that_is_allowed(tmp_path):
    path = tmp_path / "encoder.safetensors"
    layer = nn.Linear(2, 3)
    save_weights(
        path, {"encoder": layer}, {"encoder": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}}
    )
    assert torch.equal(load_encoder(path, allow_modules=["torch.nn"]).weight, layer.weight)


def test_nothing_is_loaded_unless_everything_matches(own):
    for changes, message in (
        ({"depth": 3}, r"12 missing \(blocks.2.attn.proj.bias, .*\.\.\.\)"),
        ({"depth": 1}, r"12 unexpected \(blocks.1.attn.proj.bias"),
        ({"dim": 48}, r"30 of another shape \(blocks.0.attn.proj.bias is \(24,\) instead of \(48,\)"),
    ):
        target, untouched = network(2, **changes), network(2, **changes)
        with pytest.raises(ValueError, match=f"does not fit; nothing was loaded. encoder: .*{message}"):
            load_parts(own, {"encoder": target})
        assert equal(target, untouched)
    with pytest.raises(ValueError, match=r"holds no part `decoder`; it holds encoder, teacher_encoder"):
        load_parts(own, {"encoder": network(2), "decoder": nn.Linear(1, 1)})


def test_parts_are_loaded_from_a_mapping_as_from_its_file(own):
    tensors, from_file, from_mapping = load_file(own), network(2), network(2)
    assert str(load_parts(own, {"encoder": from_file})[0]) == str(load_parts(tensors, {"encoder": from_mapping})[0])
    assert equal(from_mapping, from_file)
    with pytest.raises(ValueError, match="the mapping holds no part `decoder`; it holds encoder, teacher_encoder"):
        load_parts(tensors, {"decoder": nn.Linear(1, 1)})
    untouched = network(2, depth=3)
    with pytest.raises(ValueError, match=r"the mapping does not fit; nothing was loaded. encoder: .*12 missing"):
        load_parts(tensors, {"encoder": untouched})
    assert equal(untouched, network(2, depth=3))


def test_partial_loading_is_asked_for_and_reported(own):
    target = network(2, depth=3)
    (report,) = load_parts(own, {"encoder": target}, partial=True)
    assert len(report.missing) == 12
    assert len(report.matched) == 6 + 2 * 12
    assert torch.equal(target.blocks[1].attn.qkv.weight, network(0).blocks[1].attn.qkv.weight)
    assert torch.equal(target.blocks[2].attn.qkv.weight, network(2, depth=3).blocks[2].attn.qkv.weight)


def test_a_table_of_another_grid_and_a_patch_weight_of_one_channel_are_fitted_and_reported(own):
    target = network(2, size_voxel=[16, 8, 8], in_channels=4)
    (report,) = load_parts(own, {"encoder": target})
    assert report.reshaped == ("patch_embed.proj.weight", "pos_embed")
    assert "2 reshaped (patch_embed.proj.weight, pos_embed)" in str(report)
    source = network(0)
    assert torch.equal(target.pos_embed, resize_positions(source.pos_embed, (3, 3, 3), (4, 2, 2)))
    image = torch.randn(1, 1, 12, 12, 12)
    embedded = [
        net._embed(image.expand(-1, net.in_channels, -1, -1, -1), None)[:, 1:] - net.positions((3, 3, 3))[1:]
        for net in (target, source)
    ]
    assert torch.allclose(*embedded, atol=1e-5)  # equal channels give what the one channel gave


# Published checkpoints: the layout is known, no file is at hand, so one is made up.

WIDE = {"size_voxel": 12, "patch_voxel": 4, "dim": 192, "num_heads": 3, "depth": 2}
OLD_NAMES = {
    "embed": "decoder_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "pred": "decoder_pred",
    "pos_embed": "decoder_pos_embed",
}


def published(seed, prefix):
    torch.manual_seed(seed)
    encoder = VisionTransformer(**WIDE)
    decoder = MaskedDecoder(size_voxel=12, patch_voxel=4, encoder_dim=192, dim=24, depth=1, num_heads=2)
    head = ProjectionHead(in_dim=192, hidden_dim=8, bottleneck_dim=4, num_prototypes=5)
    state = {f"{prefix}backbone.{key}": tensor for key, tensor in encoder.state_dict().items()}
    for key, tensor in decoder.state_dict().items():
        first, dot, rest = key.partition(".")
        state[f"{prefix}backbone.{OLD_NAMES.get(first, first)}{dot}{rest}"] = tensor
    state |= {f"{prefix}head.{key}": tensor for key, tensor in head.state_dict().items()}
    return {"encoder": encoder, "decoder": decoder, "head": head}, state


@pytest.fixture
def checkpoint(tmp_path):
    student, teacher = published(0, "module."), published(1, "")
    path = tmp_path / "checkpoint-1599.pth"
    args = argparse.Namespace(lr=1e-4, mask_ratio=0.6)
    entries = {
        "student": student[1],
        "teacher": teacher[1],
        "epoch": 1599,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 5)},
    }
    torch.save(entries, path)
    return path, student[0], teacher[0]


@pytest.mark.parity
def test_a_published_encoder_loads_whole_and_its_architecture_is_read_off_it(checkpoint):
    path, student, teacher = checkpoint
    encoder = load_encoder(path, layout="glmae")
    assert equal(encoder, student["encoder"])
    assert (encoder.grid, encoder.patch_voxel, encoder.feature_depths) == ((3, 3, 3), (4, 4, 4), (1, 1, 2, 2))
    assert equal(load_encoder(path, layout="glmae", branch="teacher"), teacher["encoder"])
    untrained = load_encoder(path, layout="glmae", branch="teacher")
    with torch.serialization.safe_globals([argparse.Namespace]):
        held = {"student": torch.load(path, weights_only=True)["student"]}
    (report,) = load_parts(held, {"encoder": untrained}, layout="glmae")
    assert report.fits
    assert equal(untrained, student["encoder"])


@pytest.mark.parity
def test_published_decoder_and_head_load_as_parts(checkpoint):
    path, student, _ = checkpoint
    fresh = published(5, "")[0]
    reports = load_parts(path, fresh, layout="glmae")
    assert [report.fits and not report.reshaped for report in reports] == [True] * 3
    assert all(equal(fresh[part], student[part]) for part in fresh)


@pytest.mark.parity
@pytest.mark.parametrize("entry", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", "backbone.", ""])
def test_other_places_and_prefixes_are_found(tmp_path, entry, prefix):
    encoder = published(0, "")[0]["encoder"]
    state = {f"{prefix}{key}": tensor for key, tensor in encoder.state_dict().items()} | {
        "fc.weight": torch.zeros(2, 2)
    }
    path = tmp_path / "weights.pth"
    torch.save({entry: state, "epoch": 3} if entry else state, path)
    assert equal(load_encoder(path, layout="glmae"), encoder)


@pytest.mark.parity
def test_a_published_table_is_resized_to_the_grid_of_the_target(checkpoint):
    path, student, _ = checkpoint
    target = VisionTransformer(**{**WIDE, "size_voxel": (8, 16, 12)})
    (report,) = load_parts(path, {"encoder": target}, layout="glmae")
    assert report.reshaped == ("pos_embed",)
    assert torch.equal(target.pos_embed, resize_positions(student["encoder"].pos_embed, (3, 3, 3), (2, 4, 3)))


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_published_file_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"student": {}, "args": Payload()}, path)
    with pytest.raises(ValueError, match=r"evil\.pth is no PyTorch checkpoint that loads without running") as caught:
        load_encoder(path, layout="glmae")
    assert capsys.readouterr().out == ""
    assert not re.search("weights_only|safe_globals|likely succeed", str(caught.value)), "no advice to run it after all"
    assert "GLOBAL print was not an allowed global" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (
            {"student": {"fc.weight": torch.zeros(2)}},
            {},
            "holds no encoder of the layout `glmae`; its first entries are fc.weight",
        ),
        (
            {"model": {"cls_token": torch.zeros(1)}},
            {"branch": "teacher"},
            r"has no branch `teacher`; its entries are \['model'\]",
        ),
        ({"model": {}}, {"branch": "best"}, "branch is 'best', allowed are student, teacher"),
        ([1, 2], {}, "has no branch `student`; its entries are list"),
        ({}, {"layout": "mim"}, "layout is 'mim', known are glmae"),
    ],
)
def test_a_published_file_of_another_kind_is_refused(tmp_path, content, options, message):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_encoder(path, **{"layout": "glmae", **options})


def test_a_text_file_is_no_published_checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("not here")
    with pytest.raises(ValueError, match=r"weights\.pth is no PyTorch checkpoint"):
        load_encoder(path, layout="glmae")


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("pos_embed", (1, 290, 192), "has 290 rows, which is no cubic grid plus CLS"),
        ("patch_embed.proj.weight", (200, 1, 4, 4, 4), "width 200 whose number of heads is not known"),
    ],
)
def test_an_architecture_that_cannot_be_read_off_is_said_so(tmp_path, key, shape, message):
    state = published(0, "")[0]["encoder"].state_dict() | {key: torch.zeros(shape)}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        load_encoder(path, layout="glmae")
