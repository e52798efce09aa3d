"""Do anatomical embeddings find organs in another subject? Trains them on phantoms and prints errors in millimetres.

Landmarks are the centroids of labelled organs, paired organs by side. Those of every held-out subject are matched into
every other one. The trained network is compared with the same network before training and with copying the voxel index.

    python scripts/sam_phantoms.py --output runs/sam-phantoms            # some minutes on one core
    python scripts/sam_phantoms.py --output ... --weights ENCODER        # another encoder on the same subjects

Exits with 1 where the median error is not below half of that of the copied index. A finished training is kept.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from medssl.data.splits import pretraining_cases
from medssl.data.store import VolumeStore
from medssl.inference.embedder import Embedder
from medssl.inference.embedding import match_points
from medssl.weights import build_network, encoder_recipe

ORGANS = ("liver", "spleen", "heart", "kidneys", "lungs")
PAIRED = ("kidneys", "lungs")
FIELD_MM = 384.0
LENGTHS_MM = {
    "views.groups.pair.spacing_mm": [2.0],
    "method.fine.positive_mm": [2.0],
    "method.fine.ignore_mm": [8.0],
    "method.coarse.positive_mm": [25.0],
    "method.coarse.height_mm": [8.0, 6.0],
    "method.coarse.ignore_mm": [5.0],
}
"""What `sam_embed_tiny` states in millimetres for a grid of 2 mm; for phantoms it grows with their spacing."""


def landmarks(store: VolumeStore, case: int) -> dict[str, np.ndarray]:
    """Organ centroids in RAS mm, by name; sides of paired organs are those of the spine's middle."""
    record = store.record(case)
    label = store.read_label(case, (0, 0, 0), record.shape).result()[0]
    value = {name: number for number, name in store.label_names.items()}
    to_mm = record.volume_to_mm
    middle = np.argwhere(label == value["spine"])[:, 0].mean()
    points = {}
    for organ in ORGANS:
        voxels = np.argwhere(label == value[organ])
        parts = {organ: voxels}
        if organ in PAIRED:
            is_right = voxels[:, 0] > middle
            parts = {f"right {organ}": voxels[is_right], f"left {organ}": voxels[~is_right]}
        points |= {name: to_mm[:3, :3] @ part.mean(0) + to_mm[:3, 3] for name, part in parts.items()}
    return points


def errors_mm(embedder: Embedder, store: VolumeStore, cases: list[int]) -> np.ndarray:
    """How far matched landmarks are off, (pair, landmark)."""
    embedded = {case: embedder.of_case(store, case) for case in cases}
    known = {case: np.stack(list(landmarks(store, case).values())) for case in cases}
    rows = []
    for query, key in itertools.permutations(cases, 2):
        found, _ = match_points(embedded[query], known[query], embedded[key])
        rows.append(np.linalg.norm(found - known[key], axis=1))
    return np.stack(rows)


def main() -> int:
    """Train what is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="an encoder.safetensors; trained here where it is not given")
    parser.add_argument("--cases", type=int, default=20, help="subjects; a fifth of them is held out")
    parser.add_argument("--spacing-mm", type=float, default=6.0, help="of the phantoms and of the views")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", nargs="*", default=[], help="further KEY=VALUE of medssl.pretrain")
    options = parser.parse_args()
    root = options.output / f"store-{options.spacing_mm:g}mm"
    run = options.output / f"{options.spacing_mm:g}mm-{options.steps}steps-seed{options.seed}"
    weights = options.weights or run / "encoder.safetensors"
    if not weights.is_file():
        settings = {
            "method": "sam_embed_tiny",
            "data": "phantoms",
            "data.num_cases": options.cases,
            "store": root,
            "output_dir": run,
            "overwrite": "true",
            "seed": options.seed,
            "trainer.max_steps": options.steps,
            "validate_every": "null",
            "data.size_voxel": round(FIELD_MM / options.spacing_mm),
            "data.phantom_spacing_mm": options.spacing_mm,
        }
        for key, lengths in LENGTHS_MM.items():
            scaled = [length * options.spacing_mm / 2 for length in lengths]
            settings[key] = scaled[0] if len(scaled) == 1 else f"[{','.join(map(str, scaled))}]"
        line = ["-m", "medssl.pretrain", *(f"{key}={value}" for key, value in settings.items()), *options.pretrain]
        subprocess.run([sys.executable, *line], check=True)
    store = VolumeStore(root)
    _, held_out = pretraining_cases(store, split="5fold", fold=0, validation_fraction=0.2)
    trained = Embedder.load(weights)
    torch.manual_seed(options.seed)
    before = Embedder(build_network(encoder_recipe(weights)).eval(), trained.reading, torch.device("cpu"))
    known = {case: landmarks(store, case) for case in held_out}
    copied = np.array(
        [
            [np.linalg.norm(known[a][name] - known[b][name]) for name in known[a]]
            for a, b in itertools.permutations(held_out, 2)
        ]
    )
    columns = {
        "index copied": copied,
        "untrained": errors_mm(before, store, held_out),
        "trained": errors_mm(trained, store, held_out),
    }
    print(f"median error in mm over {len(copied)} ordered pairs of {len(held_out)} held-out subjects")
    print(f"{'':14}" + "".join(f"{name:>14}" for name in columns))
    for number, name in enumerate(known[held_out[0]]):
        print(f"{name:14}" + "".join(f"{np.median(rows[:, number]):14.1f}" for rows in columns.values()))
    print(f"{'all':14}" + "".join(f"{np.median(rows):14.1f}" for rows in columns.values()))
    print(f"{'within 10 mm':14}" + "".join(f"{(rows < 10).mean():14.0%}" for rows in columns.values()))
    ratio = np.median(columns["trained"]) / np.median(copied)
    print(f"trained / copied: {ratio:.2f} (wanted: below 0.5)")
    return int(ratio >= 0.5)


if __name__ == "__main__":
    raise SystemExit(main())
