"""Draws docs/images/phantoms.png: three planes of several phantoms, with the label map of the first."""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from medssl.phantoms.torso import LABELS, draw_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--spacing-mm", type=float, default=4.0)
    parser.add_argument("--out", default="docs/images/phantoms.png")
    options = parser.parse_args()
    size = round(384 / options.spacing_mm)
    columns = ("chest, lung window", "heart", "liver and spleen", "kidneys", "coronal", "sagittal")
    rows = [(seed, kind) for seed in options.seeds for kind in ("CT", "labels")[: 2 if seed == options.seeds[0] else 1]]
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(2.6 * len(columns), 2.7 * len(rows)), squeeze=False)
    for (seed, kind), line in zip(rows, axes, strict=True):
        volume, label = draw_phantom(seed, size_voxel=(size,) * 3, spacing_mm=options.spacing_mm)
        shown = volume.array[0] if kind == "CT" else label

        def at(axis: int, mm: float, shown: np.ndarray = shown) -> np.ndarray:
            return np.take(shown, int(np.clip(mm / options.spacing_mm + size / 2, 0, size - 1)), axis=axis)

        planes = (at(2, 70), at(2, 40), at(2, -62), at(2, -128), at(1, -8), at(0, 0))
        for axis, plane, title in zip(line, planes, columns, strict=True):
            style = {"cmap": "tab20", "vmin": 0, "vmax": 19, "interpolation": "nearest"}
            if kind == "CT":
                low, high = (-1050, 150) if "lung" in title else (-180, 280)
                style = {"cmap": "gray", "vmin": low, "vmax": high}
            else:
                plane = np.ma.masked_equal(plane, 0)
                axis.set_facecolor("black")
            axis.imshow(plane.T[::-1, ::-1], **style)  # the patient's right, or front, is on the left
            axis.set_xticks([])
            axis.set_yticks([])
            if (seed, kind) == rows[0]:
                axis.set_title(title, fontsize=9)
        line[0].set_ylabel(f"seed {seed}, {kind}", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=plt.get_cmap("tab20")(v / 19)) for v in LABELS.values()]
    figure.legend(handles, LABELS, ncol=len(LABELS), loc="lower center", fontsize=7, frameon=False)
    figure.tight_layout(pad=0.4, rect=(0, 0.02, 1, 1))
    figure.savefig(options.out, dpi=90)


if __name__ == "__main__":
    main()
