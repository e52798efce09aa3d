"""One training step of Alice, ours against the same modules with attention written out; prints a Markdown table.

    python scripts/bench_alice.py                # some minutes on two cores

The published configuration (`method=alice`: nnFormer, one pair of 64^3 crops), CPU, float32. "Written out" makes the
scores of every window, adds bias and mask, takes the softmax and multiplies, with PyTorch's own gradients; all the rest
is the same. Every run is a process of its own, both in turn, so that each peak memory is its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from medssl import building
from medssl.config import compose, with_values
from medssl.data.views import View
from medssl.methods.alice import Alice
from medssl.methods.base import Method, Progress
from medssl.ops.window_attention import BLOCKED, WindowMask
from medssl.training.optim import build_optimizer

TOTAL_STEPS, STEPS_PER_EPOCH = 1000, 10
DTYPES = {"float32": torch.float32, "float64": torch.float64}
WHO = {"ours": "ours", "eager": "attention written out"}


def window_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: WindowMask | None = None) -> Tensor:
    """The function of this name, plainly."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT + bias
    if mask is not None:
        scores = scores + BLOCKED * mask.patterns[mask.number][:, None]
    return scores.softmax(-1) @ value


def cross_attention(query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """Stands for PyTorch's fused attention."""
    share = ((query * query.shape[-1] ** -0.5) @ key.mT).softmax(-1)
    return F.dropout(share, dropout_p) @ value


@contextmanager
def written_out(who: str) -> Iterator[None]:
    """Replaces both attentions where `who` is not ours."""
    if who == "ours":
        yield
        return
    plain = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": cross_attention})
    with (
        mock.patch("medssl.models.nnformer_blocks.window_attention", window_attention),
        mock.patch("medssl.models.cafa.F", plain),
    ):
        yield


def build(*overrides: str) -> tuple[Alice, torch.optim.Optimizer]:
    """The method of the published configuration with the weights of one seed, and its optimiser."""
    config = compose("pretrain", ["~data", "method=alice", "batch_size=1", *overrides])
    config = with_values(
        config,
        {"facts": {"num_cases": 10, "num_channels": 1, "num_locations": None, "steps_per_epoch": STEPS_PER_EPOCH}},
    )
    values = OmegaConf.to_container(config, resolve=True)
    torch.manual_seed(0)
    method = building.build(values["method"], base=Method)
    return method, build_optimizer(values["optimizer"], method.param_groups(), total_steps=TOTAL_STEPS)[0]


def pair() -> dict[str, View]:
    """Two crops of noise."""
    eye, case = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4), torch.arange(2)[None]
    image = torch.rand(1, 2, 1, 64, 64, 64, generator=torch.Generator().manual_seed(1))
    location, shape = torch.full((1, 2, 3), 0.5, dtype=torch.float64), torch.full((1, 2, 3), 64)
    return {"pair": View(image, eye, eye, shape, case, torch.zeros_like(case), location)}


def progress(step: int) -> Progress:
    return Progress(step, TOTAL_STEPS, step / STEPS_PER_EPOCH, TOTAL_STEPS / STEPS_PER_EPOCH, 0)


def train(method: Alice, optimizer: torch.optim.Optimizer, batch: dict[str, View], step: int) -> None:
    torch.manual_seed(step)
    method(batch, progress(step)).loss.backward()
    method.after_backward(progress(step))
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(progress(step))


def memory_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure(who: str, steps: int) -> dict[str, float]:
    """Medians over some steps after a first one; memory above that of the built networks."""
    method, optimizer = build()
    batch, before, rows = pair(), memory_mb("VmRSS"), []
    with written_out(who):
        for step in range(1 + steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            train(method, optimizer, batch, step)
            rows.append((time.perf_counter() - start, time.process_time() - cpu_start))
    seconds, cpu_seconds = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": memory_mb("VmHWM") - before}


def differences(dtype: torch.dtype) -> dict[str, float]:
    """Of the loss and of any gradient, as shares of the loss and of the largest gradient.

    Without dropout in the cross attention, which the fused kernel draws in another order.
    """
    losses, gradients = [], []
    for who in WHO:
        method, batch = build("method.cafa.dropout=0.0")[0].to(dtype), pair()
        batch["pair"].image = batch["pair"].image.to(dtype)
        with written_out(who):
            torch.manual_seed(0)
            output = method(batch, progress(0))
            output.loss.backward()
        losses.append(output.loss.item())
        gradients.append([p.grad for p in method.parameters() if p.grad is not None])
    largest = max(gradient.abs().max().item() for gradient in gradients[0])
    apart = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    return {"loss": abs(losses[0] - losses[1]) / abs(losses[1]), "gradient": apart / largest}


def run(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each; the table shows medians")
    parser.add_argument("--steps", type=int, default=3, help="steps that each of them measures")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        is_dtype = arguments.only in DTYPES
        found = differences(DTYPES[arguments.only]) if is_dtype else measure(arguments.only, arguments.steps)
        print(json.dumps(found))
        return
    rows: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    for _ in range(arguments.rounds):
        for who in WHO:
            rows[who].append(run("--only", who, "--steps", str(arguments.steps)))
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print(f"| one step, a pair of 64^3 crops | {WHO['ours']} | {WHO['eager']} | ratio |\n|---|---|---|---|")
    for key, unit in (("seconds", "s"), ("cpu_seconds", "s of the cores"), ("peak_mb", "MB above the start")):
        ours, eager = (statistics.median(row[key] for row in rows[who]) for who in WHO)
        print(f"| {unit} | {ours:.1f} | {eager:.1f} | {eager / ours:.2f} |")
    for name in DTYPES:
        apart = run("--only", name)
        print(f"| {name}: difference of losses and of gradients | {apart['loss']:.0e}, {apart['gradient']:.0e} | | |")


if __name__ == "__main__":
    main()
