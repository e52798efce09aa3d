"""Measure the data layer and print the table of docs/benchmarks.md; every goal is a ratio within one run.

    python scripts/bench_data.py                       # our own rows
    pip install torchio batchgeneratorsv2 blosc2       # then the comparison rows run too
    python scripts/bench_data.py --volume ct.nii.gz    # another CT; the default is a synthetic phantom

Run it on an idle machine. All rows but the training one use one core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import tensorstore
import torch

from medssl.data.augment import Affine, Flip, Gamma, GaussianBlur, GaussianNoise, Window
from medssl.data.description import write_description
from medssl.data.draw import box_of
from medssl.data.module import VolumeDataModule
from medssl.data.placements import RandomCrop
from medssl.data.resampling import resample_axis
from medssl.data.sampling import Request, Shuffled
from medssl.data.scene import Scene
from medssl.data.splits import pretraining_cases
from medssl.data.store import VolumeStore
from medssl.data.store_writer import write_case, write_index
from medssl.data.views import ViewPlan
from medssl.data.volume import Box, Volume, intensity_statistics
from medssl.phantoms.torso import draw_phantom

CROP, BATCH = 96, 2
ROTATION_DEG, SCALE, GAMMA, NOISE, BLUR = 10.0, (0.9, 1.1), (0.7, 1.5), (0.0, 0.1), (0.5, 1.0)
AUGMENT = [
    Window(low_hu=-1000, high_hu=1000),
    Flip(),
    Affine(rotation_deg=ROTATION_DEG, scale=SCALE),
    Gamma(gamma=GAMMA),
    GaussianNoise(std=NOISE),
    GaussianBlur(sigma_voxel=BLUR),
]


def ct(shape: tuple[int, int, int], source: Path | None) -> np.ndarray:
    """An int16 CT of a shape: a scan or phantom, resized, with the noise of a scanner (15 HU)."""
    array = _scan(source) if source else _phantom()
    for axis, side in enumerate(shape):
        positions = np.linspace(0, array.shape[axis] - 1, side)
        array = resample_axis(array, axis, positions=positions, ratio=array.shape[axis] / side)
    array += np.random.default_rng(0).normal(0, 15, shape).astype(np.float32)
    return np.rint(array).clip(-1024, 3071).astype(np.int16)


def make_store(
    root: Path, array: np.ndarray, *, num_cases: int, spacing_mm: float = 1.0, checksums: bool = False
) -> VolumeStore:
    """The array as several cases; those after the first name its folder, so that they cost nothing to make."""
    root.mkdir()
    affine = np.diag([spacing_mm] * 3 + [1.0])
    record = write_case(
        root,
        case="case_0000",
        volume=Volume(array[None], affine, "benchmark"),
        label=None,
        modality="ct",
        group="benchmark",
        split="",
        statistics=intensity_statistics(array[None]),
        body=Box.whole(array.shape),
        points=np.full((1, 4), -1, dtype=np.int32),
        voxel_hash="",
        source="benchmark",
        checksums=checksums,
    )
    records = [record]
    for number in range(1, num_cases):
        case = f"case_{number:04d}"
        records.append(replace(record, case=case))
    write_index(root, records)
    write_description(root, {})
    return VolumeStore(root)


def per_second(draw: Callable[[], int], *, seconds: float = 8.0) -> float:
    """Crops a second of a function that makes some and says how many; the first call warms up."""
    draw()
    start, made = time.perf_counter(), 0
    while (now := time.perf_counter() - start) < seconds:
        made += draw()
    return made / now


def loader_rate(store: VolumeStore, *, augment: list, draw: bool) -> float:
    """Crops a second through placing, reading and stacking, and drawing where asked."""
    plan = ViewPlan(groups={"x": RandomCrop(size=[CROP] * 3, augment=augment)})
    module = VolumeDataModule(
        store=store, views=plan, sampler=Shuffled(), batch_size=BATCH, seed=0, training_cases=range(len(store))
    )
    batches = iter(module.loader(Shuffled(), module.training_cases, steps=range(10**6), seed=0))

    def one() -> int:
        batch = next(batches)
        if draw:
            module.draw(batch)
        else:
            torch.stack([raw.voxels for raw in batch.groups["x"]])
        return BATCH

    return per_second(one)


def read_rate(store: VolumeStore) -> float:
    """Crops a second of TensorStore alone, as many reads in flight as the loader has."""
    generator, shape = np.random.default_rng(0), np.array(store.record(0).shape)
    waiting: list = []

    def one() -> int:
        while len(waiting) < 4 * BATCH:
            lower = generator.integers(0, shape - CROP)
            waiting.append(store.read(int(generator.integers(len(store))), 0, lower, lower + CROP))
        waiting.pop(0).result()
        return 1

    return per_second(one)


def resized_read(store: VolumeStore) -> dict[str, float]:
    """Bytes read and decoded for a 160^3 view of the whole volume, from the chosen level and from level 0."""
    spec = RandomCrop(size=[160] * 3, fraction=[1.0, 1.0])
    plan = ViewPlan(groups={"x": spec})
    (view,) = plan.place(Scene(store, Request((0,), 0)), seed=0, step=0)["x"]
    found = {}
    for name, finest in (("level", False), ("full", True)):
        box = box_of(view.record, view.pose, finest=finest)
        before = _bytes_read()
        start = time.perf_counter()
        array = store.read(0, box.level, box.lower, box.upper).result()
        found |= {
            f"{name}_s": time.perf_counter() - start,
            f"{name}_decoded": array.nbytes,
            f"{name}_number": box.level,
        }
        found[f"{name}_read"] = _bytes_read() - before
    return found


def resident_growth_mb(store: VolumeStore, spec: RandomCrop) -> float:
    """Growth of this process's memory over 60 batches of crops, MB; four batches of two are read ahead."""
    plan = ViewPlan(groups={"x": spec})
    module = VolumeDataModule(
        store=store, views=plan, sampler=Shuffled(), batch_size=BATCH, seed=0, training_cases=range(len(store))
    )
    before = _resident_mb()
    peak = before
    for batch in module.loader(Shuffled(), module.training_cases, steps=range(60), seed=0):
        module.draw(batch)
        peak = max(peak, _resident_mb())
    return peak - before


