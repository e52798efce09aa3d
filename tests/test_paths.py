"""Settings that name files and folders, given as something else: one line and exit code 2 in every command."""

import importlib
import re

import pytest
from omegaconf import OmegaConf
from volume_files import image

from medssl.config import compose, config_dir, main, with_values
from medssl.data.store import VolumeStore
from medssl.paths import LISTS, PATHS, with_paths

COMMANDS = {
    "compare": ["runs=[a,b]"],
    "derive": ["store=s", "what=locations"],
    "features": ["data=folder", "data.root=r", "weights=w"],
    "finetune": ["data=folder", "data.root=r", "model=auto", "model.like=w"],
    "match": ["query=q", "reference=r", "weights=w", "grid=true"],
    "predict": ["weights=w", "input=i"],
    "prepare": ["data=folder", "data.root=r"],
    "pretrain": ["data=folder", "data.root=r"],
    "probe": ["features=f", "targets=t", "target=x"],
}
"""Every command with what it needs at least."""
NAMES = {
    "compare": ("runs", "output_dir"),
    "derive": (
        *("store", "weights.path", "file", "reference", "what.anchors", "what.masks", "what.roi", "what.transforms"),
    ),
    "features": ("data.root", "store", "weights.path", "output_dir"),
    "finetune": ("data.root", "data.split", "store", "weights.path", "model.like", "output_dir", "resume"),
    "match": ("query", "reference", "weights.path", "output"),
    "predict": ("weights.path", "input", "output_dir"),
    "prepare": ("data.root", "store"),
    "pretrain": ("data.root", "data.split", "store", "weights.path", "output_dir", "resume"),
    "probe": ("features", "reference", "targets", "output_dir"),
}
"""The settings of each command that are paths."""
WRONG = [(1e5, "100000.0"), (2024, "2024"), (True, "true"), ("", "''")]
"""Values that are no path, and how the message shows them."""


def run(command, *arguments):
    """Run a command as from its command line."""
    module = importlib.import_module(f"medssl.{command}")
    main(command, module.run, arguments=arguments, positional="runs" if command == "compare" else None)


@pytest.fixture(scope="module", params=COMMANDS)
def composed(request):
    """A command and its configuration."""
    return request.param, compose(request.param, COMMANDS[request.param])


def test_what_is_no_path_is_refused_by_the_name_of_the_setting(composed):
    command, config = composed
    for name in NAMES[command]:
        shown = name.removesuffix(".path")
        several = (command, name) in LISTS
        for value, text in [*WRONG, ([[1], 2], "[1]") if several else ([1, 2], "[1, 2]")]:
            with pytest.raises(
                ValueError, match=rf"^{re.escape(f'{shown} is {text}')}, which is no path; give"
            ) as error:
                with_paths(with_values(config, {name: value}), command)
            assert "\n" not in str(error.value)


def test_null_is_never_a_name(composed):
    command, config = composed
    for name in NAMES[command]:
        empty = with_values(config, {name: None})
        if command in PATHS[name] or name == "data.root":
            with pytest.raises(ValueError, match="is null, which is no path"):
                with_paths(empty, command)
        else:
            assert OmegaConf.select(with_paths(empty, command), name) is None


def test_all_paths_of_a_command_are_tried(composed):
    command, config = composed
    there = {name for name in PATHS if "." not in name and name in config}
    there |= {name for name in PATHS if "." in name and OmegaConf.select(config, name, default="absent") != "absent"}
    assert there - {"data.split"} <= set(NAMES[command])
    assert {file.stem for file in config_dir().glob("*.yaml")} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_so_in_one_line_and_begins_nothing(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = NAMES[command][0]
    with pytest.raises(SystemExit) as stop:
        run(command, *COMMANDS[command], f"{name}=1e5")
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name.removesuffix('.path')} is 100000.0, which is no path; give ")
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "name"), LISTS)
def test_several_paths_are_texts_too(command, name):
    assert list(OmegaConf.select(compose(command, [*COMMANDS[command], f"{name}=[a,./7]"]), name)) == ["a", "./7"]
    with pytest.raises(ValueError, match="is 7, which is no path"):
        compose(command, [*COMMANDS[command], f"{name}=[a,7]"])


def test_data_without_files_need_no_root_and_those_of_a_store_take_its_path():
    assert compose("prepare", ["data=phantoms"]).data.root is None
    assert compose("finetune", ["data=store", "store=./5"]).data.root == "./5"


def test_a_folder_whose_name_is_a_number_is_given_as_the_message_says(tmp_path, monkeypatch, capsys):
    """As a number it would have lost its zeros: 2024_01 is 202401."""
    image(tmp_path / "2024" / "a.nii.gz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("prepare", "data=folder", "data.root=2024", "store=./7", "num_workers=0")
    assert "and ./ before a name that looks like a number" in capsys.readouterr().err
    run("prepare", "data=folder", "data.root=./2024", "store=./7", "num_workers=0")
    assert VolumeStore(tmp_path / "7").names == ["a"]


def test_a_run_that_is_no_text_is_refused_among_words(capsys):
    with pytest.raises(SystemExit):
        run("compare", "a", "runs=5.5")
    assert "error: runs is 5.5, which is no path" in capsys.readouterr().err
