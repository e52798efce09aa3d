"""Encoders that go into segmenters, and segmenters as files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from medssl.models.reoriented import Reoriented
from medssl.models.segmenter import build_segmenter
from medssl.weights import (
    build_network,
    describe_loading,
    encoder_recipe,
    load_encoder,
    load_parts,
    load_segmenter,
    save_weights,
)

VIT = {
    "_target_": "medssl.models.vit.VisionTransformer",
    "size_voxel": [12, 12, 12],
    "patch_voxel": [4, 4, 4],
    "dim": 12,
    "depth": 2,
    "num_heads": 2,
}
UNET = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 6, 6]}
UNETR = {"_target_": "medssl.models.unetr.UNETRDecoder", "feature_size": 4}
CLASSES = [{"value": 0, "name": "background"}, {"value": 5, "name": "liver"}, {"value": 117, "name": "rib"}]


def pretrained(path, recipe=VIT, **card):
    torch.manual_seed(0)
    parts = {"encoder": build_network(recipe), "teacher_encoder": build_network(recipe)}
    save_weights(path, parts, {"encoder": recipe, "method": "medssl.methods.glmae.GLMAE", **card})
    return parts


def saved(path, *, encoder=UNET, deep_supervision=0, **changes):
    torch.manual_seed(1)
    network, recipes = build_segmenter(encoder, None, num_classes=3, in_channels=1, deep_supervision=deep_supervision)
    card = {"kind": "segmenter", **recipes, "classes": CLASSES, "reading": {"crop_voxel": [8, 8, 8]}}
    save_weights(path, network.parts(), {key: value for key, value in {**card, **changes}.items() if value != "drop"})
    return network.eval()


@pytest.mark.parametrize(
    "encoder", [UNET, VIT, {"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zxy"}]
)
def test_a_segmenter_comes_back_with_equal_logits(tmp_path, encoder):
    path = tmp_path / "segmenter.safetensors"
    network = saved(path, encoder=encoder, deep_supervision=1)
    loaded, card = load_segmenter(path)
    image = torch.randn(1, 1, 8, 8, 16)
    assert not loaded.training
    assert torch.equal(loaded(image), network(image))
    for ours, theirs in zip(loaded.outputs(image), network.outputs(image), strict=True):
        assert torch.equal(ours, theirs)
    assert card["classes"] == CLASSES
    assert card["reading"] == {"crop_voxel": [8, 8, 8]}


def test_the_encoder_of_a_segmenter_can_be_taken_out_again(tmp_path):
    path = tmp_path / "segmenter.safetensors"
    network = saved(path, encoder={"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zxy"})
    encoder = load_encoder(path)
    image = torch.randn(1, 1, 8, 12, 16)
    assert isinstance(encoder, Reoriented)
    assert torch.equal(encoder(image)[-1], network.encoder(image)[-1])
    with safe_open(path, framework="pt") as file:
        assert "encoder.norm.weight" in file.keys()  # noqa: SIM118  (the wrapper leaves no trace in the names)


def test_compiling_a_wrapped_encoder_leaves_no_trace_in_the_names(tmp_path):
    network = build_network({"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zxy"})
    for name, encoder in (("a", network), ("b", torch.compile(network, backend="eager"))):
        save_weights(tmp_path / name, {"encoder": encoder}, {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def rewritten(path, **changes):
    with safe_open(path, framework="pt") as file:
        card = json.loads(file.metadata()["card"])
    save_file(load_file(path), path, metadata={"card": json.dumps({**card, **changes})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_classes": 4, "classes": [*CLASSES, {"value": 9, "name": "x"}]},
            r"head: .*0.bias is \(3,\) instead of \(4,\)",
        ),
        ({"classes": CLASSES[:2]}, "names 2 labels for 3 classes"),
        ({"deep_supervision": 1, "encoder": {**UNET, "widths": [4, 6, 6]}}, "does not fit; nothing was loaded"),
        ({"encoder": {**UNET, "widths": [4, 8, 6]}}, r"encoder: .* of another shape \(stages.1.0.conv.weight"),
        ({"decoder": {"_target_": "os.system"}}, "names the class os.system, which is outside medssl.models"),
    ],
)
def test_a_card_that_does_not_belong_to_its_tensors_is_refused(tmp_path, changes, message):
    path = tmp_path / "segmenter.safetensors"
    saved(path)
    rewritten(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_segmenter(path)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_segmenter_that_was_cut_off_is_refused(tmp_path, kept):
    path = tmp_path / "segmenter.safetensors"
    saved(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file .* copy it again"):
        load_segmenter(path)


def test_another_file_than_a_segmenter_is_named(tmp_path):
    path = tmp_path / "encoder.safetensors"
    pretrained(path)
    with pytest.raises(ValueError, match=r"holds a pre-trained encoder, not a segmenter; fine-tune it first"):
        load_segmenter(path)
    saved(path, num_classes="drop", decoder="drop")
    with pytest.raises(ValueError, match="lacks decoder, num_classes"):
        load_segmenter(path)
    save_weights(path, {"net": nn.Linear(1, 1)}, {})
    with pytest.raises(ValueError, match="holds tensors, not a segmenter"):
        load_segmenter(path)
    with pytest.raises(ValueError, match="there is no weight file"):
        load_segmenter(tmp_path / "nothing.safetensors")


def segmenter_for(path, **options):
    network, _ = build_segmenter(encoder_recipe(path), UNETR, **{"num_classes": 3, "in_channels": 1, **options})
    return network


def test_a_pre_trained_transformer_enters_without_its_class_token_and_that_is_reported(tmp_path):
    path = tmp_path / "encoder.safetensors"
    source = pretrained(path)["encoder"]
    network = segmenter_for(path)
    reports = load_parts(path, {"encoder": network.encoder})
    assert reports[0].left_out == ("cls_token",)
    assert reports[0].reshaped == ("pos_embed",)
    assert len(reports[0].matched) == len(source.state_dict()) - 1
    assert torch.equal(network.encoder.pos_embed, source.pos_embed[:, 1:])
    assert torch.equal(network.encoder.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    text = describe_loading(reports, ["decoder", "head"])
    assert text.splitlines() == [
        "from the file: encoder: 29 tensors matched, 1 reshaped (pos_embed), 1 left out (cls_token)",
        "from scratch: decoder, head",
    ]
    assert describe_loading([], ["encoder", "head"]) == "from scratch: encoder, head"


def test_a_class_token_that_is_kept_is_loaded(tmp_path):
    path = tmp_path / "encoder.safetensors"
    source = pretrained(path)["encoder"]
    network, _ = build_segmenter({**encoder_recipe(path), "class_token": True}, UNETR, num_classes=2, in_channels=1)
    (report,) = load_parts(path, {"encoder": network.encoder})
    assert (report.left_out, report.reshaped) == ((), ())
    assert torch.equal(network.encoder.cls_token, source.cls_token)


def test_other_input_channels_are_fitted_and_reported(tmp_path):
    path = tmp_path / "encoder.safetensors"
    source = pretrained(path)["encoder"]
    network = segmenter_for(path, in_channels=4)
    (report,) = load_parts(path, {"encoder": network.encoder})
    assert report.reshaped == ("patch_embed.proj.weight", "pos_embed")
    assert torch.allclose(
        network.encoder.patch_embed.proj.weight.sum(1), source.patch_embed.proj.weight[:, 0], atol=1e-6
    )


def test_the_teacher_of_a_file_enters_a_segmenter(tmp_path):
    path = tmp_path / "encoder.safetensors"
    teacher = pretrained(path)["teacher_encoder"]
    network = segmenter_for(path)
    (report,) = load_parts(path, {"encoder": network.encoder}, branch="teacher")
    assert report.fits
    assert torch.equal(network.encoder.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)


def test_a_network_of_other_axes_enters_a_segmenter_through_its_wrapper(tmp_path):
    path = tmp_path / "encoder.safetensors"
    source = pretrained(path, input_axes="zyx")["encoder"]
    recipe = encoder_recipe(path)
    assert recipe == {"_target_": "medssl.models.reoriented.Reoriented", "net": VIT, "axes": "zyx"}
    network, recipes = build_segmenter(
        {**recipe, "net": {**VIT, "class_token": True}}, UNETR, num_classes=2, in_channels=1
    )
    (report,) = load_parts(path, {"encoder": network.encoder})
    assert report.fits
    image = torch.randn(1, 1, 8, 12, 16)
    expected = source.eval()(image.permute(0, 1, 4, 3, 2))[-1].permute(0, 1, 4, 3, 2)
    assert torch.equal(network.encoder.eval()(image)[-1], expected)
    assert recipes["encoder"]["axes"] == "zyx"


def test_a_published_checkpoint_enters_a_segmenter(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.manual_seed(3)
    wide = {**VIT, "dim": 192, "num_heads": 3}
    student, teacher = build_network(wide), build_network(wide)
    entries = {
        "student": {f"module.backbone.{key}": tensor for key, tensor in student.state_dict().items()},
        "teacher": {f"backbone.{key}": tensor for key, tensor in teacher.state_dict().items()},
    }
    torch.save(entries, path)
    for branch, source in (("student", student), ("teacher", teacher)):
        recipe = encoder_recipe(path, layout="glmae", branch=branch)
        network, _ = build_segmenter(recipe, UNETR, num_classes=2, in_channels=1)
        (report,) = load_parts(path, {"encoder": network.encoder}, layout="glmae", branch=branch)
        assert (report.fits, report.left_out) == (True, ("cls_token",))
        assert torch.equal(network.encoder.blocks[1].norm2.weight, source.blocks[1].norm2.weight)
        assert torch.equal(network.encoder.patch_embed.proj.weight, source.patch_embed.proj.weight)
