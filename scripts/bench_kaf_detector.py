"""KAF's keypoint detector against scikit-image's `blob_dog` on 96^3 voxels; prints a Markdown table.

    pip install scikit-image                                   # for comparison, medssl does not need it
    python scripts/bench_kaf_detector.py                       # a synthetic texture, a minute or two
    python scripts/bench_kaf_detector.py --data torso.nii.gz   # the middle of a volume (CT -160 to 240 HU)

Equal settings: sigma from 0.8 up in steps of the third root of 2 through the scales of three octaves, a difference of
at least 0.04 / 3, 3 voxels of border. `blob_dog` finds bright blobs only and is called twice, on the image and on its
negative, and has neither refinement between voxels nor a test for edges. Most of its time may go into merging blobs
that overlap, pair by pair, so it is also measured without that. Sides take turns; the fastest pass counts.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the other side, which knows no threads

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medssl.data.modality import guess_modality
from medssl.data.reading import read_volume
from medssl.models.keypoints import DifferenceOfGaussians, Foerstner, detect

SIDE, OCTAVES = 96, 3
THEIRS = "scikit-image blob_dog"


def synthetic() -> np.ndarray:
    """Smooth noise of several scales in [0, 1]."""
    noise = np.random.default_rng(0).standard_normal((SIDE,) * 3)
    fields = [gaussian_filter(noise, sigma) for sigma in (1.0, 2.0, 4.0)]
    total = sum(field / field.std() for field in fields)
    return ((total - total.min()) / (total.max() - total.min())).astype(np.float32)


def middle_of(path: Path) -> np.ndarray:
    volume = read_volume(path)
    values = volume.array[0].astype(np.float32)
    low, high = (-160.0, 240.0) if guess_modality(volume.array[0])[0] == "ct" else np.percentile(values, (0.5, 99.5))
    starts = [(n - SIDE) // 2 for n in values.shape]
    if min(starts) < 0:
        raise SystemExit(f"{path} has {values.shape} voxels; it takes {SIDE} along each axis")
    crop = values[tuple(slice(start, start + SIDE) for start in starts)]
    return np.clip((crop - low) / (high - low), 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a volume instead of the synthetic one")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    try:
        from skimage.feature import blob
    except ImportError:
        raise SystemExit("scikit-image is not installed; pip install scikit-image") from None
    image = middle_of(args.data) if args.data else synthetic()
    batch = torch.from_numpy(image)[None, None]

    def ours(detector: DifferenceOfGaussians | Foerstner) -> Callable[[], int]:
        return lambda: int(detect(batch, max_points=100_000, detector=detector).valid.sum())

    def theirs(merge: Callable) -> int:
        usual, blob._prune_blobs = blob._prune_blobs, merge
        settings = {"min_sigma": 0.8, "max_sigma": 0.8 * 2**OCTAVES, "sigma_ratio": 2 ** (1 / 3)}
        found = [blob.blob_dog(one, **settings, threshold=0.04 / 3, exclude_border=3) for one in (image, 1 - image)]
        blob._prune_blobs = usual
        return sum(map(len, found))

    def unmerged(blobs: np.ndarray, *settings: object, **more: object) -> np.ndarray:
        return blobs

    who: dict[str, Callable[[], int]] = {
        THEIRS: lambda: theirs(unmerged),
        f"{THEIRS}, with merging": lambda: theirs(blob._prune_blobs),
        "DifferenceOfGaussians": ours(DifferenceOfGaussians(num_octaves=OCTAVES, value_range=(0, 1))),
        "Foerstner": ours(Foerstner(value_range=(0, 1))),
    }
    for name in list(who)[2:]:
        who[name]()  # once before, for the first call of a kind
    seconds: dict[str, list[float]] = {name: [] for name in who}
    counts = {}
    for number in range(args.repeats):
        for name, find in who.items():
            if number and "merging" in name:
                continue  # once is long enough
            start = time.perf_counter()
            counts[name] = find()
            seconds[name].append(time.perf_counter() - start)
    reference = min(seconds[THEIRS])
    print(f"| detector | keypoints | ms per {SIDE}^3, fastest of {args.repeats} | range | times as fast |")
    print("|---|---|---|---|---|")
    for name, times in seconds.items():
        spread = f"{min(times) * 1e3:.0f} to {max(times) * 1e3:.0f}"
        print(f"| {name} | {counts[name]} | {min(times) * 1e3:.0f} | {spread} | {reference / min(times):.1f} |")


if __name__ == "__main__":
    main()
