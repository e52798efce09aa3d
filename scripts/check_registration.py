"""Registration checked on a real volume that known affines moved; prints the table of docs/locations.md.

    python scripts/check_registration.py                                # ct_torso_3mm of MEDSSL_TEST_DATA, 3 minutes
    python scripts/check_registration.py --data torso.nii.gz --affines 3

Each affine turns the volume about its middle by up to 8 degrees about each axis, scales each axis by 0.85 to 1.2 and
shifts it by up to 40 mm along each. The moved volume is resampled onto a grid of its own; then it is cut to 65 % of its
height. Errors are means over all anchors of the reference, those beyond the cut included.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from scipy.ndimage import affine_transform

from medssl.data.geometry import apply, rotation_matrix
from medssl.data.modality import guess_modality
from medssl.data.reading import read_volume
from medssl.data.volume import Volume
from medssl.tables.anchors import AnchorTable, find_anchors, roi_on_grid
from medssl.tables.locations import AnatomicalLocations
from medssl.tables.references import copy_spacing_of
from medssl.tables.registration import body_box_affine, coarse_volume, register

KEPT = 0.65
FIELDS = {"whole": None, "lower 65 %": 0.0, "middle 65 %": 0.5, "upper 65 %": 1.0}


def random_affine(rng: np.random.Generator, middle_mm: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrix(np.deg2rad(rng.uniform(-8, 8, 3))) @ np.diag(rng.uniform(0.85, 1.2, 3))
    matrix[:3, 3] = middle_mm - matrix[:3, :3] @ middle_mm + rng.uniform(-40, 40, 3)
    return matrix


def moved(volume: Volume, matrix: np.ndarray, *, place: float | None, outside: float) -> Volume:
    """The volume after `matrix`, on an axis-aligned grid; `place` says where in its height the part lies."""
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(volume.shape) - 1.0)
    reached = apply(matrix @ volume.affine, corners)
    low, high = reached.min(axis=0), reached.max(axis=0)
    if place is not None:
        height = high[2] - low[2]
        low[2] += place * (1 - KEPT) * height
        high[2] = low[2] + KEPT * height
    grid = np.diag([*volume.spacing_mm, 1.0])
    grid[:3, 3] = low
    shape = tuple(np.ceil((high - low) / volume.spacing_mm).astype(int) + 1)
    back = np.linalg.inv(matrix @ volume.affine) @ grid
    values = volume.array[0].astype(np.float32)
    values = affine_transform(values, back[:3, :3], back[:3, 3], output_shape=shape, order=1, cval=outside)
    return Volume(np.rint(values).astype(np.int16)[None], grid, "moved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(os.environ.get("MEDSSL_TEST_DATA", "."))
    parser.add_argument("--data", type=Path, default=folder / "ct_abdomen" / "ct_torso_3mm.nii.gz")
    parser.add_argument("--affines", type=int, default=6, help="for each field of view")
    parser.add_argument("--spacing-mm", type=float, default=1.5, help="of the anchors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    settings, volume, rng = AnatomicalLocations(), read_volume(options.data), np.random.default_rng(options.seed)
    modality = guess_modality(volume.array[0])[0]
    spacing = copy_spacing_of(volume.shape, volume.affine, settings.copy_spacing_mm)
    fixed = coarse_volume(volume, modality=modality, spacing_mm=spacing)
    roi, grid = roi_on_grid(
        fixed.mask, fixed.affine, shape=volume.shape, volume_affine=volume.affine, spacing_mm=options.spacing_mm
    )
    corners, _ = find_anchors(roi, max_anchors=settings.max_anchors)
    anchors = AnchorTable.of_corners(corners, grid).centre_mm
    middle = apply(volume.affine, (np.array(volume.shape) - 1) / 2)
    print(f"{options.data.name}: {len(anchors)} anchors; registered at {spacing:.1f} mm; seed {options.seed}\n")
    print("| shown | error (worst case) | worst anchor | returns off by (worst) | flagged | `body_box` | s |")
    print("|---|---|---|---|---|---|---|")
    for name, place in FIELDS.items():
        rows = []
        for _ in range(options.affines):
            truth = random_affine(rng, middle)
            part = moved(volume, truth, place=place, outside=float(volume.array.min()))
            subject = coarse_volume(part, modality=modality, spacing_mm=spacing)
            start = time.process_time()
            found = register(fixed, subject)
            seconds = time.process_time() - start
            error, boxed = (
                np.linalg.norm(apply(matrix, anchors) - apply(truth, anchors), axis=1)
                for matrix in (found.matrix, body_box_affine(fixed, subject))
            )
            flagged = settings.problem(found) != ""
            rows.append([error.mean(), error.max(), found.inverse_error_mm, flagged, boxed.mean(), seconds])
        table = np.array(rows, dtype=float)
        mean, worst = table.mean(axis=0), table.max(axis=0)
        print(
            f"| {name} | {mean[0]:.2f} ({worst[0]:.2f}) mm | {worst[1]:.1f} mm | {mean[2]:.2f} ({worst[2]:.2f}) mm | "
            f"{int(table[:, 3].sum())} of {len(rows)} | {mean[4]:.0f} mm | {mean[5]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