def opening_s(store: VolumeStore, folder: Path, *, num_cases: int = 100_000) -> float:
    """Seconds to open a store whose index has this many cases and to build its data module."""
    first = store.record(0)
    write_index(folder, [replace(first, case=f"case_{number:06d}") for number in range(num_cases)])
    write_description(folder, {})
    start = time.perf_counter()
    opened = VolumeStore(folder)
    assert opened.record(num_cases - 1).case == f"case_{num_cases - 1:06d}"
    plan = ViewPlan(groups={"x": RandomCrop(size=[CROP] * 3)})
    training, _ = pretraining_cases(opened, split=None, fold=0, validation_fraction=0.1)
    VolumeDataModule(store=opened, views=plan, sampler=Shuffled(), batch_size=BATCH, seed=0, training_cases=training)
    return time.perf_counter() - start


def phantoms_s(num_cases: int = 32) -> float:
    """Seconds to draw phantoms of 96^3 voxels at 4 mm."""
    start = time.perf_counter()
    for seed in range(num_cases):
        draw_phantom(seed)
    return time.perf_counter() - start


def training_shares(folder: Path, *, steps: int) -> dict[str, float]:
    """Median data-wait and draw share of `glmae_tiny` on phantoms, in a run of its own on all cores."""
    command = [
        sys.executable,
        "-m",
        "medssl.pretrain",
        "method=glmae_tiny",
        "data=phantoms",
        f"output_dir={folder}/run",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    arguments = [f"store={folder}/phantoms", f"trainer.max_steps={steps}", "validate_every=100000"]
    cores = list(range(os.cpu_count() or 1))
    subprocess.run(
        [*command, *arguments],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    lines = (folder / "run" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    return {
        name: float(np.median([float(row[name]) for row in rows[5:] if row[name]]))
        for name in ("data_wait_share", "draw_share", "samples_per_s")
    }


def _phantom() -> np.ndarray:
    return draw_phantom(0, size_voxel=(128, 128, 128), spacing_mm=3.0)[0].array[0].astype(np.float32)


def _scan(path: Path) -> np.ndarray:
    from medssl.data.reading import read_volume

    return read_volume(path).array[0].astype(np.float32)


def _bytes_read() -> int:
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(found[0]["values"][0]["value"]) if found else 0


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Run all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volume", type=Path, help="a CT to resize (default: a synthetic phantom)")
    parser.add_argument("--steps", type=int, default=60, help="training steps for the data-wait row; 0 leaves it out")
    parser.add_argument("--only-ours", action="store_true", help="leave out the comparison with other libraries")
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = "resized from a scan" if options.volume else "synthetic phantom"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.steps:
            shares = training_shares(folder, steps=options.steps)
            print(
                f"glmae_tiny on phantoms (synthetic), {os.cpu_count()} cores: "
                + ", ".join(f"{k} {v:.3g}" for k, v in shares.items())
            )
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        array = ct((360, 378, 328), options.volume)
        store = make_store(folder / "store", array, num_cases=8)
        alone, loader = read_rate(store), loader_rate(store, augment=[], draw=False)
        print(f"96^3 crops from int16 CT 360x378x328 ({origin}), one core, crops/s")
        print(f"  TensorStore read alone {alone:.0f}, whole loader {loader:.0f}, ratio {loader / alone:.2f}")
        rates = {"medssl": loader_rate(store, augment=AUGMENT, draw=True)}
        if not options.only_ours:
            from bench_data_others import rates_of_others

            rates |= rates_of_others(folder, array)
        print("disk to augmented batch (flip, affine, gamma, noise, blur), one core, crops/s")
        for library, rate in rates.items():
            print(f"  {library:32s} {rate:6.1f}   medssl is {rates['medssl'] / rate:.2f} times as fast")
        native = resident_growth_mb(store, RandomCrop(size=[CROP] * 3, augment=AUGMENT))
        resized = resident_growth_mb(store, RandomCrop(size=[CROP] * 3, fraction=[0.5, 1.0]))
        sizes = f"one volume is {array.nbytes / 2**20:.0f} MB, {2 * array.nbytes / 2**20:.0f} MB in float32"
        print(f"memory over 60 batches: +{native:.0f} MB native, then +{resized:.0f} MB resized; {sizes}")
        print(f"32 phantoms of 96^3 voxels at 4 mm, one core: {phantoms_s():.0f} s")
        (folder / "large").mkdir()
        print(f"opening 100,000 cases (synthetic index): {opening_s(store, folder / 'large'):.2f} s")
        found = resized_read(make_store(folder / "big", ct((512, 512, 400), options.volume), num_cases=1))
        print(f"160^3 view of 512x512x400 ({origin}): level {found['level_number']} instead of 0")
        for what in ("read", "decoded", "s"):
            full, level = found[f"full_{what}"], found[f"level_{what}"]
            unit = "s" if what == "s" else "MB"
            scale = 1 if what == "s" else 2**20
            ratio = f"{full / level:.1f} times less"
            print(f"  {what:8s} {level / scale:.2f} instead of {full / scale:.2f} {unit}: {ratio}")


if __name__ == "__main__":
    main()
