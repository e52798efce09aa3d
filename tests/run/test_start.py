"""What every command promises: files are looked for at once, the configuration stays as it is, the loss is near."""

import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

import pytest
from omegaconf.errors import ReadonlyConfigError

import medssl
from medssl import config as frame
from medssl.config import compose, main
from medssl.pretrain import run as pretrain
from medssl.run.start import start

SOURCE = Path(medssl.__file__).parent
COMMANDS = ["compare", "derive", "features", "finetune", "match", "predict", "prepare", "pretrain", "probe"]
LOOP = {"training_step", "forward"}
"""The hooks of the loop that lead to the loss; other overridden hooks of Lightning do not count."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_cannot_write_into_its_configuration(command):
    seen = []

    def run(config):
        for key in list(config):
            with pytest.raises(ReadonlyConfigError):
                config[key] = "other"
        seen.append(len(config))

    main(command, run, arguments=[], positional="runs" if command == "compare" else None)
    assert seen[0] > 0


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_started_run_has_a_configuration_that_is_read_only_down_to_its_leaves(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    config = compose(command)
    with start(config, command=command) as run:
        assert run.config.output_dir == f"runs/{command}"
        for settings in (config, run.config):
            with pytest.raises(ReadonlyConfigError):
                settings.seed = 7
            with pytest.raises(ReadonlyConfigError):
                settings.trainer.max_steps = 7
            with pytest.raises(ReadonlyConfigError):
                settings.facts.num_channels = 7


def test_the_command_line_reaches_the_loss_in_six_functions(tmp_path, monkeypatch):
    from medssl.methods.glmae import GLMAE

    stacks, forward = [], GLMAE.forward

    def watched(method, batch, progress):
        stacks.append(traceback.extract_stack())
        return forward(method, batch, progress)

    monkeypatch.setattr(GLMAE, "forward", watched)
    small = ["data.num_cases=2", "data.size_voxel=32", "data.phantom_spacing_mm=12", "trainer.max_steps=1"]
    small += ["batch_size=1", "validate_every=null", "figures_every=null", f"output_dir={tmp_path / 'run'}"]
    main("pretrain", pretrain, arguments=[*small, f"store={tmp_path / 'store'}"])
    ours = [entry for entry in stacks[0] if SOURCE in Path(entry.filename).parents]
    assert Path(ours[0].filename) == Path(frame.__file__)
    hooks = {"training_step"}
    module = str(SOURCE / "training" / "method_module.py")
    counted = [e.name for e in ours if e.filename != module or e.name in hooks]
    assert [*counted, "forward"] == ["main", "run", "pretrain", "fit", "training_step", "forward"]


def test_a_file_that_does_not_exist_is_named_before_torch_is_imported(tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"")
    (tmp_path / "there.nii.gz").write_bytes(b"")
    calls = {
        "pretrain": [
            ["data=folder", "data.root=none"],
            ["resume=none"],
            ["data=store", "store=none"],
            ["data.split=none.json"],
        ],
        "finetune": [
            ["weights=none.safetensors"],
            ["model.like=none"],
            ["data=btcv", "data.root=none"],
            ["data.split=none"],
        ],
        "predict": [["weights=none.safetensors", "input=."], ["weights=there.safetensors", "input=none"]],
        "features": [["weights=none.safetensors"], ["weights=there.safetensors", "data=folder", "data.root=none"]],
        "match": [
            ["weights=none.safetensors", "query=there.nii.gz", "reference=there.nii.gz", "grid=true"],
            ["weights=there.safetensors", "query=none", "reference=there.nii.gz", "grid=true"],
            ["weights=there.safetensors", "query=there.nii.gz", "reference=none", "grid=true"],
        ],
        "probe": [["features=none", "targets=none.csv", "target=a"]],
        "compare": [["none", "none"]],
        "derive": [["store=none"], ["store=.", "what=pairs", "weights=none"]],
        "prepare": [["data=folder", "data.root=none"]],
    }
    for command in ("pretrain", "finetune"):
        calls[command] += [["data.split=none.json"], ["data.split=none"]]
    program = textwrap.dedent(
        """
        import importlib, sys
        from medssl.config import main
        for command, lines in CALLS.items():
            run = importlib.import_module(f"medssl.{command}").run
            for line in lines:
                try:
                    main(command, run, arguments=line, positional="runs" if command == "compare" else None)
                except SystemExit as stop:
                    assert stop.code == 2, (command, line, stop.code)
                heavy = {"torch", "lightning"} & set(sys.modules)
                assert not heavy, (command, line, heavy)
        """
    ).replace("CALLS", repr(calls))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == sum(map(len, calls.values()))
    assert all(line.startswith("error: ") and "none" in line for line in errors), errors
