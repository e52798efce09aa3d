"""VoCo by its configurations: what they hold, on which networks they train, and runs by the command."""

import math

import pytest
import torch
from contrast_runs import (
    SMALL,
    assert_resumes,
    last,
    pretrained,
    resolved,
    rows,
    straight_run,
    two_steps_of_finetuning,
)
from recorded_steps import TenSteps, assert_recorded
from small_contrast import cells_and_targets

import medssl
from medssl.building import build
from medssl.config import main
from medssl.methods.base import Method
from medssl.methods.voco import VoCo
from medssl.prepare import run as prepare
from medssl.pretrain import run

TERMS = ("positive", "negative", "regulariser", "accuracy", "feature_std", "effective_rank")
NARROW = (
    "views.groups.base.size=[8,8,8]",
    "views.groups.base.extent_voxel=[24,24,16]",
    "method.projector.hidden_dim=16",
)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Phantoms, prepared."""
    settings = [*SMALL, f"store={tmp_path_factory.mktemp('voco') / 'store'}"]
    main("prepare", prepare, arguments=settings)
    return settings


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    values = resolved("method=voco_tiny")
    method, groups = values["method"], values["views"]["groups"]
    names = {name: group["_target_"].rpartition(".")[2] for name, group in groups.items()}
    assert names == {"base": "Cells", "target": "Inside"}
    assert groups["target"]["of"] == "base"
    assert groups["target"]["count"] == 4
    assert math.prod(groups["base"]["grid"]) == 18
    assert groups["base"]["extent_voxel"] == [60, 60, 40]  # a field at a random place, of cells as large as crops
    assert (
        groups["base"]["augment"]
        == groups["target"]["augment"]
        == resolved("method=simclr")["views"]["groups"]["first"]["augment"]
    )  # intensity set I, drawn for each crop
    assert (method["form"], method["teacher"]) == ("released", "none")
    assert [method[f"weight_{name}"] for name in ("positive", "negative", "regulariser")] == [1, 1, 1]
    built = build(method, base=Method)
    assert (built.projector.num_maps, built.projector.in_dim) == (3, 8 + 16 + 32)
    assert built.transfers().recipes == {"encoder": "encoder"}
    taught = build({**method, "teacher": "ema"}, base=Method)
    assert taught.teacher_encoder is not None
    assert taught.ema_momentum == 0.9


@pytest.mark.parity
def test_the_published_configuration_has_the_budget_of_the_reference():
    """References card, 0.2 and section 5."""
    values = resolved("method=voco")
    groups, optimizer = values["views"]["groups"], values["optimizer"]
    assert (values["batch_size"], values["trainer"]["max_steps"]) == (8, 250_000)
    base = groups["base"]
    assert (base["grid"], base["extent_voxel"], base["size"]) == ([4, 4, 1], [256, 256, 64], [64] * 3)
    assert (base["spacing_mm"], groups["target"]["count"]) == (1.0, 4)
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.01, 0.99, 3e-5)
    assert (optimizer["shape"], optimizer["exponent"], optimizer["hold_steps"]) == ("poly", 0.9, 250)
    assert (optimizer["nesterov"], optimizer["clip_norm"]) == (True, None)
    with torch.device("meta"):
        method = build({**values["method"], "crop_voxel": None}, base=Method)
    assert sum(p.numel() for p in method.parameters()) == 90_284_320 + 10_688_512
    assert method.decays_all


TEN_STEPS = TenSteps(
    name="voco_tiny",
    values=lambda: resolved("method=voco_tiny"),
    batch=lambda step: cells_and_targets(b=2, side=8, grid=(3, 3, 2), seed=step % 4),
    clip_norm=12.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


def test_a_run_logs_its_terms_shows_its_overlaps_and_starts_a_segmenter(where, tmp_path):
    folder = pretrained("voco_tiny", where, tmp_path / "run", *NARROW)
    for row in rows(folder):
        assert all(math.isfinite(row[term]) for term in (*TERMS, "positive_at_collapse", "positive_at_chance"))
        assert 0.5 < row["positive"] < row["positive_at_collapse"] + 0.5
    assert {path.stem.partition("-")[0] for path in (folder / "figures").iterdir()} == {"crops", "overlaps"}
    maps = medssl.load_encoder(folder / "encoder.safetensors")(torch.rand(1, 1, 16, 16, 16))
    assert [level.shape[1] for level in maps] == [8, 16, 32]
    two_steps_of_finetuning(folder, where, tmp_path / "tuned")


def test_a_run_that_broke_off_continues_bit_for_bit(where, tmp_path):
    taught = (*NARROW, "method.teacher=ema", "figures_every=null")
    straight = straight_run("voco_tiny", VoCo, where, tmp_path, *taught)
    assert_resumes("voco_tiny", where, tmp_path, *taught, terms=TERMS)
    assert any(".teacher_projector." in name for name in last(straight)["state_dict"])


def test_the_released_field_is_all_of_the_body_resized(where, tmp_path):
    released = ("views.groups.base.extent_voxel=null", "method.projector.norm=batch", "method.teacher=ema")
    folder = pretrained(
        "voco_tiny", where, tmp_path / "run", *NARROW, *released, "trainer.max_steps=1", "figures_every=null"
    )
    (row,) = rows(folder)
    assert math.isfinite(row["positive"])


@pytest.mark.slow
def test_the_tiny_run_parts_its_cells_and_falls_below_chance(tmp_path):
    """References card, section 5: 3.45 -> 0.49 in 150 steps; measured 0.34 after 300."""
    settings = ["data=phantoms", f"store={tmp_path / 'store'}", "trainer.max_steps=300", "batch_size=2"]
    found = rows(pretrained("voco_tiny", settings[:2], tmp_path / "run", *settings[2:]))[-20:]
    total = [sum(row[name] for row in found) / 20 for name in ("positive", "negative", "regulariser")]
    assert sum(total) < 0.6
    assert total[0] < sum(row["positive_at_chance"] for row in found) / 20


def test_a_field_of_one_cell_is_refused_before_data_are_prepared(tmp_path, capsys):
    store = tmp_path / "store"
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=["method=voco_tiny", f"store={store}", "views.groups.base.grid=[1,1,1]"])
    assert stop.value.code == 2
    assert "VoCo needs a view group `base` of at least two cells" in capsys.readouterr().err
    assert not store.exists()
