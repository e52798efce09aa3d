"""How many keypoints are found again after a known motion; prints the table of docs/keypoints.md.

    python scripts/keypoint_repeatability.py                          # CT and MRI of MEDSSL_TEST_DATA, some minutes
    python scripts/keypoint_repeatability.py --data a.nii.gz b.nii.gz # volumes of your own

A volume is resampled once to isotropic voxels and once through a rotation, a scale and a shift about its middle, both
by cubic splines out of the file's voxels, windowed (CT -160 to 240 HU, else the 0.5 and 99.5 percentiles) and cut to
the same number of voxels. Noise of 2 % of the window is added to both. Every volume gives several random motions.
Repeatability is the share of keypoints of the first that should be seen in the second (5 voxels inside it) and have a
mutual nearest neighbour within 2 voxels there; "by chance" is the same for as many voxels at random. The strongest
512 of each image count.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.ndimage import map_coordinates, spline_filter

from medssl.data.modality import guess_modality
from medssl.data.reading import read_volume
from medssl.data.volume import Volume
from medssl.models.keypoints import DifferenceOfGaussians, Foerstner, RandomPoints, detect

RANGE = (0.0, 1.0)
DETECTORS = {
    "blobs, sigma0 0.8": DifferenceOfGaussians(value_range=RANGE),
    "blobs, sigma0 0.8, cross": DifferenceOfGaussians(neighbourhood="cross", value_range=RANGE),
    "blobs, sigma0 1.0": DifferenceOfGaussians(sigma0=1.0, value_range=RANGE),
    "blobs, sigma0 1.6": DifferenceOfGaussians(sigma0=1.6, value_range=RANGE),
    "Foerstner": Foerstner(value_range=RANGE),
    "by chance (random voxels)": RandomPoints(),
}
MOTIONS = {
    "noise alone": (0.0, 1.0),
    "10 degrees": (10.0, 1.0),
    "20 degrees": (20.0, 1.0),
    "scale 1.15": (0.0, 1.15),
    "20 degrees, scale 1.15": (20.0, 1.15),
    "45 degrees, scale 1.3": (45.0, 1.3),
}
MARGIN, WITHIN = 5.0, 2.0


def windowed(volume: Volume) -> np.ndarray:
    values = volume.array[0].astype(np.float32)
    low, high = (-160.0, 240.0) if guess_modality(volume.array[0])[0] == "ct" else np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1)


def drawn(spline: np.ndarray, matrix: np.ndarray, side: tuple[int, ...], rng: np.random.Generator, noise: float):
    """The image at voxels `matrix @ index` of the volume, with noise, as a batch."""
    grid = np.stack(np.meshgrid(*map(np.arange, side), indexing="ij")).reshape(3, -1)
    places = matrix[:3, :3] @ grid + matrix[:3, 3:]
    values = map_coordinates(spline, places, order=3, mode="nearest", prefilter=False).reshape(side)
    values = np.clip(values, 0, 1) + noise * rng.standard_normal(side)
    return torch.from_numpy(values.astype(np.float32))[None, None]


def repeated(first: np.ndarray, second: np.ndarray, to_second: np.ndarray, side: tuple[int, ...]) -> tuple[int, int]:
    """Keypoints of the first image that the second should show, and how many it does."""
    moved = first @ to_second[:3, :3].T + to_second[:3, 3]
    seen = np.all((moved >= MARGIN) & (moved <= np.array(side) - 1 - MARGIN), axis=1)
    if not len(second) or not seen.any():
        return int(seen.sum()), 0
    distance = np.linalg.norm(moved[:, None] - second, axis=2)
    nearest, back = distance.argmin(1), distance.argmin(0)
    mutual = back[nearest] == np.arange(len(first))
    return int(seen.sum()), int((mutual & seen & (distance.min(1) <= WITHIN)).sum())


def measure(volume: Volume, *, draws: int, side: int, noise: float, rng: np.random.Generator) -> dict:
    spline = spline_filter(windowed(volume), order=3, mode="nearest").astype(np.float32)
    spacing = np.array(volume.spacing_mm)
    step = float(np.prod(spacing)) ** (1 / 3)
    sides = tuple(int(min(side, n * s / step)) for n, s in zip(volume.shape, spacing, strict=True))
    middle = np.array(sides) / 2 - 0.5
    straight = np.diag([*(step / spacing), 1.0])
    straight[:3, 3] = (np.array(volume.shape) - 1) / 2 - straight[:3, :3] @ middle
    counts: dict = {}
    for name, (degrees, scale) in MOTIONS.items():
        for _ in range(draws):
            axis = rng.standard_normal(3)
            turn = rotation_about(axis / np.linalg.norm(axis), np.deg2rad(degrees))
            move = np.eye(4)  # voxels of the second image to those of the first
            move[:3, :3] = turn * scale
            move[:3, 3] = middle - move[:3, :3] @ middle + rng.uniform(-1, 1, 3) * (name != "noise alone")
            one = drawn(spline, straight, sides, rng, noise)
            two = drawn(spline, straight @ move, sides, rng, noise)
            for kind, detector in DETECTORS.items():
                points = []
                for number, image in enumerate((one, two)):
                    shown = RandomPoints(seed=int(rng.integers(2**31)) + number) if "chance" in kind else detector
                    found = detect(image, max_points=512, detector=shown)
                    points.append(found.points[0][found.valid[0]].double().numpy())
                seen, again = repeated(*points, np.linalg.inv(move), sides)
                total = counts.setdefault((kind, name), np.zeros(3))
                total += (seen, again, len(points[0]) / draws / len(MOTIONS))
    return counts


def rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("MEDSSL_TEST_DATA", "."))
    usual = [folder / "ct_abdomen" / "ct_torso_3mm.nii.gz", folder / "mr_abdomen" / "mr_slab_3mm.nii.gz"]
    parser.add_argument("--data", type=Path, nargs="+", default=usual, help="volumes, each gets a table")
    parser.add_argument("--draws", type=int, default=4, help="random motions of each kind")
    parser.add_argument("--side", type=int, default=96, help="largest side of the images in voxels")
    parser.add_argument("--noise", type=float, default=0.02, help="standard deviation, in units of the window")
    args = parser.parse_args()
    for path in args.data:
        volume = read_volume(path)
        counts = measure(volume, draws=args.draws, side=args.side, noise=args.noise, rng=np.random.default_rng(0))
        print(f"\n{path.name}, {volume.shape} voxels of {[round(s, 2) for s in volume.spacing_mm]} mm\n")
        print(f"| detector | keypoints | {' | '.join(MOTIONS)} |\n|{'---|' * (2 + len(MOTIONS))}")
        for kind in DETECTORS:
            rows = [counts[kind, name] for name in MOTIONS]
            shares = " | ".join(f"{again / seen:.2f}" if seen else "-" for seen, again, _ in rows)
            print(f"| {kind} | {sum(row[2] for row in rows):.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
