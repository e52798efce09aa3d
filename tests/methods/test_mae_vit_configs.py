import pytest
import torch
from recorded_steps import TenSteps, assert_recorded
from small_mae import crops
from test_mae_configs import resolved

from medssl.building import build
from medssl.methods.base import Method
from medssl.models.masked_transformer import MaskedAutoencoder
from medssl.training.optim import build_optimizer

TEN_STEPS = TenSteps(
    name="mae_vit_tiny",
    values=lambda: resolved("method=mae_vit_tiny"),
    batch=lambda step: crops(b=4, side=48, seed=step % 4),
    optimizer={"warmup_steps": 0, "final_fraction": 1.0},
    clip_norm=1.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.parity
def test_the_networks_and_the_recipe_are_those_of_the_card():
    values = resolved("method=mae_vit")
    with torch.device("meta"):
        method = build(values["method"], base=Method)
    assert isinstance(method.network, MaskedAutoencoder)
    trained = {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in method.parts().items()
    }
    assert trained == {"encoder": 88_203_264, "decoder": 34_718_464}
    assert method.encoder.pos_embed.shape == (1, 1001, 768)
    assert (method.ratios, method.block_voxel, method.norm_pix) == ((0.75, 0.75), (16, 16, 16), True)
    optimizer = values["optimizer"]
    assert (optimizer["betas"], optimizer["weight_decay"]) == ([0.9, 0.95], 0.05)
    assert optimizer["lr"] == pytest.approx(1.5e-4 * 8 / 256)
    assert optimizer["warmup_steps"] == pytest.approx(250_000 * 40 / 1600)
    _, without_decay = method.param_groups()
    assert without_decay["weight_decay"] == 0
    assert all(p.ndim < 2 for p in without_decay["params"])
    _, schedule = build_optimizer(optimizer, [{"params": [torch.nn.Parameter(torch.zeros(1))]}], total_steps=250_000)
    assert [schedule.lr_lambdas[0](step) for step in (3125, 6250, 250_000)] == pytest.approx([0.5, 1, 0], abs=1e-6)


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    values = resolved("method=mae_vit_tiny")
    method = build(values["method"], base=Method)
    mechanisms = {
        "visible patches alone": method.form == "vit",
        "a quarter of them": method.ratios == (0.75, 0.75),
        "a CLS token": method.encoder.cls_token is not None,
        "a decoder with mask tokens": method.network.decoder.mask_token.requires_grad,
        "of several blocks": len(method.network.decoder.blocks) == 2,
        "several heads": method.encoder.blocks[0].attn.num_heads == 4,
        "fixed positions": not method.encoder.pos_embed.requires_grad,
        "normed targets": method.norm_pix,
        "squared error": method.error == "mse",
        "of hidden patches": method.loss_on == "hidden",
        "no decay of biases": not method.decays_all,
        "a warm-up": values["optimizer"]["warmup_steps"] == 7.5,
        "crops are moved": values["views"]["groups"]["crop"]["augment"]
        == resolved("method=mae")["views"]["groups"]["crop"]["augment"],
    }
    assert all(mechanisms.values()), [name for name, is_on in mechanisms.items() if not is_on]


def test_channels_and_recomputed_activations_reach_both_networks(at):
    values = resolved("method=mae_vit_tiny", "checkpoint_activations=true", channels=4)
    method = build(values["method"], base=Method)
    assert method.encoder.checkpoint_activations
    assert method.network.decoder.checkpoint_activations
    method(crops(b=1, channels=4, side=48), at()).loss.backward()
    assert method.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
