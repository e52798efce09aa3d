import math
from itertools import pairwise

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from recorded_steps import TenSteps, assert_recorded
from test_drasclr import batch

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.augment import ByModality
from medssl.data.sampling import SameLocation
from medssl.data.store import VolumeStore
from medssl.methods.base import Method, Progress
from medssl.pretrain import run
from medssl.training.optim import build_optimizer

SMALL = ("data=phantoms", "data.num_cases=6", "data.size_voxel=24", "data.phantom_spacing_mm=16.0")
FEW = ("views.groups.anchor.grid=[2,2,1]", "views.groups.anchor.size=[8,8,8]", "method.encoder.widths=[2,2,4,4,6,8]")
OPTIONS = [
    "method.encoder.num_experts=1",
    "method.encoder.init=per_expert",
    "method.encoder.impl=loop",
    "method.neighbour_reduce=mean",
    "method.weight_neighbours=0",
    "method.weight_local=0",
    "method.key_norm=split",
    "method.mask_self=false",
    "method.queue.num_locations=1",
    "sampler.order=sequential",
    "views.groups.neighbours.count=1",
    "~views.groups.neighbours",
]


def resolved(*overrides, num_cases=48, num_locations=27):
    """The configuration of a run on that many volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    sampler = SameLocation(num_locations=num_locations)
    config.facts = {
        "num_cases": num_cases,
        "num_channels": 1,
        "num_locations": num_locations,
        "steps_per_epoch": num_cases / config.batch_size,
        "steps_per_round": sampler.steps_per_round(num_cases, config.batch_size),
    }
    return OmegaConf.to_container(config, resolve=True)


TEN_STEPS = TenSteps(
    name="drasclr_tiny", values=lambda: resolved("method=drasclr_tiny"), batch=lambda step: batch(seed=step % 4)
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.parity
@pytest.mark.parametrize(("name", "experts", "weights"), [("drasclr", 8, 8_262_272), ("drasclr_tiny", 4, None)])
def test_a_configuration_builds_the_networks_of_the_card(name, experts, weights):
    values = resolved(f"method={name}", "method.queue.length=32", num_locations=27)
    method = build(values["method"], base=Method)
    assert values["method"]["encoder"]["num_experts"] == experts
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert weights in (None, trained)
    assert sum(p.numel() for p in method.key_encoder.parameters()) == sum(
        p.numel() for p in method.encoder.parameters()
    )
    assert tuple(method.queue.keys.shape) == (27, 32, 128)


@pytest.mark.parity
def test_the_published_values_are_the_default():
    values = resolved("method=drasclr", num_cases=9179, num_locations=581)
    method, groups = values["method"], values["views"]["groups"]
    assert (method["temperature"], method["ema_momentum"], method["weight_neighbours"]) == (0.2, 0.999, 1.0)
    assert (method["neighbour_reduce"], method["warm_up_steps"], method["encoder"]["init"]) == ("sum", 0, "official")
    assert (groups["anchor"]["count"], groups["neighbours"]["count"]) == (2, 2)
    assert (groups["anchor"]["size"], groups["anchor"]["spacing_mm"]) == ([32, 32, 32], 1.0)
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.01, 0.9, 1e-4)
    assert optimizer["nesterov"] is False
    assert values["batch_size"] == 128
    assert optimizer["hold_steps"] == 581 * 71, "71 batches a visit, as released"


@pytest.mark.parity
def test_values_of_ct_become_what_the_released_loader_makes_of_them():
    spec = instantiate(resolved("method=drasclr")["views"], _convert_="all").groups["anchor"]
    window = spec.augment[0]
    assert isinstance(window, ByModality)
    (low, high), (out_low, out_high) = window.window_hu, window.out
    for hu, expected in ((-1024, -1), (240, 1), (0, 0.62025)):
        assert (hu - low) / (high - low) * (out_high - out_low) + out_low == pytest.approx(expected, abs=1e-5)


@pytest.mark.parity
def test_the_rate_falls_after_each_round_over_all_locations():
    """lr 0.01 over 20 rounds: 0.01, 0.00994, ..., 0.005 in the middle, 6.156e-5 at the end."""
    weight = torch.nn.Parameter(torch.ones(2))
    settings = {**resolved("method=drasclr")["optimizer"], "hold_steps": 3.0}
    optimizer, schedule = build_optimizer(settings, [{"params": [weight]}], total_steps=60)
    rates = []
    for _ in range(60):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in enumerate(rates):
        assert rate == pytest.approx(0.005 * (1 + math.cos(math.pi * (step // 3) / 20)), abs=1e-9)
    assert rates[-1] == pytest.approx(6.156e-5, abs=1e-8)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_reaches_the_method_and_every_trained_weight_gets_a_gradient(option, tmp_path, finished):
    values = resolved("method=drasclr_tiny", *FEW, option, num_cases=6, num_locations=4)
    torch.manual_seed(0)
    method = build(values["method"], base=Method)
    plan, sampler = instantiate(values["views"], _convert_="all"), instantiate(values["sampler"], _convert_="all")
    views = drawn(VolumeStore(finished / "store"), plan, sampler)
    output = method(views, Progress(0, 10, 0.0, 5.0, 0))
    output.loss.backward()
    assert output.loss.isfinite()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


def drawn(store, plan, sampler):
    from medssl.data.module import VolumeDataModule

    data = VolumeDataModule(
        store=store, views=plan, sampler=sampler, batch_size=4, seed=0, training_cases=range(6), prefetch=0
    )
    return data.draw(next(iter(data.loader(sampler, data.training_cases, steps=range(1), seed=0)))).views


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command on phantoms, on a grid of four locations."""
    root = tmp_path_factory.mktemp("drasclr")
    settings = ["method=drasclr_tiny", *SMALL, *FEW, f"store={root / 'store'}", f"output_dir={root / 'run'}"]
    settings += ["batch_size=2", "trainer.max_steps=24", "validate_every=12", "figures_every=24"]
    main("pretrain", run, arguments=settings)
    return root


