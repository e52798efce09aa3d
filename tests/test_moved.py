"""Files of users that name places which modules have left are refused with the new place."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

import medssl
from medssl.building import build_network
from medssl.config import compose, main
from medssl.moved import MODULES, NAMES, RENAMED, new_path, refuse_moved
from medssl.pretrain import run as pretrain
from medssl.run.settings import changes
from medssl.weights import save_weights

OLD = [".".join(("medssl", room, file)).replace("..", ".") for room, files in MODULES.items() for file in files]
OLD_NAME = ".".join(("medssl", "data", "sources", "Phantoms"))
NEW_NAME = "medssl.phantoms.source.Phantoms"


def test_every_place_that_was_left_is_empty_and_every_new_one_is_a_module():
    source = Path(medssl.__file__).parent
    for room, files in MODULES.items():
        for file, place in files.items():
            assert not (source / room / f"{file}.py").exists(), file
            assert importlib.util.find_spec(f"medssl.{place}") is not None, place
    for (room, file), names in NAMES.items():
        stayed = source / room / f"{file}.py"
        assert not stayed.exists() or not [name for name in names if f"class {name}" in stayed.read_text()]
        for name in names:
            module, _, found = new_path(f"medssl.{room}.{file}.{name}").rpartition(".")
            assert hasattr(importlib.import_module(module), found)


@pytest.mark.parametrize("old", OLD)
def test_a_class_in_a_module_that_moved_has_a_new_path(old):
    place = new_path(f"{old}.SomeClass")
    assert place.startswith("medssl.")
    assert place.endswith(".SomeClass")
    assert new_path(place) is None


def test_what_has_another_name_is_gone_under_the_old_one():
    for old, new in RENAMED.items():
        module, _, name = old.rpartition(".")
        assert not hasattr(importlib.import_module(module), name)
        module, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(module), name)
        assert new_path(old) == new


def test_what_did_not_move_has_no_new_path():
    for path in ("medssl.models.vit.VisionTransformer", "medssl.data.augment.Flip", "monai.networks.nets.UNet", "mine"):
        assert new_path(path) is None
    assert new_path(OLD_NAME) == NEW_NAME


def test_an_old_target_is_found_wherever_it_stands():
    values = {"a": [{"b": {"_target_": OLD_NAME}}], "_target_": "medssl.data.augment.Flip"}
    with pytest.raises(ValueError, match=rf"^here names {OLD_NAME}, which is {NEW_NAME} now; write the new path"):
        refuse_moved(values, source="here")


def test_a_users_yaml_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    text = f"# @package data\nname: mine\nroot: null\nsource:\n  _target_: {OLD_NAME}\n"
    (tmp_path / "data" / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main("pretrain", pretrain, arguments=["--config-dir", str(tmp_path), "data=mine"])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert f"names {OLD_NAME}, which is {NEW_NAME} now" in error


def test_the_config_of_a_resumed_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"source": {"_target_": OLD_NAME}}}))
    with pytest.raises(ValueError, match=rf"config\.yaml names {OLD_NAME}, which is {NEW_NAME} now"):
        changes(tmp_path / "config.yaml", compose("pretrain"))


def test_a_card_with_an_old_path_is_refused_and_one_whose_paths_stayed_loads(tmp_path):
    network = {"_target_": "medssl.models.unet.UNetEncoder", "widths": [4, 8]}
    built = build_network(network)
    save_weights(tmp_path / "stayed.safetensors", {"encoder": built}, {"encoder": network})
    loaded = medssl.load_encoder(tmp_path / "stayed.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), built.parameters(), strict=True))
    old = json.loads(json.dumps(network)) | {"_target_": f"{OLD[0]}.Network"}
    save_weights(tmp_path / "moved.safetensors", {"encoder": built}, {"encoder": old})
    with pytest.raises(ValueError, match=rf"names {OLD[0]}\.Network, which is {new_path(OLD[0])}\.Network now"):
        medssl.load_encoder(tmp_path / "moved.safetensors")
