"""What steps of MACL cost; prints Markdown tables.

    python scripts/bench_macl.py                     # some minutes on two cores
    python scripts/bench_macl.py --only decoder      # or dense, step

CPU, float32. `dense`: forward and backward of the contrast of dense maps at 512 places, in one batched product and in a
loop over the places; both give the same. `decoder`: forward and backward of the encoder and the decoder of the preset
`macl_unet` on an image of the dominant branch, with the first two blocks and with all. `step`: a whole step of the
preset `macl` on crops of 64^3, optimiser included, and its peak memory. Every measurement is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch import Tensor

from medssl.losses.dense_contrast import dense_contrast
from medssl.losses.position_contrast import contrast_of_positives

PLACES, CHANNELS, BATCH = 512, 128, 8
SIDE = 64
PARTS = ("dense", "decoder", "step")


def peak_mb() -> float:
    """Peak memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def fastest(work: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of some turns after a first one, and the value."""
    seconds, value = [], 0.0
    for _ in range(1 + repeats):
        start = time.perf_counter()
        value = work().item()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "value": value, "peak_mb": peak_mb()}


def dense(who: str, repeats: int) -> dict[str, float]:
    """The contrast of two maps with 512 places."""
    torch.manual_seed(0)
    maps = [torch.randn(BATCH, CHANNELS, 8, 8, 8, requires_grad=True) for _ in range(2)]
    near = torch.rand(BATCH, BATCH) < 0.19
    positive = (near | near.T | torch.eye(BATCH, dtype=torch.bool)).repeat(2, 2)

    def loop() -> Tensor:
        rows = torch.cat([part.flatten(2) for part in maps])
        return torch.stack([contrast_of_positives(rows[..., place], positive) for place in range(PLACES)]).mean()

    def work() -> Tensor:
        loss = loop() if who == "loop" else dense_contrast(*maps, positive, chunk=None if who == "batched" else 128)
        torch.autograd.grad(loss, maps)
        return loss

    return fastest(work, repeats)


def decoder(who: str, repeats: int) -> dict[str, float]:
    """Encoder and decoder of the dominant branch for crops of 128^3: images of 32^3."""
    from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder

    torch.manual_seed(0)
    encoder = MACLUNetEncoder()
    last = MACLUNetDecoder(
        in_channels=1, encoder_channels=tuple(encoder.channels), encoder_strides=tuple(encoder.strides)
    )
    image = torch.randn(BATCH, 1, 32, 32, 32)

    def work() -> Tensor:
        decoded = last(image, encoder(image), num_blocks=2 if who == "two blocks" else None)
        found = decoded[0] if who == "two blocks" else decoded[2]  # the same map
        found.square().mean().backward()
        return found.detach().square().mean()

    return fastest(work, repeats)


def step(who: str, repeats: int) -> dict[str, float]:
    """A whole step of the preset at 64^3, with one or two blocks of the decoder."""
    from omegaconf import OmegaConf

    from medssl.building import build
    from medssl.config import compose, with_values
    from medssl.data.views import View
    from medssl.methods.base import Method, Progress

    torch.manual_seed(0)
    blocks = 2 if who == "two blocks" else 1
    size = f"views.groups.still.size=[{SIDE},{SIDE},{SIDE}]"
    config = compose("pretrain", ["~data", "method=macl", f"method.backbone.num_blocks={blocks}", size])
    config = with_values(config, {"facts": {"num_channels": 1, "crop_voxel": [SIDE] * 3}})
    method = build(OmegaConf.to_container(config.method, resolve=True), base=Method).train()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)

    def group(count: int) -> View:
        eye = torch.eye(4, dtype=torch.float64).expand(BATCH, count, 4, 4)
        case = torch.arange(BATCH)[:, None].expand(BATCH, count)
        place = (torch.arange(BATCH) // 2 / (BATCH // 2)).double()[:, None, None].expand(BATCH, count, 3)
        shape = torch.full((BATCH, count, 3), SIDE)
        return View(torch.rand(BATCH, count, 1, SIDE, SIDE, SIDE), eye, eye, shape, case, case * 0, place)

    batch = {"still": group(1), "moved": group(2)}

    def work() -> Tensor:
        loss = method(batch, Progress(0, 10, 0.0, 1.0, 0)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return fastest(work, repeats)


WORK: dict[str, tuple[Callable[[str, int], dict[str, float]], tuple[str, ...]]] = {
    "dense": (dense, ("loop", "batched", "batched, in chunks of 128")),
    "decoder": (decoder, ("all blocks", "two blocks")),
    "step": (step, ("two blocks", "one block")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        part, who = arguments.one
        print(json.dumps(WORK[part][0](who, arguments.repeats)))
        return
    print(f"CPU, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| batch 8 | | seconds | times faster | peak MB | value |\n|---|---|---|---|---|---|")
    for part in arguments.only:
        reference = None
        for who in WORK[part][1]:
            words = [sys.executable, __file__, "--one", part, who, "--repeats", str(arguments.repeats)]
            found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
            reference = reference or found["seconds"]
            seconds, faster = f"{found['seconds']:.4g}", f"{reference / found['seconds']:.1f}"
            print(
                f"| {part} | {who} | {seconds} | {faster} | {found['peak_mb']:.0f} | {found['value']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
