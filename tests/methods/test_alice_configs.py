import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from recorded_steps import TenSteps, assert_recorded

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.matching import BodyCoordinateMatcher, Matched, Matcher, TableMatcher
from medssl.data.module import VolumeDataModule
from medssl.data.sampling import Pairs
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.pretrain import run
from medssl.training.optim import build_optimizer

SMALL = ("model.encoder.size_voxel=16", "method.mask_patch_voxel=4", "views.groups.pair.size=[16,16,16]")
OPTIONS = [
    "method.backbone.mask_mode=token",
    "method.mask_shape=cube",
    "method.mask_per_sample=false",
    "method.teacher_tokens=encoder",
    "method.cafa_ema=true",
    "method.teacher_shared_head=false",
    "method.head.shared=true",
    "method.teacher_drop_path=true",
    "method.weight_reconstruction=1",
    "method.clip_per_parameter=null",
    "model.encoder.ape=none",
    "model.encoder.ape=random_frozen",
    "model.encoder.relative_index=correct",
]


def resolved(*overrides):
    """The configuration of a run on 320 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    steps_per_epoch = 320 / config.batch_size
    config.facts = {"num_cases": 320, "num_channels": 1, "num_locations": None, "steps_per_epoch": steps_per_epoch}
    return OmegaConf.to_container(config, resolve=True)


def weights_of(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def batch_of(*, b=1, side=16, seed=0):
    """Smooth pictures; the key is the query in another contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(b, 1, 5, 5, 5, generator=generator)
    query = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear")
    image = torch.stack([query, 0.8 * query + 0.1], dim=1)
    return {"pair": View.of(image)}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "backbone", "head", "cafa"),
    [
        # two output convolutions (2,306 and 1,154 weights) that the released network never uses are not here
        ("alice", 9_725_763 - 2_306 - 48, 5_994_496 - 2 * 512, 3_150_336),
        ("alice_tiny", 2_374_995 - 1_154 - 24, 203_968 - 2 * 128, 131_968),
    ],
)
def test_a_configuration_builds_networks_of_the_card_s_sizes(name, backbone, head, cafa):
    """Trained weights: the fixed gains of the prototypes and the idle mask token are counted out."""
    method = build(resolved(f"method={name}")["method"], base=Method)
    assert (weights_of(method.backbone), weights_of(method.head), weights_of(method.cafa)) == (backbone, head, cafa)
    assert weights_of(method) == backbone + head + cafa


@pytest.mark.parity
def test_the_published_values_are_the_default():
    values = resolved("method=alice")
    method, pair = values["method"], instantiate(values["views"], _convert_="all").groups["pair"]
    assert isinstance(pair, Matched)
    assert (tuple(pair.size), pair.spacing_mm, pair.tries) == ((64, 64, 64), "native", 101)
    assert isinstance(pair.matcher, TableMatcher)
    assert values["sampler"]["partner"] == "linked"
    assert tuple(pair.augment[0].window_hu) == (-125, 225)
    weights = [method[f"weight_{term}"] for term in ("inter_volume", "intra_volume", "reconstruction")]
    assert weights == [1, 1, 10]
    temperatures = [method[f"{who}_temperature{more}"] for who, more in (("student", ""), ("teacher", ""))]
    assert temperatures == [0.1, 0.01]
    assert (method["teacher_temperature_start"], method["teacher_temperature_epochs"]) == (0.008, 30)
    assert (method["ema_momentum"], method["ema_momentum_end"], method["centre_momentum"]) == (0.996, 1.0, 0.9)
    assert (method["clip_per_parameter"], method["freeze_last_layer_epochs"]) == (3.0, 1)
    assert (method["mask_ratio"], method["mask_patch_voxel"], method["mask_shape"]) == (0.75, 16, "column")
    assert values["trainer"]["max_steps"] == 4000  # 100 epochs of 40 steps


def test_rate_and_decay_follow_the_run():
    values = resolved("method=alice")["optimizer"]
    assert values["lr"] == pytest.approx(1e-4)
    assert resolved("method=alice", "batch_size=64")["optimizer"]["lr"] == pytest.approx(8e-4)
    assert values["warmup_steps"] == pytest.approx(200)
    assert values["clip_norm"] is None
    weight = torch.nn.Parameter(torch.ones(2, 2))
    short = resolved("method=alice", "trainer.max_steps=40")["optimizer"]
    optimizer, schedule = build_optimizer(short, [{"params": [weight]}], total_steps=40)
    rates, decays = [], []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        decays.append(optimizer.param_groups[0]["weight_decay"])
        optimizer.step()
        schedule.step()
    assert [rates[step] for step in (0, 1, 2, 21, 40)] == pytest.approx([0, 5e-5, 1e-4, 5.05e-5, 1e-6])
    assert [decays[step] for step in (0, 20, 40)] == pytest.approx([0.04, 0.22, 0.4])


