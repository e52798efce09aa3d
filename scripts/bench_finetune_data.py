"""Data time of a fine-tuning batch, and the whole training step, against MONAI's CacheDataset; prints Markdown tables.

    python scripts/bench_finetune_data.py                            # one core
    python scripts/bench_finetune_data.py --device cuda --cores 8 --workers 7

Both sides read 256x256x160 phantom CTs (synthetic) at their own spacing and make batches of two 96^3 crops, half of
them about a label, with the same augmentations, all with probability 1, labels by nearest neighbour. MONAI keeps the
windowed volumes in RAM and is also shown tuned: no copy of the volume for each item, and indices of foreground voxels
prepared. Ours are read from the store on disk (in the page cache). The sides take turns. Run it on an idle machine; the
processor time beside the time on the clock tells whether it was.
"""

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel
import numpy as np
import torch
from monai import transforms as T
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

from medssl.data.augment import Affine, Brightness, ByModality, Gamma, GaussianNoise
from medssl.data.module import VolumeDataModule
from medssl.data.placements import RandomCrop
from medssl.data.prepare import prepare_store
from medssl.data.sampling import Shuffled
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.phantoms.source import Phantoms
from medssl.phantoms.torso import LABELS

SHAPE, SPACING_MM, NUM_CASES, CROP, BATCH = (256, 256, 160), 1.5, 2, 96, 2
WINDOW_HU, ROTATION_DEG, SCALE = (-175.0, 250.0), 15.0, (0.8, 1.25)
FACTOR, SHIFT, GAMMA, NOISE = 0.15, 0.05, (0.7, 1.5), 0.05

Pair = tuple[Tensor, Tensor]
Pipeline = Callable[[int], Iterator[Pair]]
"""From a number of batches to that many images and labels (2 1 96 96 96) on the device."""


def ours(store: VolumeStore, device: torch.device) -> Pipeline:
    """Place, read and draw, as fine-tuning does."""
    augment = [
        Affine(rotation_deg=ROTATION_DEG, scale=SCALE),
        ByModality(window_hu=WINDOW_HU),
        Brightness(factor=(1 - FACTOR, 1 + FACTOR), shift=(-SHIFT, SHIFT)),
        Gamma(gamma=GAMMA),
        GaussianNoise(std=(0.0, NOISE)),
    ]
    crop = RandomCrop(size=[CROP] * 3, spacing_mm=SPACING_MM, label=True, label_share=0.5, augment=augment)
    cases = range(len(store))
    plan = ViewPlan(groups={"x": crop})
    module = VolumeDataModule(
        store=store, views=plan, sampler=Shuffled(), batch_size=BATCH, seed=0, training_cases=cases
    )
    done = 0

    def batches(count: int) -> Iterator[Pair]:
        nonlocal done
        loader = module.loader(module.sampler, module.training_cases, steps=range(done, done + count), seed=0)
        loader.pin_memory = device.type == "cuda"
        done += count
        for raw in loader:
            view = module.draw(raw.to(device, non_blocking=True)).views["x"]
            yield view.image.flatten(0, 1), view.label.flatten(0, 1)

    return batches


def monai_cached(files: list[dict[str, Path]], device: torch.device, *, tuned: bool, workers: int) -> Pipeline:
    """CacheDataset holds what is the same every time; crop, affine and grey values follow for every item."""
    both, angle = ("image", "label"), math.radians(ROTATION_DEG)
    fixed = [
        T.LoadImaged(both),
        T.EnsureChannelFirstd(both),
        T.Orientationd(both, axcodes="RAS", labels=None),
        T.ScaleIntensityRanged("image", *WINDOW_HU, 0.0, 1.0, clip=True),
        T.EnsureTyped(both, track_meta=False),
        *([T.FgBgToIndicesd("label")] if tuned else []),
    ]
    indices = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"} if tuned else {}
    drawn = [
        T.RandCropByPosNegLabeld(both, "label", (CROP,) * 3, pos=1, neg=1, num_samples=1, **indices),
        *([T.SelectItemsd(both)] if tuned else []),
        T.RandAffined(
            both,
            prob=1.0,
            rotate_range=[angle] * 3,
            scale_range=[(SCALE[0] - 1, SCALE[1] - 1)] * 3,
            mode=("bilinear", "nearest"),
            padding_mode=("border", "zeros"),
        ),
        T.RandScaleIntensityd("image", prob=1.0, factors=FACTOR),
        T.RandShiftIntensityd("image", prob=1.0, offsets=SHIFT),
        T.RandAdjustContrastd("image", prob=1.0, gamma=GAMMA),
        T.RandGaussianNoised("image", prob=1.0, std=NOISE),
    ]
    dataset = CacheDataset(files, T.Compose(fixed + drawn), copy_cache=not tuned, progress=False)
    loader = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )  # fmt: skip

    def endless() -> Iterator[Pair]:
        while True:
            for batch in loader:
                yield tuple(batch[key].to(device, non_blocking=True) for key in both)  # type: ignore[misc]

    stream = endless()
    return lambda count: (next(stream) for _ in range(count))


