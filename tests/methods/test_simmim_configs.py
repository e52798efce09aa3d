import pytest
import torch
from recorded_steps import TenSteps, assert_recorded
from small_mae import crops
from test_mae_configs import resolved

from medssl.building import build
from medssl.methods.base import Method
from medssl.models.masked_transformer import SimMIM

TEN_STEPS = TenSteps(
    name="simmim_tiny",
    values=lambda: resolved("method=simmim_tiny"),
    batch=lambda step: crops(b=2, side=48, seed=step % 4),
    optimizer={"warmup_steps": 0, "final_fraction": 1.0},
    clip_norm=1.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.parity
def test_network_and_recipe_are_those_of_the_card():
    values = resolved("method=simmim")
    with torch.device("meta"):
        method = build(values["method"], base=Method)
    assert isinstance(method.network, SimMIM)
    assert (method.block_voxel, method.encoder.patch_voxel) == ((8, 8, 8), (8, 8, 8))
    assert method.encoder.pos_embed.shape == (1, 8000, 768)
    assert [block.drop_path for block in method.encoder.blocks][:: len(method.encoder.blocks) - 1] == [0.0, 0.2]
    assert (method.ratios, method.error, method.loss_on) == ((0.75, 0.75), "mse", "hidden")
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (3e-4, [0.9, 0.98], 0.05)
    assert (optimizer["shape"], optimizer["exponent"], optimizer["clip_norm"]) == ("poly", 0.9, 1.0)
    assert optimizer["warmup_steps"] == 50 * 250
    assert len(method.param_groups()) == 1  # all weights decay


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    values = resolved("method=simmim_tiny")
    method = build(values["method"], base=Method)
    mechanisms = {
        "all patches": method.form == "simmim",
        "hidden ones as mask tokens": method.encoder.mask_token.requires_grad,
        "no CLS token": method.encoder.cls_token is None,
        "three quarters hidden": method.ratios == (0.75, 0.75),
        "blocks are patches": method.block_voxel == method.encoder.patch_voxel == (8, 8, 8),
        "a linear layer in place of a decoder": list(method.parts()) == ["encoder", "head"],
        "values that are not normed": not method.norm_pix,
        "squared error": method.error == "mse",
        "of hidden patches": method.loss_on == "hidden",
        "dropped paths": [block.drop_path for block in method.encoder.blocks] == [0.0, 0.1, 0.2],
        "every weight decays": method.decays_all,
    }
    assert all(mechanisms.values()), [name for name, is_on in mechanisms.items() if not is_on]


def test_options_make_the_transformer_s_configuration_that_of_simmim():
    tokens = ["method.encoder.mask_token=true", "method.encoder.class_token=false"]
    values = resolved("method=mae_vit_tiny", "method.form=simmim", "method.decoder=null", *tokens)
    assert isinstance(build(values["method"], base=Method).network, SimMIM)
