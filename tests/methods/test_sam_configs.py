import csv

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs_of_views import pair_of, volume
from recorded_steps import TenSteps, assert_recorded

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.placements import Containing
from medssl.methods.base import Method
from medssl.methods.sam_embed import SamEmbed
from medssl.pretrain import run
from medssl.training.optim import build_optimizer


def resolved(*overrides):
    """The configuration of a run on 60 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {
        "num_cases": 60,
        "num_channels": 1,
        "num_locations": None,
        "steps_per_epoch": 60 / config.batch_size,
    }
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("overrides", "trained", "size", "fine", "coarse"),
    [
        (["method=sam_embed"], 8_907_872, (96, 96, 32), (48, 48, 16), (6, 6, 8)),
        (
            ["method=sam_embed", "method.encoder.net.base_channels=64"],
            32_832_960,
            (96, 96, 32),
            (48, 48, 16),
            (6, 6, 8),
        ),
        (["method=sam_embed_tiny"], 728_600, (48, 48, 16), (24, 24, 8), (3, 3, 4)),
    ],
)
def test_a_configuration_builds_the_network_and_views_of_the_card(overrides, trained, size, fine, coarse):
    values = resolved(*overrides)
    with torch.device("meta"):
        method = build(values["method"], base=Method)
        maps = method.encoder(torch.empty(1, 1, *size))
    assert isinstance(method, SamEmbed)
    assert sum(p.numel() for p in method.parameters()) == trained
    assert [level.shape[2:] for level in maps] == [fine, coarse]
    spec = instantiate(values["views"], _convert_="all").groups["pair"]
    assert isinstance(spec, Containing)
    assert (tuple(spec.size), spec.count, spec.spacing_mm, list(spec.scale)) == (size, 2, 2.0, [0.8, 1.2])
    assert (spec.independent, spec.within, spec.outside, spec.valid) == (0.2, "body", -1024, True)
    assert (list(spec.augment[0].window_hu), list(spec.augment[0].out)) == ([-1024, 3071], [-50, 205])


@pytest.mark.parity
def test_the_numbers_of_the_losses_are_those_of_the_card():
    method = build(resolved("method=sam_embed")["method"], base=Method)
    fine, coarse = method.fine, method.coarse
    assert (fine.positive_mm, fine.ignore_mm, fine.num_candidates, fine.num_queries) == (2, 20, 2000, 100)
    assert (fine.num_hard, fine.num_negatives, fine.temperature, fine.mask_value) == (2000, 500, 0.5, "neginf")
    assert (coarse.positive_mm, list(coarse.height_mm), coarse.ignore_mm) == (25, [8, 6], 5)
    assert (coarse.num_hard, coarse.num_negatives, coarse.num_global) == (250, 200, 1000)
    small = resolved("method=sam_embed_tiny", "method.fine.mask_value=zero")["method"]
    assert [small["fine"][key] for key in ("num_candidates", "num_queries", "num_hard", "num_negatives")] == [
        150,
        30,
        400,
        100,
    ]
    assert (small["fine"]["ignore_mm"], small["coarse"]["mask_value"]) == (8.0, "zero")
    assert [small["coarse"][key] for key in ("num_hard", "num_negatives", "num_global")] == [40, 32, 48]


@pytest.mark.parity
def test_the_learning_rate_rises_for_500_steps_and_stays():
    values = resolved("method=sam_embed")
    assert values["batch_size"] == 4
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer, schedule = build_optimizer(values["optimizer"], [{"params": [weight]}], total_steps=10_000)
    assert isinstance(optimizer, torch.optim.SGD)
    settings = optimizer.param_groups[0]
    assert (settings["momentum"], settings["weight_decay"], settings["nesterov"]) == (0.9, 1e-4, False)
    rates = [0.02 * schedule.lr_lambdas[0](step) for step in (0, 250, 500, 5000, 9999)]
    assert rates == pytest.approx([0, 0.01, 0.02, 0.02, 0.02])


def two_crops(step):
    """Two crops of each of two volumes, in other places at each step."""
    starts = [[(4 + step, 2, 8), (12, 10 - step, 10)], [(20, 8, 4 + step), (12, 14, 2)]]
    return pair_of([volume(seed) for seed in (0, 1)], starts, size=(32, 32, 16))


TEN_STEPS = TenSteps(
    name="sam_embed_tiny",
    values=lambda: resolved("method=sam_embed_tiny"),
    batch=two_crops,
    optimizer={"warmup_steps": 0},
    float64=True,  # in 32 bits a change of the image by 1e-6 moves the third loss by 0.03: other negatives are hardest
    rel=2e-3,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


def test_the_command_trains_logs_draws_and_exports_an_encoder_that_loads(tmp_path, make_store):
    store = make_store(*(volume(seed)[None].numpy().astype("int16") for seed in range(4)))
    settings = {
        "method": "sam_embed_tiny",
        "method.encoder.net.base_channels": 4,
        "views.groups.pair.size": "[32,32,16]",
        "views.groups.pair.spacing_mm": 1.0,
        "data": "store",
        "store": store.root,
        "output_dir": tmp_path / "run",
        "trainer.max_steps": 2,
        "optimizer.warmup_steps": 1,
        "validate_every": 2,
    }
    main("pretrain", run, arguments=[f"{key}={value}" for key, value in settings.items()])
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["fine"]) + float(row["coarse"]), rel=1e-5)
        assert {"positive_similarity", "hardest_negative_similarity", "match_error_mm"} <= row.keys()
    assert float(rows[1]["validation_loss"]) > 0
    encoder = medssl.load_encoder(tmp_path / "run" / "encoder.safetensors")
    assert (encoder.axes, encoder.strides) == ("SPL", ((2, 2, 2), (16, 16, 4)))
    fine, coarse = encoder(torch.zeros(1, 1, 32, 48, 16))
    assert (fine.shape, coarse.shape) == ((1, 64, 16, 24, 8), (1, 64, 2, 3, 4))
