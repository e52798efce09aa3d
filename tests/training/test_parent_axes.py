"""Continued pre-training from networks of other axes: features right after loading are those of `load_encoder`."""

from functools import reduce

import pytest
import torch
from omegaconf import OmegaConf

from medssl.config import compose, main
from medssl.methods.build import method_along, method_of
from medssl.models.reoriented import TARGET, Reoriented, along
from medssl.pretrain import run
from medssl.training.parent import Parent
from medssl.weights import load_encoder, read_card, save_weights

TURNED = ("mae_tiny", "models_genesis_tiny", "simclr_tiny", "voco_tiny", "alice_tiny", "drasclr_tiny", "macl_tiny")
NEVER = ("glmae_tiny", "kaf_tiny", "mae_vit_tiny", "simmim_tiny", "macl_2d")
IMAGE = torch.linspace(0, 99, 32 * 48 * 32).sin().reshape(1, 1, 32, 48, 32)


def settings_of(name):
    """The settings of a method for 20 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", f"method={name}"])
    facts = {"num_cases": 20, "num_channels": 1, "num_locations": 27, "steps_per_epoch": 4.0, "steps_per_round": 4.0}
    config.facts = {**config.facts, **facts}
    return OmegaConf.to_container(config, resolve=True)["method"]


def encoder_recipe_of(method, settings):
    return reduce(lambda node, key: node[key], method.transfers().recipes["encoder"].split("."), settings)


def parent_along(path, name, axes, *, nested=False):
    """A file whose card says, in one of two ways, that its encoder was trained along some axes."""
    settings = settings_of(name)
    method = method_of(settings, seed=1)
    recipe = encoder_recipe_of(method, settings)
    recipe = recipe.get("net", recipe)
    card = {"encoder": along(recipe, axes)} if nested else {"encoder": recipe, "input_axes": axes}
    save_weights(path, method.parts(), card)
    return Parent.of({"path": str(path), "layout": None, "branch": "student", "parts": ["encoder"]})


@torch.no_grad()
def features(encoder):
    where = (torch.tensor([[0.5, -0.2, 0.1]]),) if getattr(encoder, "takes_coordinate", False) else ()
    return encoder.eval()(IMAGE, *where)


@pytest.mark.parametrize(("axes", "nested"), [("zyx", False), ("SAL", False), ("SAL", True), ("xyz", False)])
@pytest.mark.parametrize("name", [*TURNED, "sam_embed_tiny"])
def test_features_after_loading_are_those_of_the_file_and_of_the_file_that_is_written_then(
    name, axes, nested, tmp_path
):
    parent = parent_along(tmp_path / "old.safetensors", name, axes, nested=nested)
    method, settings = method_along(settings_of(name), parent.axes, seed=2)
    parent.load(method)
    expected = features(load_encoder(parent.path))
    for own, level in zip(features(method.encoder), expected, strict=True):
        torch.testing.assert_close(own, level, rtol=0, atol=0)
    card = {"encoder": encoder_recipe_of(method, settings)}
    save_weights(tmp_path / "new.safetensors", method.parts(), card)
    for own, level in zip(features(load_encoder(tmp_path / "new.safetensors")), expected, strict=True):
        torch.testing.assert_close(own, level, rtol=0, atol=0)
    for copy, original in method.copies_of_encoder():
        assert type(getattr(copy, "encoder", copy)) is type(getattr(original, "encoder", original))


@pytest.mark.parametrize("name", NEVER)
def test_a_method_that_uses_more_than_the_maps_refuses_other_axes(name, tmp_path):
    parent = parent_along(tmp_path / "old.safetensors", name, "zyx")
    with pytest.raises(ValueError, match=r"an encoder trained along the axes zyx; \w+ trains one along xyz and cannot"):
        method_along(settings_of(name), parent.axes, seed=2)


def test_axes_of_equal_meaning_change_nothing(tmp_path):
    settings = settings_of("mae_tiny")
    method, same = method_along(settings, parent_along(tmp_path / "old.safetensors", "mae_tiny", "RAS").axes, seed=2)
    assert same is settings
    assert not isinstance(method.encoder, Reoriented)


def test_a_run_from_a_turned_encoder_exports_a_turned_one_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parent_along(tmp_path / "old.safetensors", "mae_tiny", "SAL")
    small = ["method=mae_tiny", "data.num_cases=3", "data.size_voxel=48", "batch_size=1", "figures_every=null"]
    small += ["store=s", "validate_every=null", "optimizer.lr=0", "weights=old.safetensors", "output_dir=a"]
    main("pretrain", run, arguments=[*small, "trainer.max_steps=1"])
    assert "axes: SAL, those of the file; images are turned for the encoder" in capsys.readouterr().out
    card = read_card("a/encoder.safetensors")
    assert (card["encoder"]["_target_"], card["encoder"]["axes"]) == (TARGET, "SAL")
    assert OmegaConf.load("a/config.yaml").method.encoder.axes == "SAL"
    main("pretrain", run, arguments=[*small[:-1], "resume=a", "trainer.max_steps=2"])
    assert read_card("a/encoder.safetensors")["step"] == 2
    ends = (features(load_encoder(path)) for path in ("a/encoder.safetensors", "old.safetensors"))
    for new, old in zip(*ends, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_a_run_refuses_other_axes_before_it_prepares_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parent_along(tmp_path / "old.safetensors", "mae_vit_tiny", "zyx")
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=["method=mae_vit_tiny", "weights=old.safetensors", "store=s"])
    assert stop.value.code == 2
    assert "cannot turn it" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