def test_the_tiny_configuration_keeps_every_mechanism_and_needs_no_table():
    values = resolved("method=alice_tiny")
    pair = instantiate(values["views"], _convert_="all").groups["pair"]
    assert isinstance(pair.matcher, BodyCoordinateMatcher)
    assert values["sampler"]["partner"] == "random"
    assert (tuple(pair.size), pair.tries, values["method"]["mask_patch_voxel"]) == ((32, 32, 32), 20, 8)
    full = resolved("method=alice")["method"]
    same = ("mask_ratio", "teacher_temperature", "weight_reconstruction", "cafa_ema", "teacher_shared_head")
    assert all(values["method"][key] == full[key] for key in same)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_reaches_the_method_and_every_trained_weight_gets_a_gradient(option):
    values = resolved("method=alice_tiny", *SMALL, option)
    torch.manual_seed(0)
    method = build(values["method"], base=Method)
    optimizer, _ = build_optimizer({**values["optimizer"], "warmup_steps": 0}, method.param_groups(), total_steps=10)
    progress = Progress(2, 10, 1.0, 5.0, 0)  # in the second epoch, where the prototypes train too
    output = method(batch_of(), progress)
    output.loss.backward()
    assert output.loss.isfinite()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    before = copy.deepcopy(method.teacher_backbone.state_dict())
    method.after_backward(progress)
    optimizer.step()
    method.after_step(progress)
    share, student = 1 - output.logs["ema_momentum"].item(), method.backbone.state_dict()
    moved = 0
    for name, teacher in method.teacher_backbone.named_parameters():
        torch.testing.assert_close(teacher, before[name] + share * (student[name] - before[name]), atol=1e-6, rtol=1e-4)
        moved += not torch.equal(teacher, before[name])
    assert moved > 20


TEN_STEPS = TenSteps(
    name="alice_tiny",
    values=lambda: resolved("method=alice_tiny", *SMALL),
    batch=lambda step: batch_of(seed=step % 4),
    abs=1e-4,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The command on phantoms: 20 steps of two pairs of crops, found by body coordinates."""
    root = tmp_path_factory.mktemp("alice")
    settings = ["method=alice_tiny", "data=phantoms", "data.num_cases=4", "data.size_voxel=32"]
    settings += [f"store={root / 'store'}", f"output_dir={root / 'run'}", "batch_size=2", "trainer.max_steps=20"]
    settings += ["validate_every=10", "figures_every=20", "data.phantom_spacing_mm=12.0"]
    main("pretrain", run, arguments=settings)
    return root / "run"


def test_a_run_on_phantoms_learns_and_does_not_collapse(finished):
    lines = [line.split(",") for line in (finished / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], map(lambda cell: float(cell or "nan"), line), strict=True)) for line in lines[1:]]
    assert len(rows) == 20
    assert sum(row["reconstruction"] for row in rows[-5:]) < 0.7 * sum(row["reconstruction"] for row in rows[:5])
    assert sum(row["loss"] for row in rows[-5:]) < sum(row["loss"] for row in rows[:5])
    assert min(row["feature_std"] for row in rows) > 0.05
    assert (finished / "figures" / "pair-0000020.png").stat().st_size > 0
    assert yaml.safe_load((finished / "config.yaml").read_text())["optimizer"]["weight_decay_end"] == 0.4


def test_encoder_and_decoder_of_a_run_are_what_a_segmenter_takes(finished):
    card = medssl.weights.read_card(finished / "encoder.safetensors")
    assert card["encoder"]["_target_"].endswith("NnFormerEncoder")
    assert card["decoder"]["_target_"].endswith("NnFormerDecoder")
    student = medssl.load_encoder(finished / "encoder.safetensors")
    teacher = medssl.load_encoder(finished / "encoder.safetensors", branch="teacher")
    state = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, encoder in (("backbone", student), ("teacher_backbone", teacher)):
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, state[f"method.{name}.encoder.{key}"])
    maps = student(torch.rand(1, 1, 32, 32, 32))
    assert [x.shape[1] for x in maps] == [24, 48, 96, 192]
    held = {"centre", "token_centre", "cafa.query.weight", "teacher_head.projector.last_layer.weight_v"}
    assert {f"method.{name}" for name in held} <= state.keys()
    assert state["method.centre"].abs().max() > 0


def test_the_noise_of_the_page_reaches_the_student_alone(make_store):
    """The group that docs/methods/alice.md adds shows the same places, with noise."""
    added = yaml.safe_load(blocks_of_the_page("yaml")[0])["views"]["groups"]
    views = resolved("method=alice_tiny", "views.groups.pair.size=[8,8,8]")["views"]
    plan = instantiate({**views, "groups": {**views["groups"], **added}}, _convert_="all")
    array = np.random.default_rng(0).integers(-125, 225, (1, 20, 20, 20)).astype(np.int16)
    store = make_store(array, array[:, ::-1].copy())
    data = VolumeDataModule(
        store=store, views=plan, sampler=Pairs(), batch_size=2, seed=0, training_cases=[0, 1], prefetch=0
    )
    loader = data.loader(data.sampler, data.training_cases, steps=range(1), seed=0)
    views = data.draw(next(iter(loader))).views
    noise = views["student"].image - views["pair"].image
    assert torch.equal(views["student"].matrix, views["pair"].matrix)
    assert torch.equal(views["student"].case, views["pair"].case)
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)


def test_the_landmarks_of_the_page_are_a_matcher(tmp_path):
    space = {}
    exec(blocks_of_the_page("python")[0], space)
    points_mm = {"a": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], "b": [[7.0, 8.0, 9.0], [10.0, 11.0, 12.0]]}
    (tmp_path / "landmarks.json").write_text(json.dumps(points_mm))
    matcher = space["Landmarks"](path=tmp_path / "landmarks.json")
    assert isinstance(matcher, Matcher)
    scene = SimpleNamespace(record=lambda slot: SimpleNamespace(case="ab"[slot]))
    for seed in range(4):
        query, key, score = matcher.propose(scene, np.random.default_rng(seed))
        assert points_mm["b"][points_mm["a"].index(query)] == key
        assert score == 1.0


def blocks_of_the_page(language):
    page = (Path(__file__).parents[2] / "docs" / "methods" / "alice.md").read_text()
    return [block.split("```")[0] for block in page.split(f"```{language}\n")[1:]]
