"""The location-conditioned encoder, ours against the loop over samples; prints a Markdown table.

    python scripts/bench_drasclr.py                                              # some minutes on two cores
    python scripts/bench_drasclr.py --device cuda --impl auto plain grouped mixture loop

Published widths, float32, forward and backward over a batch of 32 patches of 32^3, which lie at one location, at 8, or
at 32. The loop makes a kernel and a convolution for each sample, as the released code does; all the rest is the same.
Every number of threads and of locations is a process of its own, in which the implementations take turns. Then whole
steps of `method=drasclr` with its queues (581 locations of 4096 keys), optimiser and key encoder, on 32 subjects of a
batch, each implementation in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from omegaconf import OmegaConf
from torch import Tensor

from medssl import building
from medssl.config import compose, with_values
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.models.conditioned import ConditionedEncoder
from medssl.training.optim import build_optimizer

BATCH, SIDE = 32, 32
LOCATIONS, SUBJECTS = 581, 9179
PLACES = {1: "one location", 8: "8 locations", 32: "32 locations"}


def build(impl: str, device: torch.device) -> ConditionedEncoder:
    """The published encoder with the weights of one seed."""
    torch.manual_seed(0)
    return ConditionedEncoder(impl=impl).to(device)


def patches(num_places: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of noise, coordinates, and the location of each patch, shuffled."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(BATCH, 1, SIDE, SIDE, SIDE, generator=generator)
    coordinate = torch.rand(num_places, 3, generator=generator) * 2 - 1
    index = (torch.arange(BATCH) % num_places)[torch.randperm(BATCH, generator=generator)]
    return image.to(device), coordinate.to(device), index.to(device)


def train(encoder: ConditionedEncoder, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The representations, with a gradient at every parameter."""
    encoder.zero_grad()
    features = encoder.represent(*batch)
    features.square().sum().backward()
    if features.is_cuda:
        torch.cuda.synchronize()
    return features.detach()


def measure(impls: list[str], num_places: int, *, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Median seconds, and seconds of the cores, over some turns after a first one."""
    encoders, batch = {impl: build(impl, device) for impl in impls}, patches(num_places, device)
    rows: dict[str, list[tuple[float, float]]] = {impl: [] for impl in impls}
    for _ in range(1 + steps):
        for impl, encoder in encoders.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            train(encoder, batch)
            rows[impl].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {
        impl: [statistics.median(column) for column in zip(*found[1:], strict=True)] for impl, found in rows.items()
    }


def difference(dtype: torch.dtype, device: torch.device) -> list[float]:
    """Of representations and gradients from those of the loop, as shares of the largest; 8 locations."""
    found = []
    image, coordinate, index = patches(8, device)
    for impl in ("auto", "loop"):
        encoder = build(impl, device).to(dtype)
        features = train(encoder, (image.to(dtype), coordinate.to(dtype), index))
        found.append((features, [parameter.grad for parameter in encoder.parameters()]))
    (ours, gradients), (loops, expected) = found
    apart = max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))
    largest = max(gradient.abs().max().item() for gradient in expected)
    return [((ours - loops).abs().max() / loops.abs().max()).item(), apart / largest]


def whole_steps(impl: str, *, steps: int, device: torch.device) -> list[float]:
    """Median seconds of a step after a first one, and the process' peak memory in GB."""
    config = compose("pretrain", ["~data", "method=drasclr", f"method.encoder.impl={impl}"])
    config = with_values(
        config,
        {
            "facts": {
                "num_cases": SUBJECTS,
                "num_channels": 1,
                "num_locations": LOCATIONS,
                "steps_per_epoch": SUBJECTS / config.batch_size,
                "steps_per_round": LOCATIONS * (SUBJECTS // config.batch_size),
            }
        },
    )
    values = OmegaConf.to_container(config, resolve=True)
    torch.manual_seed(0)
    method = building.build(values["method"], base=Method).to(device).train()
    optimizer, schedule = build_optimizer(values["optimizer"], method.param_groups(), total_steps=1000)
    seconds = []
    for step in range(1 + steps):
        batch = {"anchor": views(2, 0, device), "neighbours": views(2, 1, device)}
        start = time.perf_counter()
        progress = Progress(step, 1000, 0.0, 100.0, 0)
        method(batch, progress).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        method.after_step(progress)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return [statistics.median(seconds[1:]), peak_gb]


def views(count: int, first_location: int, device: torch.device) -> View:
    """Noise at one location, or at as many as there are views from the second location on."""
    image = torch.randn(BATCH, count, 1, SIDE, SIDE, SIDE).to(device)
    eye = torch.eye(4, dtype=torch.float64, device=device).expand(BATCH, count, 4, 4)
    case = torch.arange(BATCH, device=device)[:, None].expand(BATCH, count)
    places = torch.zeros(count, dtype=torch.int64) if first_location == 0 else 1 + torch.arange(count)
    index = places.to(device).expand(BATCH, count)
    made = View(
        image,
        eye,
        eye,
        torch.full((BATCH, count, 3), SIDE, device=device),
        case,
        case * 0,
        image.new_zeros(BATCH, count, 3).double(),
    )
    made.location_index, made.location_valid = index, torch.ones_like(index, dtype=torch.bool)
    made.coordinate = (index[..., None] / LOCATIONS * torch.tensor([1.0, -1.0, 0.5], device=device)).float()
    return made


def run(words: list[str], threads: int) -> dict[str, list[float]]:
    """What a process of its own finds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="turns that count; the table shows medians")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--impl", nargs="+", default=["auto", "loop"], help="the last is the one to compare with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, impls = torch.device(arguments.device), arguments.impl
    if arguments.only == "difference":
        print(json.dumps({str(dtype): difference(dtype, device) for dtype in (torch.float32, torch.float64)}))
        return
    if arguments.only == "step":
        print(json.dumps(whole_steps(impls[0], steps=min(2, arguments.steps), device=device)))
        return
    if arguments.only:
        print(json.dumps(measure(impls, int(arguments.only), steps=arguments.steps, device=device)))
        return
    words = ["--steps", str(arguments.steps), "--device", arguments.device, "--impl", *impls]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    *ours, reference = impls
    heads = [*impls, *(f"{reference} / {impl}" for impl in ours)]
    print(f"| batch {BATCH} of {SIDE}^3 | threads | {' | '.join(heads)} |\n|{'---|' * (2 + len(heads))}")
    for num_places, place in PLACES.items():
        for threads in arguments.threads:
            found = run(["--only", str(num_places), *words], threads)
            for row, unit in enumerate(("s", "s of the cores")):
                ratios = [f"{found[reference][row] / found[impl][row]:.1f}" for impl in ours]
                cells = [*(f"{found[impl][row]:.3f}" for impl in impls), *ratios]
                print(f"| {place}, {unit} | {threads} | {' | '.join(cells)} |", flush=True)
    threads = arguments.threads[-1]
    print(f"\n| step of method=drasclr, {threads} threads | {' | '.join(impls)} |\n|{'---|' * (1 + len(impls))}")
    options = ["--only", "step", "--steps", str(arguments.steps), "--device", arguments.device, "--impl"]
    found = {impl: run([*options, impl], threads) for impl in impls}
    for row, what in enumerate(("s", "peak memory of the process, GB")):
        print(f"| {what} | {' | '.join(f'{found[impl][row]:.2f}' for impl in impls)} |", flush=True)
    for dtype, (features, gradients) in run(["--only", "difference", *words], arguments.threads[0]).items():
        print(f"\n{dtype}: representations differ from the loop's by {features:.0e}, gradients by {gradients:.0e}")


if __name__ == "__main__":
    main()
