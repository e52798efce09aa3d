"""The command from phantoms to an encoder: the run folder, and every way of stopping and going on."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import medssl
from medssl.config import main
from medssl.pretrain import run
from medssl.training.optim import rate_share

PROBE = """
import hashlib, os, signal, time
from pathlib import Path
import torch
from medssl.methods.glmae import GLMAE

class Probe(GLMAE):
    '''GL-MAE that writes down what it sees and fails on request.'''

    def forward(self, batch, progress):
        if self.training and (log := os.environ.get("PROBE_LOG")):
            digest = hashlib.sha256(b"".join(view.image.numpy().tobytes() for view in batch.values())).hexdigest()
            with Path(log).open("a") as file:
                file.write(f"{progress.step} {progress.micro} {digest}\\n")
        wish, _, step = os.environ.get("PROBE_WISH", "").partition("@")
        if wish and progress.step == int(step):
            if wish == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if wish == "wait":
                log = Path(os.environ["PROBE_LOG"])
                log.with_suffix(".waiting").touch()
                end = time.monotonic() + 300
                while time.monotonic() < end and not log.with_suffix(".signalled").exists():
                    time.sleep(0.02)
            if wish == "nan":
                batch["global"].image.fill_(float("nan"))
        return super().forward(batch, progress)
"""
STEPS = 6


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the probe beside it; all runs share one store, which the first one makes."""
    root = tmp_path_factory.mktemp("pretrain")
    (root / "conf").mkdir()
    (root / "conf" / "probe.py").write_text(PROBE)
    return root


def arguments(root, name, **settings):
    fixed = {
        "method": "glmae_tiny",
        "method._target_": "probe.Probe",
        "+method.encoder.dropout": 0.1,
        "views.groups.global.size": "[32,32,32]",
        "views.groups.local.size": "[16,16,16]",
        "data": "phantoms",
        "data.num_cases": 4,
        "data.size_voxel": 48,
        "store": root / "store",
        "output_dir": root / name,
        "batch_size": 4,
        "accumulate": 2,
        "checkpoint_every": 4,
        "validate_every": 2,
        "figures_every": "null",
        "trainer.max_steps": STEPS,
    }
    return ["--config-dir", str(root / "conf"), *(f"{key}={value}" for key, value in {**fixed, **settings}.items())]


