"""Two processes on the CPU that train together: what they see, what they share, what they write."""

import json
import os
import subprocess
import sys

import pytest
import torch

from medssl.config import main
from medssl.pretrain import run
from medssl.weights import read_card

STEPS = 3
PROBE = """
import hashlib, os
from pathlib import Path
import torch
from medssl.methods.glmae import GLMAE

class Probe(GLMAE):
    '''GL-MAE that writes down, by rank, what it sees and where its weights go.'''

    def forward(self, batch, progress):
        if self.training:
            cases = batch["global"].case.flatten().tolist()
            corners = batch["global"].matrix[:, :, :3, 3].flatten().tolist()
            self.write(progress, f"{progress.step} sees {cases} {corners}")
        wish = os.environ.get("PROBE_WISH", "")
        if wish == f"raise on {progress.rank}" or wish == "raise on all":
            raise ValueError("case a: chunk 3 cannot be read")
        if wish == f"nan on {progress.rank}":
            batch["global"].image.fill_(float("nan"))
        return super().forward(batch, progress)

    def after_step(self, progress):
        super().after_step(progress)
        state = b"".join(tensor.numpy().tobytes() for tensor in self.state_dict().values())
        self.write(progress, f"{progress.step} holds {hashlib.sha256(state).hexdigest()}")
        if progress.step == 0:
            torch.save(self.centre, Path(os.environ["PROBE"]) / f"centre-{progress.rank}.pt")

    def write(self, progress, line):
        with (Path(os.environ["PROBE"]) / f"rank-{progress.rank}.log").open("a") as file:
            file.write(line + "\\n")
"""


def arguments(root, name, *more):
    return [
        *("--config-dir", str(root / "conf"), "method=glmae_tiny", "method._target_=rank_probe.Probe"),
        *("views.groups.global.size=[32,32,32]", "views.groups.local.size=[16,16,16]", "batch_size=4"),
        *("data=phantoms", "data.num_cases=4", "data.size_voxel=48", f"store={root / 'store'}"),
        *(f"trainer.max_steps={STEPS}", "figures_every=null", "validate_every=2", f"output_dir={root / name}", *more),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "conf").mkdir()
    (folder / "conf" / "rank_probe.py").write_text(PROBE)
    return folder


