import json
from pathlib import Path

import pytest
import torch
from oracles import self_distillation as oracle

from medssl.losses.reconstruction import masked_mse, patch_statistics
from medssl.ops.patches import patchify

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())["mse"]


@pytest.mark.parity
def test_the_card_s_volume_gives_the_card_s_losses():
    volume = torch.cos(0.05 * torch.arange(512, dtype=torch.float64)).reshape(1, 1, 8, 8, 8)
    prediction = torch.sin(0.1 * torch.arange(512, dtype=torch.float64)).reshape(1, 8, 64)
    masked = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]], dtype=torch.bool)
    target = patchify(volume, 4)
    for prefix, predicted in (("", prediction), ("zero_", torch.zeros_like(prediction))):
        for norm_pix, name in ((False, "plain"), (True, "norm_pix")):
            loss = masked_mse(predicted, target, masked, norm_pix=norm_pix)
            assert loss.item() == pytest.approx(GOLDEN[prefix + name], abs=1e-14)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_mse_matches_a_plain_loop(norm_pix):
    prediction, target = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    masked = torch.rand(3, 5) < 0.5
    expected = oracle.masked_mse(prediction, target, masked, norm_pix=norm_pix)
    assert masked_mse(prediction, target, masked, norm_pix=norm_pix).item() == pytest.approx(expected, rel=1e-5)


def test_visible_patches_do_not_count():
    prediction, target = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    masked = torch.tensor([[1, 0, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    loss = masked_mse(prediction, target, masked)
    changed = torch.where(masked[..., None], target, target + torch.randn(2, 6, 8))
    assert masked_mse(prediction, changed, masked).item() == loss.item()


def test_the_loss_of_a_batch_is_the_mean_of_its_samples_in_any_order():
    prediction, target = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    masked = torch.rand(4, 6).argsort(dim=1) < 3
    single = torch.stack([masked_mse(prediction[[i]], target[[i]], masked[[i]]) for i in range(4)])
    order = torch.tensor([3, 1, 0, 2])
    permuted = [masked_mse(prediction[order][[i]], target[order][[i]], masked[order][[i]]) for i in range(4)]
    assert torch.stack(permuted).tolist() == pytest.approx(single[order].tolist())
    assert masked_mse(prediction, target, masked).item() == pytest.approx(single.mean().item(), rel=1e-6)


def test_the_gradient_is_right_and_stays_on_masked_patches():
    prediction = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 4, 5, dtype=torch.float64)
    masked = torch.tensor([[True, False, True, False]])
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, target, masked), prediction)
    masked_mse(prediction, target, masked).backward()
    assert (prediction.grad.abs().sum(2) > 0).tolist() == masked.tolist()


def test_a_constant_patch_has_target_zero():
    loss = masked_mse(torch.full((1, 1, 8), 0.5), torch.full((1, 1, 8), 3.0), torch.ones(1, 1, dtype=torch.bool))
    assert loss.item() == pytest.approx(0.25)


def test_nothing_masked_gives_zero_not_nan():
    prediction = torch.randn(1, 4, 5, requires_grad=True)
    loss = masked_mse(prediction, torch.randn(1, 4, 5), torch.zeros(1, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad.abs().max() == 0


def test_half_precision_is_computed_in_float32():
    prediction, target = torch.randn(2, 4, 64).bfloat16(), torch.rand(2, 4, 64)
    masked = torch.ones(2, 4, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_mse(prediction, target, masked)
    assert loss.dtype == torch.float32
    assert loss.item() == masked_mse(prediction.float(), target, masked).item()


def test_statistics_undo_the_normalisation():
    patches = torch.rand(2, 3, 8) * 5
    mean, std = patch_statistics(patches)
    normed = (patches - mean) / std
    assert normed.mean(2).abs().max() < 1e-5
    assert normed.var(2).flatten().tolist() == pytest.approx([1.0] * 6, rel=1e-5)
