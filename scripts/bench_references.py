"""One training step of MAE, SimCLR and VoCo, ours against the same mathematics in plain torch; prints a Markdown table.

    python scripts/bench_references.py                # minutes on two cores
    python scripts/bench_references.py --only mae --overrides mae=views.groups.crop.size=[64,64,64]

The tiny configurations, CPU, float32, one fixed batch of noise. A step is that of the trainer: seeding, forward,
backward, clipping, optimiser, schedule. "Plain" writes network and loss out by functions of torch and logs nothing.
Both start from the same weights, and have to give the same losses over three steps before time is taken. Their steps
then alternate in one process; the table shows medians, of seconds and of seconds of both cores together. Memory is the
most that tensors of one step hold at a time, by the profiler's record of the allocator: it is the same in every run,
while the resident memory of equal processes differs by a quarter.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from medssl.config import compose, with_values
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.methods.build import method_of
from medssl.training.optim import build_optimizer

WHO = ("plain", "ours")
CHECKED_STEPS, TOLERANCE = 3, 1e-5
Batch = dict[str, View]


def convolved(layer: Any, x: Tensor) -> Tensor:
    """Convolution, instance norm and, where the layer has one, the rectifier."""
    conv, norm = layer.conv, layer.norm
    x = F.conv3d(x, conv.weight, None, conv.stride, conv.padding)
    x = F.group_norm(x, norm.num_features, norm.weight, norm.bias, norm.eps)
    return F.leaky_relu(x, 0.01, inplace=True) if hasattr(layer, "act") else x


def encoded(encoder: Any, image: Tensor) -> list[Tensor]:
    """The maps of a residual encoder."""
    x, maps = convolved(encoder.stem, image), []
    for stage in encoder.stages:
        for block in stage:
            pool, project = block.skip
            skip = x if isinstance(pool, nn.Identity) else F.avg_pool3d(x, pool.kernel_size)
            skip = skip if isinstance(project, nn.Identity) else convolved(project, skip)
            x = F.leaky_relu(convolved(block.conv2, convolved(block.conv1, x)) + skip, 0.01, inplace=True)
        maps.append(x)
    return maps


def decoded(decoder: Any, maps: Sequence[Tensor]) -> Tensor:
    """The finest decoded map."""
    x = maps[-1]
    for up, stage, skip in zip(reversed(decoder.ups), reversed(decoder.stages), maps[-2::-1], strict=True):
        x = torch.cat([F.conv_transpose3d(x, up.weight, up.bias, up.stride), skip], dim=1)
        for layer in stage:
            x = convolved(layer, x)
    return x


def projected(method: Any, image: Tensor) -> Tensor:
    """The embeddings of crops."""
    x = torch.cat([level.mean((2, 3, 4)) for level in encoded(method.encoder, image)], dim=1)
    first, second, last = (layer for layer in method.projector.mlp if isinstance(layer, nn.Linear))
    for layer in (first, second):
        x = F.linear(x, layer.weight, layer.bias)
        x = F.relu(F.layer_norm(x, x.shape[1:]))
    return F.linear(x, last.weight, last.bias)


def mae(method: Any, batch: Batch, progress: Progress) -> Tensor:
    """The squared error of the hidden voxels."""
    image, block = batch["crop"].image[:, 0], method.block_voxel[0]
    grid = [side // block for side in image.shape[2:]]
    number = grid[0] * grid[1] * grid[2]
    order = torch.rand(len(image), number, generator=progress.generator("mask")).argsort(dim=1)
    hidden = torch.ones(len(image), number).scatter(1, order[:, : int(number * (1 - method.ratios[0]))], 0)
    hidden = F.interpolate(hidden.view(-1, 1, *grid), scale_factor=block)
    network = method.network
    x = decoded(network.decoder, encoded(network.encoder, image * (1 - hidden)))
    predicted = F.conv3d(x, network.head.weight, network.head.bias)
    return ((predicted - image).square() * hidden).sum() / hidden.sum()


def simclr(method: Any, batch: Batch, progress: Progress) -> Tensor:
    """NT-Xent of the pairs."""
    images = torch.cat([batch[name].image.flatten(0, 1) for name in ("first", "second")])
    rows = F.normalize(projected(method, images), dim=1)
    logits = (rows @ rows.T / method.temperature).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(rows)).roll(len(rows) // 2))


def voco(method: Any, batch: Batch, progress: Progress) -> Tensor:
    """The three released terms."""
    base, target = batch["base"], batch["target"]
    images = torch.cat([base.image, target.image], dim=1)
    rows = F.normalize(projected(method, images.flatten(0, 1)), dim=1).unflatten(0, images.shape[:2])
    bases, targets = rows[:, : base.image.shape[1]], rows[:, base.image.shape[1] :]
    predicted = F.relu(targets @ bases.detach().mT)
    lower = torch.maximum(target.crop_body[:, :, None, 0], base.crop_body[:, None, :, 0])
    upper = torch.minimum(target.crop_body[:, :, None, 1], base.crop_body[:, None, :, 1])
    side = target.crop_body[:, :, 1] - target.crop_body[:, :, 0]
    overlap = (F.relu(upper - lower) / side[:, :, None]).prod(3).float()
    apart = (overlap == 0).float()
    surprise = -torch.log(1 - (overlap - predicted).abs() + 1e-6)
    positive = (overlap * surprise).sum((1, 2)) / (overlap.sum((1, 2)) + 1e-6)
    negative = (apart * predicted.square()).sum((1, 2)) / (apart.sum((1, 2)) + 1e-6)
    i, j = torch.triu_indices(bases.shape[1], bases.shape[1], offset=1)
    regulariser = F.relu(bases @ bases.mT)[:, i, j].square().mean()
    return positive.mean() + negative.mean() + regulariser


PLAIN: dict[str, Callable[[Any, Batch, Progress], Tensor]] = {"mae": mae, "simclr": simclr, "voco": voco}


@dataclass
class Bench:
    """A method in both forms, and the batch that they see."""

    name: str
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        config = compose("pretrain", ["~data", f"method={self.name}_tiny", *self.overrides])
        size: Any = OmegaConf.to_container(next(iter(config.views.groups.values())).size)
        config = with_values(config, {"facts": {"num_channels": 1, "crop_voxel": size}})
        values: Any = OmegaConf.to_container(config, resolve=True)
        self.settings, self.total_steps = values["optimizer"], values["trainer"]["max_steps"]
        self.batch = noise(self.name, values["views"]["groups"], values["batch_size"], size)
        self.crops = f"{sum(view.image[:, :, 0, 0, 0, 0].numel() for view in self.batch.values())} of {size[0]}^3"
        method = method_of(values["method"], seed=0)
        self.methods = {who: copy.deepcopy(method) for who in WHO}
        self.optimizers = {who: self.optimizer(self.methods[who]) for who in WHO}

    def optimizer(self, method: Method) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        return build_optimizer(self.settings, method.param_groups(), total_steps=self.total_steps)

    def step(self, who: str, number: int) -> float:
        """Take a training step, and return its loss."""
        method, (optimizer, schedule) = self.methods[who], self.optimizers[who]
        progress = Progress(number, self.total_steps, number / 10, self.total_steps / 10, 0)
        progress.seed_torch()
        optimizer.zero_grad()
        ours = who == "ours"
        loss = method(self.batch, progress).loss if ours else PLAIN[self.name](method, self.batch, progress)
        loss.backward()
        if ours:
            method.after_backward(progress)
        if self.settings["clip_norm"] is not None:
            nn.utils.clip_grad_norm_(method.parameters(), self.settings["clip_norm"])
        optimizer.step()
        if ours:
            method.after_step(progress)
        schedule.step()
        return loss.item()


def noise(name: str, groups: dict[str, Any], batch_size: int, size: Sequence[int]) -> Batch:
    """A batch of noise at the places that VoCo asks for; the others do not ask."""
    generator = torch.Generator().manual_seed(1)

    def image(count: int) -> Tensor:
        return torch.randn(batch_size, count, 1, *size, generator=generator)

    if name == "mae":
        return {"crop": View.of(image(groups["crop"]["count"]))}
    if name == "simclr":
        return {group: View.of(image(groups["first"]["count"])) for group in ("first", "second")}
    grid, count = torch.tensor(groups["base"]["grid"], dtype=torch.float64), groups["target"]["count"]
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid.int().tolist())) / grid
    corners = torch.rand(batch_size, count, 3, generator=generator, dtype=torch.float64) * (1 - 1 / grid)
    base, target = (torch.stack([lower, lower + 1 / grid], dim=-2) for lower in (cells, corners))
    return {
        "base": View.of(image(len(cells)), crop_body=base[None]),
        "target": View.of(image(count), crop_body=target),
    }


def check(bench: Bench) -> float:
    """The largest difference of losses over some steps, as a share of the loss.

    Raises:
        SystemExit: They differ by more than the tolerance.
    """
    apart = 0.0
    for number in range(CHECKED_STEPS):
        plain, ours = (bench.step(who, number) for who in WHO)
        apart = max(apart, abs(plain - ours) / abs(plain))
    if apart > TOLERANCE:
        raise SystemExit(f"{bench.name}: losses differ by {apart:.1e}")
    return apart


def times(bench: Bench, steps: int) -> dict[str, list[float]]:
    """Median seconds, and those of the cores, of steps that alternate; each side is first in every other round."""
    rows: dict[str, list[tuple[float, float]]] = {who: [] for who in WHO}
    for number in range(steps):
        for who in WHO if number % 2 else WHO[::-1]:
            start, cpu_start = time.perf_counter(), time.process_time()
            bench.step(who, CHECKED_STEPS + number)
            rows[who].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {who: [statistics.median(column) for column in zip(*rows[who], strict=True)] for who in WHO}


def peak_mb(bench: Bench, who: str, number: int) -> float:
    """The most memory that a step holds at a time beyond what it found."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        bench.step(who, number)
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each side")
    parser.add_argument("--only", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--overrides", nargs="+", default=[], help="settings, each behind its method: mae=KEY=VALUE")
    arguments = parser.parse_args()
    overrides = {name: [o.split("=", 1)[1] for o in arguments.overrides if o.startswith(f"{name}=")] for name in PLAIN}
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| one step | crops | | plain | ours | ratio |\n|---|---|---|---|---|---|")
    for name in arguments.only:
        bench = Bench(name, overrides[name])
        apart = check(bench)
        rows = list(zip(("s", "s of the cores"), *times(bench, arguments.steps).values(), strict=True))
        rows.append(("MB of tensors", *(peak_mb(bench, who, CHECKED_STEPS + arguments.steps) for who in WHO)))
        for unit, plain, ours in rows:
            digits = ".1f" if unit.startswith("MB") else ".3f"
            print(f"| `{name}` | {bench.crops} | {unit} | {plain:{digits}} | {ours:{digits}} | {plain / ours:.2f} |")
        print(f"| `{name}` | {bench.crops} | difference of losses | | {apart:.0e} | |", flush=True)


if __name__ == "__main__":
    main()
