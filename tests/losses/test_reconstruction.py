import itertools
import json
from pathlib import Path

import pytest
import torch
from oracles import self_distillation as oracle

from medssl.losses.reconstruction import masked_mse, patch_statistics, voxel_error
from medssl.ops.masking import voxel_mask
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


CELLS = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool).reshape(1, 1, 2, 2, 2)
"""Hidden cells of 4 voxels, references card, 1 (G1)."""


@pytest.mark.parity
def test_the_references_card_s_volume_gives_its_losses():
    n = torch.arange(512, dtype=torch.float64)
    image, prediction = (x.reshape(1, 1, 8, 8, 8) for x in (torch.cos(0.05 * n), torch.sin(0.1 * n)))
    hidden = voxel_mask(CELLS, (8, 8, 8))
    assert voxel_error(prediction, image, hidden).item() == pytest.approx(0.936785670667, abs=1e-12)
    assert voxel_error(torch.zeros_like(image), image, hidden).item() == pytest.approx(0.455423430334, abs=1e-12)
    normed = masked_mse(patchify(prediction, 4), patchify(image, 4), CELLS.flatten(1))
    assert normed.item() == pytest.approx(1.475905432637, abs=1e-12)


@pytest.mark.parametrize("error", ["mse", "l1"])
def test_the_voxel_error_matches_a_plain_loop(error):
    prediction, target = torch.randn(2, 3, 2, 3, 4), torch.randn(2, 3, 2, 3, 4)
    counted = torch.rand(2, 1, 2, 3, 4) < 0.4
    errors = []
    for sample, x, y, z in itertools.product(range(2), range(2), range(3), range(4)):
        if counted[sample, 0, x, y, z]:
            apart = (prediction[sample, :, x, y, z] - target[sample, :, x, y, z]).tolist()
            errors.append(sum(d * d if error == "mse" else abs(d) for d in apart) / 3)
    found = voxel_error(prediction, target, counted, error=error)
    assert found.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    doubled = voxel_error(prediction, target, counted, error=error, num_counted=2 * counted.sum())
    assert doubled.item() == pytest.approx(found.item() / 2)


def test_the_voxel_error_of_whole_blocks_is_that_of_their_patches():
    prediction, target = torch.randn(3, 2, 8, 8, 8), torch.randn(3, 2, 8, 8, 8)
    masked = torch.rand(3, 8).argsort(dim=1) < 5
    hidden = voxel_mask(masked.unflatten(1, (2, 2, 2))[:, None], (8, 8, 8))
    expected = masked_mse(patchify(prediction, 4), patchify(target, 4), masked, norm_pix=False)
    assert voxel_error(prediction, target, hidden).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("error", ["mse", "l1"])
def test_the_gradient_of_the_voxel_error_is_right_and_stays_on_counted_voxels(error):
    prediction = torch.randn(1, 2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 2, 2, 2, 3, dtype=torch.float64)
    counted = torch.rand(1, 1, 2, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.autograd.gradcheck(lambda p: voxel_error(p, target, counted, error=error), prediction)
    voxel_error(prediction, target, counted, error=error).backward()
    assert torch.equal(prediction.grad != 0, counted.expand(1, 2, 2, 2, 3))


def test_the_voxel_error_of_no_voxel_is_zero_and_half_precision_is_computed_in_float32():
    prediction = torch.randn(1, 1, 2, 2, 2, requires_grad=True)
    loss = voxel_error(prediction, torch.randn(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == prediction.grad.abs().max() == 0
    large = torch.full((1, 1, 8, 8, 8), 100.0, dtype=torch.float16)  # their squares sum to more than float16 holds
    everywhere = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)
    assert voxel_error(large, -large, everywhere).item() == 40_000
    with pytest.raises(ValueError, match="error is 'ssim', allowed are mse, l1"):
        voxel_error(large, large, everywhere, error="ssim")