def training_step(device: torch.device) -> Callable[[Pair], None]:
    """Forward, backward and optimiser step of a small U-Net."""
    torch.manual_seed(0)
    classes = max(LABELS.values()) + 1
    network = UNet(3, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2)).to(device)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step(batch: Pair) -> None:
        image, label = batch
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(image)
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits.float(), label).backward()
        optimizer.step()

    return step


def seconds_each(
    pipelines: dict[str, Pipeline], use: Callable[[Pair], None], *, count: int, rounds: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds a batch on the clock and of the processor (rounds, 2); the pipelines take turns in every round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        for name, pipeline in pipelines.items():
            _wait(device)
            start = time.perf_counter(), time.process_time()
            for batch in pipeline(count):
                use(batch)
            _wait(device)
            if number:  # the first round warms up
                found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.array(rows) / count for name, rows in found.items()}


def table(what: str, found: dict[str, np.ndarray]) -> str:
    """Medians in milliseconds, their range, and how many times as long as ours, which come first."""
    lines = [f"| {what} | ms | range over rounds | processor ms | times ours |", "|---|---|---|---|---|"]
    base = float(np.median(next(iter(found.values()))[:, 0]))
    for name, rows in found.items():
        clock, processor = 1e3 * np.median(rows, axis=0)
        low, high = 1e3 * rows[:, 0].min(), 1e3 * rows[:, 0].max()
        lines.append(f"| {name} | {clock:.0f} | {low:.0f} to {high:.0f} | {processor:.0f} | {clock / 1e3 / base:.2f} |")
    return "\n".join(lines)


def volumes(folder: Path) -> tuple[VolumeStore, list[dict[str, Path]]]:
    """The same phantoms as a store and as uncompressed NIfTI files."""
    source = Phantoms(num_cases=NUM_CASES, size_voxel=SHAPE, spacing_mm=SPACING_MM)
    prepare_store(source, folder / "store", num_workers=0, progress=False)
    store, files = VolumeStore(folder / "store"), []
    for number, record in enumerate(store.records()):
        files.append({key: folder / f"{record.case}_{key}.nii" for key in ("image", "label")})
        whole = (0, 0, 0), record.shape
        arrays = store.read(number, 0, *whole).result()[0], store.read_label(number, *whole).result()[0]
        for path, array in zip(files[-1].values(), arrays, strict=True):
            nibabel.save(nibabel.Nifti1Image(array, record.volume_to_mm), path)
    return store, files


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes of MONAI's loader; ours has none")
    parser.add_argument("--batches", type=int, default=8, help="a round, for the data time")
    parser.add_argument("--steps", type=int, default=3, help="a round, for the whole step; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device(options.device)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(options.cores)
    with tempfile.TemporaryDirectory() as name:
        store, files = volumes(Path(name))
        pipelines = {
            "medssl": ours(store, device),
            "MONAI CacheDataset": monai_cached(files, device, tuned=False, workers=options.workers),
            "MONAI CacheDataset, tuned": monai_cached(files, device, tuned=True, workers=options.workers),
        }
        again = {"rounds": options.rounds, "device": device}
        where = f"{options.device}, {options.cores} core{'s' * (options.cores > 1)}"
        print(
            table(f"data of a batch ({where})", seconds_each(pipelines, lambda _: None, count=options.batches, **again))
        )
        if options.steps:
            step = training_step(device)
            print(f"\n{table(f'training step ({where})', seconds_each(pipelines, step, count=options.steps, **again))}")


if __name__ == "__main__":
    main()
