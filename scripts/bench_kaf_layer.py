"""KAF's layer of the finest level, its first convolution over tokens against that over a map; prints a Markdown table.

    python scripts/bench_kaf_layer.py                # some minutes on two cores

Forward and backward of the layer of the preset `kaf` (16 channels, tokens of 256, 6 pairs of attention layers, 64
channels between the convolutions) over one crop with keypoints at random, CPU, float32: the convolution alone, and the
whole layer. Both give the same. Every measurement is a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch

from medssl.models.kaf_layer import KAFLayer, find_tokens

KEYPOINTS = {48: 64, 96: 512}
WHO = {"sparse": True, "dense": False}
PARTS = ("first convolution", "whole layer")


def memory_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def measure(part: str, who: str, side: int, repeats: int) -> dict[str, float]:
    """Fastest of some passes after a first one; memory above that before the first."""
    torch.manual_seed(0)
    layer = KAFLayer(16, spatial_dims=3, sparse_first_conv=WHO[who])
    points = torch.rand(1, KEYPOINTS[side], 3) * (side - 1)
    size = (side,) * 3
    keypoints, _ = find_tokens(points, torch.ones(points.shape[:2], dtype=torch.bool), size_voxel=size)
    features = torch.randn(1, 16, *size, requires_grad=True)
    tokens = torch.randn(KEYPOINTS[side], 256, requires_grad=True)
    voxel, sample = keypoints.voxel((1, 1, 1)), keypoints.packing.sample
    before, seconds = memory_mb("VmRSS"), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        if part == PARTS[0]:
            out = layer.diffuse(tokens, voxel, sample, batch=1, size_voxel=size)
        else:
            out, _ = layer(features, keypoints, stride=(1, 1, 1))
        out.backward(torch.ones_like(out))
        layer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_mb": memory_mb("VmHWM") - before, "sum": out.double().sum().item()}


def run(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="passes that each process measures, after a first one")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        part, who, side = arguments.only
        print(json.dumps(measure(part, who, int(side), arguments.repeats)))
        return
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| forward and backward | sparse, s | dense, s | ratio | sparse, MB | dense, MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for side, count in KEYPOINTS.items():
        for part in PARTS:
            options = (str(side), "--repeats", str(arguments.repeats))
            sparse, dense = (run("--only", part, who, *options) for who in WHO)
            assert abs(sparse["sum"] - dense["sum"]) < 1e-3 * max(1, abs(dense["sum"])), "both give the same"
            row = [f"{part}, {side}^3, {count} keypoints"]
            for key, digits in (("seconds", 2), ("peak_mb", 0)):
                a, b = sparse[key], dense[key]
                row += [f"{a:.{digits}f}", f"{b:.{digits}f}", f"{b / a:.1f}"]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
