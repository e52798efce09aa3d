"""Do anatomical embeddings find places in another subject? Trains them on phantoms and prints errors in millimetres.

Landmarks of every held-out subject are matched into every other one. The trained network is compared with the same
network before training and with copying the voxel index.

    python scripts/sam_phantoms.py --output runs/sam-phantoms                      # ellipsoids: a minute on one core
    python scripts/sam_phantoms.py --output runs/sam-phantoms --phantoms torso     # some minutes
    python scripts/sam_phantoms.py --output ... --weights ENCODER                  # another encoder on these subjects

`ellipsoids` are small fields of deformed ellipsoids at 2 mm; landmarks are the organs' centres, whose places the warp
of a subject gives. `torso` are whole torsos; landmarks are the centroids of labelled organs, paired organs by side.

Exits with 1 where the median error is not below half of that of the copied index. A finished training is kept.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ellipsoid_phantoms
import numpy as np
import torch

from medssl.data.cases import Source
from medssl.data.prepare import prepare_store
from medssl.data.splits import pretraining_cases
from medssl.data.store import VolumeStore
from medssl.extraction.embedder import Embedder
from medssl.extraction.embedding import match_points
from medssl.phantoms.source import Phantoms
from medssl.weights import build_network, encoder_recipe

NUM_CASES = 20
TORSO_MM, TORSO_SPACING_MM = 384.0, 5.0
PAIRED = ("kidneys", "lungs")
LENGTHS_MM = {
    "views.groups.pair.spacing_mm": [2.0],
    "method.fine.positive_mm": [2.0],
    "method.fine.ignore_mm": [8.0],
    "method.coarse.positive_mm": [25.0],
    "method.coarse.height_mm": [8.0, 6.0],
    "method.coarse.ignore_mm": [5.0],
}
"""What `sam_embed_tiny` states in millimetres for a grid of 2 mm; it grows with the spacing of the phantoms."""

Landmarks = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Experiment:
    """Subjects, places that are looked up in them (RAS mm, by name; NaN beyond the field), and settings of the run."""

    source: Source
    landmarks: Callable[[VolumeStore, int], Landmarks]
    spacing_mm: float
    view_voxel: tuple[int, int, int]
    steps: int


def organ_centres(store: VolumeStore, case: int) -> Landmarks:
    """The centres of the ellipsoids but for those that reach through the field, by the subject's warp."""
    centres = {name: centre for name, (centre, radii, _) in ellipsoid_phantoms.ORGANS.items() if max(radii) < 90}
    canvas = ellipsoid_phantoms.drawn(int(store.record(case).source.rpartition("_")[2]))
    places = ellipsoid_phantoms.places_mm(canvas, np.array(list(centres.values()), dtype=np.float64))
    return dict(zip(centres, places, strict=True))


def organ_centroids(store: VolumeStore, case: int) -> Landmarks:
    """Centroids of labelled organs; sides of paired organs are those of the spine's middle."""
    record = store.record(case)
    label = store.read_label(case, (0, 0, 0), record.shape).result()[0]
    value = {name: number for number, name in store.label_names.items()}
    to_mm = record.volume_to_mm
    middle = np.argwhere(label == value["spine"])[:, 0].mean()
    points: dict[str, np.ndarray] = {}
    for organ in ("liver", "spleen", "heart", "kidneys", "lungs"):
        voxels = np.argwhere(label == value[organ])
        parts = {organ: voxels}
        if organ in PAIRED:
            is_right = voxels[:, 0] > middle
            parts = {f"right {organ}": voxels[is_right], f"left {organ}": voxels[~is_right]}
        points |= {name: to_mm[:3, :3] @ part.mean(0) + to_mm[:3, 3] for name, part in parts.items()}
    return points


EXPERIMENTS = {
    "ellipsoids": Experiment(
        ellipsoid_phantoms.Ellipsoids(NUM_CASES), organ_centres, ellipsoid_phantoms.SPACING_MM, (48, 48, 16), 150
    ),
    "torso": Experiment(
        Phantoms(num_cases=NUM_CASES, size_voxel=round(TORSO_MM / TORSO_SPACING_MM), spacing_mm=TORSO_SPACING_MM),
        organ_centroids,
        TORSO_SPACING_MM,
        (64, 64, 24),
        450,
    ),
}


