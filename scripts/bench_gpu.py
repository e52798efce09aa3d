"""Measure the data layer and a full pre-training configuration on a CUDA device; the figures go to docs/benchmarks.md.

    python scripts/bench_gpu.py --method glmae --batch-size 8 --steps 40

The volumes are synthetic: one phantom, resized to 360x378x328 int16 voxels, stored several times.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_data import AUGMENT, CROP, ct, make_store

from medssl.config import compose
from medssl.data.module import VolumeDataModule
from medssl.data.placements import RandomCrop
from medssl.data.sampling import Shuffled
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan


def crops_per_second(store: VolumeStore, *, batch_size: int = 16, num_batches: int = 60) -> float:
    """Augmented 96^3 crops a second on the device, reading included."""
    plan = ViewPlan(groups={"x": RandomCrop(size=[CROP] * 3, augment=AUGMENT)})
    module = VolumeDataModule(
        store=store, views=plan, sampler=Shuffled(), batch_size=batch_size, seed=0, training_cases=range(len(store))
    )
    loader = module.loader(Shuffled(), module.training_cases, steps=range(num_batches + 5), seed=0)
    loader.pin_memory = True
    for number, batch in enumerate(loader):
        if number == 5:
            torch.cuda.synchronize()
            start = time.perf_counter()
        module.draw(batch.to(torch.device("cuda"), non_blocking=True))
    torch.cuda.synchronize()
    return num_batches * batch_size / (time.perf_counter() - start)


def training(store: VolumeStore, folder: Path, overrides: list[str]) -> dict[str, float]:
    """Median step time, shares, and peak device memory of a run through the command's own code."""
    from medssl.pretrain import run
    from medssl.run.folder import RunFolder

    fixed = ["trainer=gpu", "data=store", f"store={store.root}", "validate_every=null", "figures_every=100000"]
    config = compose("pretrain", [*fixed, f"output_dir={folder}", "overwrite=true", *overrides])
    torch.cuda.reset_peak_memory_stats()
    run(config)
    with RunFolder(folder).metrics.open() as file:
        rows = list(csv.DictReader(file))[5:]
    median = {
        name: float(np.median([float(r[name]) for r in rows]))
        for name in ("samples_per_s", "data_wait_share", "draw_share")
    }
    first, last = (np.mean([float(r["loss"]) for r in part]) for part in (rows[:5], rows[-5:]))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "step_s": config.batch_size / median["samples_per_s"],
        **median,
        "peak_GiB": peak,
        "first": first,
        "last": last,
    }


def main() -> None:
    """Run both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="glmae")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="further KEY=VALUE of medssl.pretrain")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        store = make_store(Path(name) / "store", ct((360, 378, 328), None), num_cases=16)
        print(f"augmented 96^3 crops on the device: {crops_per_second(store):.0f} a second")
        for batch_size in options.batch_size:
            overrides = [f"method={options.method}", f"batch_size={batch_size}", f"trainer.max_steps={options.steps}"]
            figures = training(store, Path(name) / f"run-{batch_size}", [*overrides, *options.overrides])
            print(
                f"{options.method}, bf16, batch {batch_size}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
            )


if __name__ == "__main__":
    main()
