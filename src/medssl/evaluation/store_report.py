"""The report of a prepared store: what its cases are like, which are odd, and a page with slices and histograms."""

import base64
import html
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from medssl.data.atomic import write_text
from medssl.data.measurements import VOXELS
from medssl.data.padding import shown
from medssl.data.store import Record, VolumeStore
from medssl.evaluation.report import html_page, html_table

REPORT = "report.html"
TITLE = "Prepared cases"
MOST_PICTURES = 300
"""Cases up to which the page shows slices and histograms."""
MOST_LISTED = 20
RARE = 0.2
"""Share of cases up to which a modality that is judged by the values is named as odd."""
FAR = 3.0
"""Factor to the median of the other cases from which a spacing, a size, or a range in HU is odd."""
FAR_WITHOUT_UNIT = 30.0
"""That of a range whose unit is arbitrary: MR of one scanner may be eight bits in one case and twelve in the next."""
WINDOW_HU = (-200.0, 300.0)
SIDE_PIXEL, BINS = 150, 60


@dataclass(frozen=True)
class Overview:
    """The tables of a store: their first rows are headings.

    Args:
        summary: One row per modality.
        odd: One row per case that a person should look at, with the reasons.
        cases: One row per case.
    """

    summary: list[list[str]]
    odd: list[list[str]]
    cases: list[list[str]]

    def __str__(self) -> str:
        lines = _aligned(self.summary)
        odd = self.odd[1:]
        if odd:
            lines.append(f"to look at: {len(odd)} of {len(self.cases) - 1} cases")
            lines += [f"  {case}: {reasons}" for case, reasons in odd[:MOST_LISTED]]
            lines += [f"  ... and {len(odd) - MOST_LISTED} more"] if len(odd) > MOST_LISTED else []
        return "\n".join(lines)


def overview(records: Sequence[Record]) -> Overview:
    """Return the tables of the cases of a store."""
    by_modality: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_modality["+".join(record.modality)].append(record)
    summary = [["modality", "cases", "range (0.5 to 99.5 %)", "spacing (mm)", "size (voxels)"]]
    summary += [[name, str(len(found)), *_middle(found)] for name, found in sorted(by_modality.items())]
    reasons = {record.case: list(_reasons(record)) for record in records}
    for record, twin in _split_series(records):
        reasons[record.case].append(f"of one DICOM series with {twin.case}: is one scan in two folders?")
    for name, found in by_modality.items():
        for record, words in zip(found, _outliers(found), strict=True):
            reasons[record.case] += words
            if record.modality_from == VOXELS and "unknown" not in name and len(found) <= RARE * len(records):
                reasons[record.case].append(f"{name} by its values, which {len(records) - len(found)} others are not")
    odd = [["case", "reasons"], *([case, "; ".join(words)] for case, words in reasons.items() if words)]
    cases = [["case", "modality", "stated by", "range", "spacing (mm)", "size (voxels)", "body", "padding"]]
    return Overview(summary, odd, [*cases, *map(_row, records)])


def write_report(store: VolumeStore, tables: Overview) -> Path:
    """Write `report.html` into the store and return its path; equal stores give equal bytes.

    It holds slices and histograms of up to 300 cases, and loads nothing.
    """
    lines = [f"<p>{len(store)} cases.</p>", html_table(tables.summary)]
    if tables.odd[1:]:
        lines += ["<h2>To look at</h2>", html_table(tables.odd)]
    lines += ["<h2>Cases</h2>", html_table(tables.cases)]
    if len(store) <= MOST_PICTURES:
        lines.append("<h2>Slices</h2>")
        lines.append("<p>Axial, coronal and sagittal slice through the middle, and the histogram, of each channel.</p>")
        lines += [_pictures(store, number) for number in range(len(store))]
    path = store.root / REPORT
    write_text(path, html_page(TITLE, lines))
    return path


def _reasons(record: Record) -> Iterator[str]:
    """Yield why a case is odd in itself."""
    yield from record.doubts
    if "unknown" in record.modality and not record.doubts:
        yield "stated as of unknown modality"
    if padding := shown(record.padding):
        yield f"padding {padding} left out"


