"""Composition, help and error messages: in one process, but for what a fresh interpreter imports."""

import importlib
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

import medssl
from medssl.config import CommandLine, compose, config_dir, help_text, main, mistyped, to_yaml, user_message


def run_like_a_command(config):
    """Stands in for what a command does with its configuration."""
    raise KeyError("a fault of the program")


def complain(config):
    raise ValueError("seed must be even, got 7; choose an even one")


def failure(capsys, *arguments, run=run_like_a_command):
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    return message


def test_help_and_the_bare_package_import_neither_torch_nor_lightning():
    code = (
        "import sys, runpy; sys.argv = ['pretrain', '--help']\n"
        "import medssl\n"
        "try: runpy.run_module('medssl.pretrain', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'lightning', 'monai', 'SimpleITK', 'matplotlib', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("method", "data", "trainer", "glmae_tiny", "phantoms", "output_dir", "max_rejected_fraction"):
        assert name in done.stdout


def test_every_public_name_can_be_imported():
    for name in medssl.__all__:
        assert getattr(medssl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = medssl.nonsense


def test_the_names_that_scripts_rely_on_are_keys_of_the_configuration():
    config = compose("pretrain")
    names = "method data store output_dir overwrite resume seed batch_size checkpoint_every trainer logger"
    assert set(f"{names} max_rejected_fraction".split()) <= set(config)
    assert "root" in config.data
    assert "max_steps" in config.trainer


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp"])
@pytest.mark.parametrize("logger", ["csv", "wandb"])
def test_every_choice_of_trainer_and_logger_composes_and_resolves(trainer, logger):
    config = compose("pretrain", [f"trainer={trainer}", f"logger={logger}", "facts.steps_per_epoch=3"])
    precision = {"cpu": "32-true", "gpu": "bf16-mixed", "ddp": "bf16-mixed"}[trainer]
    assert OmegaConf.to_container(config, resolve=True)["trainer"]["precision"] == precision


def test_ddp_on_the_cpu_trains_in_32_bit():
    assert compose("pretrain", ["trainer=ddp", "trainer.accelerator=cpu"]).trainer.precision == "32-true"


def test_epochs_become_steps_once_the_facts_are_known():
    config = compose("pretrain", ["+a=${epochs:2.5}", "+b='${mul:2,3,${a}}'", "+c='${div:${b},4}'"])
    assert "a: ${epochs:2.5}" in to_yaml(config)
    config.facts.steps_per_epoch = 10
    assert (config.a, config.b, config.c) == (25, 150, 37.5)
    assert "a: 25\n" in to_yaml(config)


def test_a_folder_of_the_user_adds_choices_and_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "# @package _global_\nmethod: {_target_: mine.Mine}\nviews: {}\nsampler: {}\nbatch_size: 3\n"
    )
    (tmp_path / "mine_of_this_test.py").write_text("answer = 42\n")
    found = {}

    def run(config):
        import mine_of_this_test

        found.update(batch_size=config.batch_size, answer=mine_of_this_test.answer)

    main("pretrain", run, arguments=["--config-dir", str(tmp_path), "method=mine"])
    assert found == {"batch_size": 3, "answer": 42}
    assert "mine" in help_text("pretrain", "", extra_dir=tmp_path)


def test_cfg_prints_the_configuration_and_runs_nothing(capsys):
    main("pretrain", run_like_a_command, arguments=["--cfg", "seed=5", "data.root=/scans"])
    assert OmegaConf.create(capsys.readouterr().out).seed == 5


def test_help_lists_groups_with_their_choices_and_explains_every_key():
    text = help_text("pretrain", "what it does")
    keys = [
        line.split(":")[0] for line in (config_dir() / "pretrain.yaml").read_text().splitlines() if line[:1].isalpha()
    ]
    explained = [key for key in keys if key not in ("defaults", "method", "model", "views", "sampler", "facts")]
    assert all(f"\n  {key} " in text for key in explained)
    assert "cpu*, ddp, gpu" in text
    assert all(f"\n  {key} " in text for key in ("trainer.devices", "trainer.accelerator", "logger.offline"))
    assert not any("batch_size" in line and "[" in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method=nonsense"], ["method=nonsense does not exist", "glmae_tiny"]),
        (["batchsize=3"], ["no key 'batchsize'", "did you mean 'batch_size'"]),
        (["trainer.max_step=3"], ["did you mean 'trainer.max_steps'"]),
        (["seed=1,2"], ["seed=[1,2,3]"]),
        (["model=null"], ["a group takes the name of a choice", "NoneType"]),
        (["seed=[1"], ["seed=[1", "cannot be read"]),
        (["seed"], ["'seed' is not understood"]),
        (["--nonsense"], ["'--nonsense' is not understood"]),
        (["--config-dir", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, arguments, words):
    message = failure(capsys, *arguments)
    assert all(word in message for word in words), message


def test_a_key_is_never_suggested_instead_of_itself(capsys):
    assert "did you mean 'data.channels'" not in failure(capsys, "data=store", "data.channels=all")


@pytest.mark.parametrize("rate", ["${div:1,0}", "${div:abc,2}", "${mul:${nothing},2}", "${epochs:2}"])
def test_a_value_that_cannot_be_computed_is_one_line(capsys, rate):
    failure(capsys, f"optimizer.lr='{rate}'", run=lambda config: config.optimizer.lr)


def test_a_missing_value_is_named(capsys):
    message = failure(capsys, "+needed=???", run=lambda config: config.needed)
    assert "needed is missing; give it as needed=VALUE" in message


def test_our_own_value_errors_are_one_line_and_others_are_not(capsys):
    assert "choose an even one" in failure(capsys, run=complain)
    with pytest.raises(KeyError):
        main("pretrain", run_like_a_command, arguments=[])
    import numpy as np

    with pytest.raises(ValueError, match="broadcast"):
        main("pretrain", lambda config: np.broadcast_to(np.zeros(2), 3), arguments=[])


def test_the_traceback_of_a_mistake_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("MEDSSL_DEBUG", "1")
    with pytest.raises(ValueError, match="choose an even one"):
        main("pretrain", complain, arguments=[])


def test_a_wrong_keyword_of_a_class_named_in_yaml_is_one_line(capsys):
    from hydra.utils import instantiate

    def run(config):
        instantiate({"_target_": "medssl.data.sampling.Pairs", "patner": "random"})

    assert "patner" in failure(capsys, run=run)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("views.groups.pair.tries=abc", "views.groups.pair.tries must be int, got 'abc'"),
        ("views.groups.pair.size=40", "views.groups.pair.size must be Sequence[int], got 40"),
        ("views.groups.pair.size=[4,4,x]", "views.groups.pair.size must be Sequence[int], got [4, 4, 'x']"),
        ("method.weight_reconstruction=abc", "method.weight_reconstruction must be float, got 'abc'"),
        ("method.clip_per_parameter=abc", "method.clip_per_parameter must be float | None, got 'abc'"),
        ("method.mask_per_sample=null", "method.mask_per_sample must be bool, got None"),
        ("model.encoder.feature_size=wide", "model.encoder.feature_size must be int, got 'wide'"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named_wherever_it_made_the_run_fail(capsys, setting, message):
    def run(config):
        import medssl.data.matching
        import medssl.methods.alice
        import medssl.models.nnformer  # noqa: F401

        raise TypeError("can't multiply sequence by non-int of type 'float'")

    assert failure(capsys, "method=alice_tiny", setting, run=run) == f"error: {message}\n"


def test_no_setting_of_ours_counts_as_one_of_the_wrong_type():
    """Else a fault of the program would be blamed on it."""
    targets = set()
    for command, groups in {
        "pretrain": ("method", "model", "data"),
        "derive": ("what",),
        "finetune": ("model",),
    }.items():
        for group in groups:
            for file in sorted((config_dir() / group).glob("*.yaml")):
                config = compose(command, [f"{group}={file.stem}"])
                names = set(re.findall(r"_target_: (medssl[.\w]+)", OmegaConf.to_yaml(config)))
                for name in names:
                    importlib.import_module(name.rpartition(".")[0])
                assert mistyped(config) is None, (command, file)
                targets |= names
    assert len(targets) > 20


def test_a_missing_file_is_the_users_to_mend(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "gone").read_text()
    assert "gone" in user_message(caught.value)


def test_options_stand_anywhere_among_the_overrides(tmp_path):
    line = CommandLine.parse(["seed=1", f"--config-dir={tmp_path}", "~logger", "+a.b=2"])
    assert line.overrides == ["seed=1", "~logger", "+a.b=2"]
    assert line.extra_dir == tmp_path


def test_words_without_an_equals_sign_are_taken_only_by_commands_that_name_a_list_for_them(tmp_path, capsys):
    line = CommandLine.parse(["runs/a", "seed=1", "~logger", "runs/b"], positional=True)
    assert (line.words, line.overrides) == (["runs/a", "runs/b"], ["seed=1", "~logger"])
    found = []
    main("compare", found.append, arguments=["runs=[runs/0]", "runs/a, b", "runs/b"], positional="runs")
    assert found[0].runs == ["runs/0", "runs/a, b", "runs/b"]
    main("compare", found.append, arguments=["runs=runs/0"], positional="runs")
    assert found[1].runs == ["runs/0"]
    with pytest.raises(ValueError, match="'--run' is not understood"):
        CommandLine.parse(["--run"], positional=True)
    assert "medssl.pretrain RUNS ... KEY=VALUE" in help_text("pretrain", "", positional="runs")
