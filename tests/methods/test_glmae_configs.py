import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs_of_views import global_and_local
from recorded_steps import TenSteps, assert_recorded

from medssl.building import build
from medssl.config import compose
from medssl.data.views import ViewPlan
from medssl.methods.base import Method


def resolved(*overrides):
    """The configuration of a run on 320 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {
        "num_cases": 320,
        "num_channels": 1,
        "num_locations": None,
        "steps_per_epoch": 320 / config.batch_size,
    }
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize(
    ("name", "trained", "sizes", "counts", "tokens"),
    [
        ("glmae", 145_994_752, (160, 96), (2, 8), (1000, 216)),
        ("glmae_small", 28_267_264, (96, 48), (2, 4), (216, 27)),
        ("glmae_tiny", 512_736, (48, 32), (2, 3), (216, 64)),
    ],
)
def test_a_configuration_builds_the_networks_and_views_of_the_card(name, trained, sizes, counts, tokens):
    values = resolved(f"method={name}")
    with torch.device("meta"):
        method = build(values["method"], base=Method)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == trained
    plan = instantiate(values["views"], _convert_="all")
    assert isinstance(plan, ViewPlan)
    for group, size, count, num_tokens in zip(("global", "local"), sizes, counts, tokens, strict=True):
        assert (tuple(plan.groups[group].size), plan.groups[group].count) == ((size,) * 3, count)
        image = torch.empty(1, 1, size, size, size, device="meta")
        assert method.encoder.tokens(image).shape[1] == 1 + num_tokens
    assert tuple(plan.groups["local"].augment[0].window_hu) == (-1000, 1000)


def test_the_networks_take_as_many_channels_as_the_data_have():
    config = compose("pretrain", ["~data", "method=glmae_tiny"])
    config.facts = {"num_cases": 4, "num_channels": 3, "num_locations": None, "steps_per_epoch": 0.5}
    method = build(OmegaConf.to_container(config, resolve=True)["method"], base=Method)
    assert method.encoder.patch_embed.proj.in_channels == 3
    assert method.decoder.pred.out_features == 3 * 8**3


def test_the_learning_rate_counts_crops_and_follows_the_batch_size():
    assert resolved("method=glmae")["optimizer"]["lr"] == pytest.approx(1.5e-4 * 32 * 10 / 256)
    assert resolved("method=glmae", "batch_size=8")["optimizer"]["lr"] == pytest.approx(1.5e-4 * 8 * 10 / 256)
    assert resolved("method=glmae_small")["optimizer"]["lr"] == pytest.approx(1.5e-4 * 16 * 6 / 256)
    fewer = resolved("method=glmae", "views.groups.local.count=2")["optimizer"]["lr"]
    assert fewer == pytest.approx(1.5e-4 * 32 * 4 / 256)
    assert resolved("method=glmae_tiny")["optimizer"]["lr"] == pytest.approx(2e-3)


def test_the_run_is_1600_epochs_long_with_40_of_warm_up_and_can_be_cut_short():
    values = resolved("method=glmae")
    assert values["trainer"]["max_steps"] == 16000
    assert values["optimizer"]["warmup_steps"] == pytest.approx(400)
    assert values["optimizer"]["clip_norm"] == 3.0
    short = resolved("method=glmae", "trainer.max_steps=2", "batch_size=1")
    assert short["optimizer"]["warmup_steps"] < short["trainer"]["max_steps"] == 2


def test_the_bold_values_of_the_tiny_configuration_are_those_of_the_card():
    method = resolved("method=glmae_tiny")["method"]
    found = [method[key] for key in ("teacher_temperature", "weight_consistency_global", "weight_consistency_local")]
    assert found == [0.02, 1.0, 1.0]
    assert method["ema_momentum"] == 0.996
    assert method["head"]["init_std"] == 0.1
    paper = resolved("method=glmae")["method"]
    assert (paper["teacher_temperature"], paper["weight_consistency_global"], paper["head"]["init_std"]) == (
        0.04,
        0.5,
        0.02,
    )


def test_checkpointed_activations_and_channels_reach_both_networks():
    method = resolved("method=glmae", "checkpoint_activations=true", "method.encoder.in_channels=4")["method"]
    assert method["encoder"]["checkpoint_activations"] is method["decoder"]["checkpoint_activations"] is True
    assert method["decoder"]["out_channels"] == 4


TEN_STEPS = TenSteps(
    name="glmae_tiny",
    values=lambda: resolved("method=glmae_tiny"),
    batch=lambda step: global_and_local(seed=step % 4, sides=(48, 32)),
    optimizer={"warmup_steps": 0, "final_fraction": 1.0},
    clip_norm=3.0,
    rel=2e-3,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)
