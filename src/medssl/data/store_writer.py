"""The writer of a store's cases and index, whole or not at all; `medssl.data.store` reads them."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Int, Int32, Shaped

from medssl.data.atomic import whole_folder, write_text
from medssl.data.checksums import checksum, sealed, sealed_line
from medssl.data.resampling import halve
from medssl.data.store import CONTEXT, Record
from medssl.data.volume import Box, Volume

CHUNK_VOXEL = 32
COARSEST_VOXEL = 96
"""Levels end once the longest side is at most this long, so that the coarsest one has about 64 voxels."""


def write_case(
    root: Path,
    *,
    case: str,
    volume: Volume,
    label: Int[np.ndarray, "x y z"] | None,
    modality: str | Sequence[str],
    group: str,
    split: str,
    statistics: Sequence[dict[str, float]],
    body: Box,
    points: Int32[np.ndarray, "point 4"],
    voxel_hash: str,
    source: str,
    modality_from: str = "source",
    padding: Sequence[Sequence[tuple[float, float]]] = (),
    doubts: Sequence[str] = (),
    left_out: Sequence[tuple[str, str]] = (),
    targets: Mapping[str, float] | None = None,
    fingerprint: str = "",
    checksums: bool = False,
) -> Record:
    """Write one case and return its record; it appears only when it is whole. Equal input gives equal bytes.

    The folder is named by the case and a hash of all that is stored in it. A case that is made again from other files
    thus never replaces the folder that another process may be reading.

    Args:
        root: Folder of the store.
        case: Name of the case, unique and safe as a file name.
        volume: Canonical RAS voxels. They are stored as int16: exactly where they are integers in its range, else
            linearly quantised.
        label: Label map on the same grid, kept at full resolution only.
        modality: Modality of each channel, or one of all.
        group: Cohort of the case.
        split: "train", "validation" or "test", or "" where the source does not say.
        statistics: Intensity statistics of the whole volume without its padding, one dict per channel.
        body: Box of the body, in voxel faces.
        points: Rows of x, y, z (voxels) and value: -1 for a body voxel, else the label there.
        voxel_hash: Hash of the canonical voxels as read.
        source: Place that the case came from.
        modality_from: Who stated the modality: "setting", "source", "header", or "voxels" for a guess.
        padding: Values of each channel that stood for "no voxel here", with their shares.
        doubts: Sentences on what a person should look at.
        left_out: Files beside the image that were passed over, with the reason.
        targets: Known numbers of the subject, by name.
        fingerprint: Hash of the files that the case was made from.
        checksums: Whether every chunk of the arrays carries a checksum that reading verifies.
    """
    stored, slope, intercept = _to_int16(volume.array, statistics)
    factors = _level_factors(volume.shape, volume.spacing_mm)
    record = Record(
        case=case,
        folder="",
        shape=volume.shape,
        channels=volume.num_channels,
        affine=tuple(tuple(float(x) for x in row) for row in volume.affine),
        spacing_mm=volume.spacing_mm,
        modality=(modality,) * volume.num_channels if isinstance(modality, str) else tuple(modality),
        modality_from=modality_from,
        group=group,
        split=split,
        statistics=tuple(statistics),
        padding=tuple(map(tuple, padding)) or ((),) * volume.num_channels,
        doubts=(*doubts, *_clipped(statistics, slope, intercept)),
        body_lower=tuple(map(float, body.lower)),  # type: ignore[arg-type]
        body_upper=tuple(map(float, body.upper)),  # type: ignore[arg-type]
        voxel_hash=voxel_hash,
        source=source,
        slope=slope,
        intercept=intercept,
        level_factors=factors,
        labels=() if label is None else tuple(int(v) for v in np.unique(label) if v != 0),
        left_out=tuple(map(tuple, left_out)),  # type: ignore[arg-type]
        targets=tuple((targets or {}).items()),
        fingerprint=fingerprint,
        series=volume.series,
    )
    labels = None if label is None else label.astype(np.uint8 if label.max() < 256 else np.int32)[None]
    record = replace(record, folder=f"{case}-{_content_hash(record, stored, labels, points)}.zarr")
    with whole_folder(root / record.folder) as partial:
        level = stored
        for number, factor in enumerate(factors):
            if number:
                step = tuple(a != b for a, b in zip(factor, factors[number - 1], strict=True))
                level = np.clip(np.rint(halve(level.astype(np.float32), axes=step)), -32768, 32767).astype(np.int16)
            _write_array(partial / str(number), level, checksums=checksums)
        _write_array(partial / "points", points, chunk=points.shape, checksums=True)
        if labels is not None:
            _write_array(partial / "labels" / "segmentation" / "0", labels, checksums=checksums)
            _write_group(partial / "labels", {"ome": {"version": "0.5", "labels": ["segmentation"]}})
            _write_group(
                partial / "labels" / "segmentation",
                {
                    "ome": {
                        "image-label": {"source": {"image": "../../"}},
                        **_multiscales(volume.spacing_mm, factors[:1]),
                    }
                },
            )
        record = replace(record, metadata=_metadata(partial))
        ome = _multiscales(volume.spacing_mm, factors)
        _write_group(partial, sealed({"ome": ome, "medssl": record.to_json()}))
    return record


def _content_hash(record: Record, *arrays: Shaped[np.ndarray, "..."] | None) -> str:
    """Return eight hexadecimal digits that stand for a record and the arrays that are stored with it."""
    digest = hashlib.sha256(json.dumps(record.to_json(), sort_keys=True).encode())
    for array in arrays:
        if array is not None:
            digest.update(f"{array.shape} {array.dtype.str}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:8]


def _metadata(folder: Path) -> tuple[tuple[str, str], ...]:
    """Return path and checksum of the description of each array below a folder, sorted."""
    found = (path for path in folder.rglob("zarr.json") if (path.parent / "c").is_dir())
    return tuple(sorted((str(path.parent.relative_to(folder)), checksum(path.read_bytes())) for path in found))


def write_index(root: Path, records: Sequence[Record]) -> None:
    """Write `index.jsonl`, sorted by case, all or nothing."""
    lines = (f"{sealed_line(record.to_json())}\n" for record in sorted(records, key=lambda r: r.case))
    write_text(root / "index.jsonl", "".join(lines))


def _to_int16(
    array: Shaped[np.ndarray, "channel x y z"], statistics: Sequence[dict[str, float]]
) -> tuple[Shaped[np.ndarray, "channel x y z"], tuple[float, ...], tuple[float, ...]]:
    """Return stored integers, slope and intercept of each channel: exact for whole numbers in at most 65,536 values.

    Other values are quantised linearly. Values beyond eight times the central range (0.5 to 99.5 %) are clipped,
    because a single hot voxel would cost the resolution of all others.
    """
    stored, scales = np.empty(array.shape, np.int16), []
    for number, (channel, kept) in enumerate(zip(array, statistics, strict=True)):
        low, high = float(channel.min()), float(channel.max())
        whole = channel.dtype.kind in "iu" or bool(np.all(channel == np.rint(channel)))
        if whole and low >= -32768 and high <= 32767:
            slope, intercept = 1.0, 0.0
        elif whole and high - low <= 65535:
            slope, intercept = 1.0, low + 32768
        else:
            bulk, spread = (kept["p0_5"], kept["p99_5"]), kept["p99_5"] - kept["p0_5"]
            if spread > 0:
                low, high = max(low, bulk[0] - 8 * spread), min(high, bulk[1] + 8 * spread)
            slope = (high - low) / 65535
            intercept = low + 32768 * slope
        for plane, out in zip(channel, stored[number], strict=True):  # plane by plane: no wide copy of the volume
            out[:] = np.clip(np.rint((plane.astype(np.float64) - intercept) / slope), -32768, 32767)
        scales.append((slope, intercept))
    return stored, tuple(slope for slope, _ in scales), tuple(intercept for _, intercept in scales)


def _clipped(
    statistics: Sequence[dict[str, float]], slope: Sequence[float], intercept: Sequence[float]
) -> Iterator[str]:
    """Yield, for each channel with values beyond those that its integers can mean, what became of them."""
    for number, (kept, step, shift) in enumerate(zip(statistics, slope, intercept, strict=True)):
        low, high = shift - 32768 * step, shift + 32767 * step
        if kept["minimum"] < low - step or kept["maximum"] > high + step:
            where = f"channel {number}: " if len(statistics) > 1 else ""
            span = f"{kept['minimum']:.6g} to {kept['maximum']:.6g}"
            yield f"{where}values of {span} are stored as {low:.6g} to {high:.6g}, so that the others keep their steps"


def _level_factors(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[tuple[int, int, int], ...]:
    factors = [np.ones(3, dtype=int)]
    while True:
        sides = -(-np.array(shape) // factors[-1])
        spacing = np.array(spacing_mm) * factors[-1]
        halved = (spacing <= 1.5 * spacing.min()) & (sides > 1)
        if sides.max() <= COARSEST_VOXEL or not halved.any():
            return tuple(tuple(int(x) for x in factor) for factor in factors)  # type: ignore[misc]
        factors.append(factors[-1] * np.where(halved, 2, 1))


def _write_array(
    path: Path, array: Shaped[np.ndarray, "..."], *, chunk: Sequence[int] | None = None, checksums: bool
) -> None:
    inner = [max(1, n) for n in chunk] if chunk else [array.shape[0], *[CHUNK_VOXEL] * 3]
    shard = [max(1, -(-n // c)) * c for n, c in zip(array.shape, inner, strict=True)]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": inner, "codecs": _chunk_codecs(array.dtype, checksums=checksums), "index_codecs": index}
    metadata = {
        "shape": list(array.shape),
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["c", "x", "y", "z"] if array.ndim == 4 else ["point", "column"],
    }
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,  # every chunk exists, so that a lost one is seen
    }
    tensorstore.open(spec, context=CONTEXT, create=True).result().write(array).result()


def _chunk_codecs(dtype: np.dtype[Any], *, checksums: bool) -> list[dict[str, Any]]:
    """Return the codecs of a chunk, in the order of writing."""
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": dtype.itemsize, "blocksize": 0}
    little = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    return [little, {"name": "blosc", "configuration": blosc}, *([{"name": "crc32c"}] if checksums else [])]


def _write_group(path: Path, attributes: dict[str, Any]) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(group, indent=1, sort_keys=True), encoding="utf-8")


def _multiscales(spacing_mm: Sequence[float], factors: Sequence[Sequence[int]]) -> dict[str, Any]:
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "millimeter"} for n in "xyz")]
    datasets = []
    for number, factor in enumerate(factors):
        scale = [1.0, *(s * f for s, f in zip(spacing_mm, factor, strict=True))]
        shift = [0.0, *(s * (f - 1) / 2 for s, f in zip(spacing_mm, factor, strict=True))]
        transformations = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets, "name": "volume"}]}
