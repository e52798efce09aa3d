from pathlib import Path

import pytest

from medssl.config import main
from medssl.pretrain import run
from medssl.run.folder import RunFolder, checkpoint_to_resume


@pytest.fixture
def used(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim(overwrite=False, checkpoint=None)
    written = ("encoder-0000200.safetensors", "figures/global-0000100.png", "checkpoints/.last.ckpt.7.partial")
    foreign = ("notes.txt", "encoder-best.safetensors", "figures/mine.png", "checkpoints/kept.ckpt")
    paths = (folder.config, folder.metrics, folder.last_checkpoint, folder.encoder)
    for path in (*paths, *(folder.root / name for name in (*written, *foreign))):
        path.write_text("earlier")
    return folder


def test_a_folder_that_holds_a_run_is_refused_with_both_ways_out(used):
    with pytest.raises(ValueError, match=r"already holds a run; .*resume=.*overwrite=true"):
        used.claim(overwrite=False, checkpoint=None)
    assert used.metrics.read_text() == "earlier"


def test_going_on_with_the_run_of_the_folder_keeps_everything(used, monkeypatch):
    monkeypatch.chdir(used.root)
    for checkpoint in (used.last_checkpoint, Path("checkpoints/last.ckpt"), used.root / "copy.ckpt"):
        used.claim(overwrite=False, checkpoint=checkpoint)
    assert used.last_checkpoint.read_text() == "earlier"


def test_a_checkpoint_of_another_run_does_not_open_the_folder(used, tmp_path):
    other = tmp_path / "other" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="already holds a run"):
        used.claim(overwrite=False, checkpoint=other)
    assert used.last_checkpoint.read_text() == "earlier"
    RunFolder(tmp_path / "new").claim(overwrite=False, checkpoint=other)


def test_a_slip_in_the_new_run_does_not_cost_the_old_one(used, capsys):
    slip = ["method=glmae_tiny", "trainer.accelerator=zork", "overwrite=true", f"output_dir={used.root}"]
    with pytest.raises(SystemExit) as stopped:
        main("pretrain", run, arguments=slip)
    assert stopped.value.code == 2
    assert "zork" in capsys.readouterr().err
    assert used.metrics.read_text() == used.last_checkpoint.read_text() == used.encoder.read_text() == "earlier"


def test_overwriting_removes_the_files_of_the_run_and_no_others(used):
    used.claim(overwrite=True, checkpoint=None)
    used.clear(checkpoint=used.last_checkpoint)
    assert used.metrics.read_text() == "earlier"
    assert not list(used.root.rglob(".*.partial")), "what was half written goes in any case"
    used.clear(checkpoint=None)
    left = {path.name for path in used.root.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "encoder-best.safetensors", "mine.png", "kept.ckpt"}


def test_a_file_is_no_run_folder(used):
    with pytest.raises(ValueError, match=r"output_dir=.*metrics\.csv is a file; name a folder"):
        RunFolder(used.metrics).claim(overwrite=True, checkpoint=None)


def test_a_start_that_failed_before_its_first_step_can_be_repeated(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(overwrite=False, checkpoint=None)
    folder.write_config("seed: 0", command="pretrain")
    folder.claim(overwrite=False, checkpoint=None)


def test_the_config_of_another_program_is_not_lost_silently(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text("seed: 0")
    with pytest.raises(ValueError, match=r"config\.yaml is not of a run; .*overwrite=true"):
        folder.claim(overwrite=False, checkpoint=None)
    folder.claim(overwrite=True, checkpoint=None)


def test_resume_takes_a_run_folder_or_a_checkpoint(used, tmp_path):
    assert checkpoint_to_resume(used.root) == used.last_checkpoint
    assert checkpoint_to_resume(used.last_checkpoint) == used.last_checkpoint
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint_to_resume(tmp_path / "elsewhere")
