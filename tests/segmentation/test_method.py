"""Supervised segmentation as a method: labels, losses, freezing, learning rates."""

import pytest
import torch
from monai.losses import DiceCELoss
from torch import nn

from medssl.data.views import View
from medssl.models.segmenter import build_segmenter
from medssl.segmentation.method import Segmentation
from medssl.training.optim import build_optimizer

UNET = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8, 8], "strides": [1, 2, 2]}
VIT = {
    "_target_": "medssl.models.vit.VisionTransformer",
    **{"size_voxel": 16, "patch_voxel": 8, "dim": 24, "depth": 3, "num_heads": 2},
}
VALUES = [0, 5, 117]


def method(encoder=UNET, *, deep_supervision=0, **options):
    torch.manual_seed(0)
    segmenter, _ = build_segmenter(
        encoder, None, num_classes=len(VALUES), in_channels=1, deep_supervision=deep_supervision
    )
    loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, smooth_nr=0.0, smooth_dr=1e-6)
    return Segmentation(segmenter=segmenter, label_values=VALUES, loss=loss, **options)


def batch(*, samples=2, side=16):
    torch.manual_seed(1)
    image = torch.rand(samples, 1, 1, side, side, side)
    label = torch.tensor(VALUES)[(image > 0.5).long() + (image > 0.8).long()]
    return {"crop": View.of(image, label=label)}


def test_label_values_with_gaps_become_class_numbers_and_others_background():
    label = torch.tensor([[0, 5], [117, 6], [4, 300]])
    assert method().classes_of(label).tolist() == [[0, 1], [2, 0], [0, 0]]


def test_the_loss_is_that_of_the_logits_against_the_classes(at):
    segmentation, views = method(), batch()
    output = segmentation(views, at())
    image, label = views["crop"].image.flatten(0, 1), views["crop"].label.flatten(0, 1)
    target = torch.where(label == 5, 1, torch.where(label == 117, 2, 0))
    assert output.loss.item() == pytest.approx(segmentation.loss(segmentation.segmenter(image), target).item())
    assert output.logs["foreground_share"].item() == pytest.approx((label > 0).float().mean().item())


def test_an_encoder_that_takes_locations_gets_that_of_every_voxel(at):
    segmentation, views = method(), batch()
    encoder, seen = segmentation.segmenter.encoder, []
    segmentation.segmenter.takes_coordinate = True
    plain = encoder.forward
    encoder.forward = lambda image, coordinate: seen.append(coordinate) or plain(image)
    faces = torch.tensor([[1.5, -0.5, -0.5], [9.5, 15.5, 31.5]], dtype=torch.float64)
    views["crop"].body_faces = faces.expand(2, 1, 2, 3)
    segmentation(views, at())
    (coordinate,) = seen
    assert coordinate.shape == (2, 3, 16, 16, 16)
    x, y, z = coordinate[0, 0, :, 0, 0], coordinate[0, 1, 0, :, 0], coordinate[0, 2, 0, 0, :]
    for found, lower, side in ((x, 1.5, 8.0), (y, -0.5, 16.0), (z, -0.5, 32.0)):
        expected = 2 * (torch.arange(16.0) - lower) / side - 1
        assert torch.allclose(found, expected.clamp(-1, 1)), "beyond the body box its face counts"


def test_deep_supervision_counts_a_coarser_output_half(at):
    segmentation, views = method(deep_supervision=1), batch()
    fine, coarse = segmentation.segmenter.outputs(views["crop"].image.flatten(0, 1))
    target = segmentation.classes_of(views["crop"].label.flatten(0, 1))
    picked = nn.functional.interpolate(target.double(), scale_factor=0.5, mode="nearest-exact").long()
    expected = (segmentation.loss(fine, target) + 0.5 * segmentation.loss(coarse, picked)) / 1.5
    assert segmentation(views, at()).loss.item() == pytest.approx(expected.item())


def test_the_loss_falls_in_some_steps(at):
    segmentation, views = method(), batch()
    optimizer = torch.optim.AdamW(segmentation.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = segmentation(views, at()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("freeze", "trained"), [("none", 3), ("encoder", 2), ("all_but_head", 1)])
def test_what_is_frozen_gets_no_gradient_and_stays_in_evaluation_mode(freeze, trained, at):
    segmentation = method(freeze=freeze)
    segmentation.train()
    segmentation(batch(), at()).loss.backward()
    parts = list(segmentation.parts().values())
    has_gradient = [any(p.grad is not None for p in part.parameters()) for part in parts]
    assert has_gradient == [False] * (3 - trained) + [True] * trained
    assert [part.training for part in parts] == has_gradient


def test_a_wrong_freeze_names_the_choices():
    with pytest.raises(ValueError, match="none, encoder, all_but_head"):
        method(freeze="decoder")


def test_deeper_blocks_learn_faster_and_the_decoder_at_its_own_rate():
    segmentation = method(VIT, layer_decay=0.5, decoder_lr_scale=4.0)
    optimizer, _ = build_optimizer(
        {"_target_": "torch.optim.AdamW", "lr": 1e-3, "weight_decay": 0.1}, segmentation.param_groups(), total_steps=10
    )
    rates, decays = {}, {}
    names = {id(parameter): name for name, parameter in segmentation.segmenter.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]], decays[names[id(parameter)]] = group["lr"], group["weight_decay"]
    assert rates["encoder.patch_embed.proj.weight"] == pytest.approx(1e-3 / 16)
    assert [rates[f"encoder.blocks.{n}.attn.qkv.weight"] for n in range(3)] == pytest.approx([1.25e-4, 2.5e-4, 5e-4])
    assert rates["encoder.norm.weight"] == pytest.approx(1e-3)
    assert rates["head.0.weight"] == pytest.approx(4e-3)
    assert decays["encoder.norm.weight"] == decays["head.0.bias"] == 0
    assert decays["head.0.weight"] == 0.1
    assert len(rates) == sum(parameter.requires_grad for parameter in segmentation.parameters())


def test_layer_decay_of_a_convolutional_encoder_is_refused():
    with pytest.raises(ValueError, match="UNetEncoder has none"):
        method(layer_decay=0.75)


def test_every_tensor_is_saved_once():
    segmentation = method()
    names = [name for name in segmentation.state_dict() if name not in ("best", "validated_step")]
    assert len(names) == len(segmentation.segmenter.state_dict())