def test_a_run_on_phantoms_visits_every_location_and_keeps_its_queues(finished):
    lines = [line.split(",") for line in (finished / "run" / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], map(lambda cell: float(cell or "nan"), line), strict=True)) for line in lines[1:]]
    assert len(rows) == 24
    assert all(math.isfinite(row[term]) for row in rows for term in ("local", "neighbours", "feature_std"))
    state = torch.load(finished / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["method.coordinates"].isfinite().all(), "24 steps of two visit four locations more than once"
    assert state["method.key_encoder.bn1.num_batches_tracked"] == 24, "keys have batch statistics of their own passes"
    assert state["method.encoder.bn1.num_batches_tracked"] == 48
    assert min(row["key_std"] for row in rows) > 0.05, "keys of different subjects differ"
    subjects = state["method.queue.subjects"]
    assert all(len(set(ring.tolist()) - {-1}) > 2 for ring in subjects)
    assert (finished / "run" / "figures" / "location-0000024.png").stat().st_size > 0


def test_the_encoder_of_a_run_loads_and_tells_locations_apart(finished):
    encoder = medssl.load_encoder(finished / "run" / "encoder.safetensors").eval()
    image = torch.rand(1, 1, 8, 8, 8)
    here, there = (encoder.represent(image, torch.tensor([[x, 0.0, 0.0]])) for x in (-1.0, 1.0))
    assert here.shape == (1, 128)
    assert not torch.allclose(here, there)


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_the_location_of_a_batch_is_that_of_its_crops_and_all_are_visited_in_a_round(order, finished):
    options = [f"sampler.order={order}", "sampler.batches_per_visit=null"]
    values = resolved("method=drasclr_tiny", *FEW, *options, num_cases=6, num_locations=4)
    plan, sampler = instantiate(values["views"], _convert_="all"), instantiate(values["sampler"], _convert_="all")
    assert isinstance(sampler, SameLocation)
    from medssl.data.module import VolumeDataModule

    store = VolumeStore(finished / "store")
    data = VolumeDataModule(store=store, views=plan, sampler=sampler, batch_size=2, seed=0, training_cases=range(6))
    visited, streams = [], []
    for raw in data.loader(sampler, data.training_cases, steps=range(12), seed=0):
        views = data.draw(raw).views
        (location,) = set(views["anchor"].location_index.flatten().tolist())
        body = views["anchor"].location_body[:, 0]
        cell = torch.tensor(plan.groups["anchor"].cells[location])
        assert torch.allclose(body, cell.expand_as(body), atol=0.06), "crops lie where the queue says"
        visited.append(location)
        streams.append(views["anchor"].image)
    assert sorted(visited) == sorted([0, 1, 2, 3] * 3)
    assert all(not torch.equal(a, b) for a, b in pairwise(streams))


def test_locations_of_a_table_need_one(tmp_path, capsys):
    settings = ["method=drasclr", *SMALL, f"store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stopped:
        main("pretrain", run, arguments=[*settings, "trainer.max_steps=2", "batch_size=2"])
    assert stopped.value.code == 2
    assert "python -m medssl.derive what=locations" in capsys.readouterr().err
