"""Sliding-window inference of one volume, ours against MONAI's SlidingWindowInferer; prints docs/benchmarks.md's table.

    python scripts/bench_inference.py            # about three minutes on one core

The same small U-Net, windows, overlap and batch; one core. Every run is a process of its own, ours and MONAI's in turn,
so that each peak memory is its own. Run it on an idle machine; seconds of the core bear some company.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from medssl.segmentation.sliding_window import SlidingWindow

SIDES, WINDOW, OVERLAP, BATCH, NUM_CLASSES = (256, 256, 160), (96, 96, 96), 0.5, 2, 14
KINDS = {
    "probabilities": "probabilities of the whole volume",
    "classes": "classes of the whole volume (ours: slab by slab)",
}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return UNet(3, 1, NUM_CLASSES, channels=(4, 8, 16), strides=(2, 2), num_res_units=0).eval()


def predicted(who: str, kind: str) -> torch.Tensor:
    """Probabilities (k x y z) or class numbers (x y z) of a volume of noise."""
    torch.manual_seed(1)
    image, net = torch.rand(1, *SIDES), network()

    def predict(windows: torch.Tensor) -> torch.Tensor:
        return net(windows).softmax(1)

    if who == "monai":
        inferer = SlidingWindowInferer(WINDOW, sw_batch_size=BATCH, overlap=OVERLAP, mode="gaussian")
        whole = inferer(image[None], predict)[0]
        return whole if kind == "probabilities" else whole.max(0).indices
    window = SlidingWindow(WINDOW, OVERLAP, batch_size=BATCH)
    if kind == "probabilities":
        return window(image, predict)
    classes = torch.empty(SIDES, dtype=torch.int64)
    for first, slab in window.slabs(lambda first, last: image[..., first:last], SIDES, predict):
        classes[..., first : first + slab.shape[-1]] = slab.max(0).indices
    return classes


def memory_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure(who: str, kind: str) -> dict[str, float]:
    network()(torch.rand(1, 1, 32, 32, 32))  # what is set up once
    before, start, cpu_start = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    with torch.inference_mode():
        predicted(who, kind)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": memory_mb("VmHWM") - before}


def difference() -> float:
    with torch.inference_mode():
        return float((predicted("ours", "probabilities") - predicted("monai", "probabilities")).abs().max())


def run(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the table shows the best")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps({"max": difference()} if arguments.only == ["difference"] else measure(*arguments.only)))
        return
    print(f"{torch.get_num_threads()} thread, load {os.getloadavg()[0]:.1f}\n")
    print("| what | ours | MONAI | ratio |\n|---|---|---|---|")
    for kind, text in KINDS.items():
        found: dict[str, list[dict[str, float]]] = {"ours": [], "monai": []}
        for _ in range(arguments.rounds):
            for who, rows in found.items():
                rows.append(run("--only", who, kind))
        for key, unit in (("seconds", "s"), ("cpu_seconds", "s of the core"), ("peak_mb", "MB above the start")):
            ours, monai = (min(row[key] for row in found[who]) for who in ("ours", "monai"))
            print(f"| {text} | {ours:.1f} {unit} | {monai:.1f} {unit} | {ours / monai:.2f} |", flush=True)
    print(f"| largest difference of a probability | {run('--only', 'difference')['max']:.1e} | | |")


if __name__ == "__main__":
    main()
