import math
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from recorded_steps import TenSteps, assert_recorded
from test_kaf import at, batch

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.derive import run as derive
from medssl.methods.base import Method
from medssl.models.keypoints import RandomPoints
from medssl.prepare import run as prepare
from medssl.pretrain import run
from medssl.segmentation.reading_differences import other_reading

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
FEW = ("model.encoder.base_channels=2", "views.groups.first.size=[16,16,16]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Keypoints of phantoms, and the command on them."""
    root = tmp_path_factory.mktemp("kaf")
    where = [*SMALL, f"store={root / 'store'}"]
    main("prepare", prepare, arguments=where)
    main("derive", derive, arguments=["what=keypoints", f"store={root / 'store'}", "num_workers=0"])
    budget = ["trainer.max_steps=6", "batch_size=2", "validate_every=3", "figures_every=6"]
    main("pretrain", run, arguments=["method=kaf_tiny", *where, *FEW, *budget, f"output_dir={root / 'run'}"])
    return root


def test_a_run_on_phantoms_contrasts_and_matches_and_shows_its_matches(finished):
    lines = [line.split(",") for line in (finished / "run" / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], map(lambda cell: float(cell or "nan"), line), strict=True)) for line in lines[1:]]
    assert len(rows) == 6
    assert all(math.isfinite(row[term]) for row in rows for term in ("image", "keypoints", "matching"))
    assert min(row["points"] for row in rows) >= 8
    assert 0 < max(row["matched_share"] for row in rows) < 1
    assert (finished / "run" / "figures" / "matches-0000006.png").stat().st_size > 0


def test_the_encoder_of_a_run_finds_keypoints_by_itself(finished):
    encoder = medssl.load_encoder(finished / "run" / "encoder.safetensors").eval()
    maps = encoder(torch.rand(1, 1, 32, 32, 32))
    assert [level.shape[1] for level in maps] == [4, 8, 16, 32, 64]
    assert maps[-1].shape[2:] == (2, 2, 2)


def resolved(*overrides):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {"num_cases": 32, "num_channels": 1, "num_locations": 0, "steps_per_epoch": 4.0}
    return OmegaConf.to_container(config, resolve=True)


TEN_STEPS = TenSteps(
    name="kaf_tiny", values=lambda: resolved("method=kaf_tiny"), batch=lambda step: batch(seed=step % 4)
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.gpu
def test_a_step_in_half_precision_on_a_gpu_stays_finite():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    method = build(resolved("method=kaf_tiny")["method"], base=Method).cuda()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3)
    views = {
        name: replace(view, **{key: value.to("cuda") for key, value in vars(view).items() if value is not None})
        for name, view in batch().items()
    }
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = method(views, at())
    output.loss.backward()
    assert output.loss.isfinite()
    assert method.matcher.dustbin.grad.abs() > 0
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in method.parameters())


@pytest.mark.parametrize(
    ("method", "setting", "channels", "token_channels"),
    [
        ("kaf_tiny", "model.encoder.levels=[0,1,1,1]", 256, 192),
        ("kaf_tiny", "model.encoder.base_channels=16", 512, 256),
        ("kaf", "model.encoder.max_channels=320", 320, 1024),
    ],
)
def test_heads_follow_the_encoder(method, setting, channels, token_channels):
    built = build(resolved(f"method={method}", setting)["method"], base=Method).eval()
    assert built.heads.bottleneck[0].in_features == channels
    assert built.heads.fusion.in_features == token_channels
    with torch.no_grad():
        assert built(batch(b=2), at()).loss.isfinite()


def test_the_released_momentum_and_order_of_axes_reach_encoder_and_matcher():
    released = ["model.encoder.bn_momentum=0.19", "model.encoder.axis_swap=true"]
    for overrides, momentum, is_swapped in (([], 0.1, False), (released, 0.19, True)):
        built = build(resolved("method=kaf_tiny", *overrides)["method"], base=Method)
        assert [layer.mlp[1].momentum for layer in built.encoder.kaf["0"].attention] == [momentum] * 2
        assert built.encoder.kaf["3"].position.axis_swap is is_swapped
        assert built.matcher.position.axis_swap is is_swapped


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "views.groups.first.size=[16,20,16]",
            "views.groups.first.size=[16, 20, 16] is no multiple of the network's coarsest stride, which is [16",
        ),
        ("model.encoder.spatial_dims=2", "views.groups.first.size=[16, 16, 16]: a 2D network takes slices, [x, y, 1]"),
        ("views.groups.first.points=null", "method.points.match=shared takes points of a table"),
        ("views.groups.first.points=corners", "no derived data 'corners'; run `python -m medssl.derive what=corners"),
    ],
)
def test_what_cannot_train_is_refused_before_a_batch_is_drawn(finished, capsys, monkeypatch, setting, message):
    monkeypatch.setattr("medssl.training.pretraining.fit", lambda *_, **__: pytest.fail("the training begins"))
    where = [*SMALL, f"store={finished / 'store'}", f"output_dir={finished / 'refused'}"]
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=["method=kaf_tiny", *where, *FEW, setting])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error


def test_an_encoder_may_look_at_random_points():
    random = "model.encoder.detector._target_=medssl.models.keypoints.RandomPoints"
    values = resolved("method=kaf_tiny", random, "~model.encoder.detector.value_range")
    encoder = instantiate(values["model"]["encoder"], _convert_="all").eval()
    assert encoder.detector == RandomPoints()
    assert encoder.find(torch.zeros(1, 1, 16, 16, 16))[1].sum() == 64


def test_views_and_table_of_keypoints_show_ct_in_one_window():
    table = compose("derive", ["what=keypoints"]).what
    for group in resolved("method=kaf")["views"]["groups"].values():
        shown = group["augment"][0]
        assert shown["_target_"].endswith("ByModality")
        assert (shown["window_hu"], shown["percentiles"]) == (table.window_hu, table.percentiles)


def test_fine_tuning_with_the_window_of_pre_training_reads_images_alike():
    card = {"reading": {"views": resolved("method=kaf")["views"]}}
    lines = []
    for window in ([-160, 240], [-1000, 1000]):
        normalise = OmegaConf.to_container(compose("finetune", [f"window_hu={window}"]).normalise, resolve=True)
        reading = {"spacing_mm": "native", "outside": "minimum", "normalise": normalise}
        lines.append(other_reading(card, reading))
    assert lines[0] == []
    assert "window_hu=[-160, 240] percentiles=[0.5, 99.5] out=[0, 1] in pre-training" in lines[1][0]


@pytest.mark.parity
def test_the_released_weights_temperatures_and_optimiser_are_the_default():
    values = resolved("method=kaf")
    method = values["method"]
    weights = [method[f"weight_{term}"] for term in ("image", "keypoints", "matching")]
    assert weights == [1, 1, 0.01]
    assert (method["temperature"], method["base_temperature"]) == (0.1, 0.07)
    assert (method["metric"], method["threshold"]) == ("linf", 0.35), "ours: as many positives as 0.1 along one axis"
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.002, 0.9, 1e-5)
    built = build(method, base=Method)
    encoder = sum(p.numel() for p in built.encoder.parameters())
    assert round(encoder / 1e6, 1) == 46.1
