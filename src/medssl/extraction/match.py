"""The matching of two scans: read and embed them, print and draw the places of points of one in the other."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64

from medssl.data.geometry import apply
from medssl.data.matching import extent_text
from medssl.data.measurements import measure
from medssl.data.store import Record
from medssl.data.volume import find_body
from medssl.extraction.embedder import Embedder
from medssl.extraction.embedding import VolumeEmbedding, contains, match_points
from medssl.extraction.settings import MatchSettings
from medssl.inference.device import find_device
from medssl.inference.files import ImageFile, read_image
from medssl.inference.record import record_from

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLANES = ("sagittal", "coronal", "axial")
WINDOW_HU = (-200.0, 300.0)
GRID_SHARES = (0.3, 0.5, 0.7), (0.5,), (0.75, 0.5, 0.25)
"""Shares of the body box along x, y and z."""


@dataclass(frozen=True)
class MatchedScan:
    """A scan to match: the file as it was read, its record, its embedding."""

    file: ImageFile
    record: Record
    embedding: VolumeEmbedding

    def voxel_of_file(self, point_mm: Float[np.ndarray, "3"]) -> list[int]:
        """Return the nearest voxel to a point, as the file counts them."""
        x, y, z = np.rint(apply(np.linalg.inv(self.file.affine), point_mm)).astype(int).tolist()
        return [x, y, z]


def match_scans(settings: MatchSettings) -> None:
    """Match the points, print a line per point, and write the picture.

    Raises:
        ValueError: A file or the weights are wrong, or a point lies outside of its scan.
    """
    points_mm = settings.points_mm
    embedder = Embedder.load(
        settings.weights,
        layout=settings.layout,
        device=find_device(settings.device),
        tile_voxel=settings.tile_voxel,
        allow_modules=settings.allow_modules,
    )
    query_file, query_record = _read(settings.query, settings, embedder)
    if points_mm is None:
        points_mm = grid_points(query_file, query_record)
    inside = contains(query_record, points_mm)
    if not inside.all():
        outside = _text(points_mm[~inside][0])
        raise ValueError(f"point_mm={outside} lies outside of {settings.query}, {extent_text(query_record)}")
    start = time.monotonic()
    query = MatchedScan(query_file, query_record, embedder.of_array(query_file.volume.array, query_record))
    reference_file, reference_record = _read(settings.reference, settings, embedder)
    found = embedder.of_array(reference_file.volume.array, reference_record)
    reference = MatchedScan(reference_file, reference_record, found)
    matches_mm, scores = match_points(query.embedding, points_mm, reference.embedding)
    seconds = time.monotonic() - start
    for point_mm, match_mm, score in zip(points_mm, matches_mm, scores, strict=True):
        voxel = reference.voxel_of_file(match_mm)
        print(f"{_text(point_mm)} mm -> {_text(match_mm)} mm, voxel {voxel}, score {score:.3f}")
    match_figure(query, reference, points_mm, matches_mm, scores).savefig(settings.output, dpi=100)
    number = f"{len(points_mm)} point{'s' * (len(points_mm) != 1)}"
    print(f"{number} of {settings.query} in {settings.reference}, {seconds:.1f} s -> {settings.output}")
    print(
        "scores compare places under this network alone; they are no probabilities, nor comparable with 0.7 of others"
    )


def grid_points(file: ImageFile, record: Record) -> Float64[np.ndarray, "n 3"]:
    """Return nine points (RAS mm) over the middle coronal plane of the body, from the upper left of a picture on."""
    box, _, _ = find_body(file.volume, modality=record.modality[0])
    x, y, z = GRID_SHARES
    shares = np.array([(a, b, c) for c in z for b in y for a in x])
    voxels = np.rint(box.to_volume(shares))
    return apply(record.volume_to_mm, voxels)


def match_figure(
    query: MatchedScan,
    reference: MatchedScan,
    points_mm: Float[np.ndarray, "n 3"],
    matches_mm: Float[np.ndarray, "n 3"],
    scores: Float[np.ndarray, " n"],
) -> "Figure":
    """Return a figure with a row per point: three planes of the query through it, three of the reference at its match.

    Anterior and superior point up, the patient's left is on the left as arrays run.
    """
    from matplotlib.figure import Figure

    height = 2.8 * len(points_mm)
    figure = Figure(figsize=(15, height))
    axes = figure.subplots(len(points_mm), 6, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.2 / height, top=1 - 0.5 / height, wspace=0.05, hspace=0.25)
    for row, (point, match, score) in enumerate(zip(points_mm, matches_mm, scores, strict=True)):
        for scan, place, first in ((query, point, 0), (reference, match, 3)):
            for axis, panel in enumerate(axes[row, first : first + 3]):
                _draw_slice(panel, scan, place, axis)
                panel.set_title(PLANES[axis] if axis else f"{scan.file.path.name}\n{_text(place)} mm", fontsize=8)
        axes[row, 5].set_title(f"{PLANES[2]}\nscore {score:.3f}", fontsize=8)
    return figure


def _draw_slice(panel: "Axes", scan: MatchedScan, point_mm: Float[np.ndarray, "3"], axis: int) -> None:
    record = scan.record
    place = apply(record.mm_to_volume, point_mm)
    number = int(np.clip(np.rint(place[axis]), 0, record.shape[axis] - 1))
    values = scan.file.volume.array[0].take(number, axis=axis).astype(np.float32)
    a, b = (other for other in range(3) if other != axis)
    kept = record.statistics[0]
    low, high = WINDOW_HU if record.modality[0] == "ct" else (kept["p0_5"], kept["p99_5"])
    aspect = record.spacing_mm[b] / record.spacing_mm[a]
    panel.imshow(np.flipud(values.T), cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    panel.plot(place[a], record.shape[b] - 1 - place[b], "+", color="red", markersize=14, markeredgewidth=1.5)


def _read(source: Path, settings: MatchSettings, embedder: Embedder) -> tuple[ImageFile, Record]:
    channels = embedder.reading.channels if settings.channels is None else settings.channels
    file = read_image(source, channels=channels, assume_spacing_mm=settings.assume_spacing_mm)
    try:
        measured = measure(file.volume, setting=settings.modality, chosen=channels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return replace(file, volume=measured.volume), record_from(measured, source.name)


def _text(point_mm: Float[np.ndarray, "3"]) -> str:
    return f"[{', '.join(f'{value:.1f}' for value in point_mm)}]"
