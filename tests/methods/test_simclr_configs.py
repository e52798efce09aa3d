"""SimCLR by its configurations: what they hold, on which networks they train, and runs by the command."""

import math

import pytest
import torch
from contrast_runs import (
    SMALL,
    assert_resumes,
    pretrained,
    resolved,
    rows,
    straight_run,
    two_steps_of_finetuning,
)
from recorded_steps import TenSteps, assert_recorded
from small_contrast import pairs_of_crops

import medssl
from medssl.building import build
from medssl.config import main
from medssl.methods.base import Method
from medssl.methods.simclr import SimCLR
from medssl.prepare import run as prepare

TERMS = ("contrast", "contrast_at_collapse", "accuracy", "feature_std", "effective_rank")
NARROW = ("views.groups.first.size=[16,16,16]", "views.groups.second.shift_voxel=8", "method.projector.hidden_dim=16")
INTENSITIES = [  # references card, 0.4: set I, in order, with the probability of each
    ("ZScore", 1.0), ("GaussianNoise", 0.1), ("GaussianBlur", 0.1), ("Brightness", 0.15), ("Contrast", 0.15),
    ("LowResolution", 0.05), ("Gamma", 0.1), ("Gamma", 0.3), ("Flip", 0.5), ("Rotate90", 0.4),
]  # fmt: skip


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Phantoms, prepared."""
    settings = [*SMALL, f"store={tmp_path_factory.mktemp('simclr') / 'store'}"]
    main("prepare", prepare, arguments=settings)
    return settings


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    values = resolved("method=simclr_tiny")
    method, groups = values["method"], values["views"]["groups"]
    names = {name: group["_target_"].rpartition(".")[2] for name, group in groups.items()}
    assert names == {"first": "RandomCrop", "second": "Shifted"}  # pairs that overlap
    assert groups["second"]["of"] == "first"
    assert groups["first"]["count"] == groups["second"]["count"] == 2  # a volume's other pair is a negative
    assert groups["second"]["shift_voxel"] == [side // 2 for side in groups["first"]["size"]]  # half along each axis
    for group in groups.values():
        chain = [step["_target_"].rpartition(".")[2] for step in group["augment"]]
        assert chain == [name for name, _ in INTENSITIES]
        assert all(step.get("share", "view") == "view" for step in group["augment"])  # drawn for each crop
    inverted, plain = (step for step in groups["first"]["augment"] if step["_target_"].endswith("Gamma"))
    assert (inverted["invert"], plain.get("invert", False)) == (True, False)
    assert all(step["balanced"] and step["keep_statistics"] for step in (inverted, plain))
    built = build(method, base=Method)
    assert built.projector.num_maps == 3  # every stage
    assert built.projector.in_dim == 8 + 16 + 32
    assert (method["projector"]["norm"], method["temperature"], method["gather"]) == ("layer", 0.5, True)
    assert len([layer for layer in built.projector.mlp if isinstance(layer, torch.nn.Linear)]) == 3
    assert built.transfers().recipes == {"encoder": "encoder"}
    assert values["optimizer"]["clip_norm"] == 1


@pytest.mark.parity
def test_the_published_configuration_has_the_budget_of_the_reference():
    """References card, 0.2 and section 4."""
    values = resolved("method=simclr")
    groups = values["views"]["groups"]
    assert (values["batch_size"], values["trainer"]["max_steps"]) == (32, 250_000)
    assert (groups["first"]["count"], groups["first"]["size"], groups["first"]["spacing_mm"]) == (2, [64] * 3, 1.0)
    assert groups["second"]["shift_voxel"] == [32] * 3
    found = [(step["_target_"].rpartition(".")[2], step) for step in groups["first"]["augment"]]
    defaults = {"ZScore": 1.0, "Flip": 0.5}
    assert [(name, step.get("probability", defaults.get(name))) for name, step in found] == INTENSITIES
    ranges = {
        key: step[key] for _, step in found for key in ("std", "sigma_voxel", "zoom", "gamma", "planes") if key in step
    }
    expected = {"std": [0, 0.1], "sigma_voxel": [0.5, 1], "zoom": [0.5, 1], "gamma": [0.7, 1.5], "planes": [[0, 1]]}
    assert ranges == expected
    assert [step["factor"] for _, step in found if "factor" in step] == [[0.75, 1.25]] * 2
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (3e-4, [0.9, 0.98], 0.05)
    assert (optimizer["warmup_steps"], optimizer["shape"], optimizer["clip_norm"]) == (12_500, "poly", 1.0)
    with torch.device("meta"):
        method = build({**values["method"], "crop_voxel": None}, base=Method)
    assert sum(p.numel() for p in method.encoder.parameters()) == 90_284_320
    assert sum(p.numel() for p in method.projector.parameters()) == 10_688_512
    assert method.decays_all


TEN_STEPS = TenSteps(
    name="simclr_tiny",
    values=lambda: resolved("method=simclr_tiny"),
    batch=lambda step: pairs_of_crops(b=4, side=16, seed=step % 4),
    clip_norm=1.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.fixture(scope="module")
def straight(where, tmp_path_factory):
    """A run of four steps."""
    return straight_run("simclr_tiny", SimCLR, where, tmp_path_factory.mktemp("runs"), *NARROW)


def test_a_run_logs_its_terms_shows_its_pairs_and_starts_a_segmenter(where, straight, tmp_path):
    for row in rows(straight):
        assert all(math.isfinite(row[term]) for term in TERMS)
        assert row["contrast_at_collapse"] == pytest.approx(math.log(7), abs=1e-5)
    assert {path.stem.partition("-")[0] for path in (straight / "figures").iterdir()} == {"pairs", "similarity"}
    maps = medssl.load_encoder(straight / "encoder.safetensors")(torch.rand(1, 1, 16, 16, 16))
    assert [level.shape[1] for level in maps] == [8, 16, 32]
    two_steps_of_finetuning(straight, where, tmp_path / "tuned")


def test_a_run_that_broke_off_continues_bit_for_bit(where, straight):
    assert_resumes("simclr_tiny", where, straight.parent, *NARROW, terms=TERMS)


@pytest.mark.slow
def test_the_tiny_run_leaves_collapse(tmp_path):
    """References card, section 4: below 3.0 after 300 steps where ln 23 = 3.135; measured 2.72."""
    settings = ["data=phantoms", f"store={tmp_path / 'store'}", "trainer.max_steps=300", "batch_size=6"]
    found = rows(pretrained("simclr_tiny", settings[:2], tmp_path / "run", *settings[2:]))[-20:]
    assert sum(row["contrast"] for row in found) / 20 < 3.0
    assert sum(row["accuracy"] for row in found) / 20 > 2 / 23
    assert sum(row["feature_std"] for row in found) / 20 > 0.3


def test_a_crop_that_does_not_fit_is_refused_before_data_are_prepared(tmp_path, capsys):
    from medssl.pretrain import run

    settings = ["method=simclr_tiny", "views.groups.first.size=[30,32,32]", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        main("pretrain", run, arguments=[*settings, f"store={tmp_path / 'store'}"])
    said = "views.groups.first.size=[30, 32, 32] is no multiple of the coarsest stride of ResidualEncoder"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
