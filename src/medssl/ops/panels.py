"""Figures that show volumes: orthogonal slices, matched points and matched keypoints."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def orthogonal_slices(volumes: Mapping[str, Float[Tensor, "x y z"]], *, title: str = "") -> "Figure":
    """Draw one column for each volume, with its sagittal, coronal and axial middle slice as rows; NaN is blue.

    The grey scale is that of the first volume, shared by all. Anterior and superior point up.
    """
    from matplotlib.figure import Figure

    arrays = {name: volume.detach().float().cpu() for name, volume in volumes.items()}
    first = next(iter(arrays.values()))
    low, high = first.min().item(), first.max().item()
    figure = Figure(figsize=(2.4 * len(arrays), 7.6), layout="constrained")
    axes = figure.subplots(3, len(arrays), squeeze=False)
    for column, (name, volume) in enumerate(arrays.items()):
        axes[0, column].set_title(name)
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            panel = axes[axis, column]
            panel.set_facecolor("steelblue")
            middle = volume.select(axis, volume.shape[axis] // 2)
            picture = torch.flip(middle.T, dims=[0]).numpy()  # second axis of the slice upwards
            panel.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            if column == 0:
                panel.set_ylabel(plane)
    figure.suptitle(title)
    return figure


def heat_maps(
    tables: Mapping[str, Float[Tensor, "row column"]], *, title: str = "", limits: tuple[float, float]
) -> "Figure":
    """Draw tables beside each other, with one colour scale from `limits`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(tables) + 0.8, 4.6), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, (name, table) in zip(axes, tables.items(), strict=True):
        shown = panel.imshow(
            table.detach().float().cpu().numpy(), vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="auto"
        )
        panel.set(xticks=[], yticks=[], title=name)
    figure.colorbar(shown, ax=list(axes))
    figure.suptitle(title)
    return figure


class PointMatch(NamedTuple):
    """A point of one volume and its place in another, in voxels of the volumes.

    `similarity` lies on the coarser grid of the other volume. It is largest at `found`; the true place is `truth`.
    """

    similarity: Float[Tensor, "i j k"]
    query: tuple[float, ...]
    found: tuple[float, ...]
    truth: tuple[float, ...]
    error_mm: float


def point_matches(
    first: Float[Tensor, "x y z"], second: Float[Tensor, "x y z"], matches: Sequence[PointMatch], *, title: str = ""
) -> "Figure":
    """Draw one row for each match: the axial slice of the point, that of its match, and the similarity there.

    Anterior points up. The cross marks the searched or found point. The ring marks the truth in the slice of the match.
    """
    from matplotlib.figure import Figure

    volumes = [volume.detach().float().cpu() for volume in (first, second)]
    low, high = torch.cat([volume.flatten() for volume in volumes]).aminmax()
    figure = Figure(figsize=(7.6, 2.6 * len(matches)), layout="constrained")
    axes = figure.subplots(len(matches), 3, squeeze=False)
    for name, panel in zip(("point", "match (x), truth (o)", "similarity"), axes[0], strict=True):
        panel.set_title(name)
    for row, match in zip(axes, matches, strict=True):
        similarity = match.similarity.detach().float().cpu()
        level = min(int((match.found[2] + 0.5) * similarity.shape[2] / second.shape[2]), similarity.shape[2] - 1)
        for panel, volume, place in zip(row, (*volumes, None), (match.query, match.found, match.found), strict=True):
            x, y = (volumes[0] if panel is row[0] else volumes[1]).shape[:2]
            shown = similarity[..., level] if volume is None else volume[..., round(place[2])]
            style = {"cmap": "viridis"} if volume is None else {"cmap": "gray", "vmin": float(low), "vmax": float(high)}
            extent = (-0.5, x - 0.5, -0.5, y - 0.5)
            panel.imshow(shown.T.numpy(), origin="lower", extent=extent, interpolation="nearest", **style)
            panel.plot(*place[:2], "x", color="orange", markersize=9)
            if panel is not row[0]:
                panel.plot(*match.truth[:2], "o", color="deepskyblue", markersize=9, fillstyle="none")
            panel.set(xticks=[], yticks=[], xlim=extent[:2], ylim=extent[2:])
        row[1].set_xlabel(f"{match.error_mm:.1f} mm off")
    figure.suptitle(title)
    return figure


class MatchedPoints(NamedTuple):
    """Keypoints of two volumes in voxels, and pairs (number in the first volume, number in the second)."""

    first: Float[Tensor, "n 3"]
    second: Float[Tensor, "m 3"]
    first_valid: Bool[Tensor, " n"]
    second_valid: Bool[Tensor, " m"]
    found: set[tuple[int, int]]
    true: set[tuple[int, int]]


def matched_points(
    first: Float[Tensor, "x y z"], second: Float[Tensor, "x y z"], points: MatchedPoints, *, title: str = ""
) -> "Figure":
    """Draw the front views of both volumes side by side, as maximum projections, with keypoints and pairs.

    Green lines join right pairs, red lines wrong ones, thin grey lines true pairs that were not found. Superior is up,
    and the subject's left is on the left of the picture.
    """
    from matplotlib.figure import Figure

    projected = [volume.detach().float().cpu().amax(1) for volume in (first, second)]  # (x z)
    low, high = torch.cat([picture.flatten() for picture in projected]).aminmax()
    beside = torch.cat([torch.nn.functional.pad(projected[0], (0, 0, 0, 2), value=float(low)), projected[1]])
    figure = Figure(figsize=(9.0, 9.0 * beside.shape[1] / beside.shape[0] + 0.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(beside.T.numpy(), origin="lower", cmap="gray", vmin=float(low), vmax=float(high))
    offset = projected[0].shape[0] + 2
    for place, valid, shift in ((points.first, points.first_valid, 0), (points.second, points.second_valid, offset)):
        axes.plot(place[valid, 0].numpy() + shift, place[valid, 2].numpy(), ".", color="gold", markersize=4)
    right = points.found & points.true
    for pairs, color, width in (
        (points.true - right, "lightgrey", 0.3),
        (points.found - right, "tomato", 0.6),
        (right, "limegreen", 0.6),
    ):
        for i, j in sorted(pairs):
            (x, _, z), (x2, _, z2) = points.first[i].tolist(), points.second[j].tolist()
            axes.plot([x, x2 + offset], [z, z2], "-", color=color, linewidth=width, alpha=0.7)
    label = f"{len(right)} of {len(points.found)} found pairs are right, "
    label += f"{len(right)} of {len(points.true)} true pairs found"
    axes.set(xticks=[], yticks=[], xlabel=label)
    figure.suptitle(title)
    return figure
