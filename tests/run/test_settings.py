import pytest

from medssl.config import compose, config_dir, to_yaml
from medssl.run.settings import changes, check_settings
from medssl.training.fit import check_trainer


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch_size=0", "batch_size must be a whole number from 1 up; got 0"),
        ("seed=first", "seed must be a whole number from 0 up; got 'first'"),
        ("trainer.max_steps=2.5", "trainer.max_steps must be a whole number from 1 up; got 2.5"),
        ("validate_every=0", "validate_every must be a whole number from 1 up, or null for never; got 0"),
        ("checkpoint_every=true", "checkpoint_every"),
        ("optimizer.lr=-1", "optimizer.lr must be a number from 0 up; got -1"),
        ("optimizer.lr=abc", "optimizer.lr must be a number from 0 up; got 'abc'"),
        ("+optimizer.least_fraction=2", "optimizer.least_fraction is a share, from 0 to 1; got 2"),
        ("optimizer.clip_norm=true", "optimizer.clip_norm must be a number from 0 up; got True"),
        *[
            (f"{key}={word}", f"{key} must be true or false; got '{word}'")
            for key in ("overwrite", "compile", "checkpoint_activations")
            for word in ("no", "off", "maybe")
        ],
    ],
)
def test_a_count_that_is_none_is_refused(override, words):
    with pytest.raises(ValueError) as caught:
        check_settings(compose("pretrain", [override]))
    assert words in str(caught.value)


def test_the_switch_of_a_logger_is_one_too():
    with pytest.raises(ValueError, match=r"logger\.offline must be true or false; got 'no'"):
        check_settings(compose("pretrain", ["logger=wandb", "logger.offline=no"]))


def test_the_configurations_as_they_are_pass():
    for method in ("glmae", "glmae_tiny"):
        check_settings(compose("pretrain", [f"method={method}", "figures_every=null"]))


def test_what_a_resumed_run_does_otherwise_is_told(tmp_path):
    earlier = tmp_path / "config.yaml"
    earlier.write_text(to_yaml(compose("pretrain", ["optimizer.lr=0.5", "output_dir=a", "export_every=3"])))
    now = compose("pretrain", ["optimizer.lr=0.25", "output_dir=b", "resume=a"])
    assert changes(earlier, now) == ["optimizer.lr was 0.5, is now 0.25"]
    assert changes(tmp_path / "none.yaml", now) == []


@pytest.mark.parametrize("method", sorted(file.stem for file in (config_dir() / "method").glob("*.yaml")))
def test_the_trainer_is_checked_before_the_length_of_an_epoch_is_known(method):
    assert check_trainer(compose("pretrain", [f"method={method}"])).world_size == 1