def fail(root, wish, *launcher):
    """The lines on stderr of two processes that fail."""
    together = arguments(root, wish.replace(" ", "_"), "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    done = subprocess.run(
        [sys.executable, "-m", *(launcher or ("medssl.pretrain",)), *together],
        env={**os.environ, "PROBE": str(root), "PROBE_WISH": wish},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    return done.stderr.splitlines()


@pytest.mark.ddp
@pytest.mark.parametrize("wish", [pytest.param("raise on 0", marks=pytest.mark.slow), "raise on 1"])
def test_the_error_of_one_rank_does_not_drown_in_what_follows_from_it_on_others(root, wish):
    lines = fail(root, wish)
    assert sum(line == "error: case a: chunk 3 cannot be read" for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.slow
@pytest.mark.ddp
def test_a_loss_that_is_not_a_number_on_one_rank_is_told_once(root):
    lines = fail(root, "nan on 1")
    assert sum("loss = nan" in line for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line]


@pytest.mark.ddp
def test_what_all_ranks_find_wrong_is_told_once(root):
    wrong = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "medssl.pretrain",
        "trainer.max_steps=0",
    ]
    done = subprocess.run([sys.executable, "-m", *wrong], capture_output=True, text=True, timeout=300)
    assert done.stderr.count("trainer.max_steps must be") == 1


@pytest.mark.ddp
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "rank_probe.py").write_text(PROBE)
    for name in ("alone", "together"):
        (tmp_path / f"log-{name}").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PROBE", str(tmp_path / "log-alone"))
    main("pretrain", run, arguments=arguments(tmp_path, "alone"))
    devices = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    together = arguments(tmp_path, "together", "figures_every=2", *devices)
    done = subprocess.run(
        [sys.executable, "-m", "medssl.pretrain", *together],
        env={**os.environ, "PROBE": str(tmp_path / "log-together")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    logs = [(tmp_path / "log-together" / f"rank-{rank}.log").read_text().splitlines() for rank in (0, 1)]
    seen, held = ([[line for line in log if word in line] for log in logs] for word in (" sees ", " holds "))
    assert len(seen[0]) == len(seen[1]) == STEPS
    assert held[0] == held[1]
    assert len(set(held[0])) == STEPS
    assert not set(seen[0]) & set(seen[1])
    alone = (tmp_path / "log-alone" / "rank-0.log").read_text().splitlines()
    for step in range(STEPS):  # the same requests, dealt out
        whole, *parts = (eval_cases(log, step) for log in (alone, *logs))
        assert sorted(whole) == sorted(parts[0] + parts[1])

    centres = [torch.load(tmp_path / "log-together" / f"centre-{rank}.pt", weights_only=True) for rank in (0, 1)]
    expected = torch.load(tmp_path / "log-alone" / "centre-0.pt", weights_only=True)
    assert torch.equal(*centres)
    assert expected.abs().max() > 0
    torch.testing.assert_close(centres[0], expected, rtol=1e-4, atol=1e-7)

    assert done.stdout.count("volumes,") == 1
    rows = (tmp_path / "together" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(step) for step in range(1, STEPS + 1)]
    assert len(list((tmp_path / "together" / "figures").iterdir())) == 2 * 2  # of steps 2 and 3


@pytest.mark.ddp
def test_two_processes_fine_tune_and_share_the_cases_to_evaluate(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "medssl.finetune", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
            *("model=unet", "model.encoder.widths=[4,8]", "model.encoder.strides=[1,2]", "crop_voxel=[16,16,16]"),
            *("data=phantoms", "data.num_cases=7", "data.size_voxel=32", "data.phantom_spacing_mm=12"),
            *(f"store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}", "validate_every=2"),
            "trainer.max_steps=2",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("classes: 11") == 1
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(results["cases"]) == results["split"]["num_cases"] == 2  # one a process
    best = read_card(tmp_path / "run" / "segmenter-best.safetensors")["validation_dice"]
    assert best == pytest.approx(results["dice"]["mean"])  # the validation cases after the last step, by another way


def drasclr(root, *more):
    """Two processes with `drasclr_tiny` on four locations, by the command."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "medssl.pretrain", "method=drasclr_tiny", "trainer=ddp", "trainer.accelerator=cpu"),
            *("trainer.devices=2", "data=phantoms", "data.num_cases=6", "data.size_voxel=24"),
            *("data.phantom_spacing_mm=16.0", "views.groups.anchor.grid=[2,2,1]", "views.groups.anchor.size=[8,8,8]"),
            *("method.encoder.widths=[2,2,4,4,6,8]", "sampler.batches_per_visit=1"),
            *(f"store={root / 'store'}", f"output_dir={root / 'run'}", *more),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_share_the_queues_of_their_keys(tmp_path):
    done = drasclr(tmp_path, "batch_size=2", "trainer.max_steps=2")
    assert done.returncode != 0
    assert "\nerror: DrasCLR needs at least 2 samples in each process" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    done = drasclr(tmp_path, "batch_size=4", "trainer.max_steps=4", "overwrite=true")
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state["method.key_encoder.bn1.num_batches_tracked"] == 4, "one pass of keys a step"
    assert state["method.encoder.bn1.num_batches_tracked"] == 8, "queries, and their neighbourhoods"
    subjects = state["method.queue.subjects"]
    assert (subjects >= 0).sum() == 4 * 4, "each step adds the keys of both processes"
    for ring in subjects:
        held = ring[ring >= 0].tolist()
        assert len(held) == 4
        assert len(set(held)) == 4, "each process holds other cases"


def eval_cases(log, step):
    """The cases that one process saw in a step."""
    (line,) = (line for line in log if line.startswith(f"{step} sees "))
    return [int(number) for number in line.split("[")[1].split("]")[0].split(",")]
