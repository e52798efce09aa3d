"""The report on a registered store for a person: the failed cases, and a picture of the worst ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from medssl.data.atomic import whole_file
from medssl.data.geometry import apply
from medssl.data.store import VolumeStore
from medssl.tables.derived import Table, table_of
from medssl.tables.references import Reference, coarse_case
from medssl.tables.registration import Coarse, resampled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from medssl.tables.locations import AnatomicalLocations

PICTURE = "locations.png"
NUM_LISTED = 50
NUM_EXAMPLES = 5
NUM_ROWS = 5
"""Number of subjects in the picture, below the reference."""


def closing_message(derivation: "AnatomicalLocations", tables: dict[str, Table], reference: Reference) -> str:
    """Return text on the reference, the cases that failed the check with the remedy, and cases of doubtful frame."""
    anchors = reference.anchors
    spacing = " x ".join(f"{s:g}" for s in dict.fromkeys(np.round(anchors.spacing_mm, 3).tolist()))
    lines = [
        f"reference {anchors.reference}: {len(anchors)} locations, patches of {anchors.patch_voxel} voxels of "
        f"{spacing} mm, registered at {reference.spacing_mm:.3g} mm"
    ]
    failed = {case: table for case, table in tables.items() if table["is_fallback"]}
    if failed:
        ratio = derivation.max_volume_ratio
        rule = f"more than {derivation.max_inverse_error_mm:g} mm off after the way back, or a volume ratio beyond "
        lines.append(f"{len(failed)} of {len(tables)} failed the check ({rule}{1 / ratio:.3g} to {ratio:g}):")
        used = {"body_box": "uses body_box instead", "none": "all its locations are invalid"}
        lines += _listed(
            [f"{case}: {table['problem']}; {used[str(table['provider'])]}" for case, table in failed.items()]
        )
    elif derivation.provider in ("reference_affine", "official_atlas"):
        lines.append(f"all {len(tables)} passed the check")
    boxed = [case for case, table in tables.items() if table["is_cut"] and str(table["provider"]) == "body_box"]
    if boxed:
        lines.append(
            f"the body reaches both the first and the last slice of {len(boxed)} that use body_box: what is cut off "
            "is not known there, so their locations along z correspond roughly at best:"
        )
        lines += _listed(boxed, NUM_EXAMPLES)
    unseen = [case for case, table in tables.items() if table["valid"].mean() < 0.5]
    if unseen:
        lines.append(f"{len(unseen)} show fewer than half of the locations:")
        lines += _listed([f"{case}: {tables[case]['valid'].mean():.0%}" for case in unseen], NUM_EXAMPLES)
    return "\n".join(lines)


def report(derivation: "AnatomicalLocations", store: VolumeStore, folder: Path, reference: Reference) -> str:
    """Return the closing message, and write the picture into `folder`."""
    tables = {record.case: table_of(store, derivation, n) for n, record in enumerate(store.records())}
    order = worst_first(list(tables.values()))
    chosen = [n for n in order if n != derivation.reference_case(store)][:NUM_ROWS]
    names = list(tables)
    shown = [(names[n], tables[names[n]], coarse_case(store, n, spacing_mm=reference.spacing_mm)) for n in chosen]
    with whole_file(folder / PICTURE) as partial:
        location_figure(reference, shown).savefig(partial, format="png", dpi=80)
    return f"{closing_message(derivation, tables, reference)}\npicture of the worst: {folder / PICTURE}"


def worst_first(tables: Sequence[Table]) -> list[int]:
    """Return numbers of the tables: the fallback first, then by falling inverse error, then by rising score."""

    def badness(number: int) -> tuple[bool, float, float]:
        error, score = (np.nan_to_num(float(tables[number][name])) for name in ("inverse_error_mm", "score"))
        return not tables[number]["is_fallback"], -error, score

    return sorted(range(len(tables)), key=badness)


def location_figure(reference: Reference, subjects: Sequence[tuple[str, Table, Coarse]]) -> "Figure":
    """Draw three planes through the middle of the reference, then of each subject that is moved onto it.

    The planes are sagittal, coronal and axial. Every row has the outline of the reference's body (or
    mask). Dots are the anchors within half a patch of the plane, filled where the subject shows the location.
    """
    from matplotlib.figure import Figure

    fixed = reference.coarse
    figure = Figure(figsize=(9, 3 * (1 + len(subjects))), layout="constrained")
    axes = figure.subplots(1 + len(subjects), 3, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    rows = [(f"reference {reference.anchors.reference}", fixed.values, np.ones(len(reference.anchors), dtype=bool))]
    for case, table, moving in subjects:
        title = f"{case}: {table['provider']}"
        if np.isfinite(table["inverse_error_mm"]):
            title += f", returns {float(table['inverse_error_mm']):.1f} mm off"
        rows.append((title, resampled(moving, fixed, table["reference_to_subject"]), table["valid"]))
    middle = np.rint(np.argwhere(fixed.mask).mean(axis=0)).astype(int)
    to_voxel = np.linalg.inv(fixed.affine)
    anchors = apply(to_voxel, reference.anchors.centre_mm)
    spacing = np.linalg.norm(fixed.affine[:3, :3], axis=0)
    for panels, (title, values, valid) in zip(axes, rows, strict=True):
        for axis, panel in enumerate(panels):
            near = np.abs(anchors[:, axis] - middle[axis]) * spacing[axis] <= reference.anchors.patch_mm[axis] / 2
            _draw(panel, fixed, values, anchors[near], valid[near], axis=axis, number=int(middle[axis]))
        panels[1].set_title(title, fontsize=9)
    return figure


def _draw(
    panel: "Axes",
    fixed: Coarse,
    values: Float32[np.ndarray, "x y z"],
    anchors: np.ndarray,
    valid: np.ndarray,
    *,
    axis: int,
    number: int,
) -> None:
    spacing = np.linalg.norm(fixed.affine[:3, :3], axis=0)
    a, b = (other for other in range(3) if other != axis)
    options = {"origin": "lower", "aspect": spacing[b] / spacing[a]}
    panel.imshow(values.take(number, axis=axis).T, cmap="gray", vmin=0, vmax=1, interpolation="nearest", **options)
    outline = fixed.mask.take(number, axis=axis).T.astype(float)
    if 0 < outline.mean() < 1:
        panel.contour(outline, levels=[0.5], colors="tab:red", linewidths=0.8)
    for kept, fill in ((valid, "tab:cyan"), (~valid, "none")):
        panel.scatter(anchors[kept, a], anchors[kept, b], s=9, facecolors=fill, edgecolors="tab:cyan", linewidths=0.6)


def _listed(rows: Sequence[str], limit: int = NUM_LISTED) -> list[str]:
    more = [f"  ... and {len(rows) - limit} more, see quality.csv"] if len(rows) > limit else []
    return [f"  {row}" for row in rows[:limit]] + more