def train(experiment: Experiment, root: Path, run: Path, *, steps: int, seed: int, further: list[str]) -> None:
    """Pre-train on the subjects that are not held out."""
    settings = {
        "method": "sam_embed_tiny",
        "data": "store",
        "data.split": "5fold",
        "store": root,
        "output_dir": run,
        "overwrite": "true",
        "seed": seed,
        "trainer.max_steps": steps,
        "optimizer.final_fraction": 0,
        "validate_every": "null",
        "views.groups.pair.size": "[{},{},{}]".format(*experiment.view_voxel),
    }
    for key, lengths in LENGTHS_MM.items():
        scaled = [str(length * experiment.spacing_mm / 2) for length in lengths]
        settings[key] = scaled[0] if len(scaled) == 1 else f"[{','.join(scaled)}]"
    line = ["-m", "medssl.pretrain", *(f"{key}={value}" for key, value in settings.items()), *further]
    subprocess.run([sys.executable, *line], check=True)


def errors_mm(embedder: Embedder, store: VolumeStore, places_mm: dict[int, np.ndarray]) -> np.ndarray:
    """How far matched landmarks are off, (pair, landmark); NaN where a subject does not show one."""
    embedded = {case: embedder.of_case(store, case) for case in places_mm}
    rows = []
    for query, key in itertools.permutations(places_mm, 2):
        found, _ = match_points(embedded[query], np.nan_to_num(places_mm[query]), embedded[key])
        missing = np.isnan(places_mm[query]).any(axis=1)
        rows.append(np.where(missing, np.nan, np.linalg.norm(found - places_mm[key], axis=1)))
    return np.stack(rows)


def main() -> int:
    """Train what is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--phantoms", choices=EXPERIMENTS, default="ellipsoids")
    parser.add_argument("--weights", type=Path, help="an encoder.safetensors; trained here where it is not given")
    parser.add_argument("--steps", type=int, help="default: 150 for ellipsoids, 450 for torsos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", nargs="*", default=[], help="further KEY=VALUE of medssl.pretrain")
    options = parser.parse_args()
    experiment = EXPERIMENTS[options.phantoms]
    steps = options.steps or experiment.steps
    root, run = (
        options.output / f"store-{options.phantoms}",
        options.output / f"{options.phantoms}-{steps}steps-seed{options.seed}",
    )
    prepare_store(experiment.source, root, num_workers=0, progress=False)
    weights = options.weights or run / "encoder.safetensors"
    if not weights.is_file():
        train(experiment, root, run, steps=steps, seed=options.seed, further=options.pretrain)
    store = VolumeStore(root)
    _, held_out = pretraining_cases(store, split="5fold", fold=0, validation_fraction=0.2)
    known = {case: experiment.landmarks(store, case) for case in held_out}
    places = {case: np.stack(list(points.values())) for case, points in known.items()}
    trained = Embedder.load(weights)
    torch.manual_seed(options.seed)
    before = Embedder(build_network(encoder_recipe(weights)).eval(), trained.reading, torch.device("cpu"))
    pairs = itertools.permutations(places.values(), 2)
    columns = {
        "index copied": np.stack([np.linalg.norm(query - key, axis=1) for query, key in pairs]),
        "untrained": errors_mm(before, store, places),
        "trained": errors_mm(trained, store, places),
    }
    counted = np.isfinite(columns["index copied"])
    print(f"median error in mm over {counted.sum()} matches between {len(held_out)} held-out subjects")
    print(f"{'':14}" + "".join(f"{name:>14}" for name in columns))
    for number, name in enumerate(known[held_out[0]]):
        if counted[:, number].any():
            print(f"{name:14}" + "".join(f"{np.nanmedian(rows[:, number]):14.1f}" for rows in columns.values()))
    print(f"{'all':14}" + "".join(f"{np.median(rows[counted]):14.1f}" for rows in columns.values()))
    print(f"{'within 10 mm':14}" + "".join(f"{(rows[counted] < 10).mean():14.0%}" for rows in columns.values()))
    ratio = np.nanmedian(columns["trained"]) / np.nanmedian(columns["index copied"])
    print(f"trained / copied: {ratio:.2f} (wanted: below 0.5)")
    return int(ratio >= 0.5)


if __name__ == "__main__":
    raise SystemExit(main())