def _split_series(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Yield each case of a DICOM series that another case was read from before, with that case."""
    first: dict[str, Record] = {}
    for record in records:
        if record.series and (twin := first.setdefault(record.series, record)) is not record:
            yield record, twin


def _outliers(records: Sequence[Record]) -> list[list[str]]:
    """Return, for each case of one modality, what lies far from the others."""
    found: list[list[str]] = [[] for _ in records]
    spread = [[max(kept["p99_5"] - kept["p0_5"], 1e-12) for kept in record.statistics] for record in records]
    in_hu = all(word == "ct" for record in records for word in record.modality)
    for what, far, values in (
        ("spacing", FAR, np.array([record.spacing_mm for record in records])),
        ("size", FAR, np.array([record.shape for record in records], dtype=float)),
        ("range", FAR if in_hu else FAR_WITHOUT_UNIT, np.array(spread)),
    ):
        logs = np.log(values)
        away = np.abs(logs - np.median(logs, axis=0))
        limit = np.maximum(np.log(far), 4 * np.median(away, axis=0))
        middle = " x ".join(f"{value:.3g}" for value in np.median(values, axis=0))
        for number in np.flatnonzero((away > limit).any(axis=1)):
            own = " x ".join(f"{value:.3g}" for value in values[number])
            found[number].append(f"{what} {own}, that of the others is about {middle}")
    return found


def _middle(records: Sequence[Record]) -> list[str]:
    """Return median range, spacing and size of some cases, the last two with their extremes."""
    ends = [
        [np.median([record.statistics[channel][key] for record in records]) for key in ("p0_5", "p99_5")]
        for channel in range(records[0].channels)
    ]
    columns = ["; ".join(f"{low:.4g} to {high:.4g}" for low, high in ends)]
    for values in (
        np.array([record.spacing_mm for record in records]),
        np.array([record.shape for record in records], dtype=float),
    ):
        middle = " x ".join(f"{value:.3g}" for value in np.median(values, axis=0))
        few = values.min() == values.max() or bool((values == values[0]).all())
        columns.append(middle if few else f"{middle} ({values.min():.3g} to {values.max():.3g})")
    return columns


def _row(record: Record) -> list[str]:
    body = np.prod(record.body.size) / np.prod(record.shape)
    return [
        record.case,
        "+".join(record.modality),
        record.modality_from,
        "; ".join(f"{kept['minimum']:.4g} to {kept['maximum']:.4g}" for kept in record.statistics),
        " x ".join(f"{side:.3g}" for side in record.spacing_mm),
        " x ".join(map(str, record.shape)),
        f"{100 * body:.0f} %",
        shown(record.padding) or "–",
    ]


def _pictures(store: VolumeStore, number: int) -> str:
    """Return three slices and the histogram of each channel of a case, read from its coarsest level."""
    record = store.record(number)
    factor = np.array(record.level_factors[-1])
    sides = -(-np.array(record.shape) // factor)
    stored = store.read(number, len(record.level_factors) - 1, [0, 0, 0], sides.tolist()).result()
    figures = []
    for channel, values in enumerate(record.values(stored)):
        which = "" if record.channels == 1 else f", channel {channel} ({record.modality[channel]})"
        caption = f"<figcaption>{html.escape(record.case + which)}</figcaption>"
        figures.append(f"<figure>{caption}{_row_of(record, channel, values)}</figure>")
    return "".join(figures)


def _row_of(record: Record, channel: int, values: Float[np.ndarray, "x y z"]) -> str:
    kept = record.statistics[channel]
    low, high = WINDOW_HU if record.modality[channel] == "ct" else (kept["p0_5"], kept["p99_5"])
    grey = (255 * ((values - low) / max(high - low, 1e-12)).clip(0, 1)).astype(np.uint8)
    extent_mm = np.array(record.shape) * record.spacing_mm
    parts = []
    for axis in (2, 1, 0):
        width, height = (SIDE_PIXEL * extent_mm[other] / extent_mm.max() for other in range(3) if other != axis)
        shown_plane = np.flipud(grey.take(grey.shape[axis] // 2, axis=axis).T)
        source = base64.b64encode(_png(shown_plane)).decode()
        size = f'width="{max(1, round(width))}" height="{max(1, round(height))}"'
        parts.append(f'<img alt="" {size} src="data:image/png;base64,{source}">')
    parts.append(_histogram(values.reshape(-1), kept["p0_5"], kept["p99_5"]))
    return "".join(parts)


def _histogram(values: Float[np.ndarray, " n"], low: float, high: float) -> str:
    """Return a histogram as an SVG picture; the counts are drawn as square roots, so that few voxels are seen too."""
    counts, edges = np.histogram(values, bins=BINS, range=(low, high) if high > low else None)
    heights = 100 * np.sqrt(counts / max(counts.max(), 1))
    bars = "".join(f"M{number} 100v{-height:.1f}h1V100z" for number, height in enumerate(heights) if height)
    label = html.escape(f"{edges[0]:.4g} to {edges[-1]:.4g}")
    return (
        f'<svg class="histogram" viewBox="0 0 {BINS} 100" preserveAspectRatio="none"><title>{label}</title>'
        f'<path d="{bars}"/></svg>'
    )


def _png(grey: UInt8[np.ndarray, "row column"]) -> bytes:
    """Return a grey picture as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows, columns = grey.shape
    lines = b"".join(b"\x00" + row.tobytes() for row in grey)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 6)) + chunk(b"IEND", b"")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
