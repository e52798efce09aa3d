"""Measure what the checksums of chunks cost when crops are read: the same volume with and without them, in turn.

    python scripts/bench_checksums.py --rounds 15

Run it on an idle machine; it uses one core. It prints the median rate of either side and the median of their ratios.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_data import CROP, ct, make_store

from medssl.data.store import VolumeStore


def seconds_of(store: VolumeStore, corners: np.ndarray) -> float:
    """Processor seconds of this process for crops at these corners, read one after another."""
    start = time.process_time()
    for lower in corners:
        store.read(0, 0, lower, lower + CROP).result()
    return time.process_time() - start


def main() -> None:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of measurements")
    parser.add_argument("--crops", type=int, default=40, help="crops of a measurement")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        array = ct((360, 378, 328), None)
        stores = [make_store(Path(name) / str(on), array, num_cases=1, checksums=on) for on in (True, False)]
        generator, times = np.random.default_rng(0), []
        for number in range(options.rounds + 1):  # the first round warms up
            corners = generator.integers(0, np.array(array.shape) - CROP, (options.crops, 3))
            pair = [0.0, 0.0]
            for side in (0, 1) if number % 2 else (1, 0):
                pair[side] = seconds_of(stores[side], corners)
            times += [pair] if number else []
        with_sums, without = np.median(np.array(times), axis=0) / options.crops
        ratio = np.median([a / b for a, b in times])
        print(f"{CROP}^3 crops of a CT (synthetic phantom), processor time: {1000 * with_sums:.2f} ms with checksums,")
        print(f"{1000 * without:.2f} ms without; median of {options.rounds} ratios {ratio:.3f}")


if __name__ == "__main__":
    main()