def pretrain(root, name, *, wish="", **settings):
    """Run the command in this process and give back the run folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("PROBE_LOG", str(root / f"{name}.log"))
        patch.setenv("PROBE_WISH", wish)
        main("pretrain", run, arguments=arguments(root, name, **settings))
    return root / name


def start(root, name, *, wish="", variables=None, **settings):
    """Run the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "medssl.pretrain", *arguments(root, name, **settings)],
        env={**os.environ, "PROBE_LOG": str(root / f"{name}.log"), "PROBE_WISH": wish, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process, *, pattern=None):
    deadline = time.monotonic() + 300
    while not (list(path.glob(pattern)) if pattern else path.exists()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(workplace):
    return pretrain(workplace, "straight", figures_every=4)


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def differences(a, b, path=""):
    """Names of the entries in which two nested states differ by a bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        missing = [f"{path}.{key}" for key in a.keys() ^ b.keys()]
        return missing + [name for key in a.keys() & b.keys() for name in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        return [name for n, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{path}[{n}]")]
    return [] if a == b else [path]


def test_the_run_folder_holds_what_was_promised(straight):
    assert yaml.safe_load((straight / "config.yaml").read_text())["facts"]["num_cases"] == 3  # one is held out
    assert "${" not in (straight / "config.yaml").read_text()
    rows = metrics(straight)
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    terms = ["reconstruction_global", "reconstruction_local", "consistency_global", "consistency_local"]
    shares = ["learning_rate", "samples_per_s", "data_wait_share", "draw_share"]
    assert set(terms + shares) <= set(rows[0])
    assert [bool(row["validation_loss"]) for row in rows] == [False, True] * 3
    assert all(0 <= float(row["data_wait_share"]) + float(row["draw_share"]) <= 1 for row in rows)
    pictures = sorted(path.name for path in (straight / "figures").iterdir())
    assert pictures == [f"{name}-{step:07d}.png" for name in ("global", "local") for step in (4, 6)]
    assert checkpoint(straight)["global_step"] == STEPS


def test_the_encoder_loads_with_the_card_of_its_run(straight):
    encoder = medssl.load_encoder(straight / "encoder.safetensors")
    features = encoder(torch.zeros(1, 1, 24, 32, 40))
    assert [tuple(map_.shape[1:]) for map_ in features] == [(channels, 3, 4, 5) for channels in encoder.channels]
    weights = checkpoint(straight)["state_dict"]
    assert all(torch.equal(tensor, weights[f"method.encoder.{key}"]) for key, tensor in encoder.state_dict().items())
    card = medssl.read_card(straight / "encoder.safetensors")
    assert card["step"] == STEPS
    assert card["data"]["num_cases"] == 3  # what is held out is not in its fingerprint
    assert card["reading"]["views"]["groups"]["global"]["size"] == [32, 32, 32]
    assert card["versions"]["torch"] == torch.__version__


def test_a_killed_run_goes_on_bit_for_bit(workplace, straight):
    killed = start(workplace, "killed", wish="kill@5")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    folder = workplace / "killed"
    assert checkpoint(folder)["global_step"] == 4
    assert [row["step"] for row in metrics(folder)] == ["1", "2", "3", "4", "5"]
    (workplace / "killed.log").unlink()

    pretrain(workplace, "killed", resume=folder)
    ours, theirs = checkpoint(straight), checkpoint(folder)
    assert any(key.startswith("method.teacher_") for key in ours["state_dict"])
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert differences(ours[part], theirs[part]) == []
    batches = (workplace / "straight.log").read_text().splitlines()
    assert (workplace / "killed.log").read_text().splitlines() == batches[2 * 4 :]
    same = [key for key in metrics(straight)[0] if key not in ("samples_per_s", "data_wait_share", "draw_share")]
    rows, again = ([[row[key] for key in same] for row in metrics(run)] for run in (straight, folder))
    assert rows == again


def test_a_second_start_in_the_same_folder_is_refused(workplace, straight, capsys):
    before = (straight / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit) as stop:
        pretrain(workplace, "straight")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "already holds a run" in message
    assert "overwrite=true" in message
    assert message.count("\n") == 1
    assert (straight / "metrics.csv").read_bytes() == before


def test_another_run_is_not_replaced_by_a_resumed_one(workplace, straight, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(straight, other)
    with pytest.raises(SystemExit) as stop:
        pretrain(workplace, "straight", resume=other, **{"trainer.max_steps": STEPS + 2})
    assert stop.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    threads = torch.get_num_threads()
    longer = {"trainer.max_steps": STEPS + 2, "threads": threads + 1}
    pretrain(workplace, "straight", resume=other, output_dir="null", **longer)
    torch.set_num_threads(threads)
    said = f"threads was {threads}, is now {threads + 1}; the run will not be the one it would have been"
    assert f"resume: {said}\n" in capsys.readouterr().out
    assert [checkpoint(folder)["global_step"] for folder in (other, straight)] == [STEPS + 2, STEPS]
    rows = metrics(other)
    assert len(rows) == STEPS + 2
    warmup, peak = 40 * (STEPS + 2) / 1600, 2e-3
    rates = [peak * rate_share(step, total_steps=STEPS + 2, warmup_steps=warmup) for step in (STEPS, STEPS + 1)]
    assert [float(row["learning_rate"]) for row in rows[STEPS:]] == pytest.approx(rates)  # as the longer run has them


def test_a_run_without_validation_trains_on_the_same_volumes(workplace, straight):
    folder = pretrain(workplace, "unwatched", validate_every="null", **{"trainer.max_steps": 1})
    assert yaml.safe_load((folder / "config.yaml").read_text())["facts"]["num_cases"] == 3
    assert (workplace / "unwatched.log").read_text().splitlines() == (
        (workplace / "straight.log").read_text().splitlines()[:2]
    )
    assert "validation_loss" not in metrics(folder)[0]


def test_a_loss_that_is_not_a_number_names_step_term_and_cases(workplace, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain(workplace, "nan", wish="nan@1", validate_every="null")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    cases = {json.loads(line)["case"] for line in (workplace / "store" / "index.jsonl").read_text().splitlines()}
    assert message.startswith("error: step 2: loss = nan, reconstruction_global = nan")
    assert sum(case in message for case in cases) == 2
    assert [row["step"] for row in metrics(workplace / "nan")] == ["1"]


def test_sigterm_saves_and_says_how_to_go_on(workplace, straight):
    process = start(workplace, "stopped", wish="wait@2")
    wait_for(workplace / "stopped.waiting", process)
    process.send_signal(signal.SIGTERM)
    (workplace / "stopped.signalled").touch()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert "Traceback" not in output
    assert "stopped by SIGTERM after step 3 of 6" in output
    assert f"resume={workplace / 'stopped'}" in output
    assert checkpoint(workplace / "stopped")["global_step"] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method.encoder.dim": 48}, "is of another network: method."),
        ({"optimizer._target_": "torch.optim.NAdam"}, "was trained by another optimiser"),
        ({"trainer.max_steps": STEPS}, f"is at step {STEPS} of {STEPS}"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    workplace, straight, capsys, settings, words
):
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        pretrain(workplace, "straight", resume=straight, **{"trainer.max_steps": STEPS + 2, **settings})
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_a_file_that_is_no_checkpoint_of_ours_is_refused(workplace, straight, tmp_path, capsys):
    torch.save({"global_step": 2, "state_dict": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((straight / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    for name in ("foreign", "cut"):
        with pytest.raises(SystemExit):
            pretrain(workplace, "other", resume=tmp_path / f"{name}.ckpt")
        assert "is not a whole checkpoint of a run" in capsys.readouterr().err


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "pretrain", "SLURM_PROCID": "0"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}


@pytest.mark.slow
def test_a_job_of_slurm_saves_at_its_signal_and_goes_on_when_started_again(workplace, straight):
    process = start(workplace, "job", wish="wait@2", variables=SLURM)
    wait_for(workplace / "job.waiting", process)
    process.send_signal(signal.SIGUSR1)
    (workplace / "job.signalled").touch()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "stopped by SIGUSR1 after step 3 of 6" in output
    assert not list((workplace / "job").rglob("hpc_ckpt*"))
    again = start(workplace, "job", variables={**SLURM, "SLURM_RESTART_COUNT": "1"})
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert [row["loss"] for row in metrics(workplace / "job")] == [row["loss"] for row in metrics(straight)]


def test_a_job_started_again_before_its_first_checkpoint_starts_over(workplace, straight, monkeypatch):
    folder = workplace / "early_job"
    folder.mkdir()
    shutil.copy(straight / "metrics.csv", folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    pretrain(workplace, "early_job", **{"trainer.max_steps": 1})
    assert len(metrics(folder)) == 1


def test_a_computed_rate_that_is_none_is_refused(workplace, straight, capsys):
    with pytest.raises(SystemExit):
        pretrain(workplace, "rate", **{"optimizer.lr": "'${mul:abc,2}'"})
    assert capsys.readouterr().err == "error: optimizer.lr must be a number from 0 up; got 'abcabc'\n"


def test_a_batch_that_cannot_be_split_is_refused(workplace, straight, capsys):
    with pytest.raises(SystemExit):
        pretrain(workplace, "odd", batch_size=3)
    assert "divisible" in capsys.readouterr().err


def test_recomputed_activations_change_no_number_and_exports_come_in_between(workplace, straight):
    folder = pretrain(workplace, "checkpointed", checkpoint_activations="true", export_every=3)
    assert [row["loss"] for row in metrics(folder)] == pytest.approx([row["loss"] for row in metrics(straight)])
    assert sorted(path.name for path in folder.glob("encoder*")) == [
        "encoder-0000003.safetensors",
        "encoder-0000006.safetensors",
        "encoder.safetensors",
    ]


def test_a_stop_while_preparing_keeps_the_finished_cases(workplace, tmp_path):
    process = start(workplace, "early", **{"data.num_cases": 400, "store": tmp_path / "store"})
    wait_for(tmp_path / "store", process, pattern="phantom_0000-*.zarr")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    assert f"stopped by SIGTERM while preparing; finished cases are kept in {tmp_path / 'store'}" in output
    assert list((tmp_path / "store").glob("phantom_0000-*.zarr/zarr.json"))
    assert not (tmp_path / "store" / "index.jsonl").exists()


def test_an_unreadable_chunk_names_its_case(workplace, straight, tmp_path, capsys):
    broken = tmp_path / "store"
    shutil.copytree(workplace / "store", broken)
    for chunk in broken.glob("*.zarr/0/c/**/*"):
        if chunk.is_file():
            chunk.write_bytes(b"\xff" * (chunk.stat().st_size // 2))
    with pytest.raises(SystemExit) as stop:
        pretrain(workplace, "broken", store=broken)
    assert stop.value.code == 2
    assert re.search(r"^error: .*phantom_\d+.*prepare again", capsys.readouterr().err, flags=re.M)


def test_the_offline_logger_goes_on_with_its_run_and_knows_the_settings(workplace, straight):
    import wandb

    folder, offline = workplace / "offline", {"logger": "wandb", "logger.offline": "true", "figures_every": 4}
    for steps, more in ((1, {}), (2, {"resume": folder})):
        pretrain(workplace, "offline", **offline, **more, **{"trainer.max_steps": steps})
        wandb.finish()  # as the end of the process does
        time.sleep(1.1)  # the names of its folders hold seconds
    files = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.stem for path in files} == {f"run-{(folder / 'wandb_id').read_text()}"}
    assert len(files) == 2
    assert all(b"max_rejected_fraction" in path.read_bytes() for path in files)
    assert len(metrics(folder)) == 2


@pytest.mark.slow
def test_real_volumes_of_every_kind_train_and_the_unreadable_are_listed(real_data, tmp_path):
    small = {"data": "folder", "data.root": real_data, "max_rejected_fraction": 1, "trainer.max_steps": 2}
    process = subprocess.run(
        [
            *(sys.executable, "-m", "medssl.pretrain", "method=glmae_tiny", f"output_dir={tmp_path / 'out'}"),
            *(f"store={tmp_path / 'store'}", "batch_size=2"),
            *(f"{key}={value}" for key, value in small.items()),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    names = {row["file"].rsplit("/", 1)[-1] for row in rejected}
    assert {"truncated.nii.gz", "nan_voxels.nii.gz", "four_d.nii.gz", "not_an_image.nii.gz"} <= names
    assert "good.nii.gz" not in names
    assert len(metrics(tmp_path / "out")) == 2
