"""The volume store: one OME-Zarr multiscale group per case, an index, and derived tables.

Layout of a store: `store.json` (format and recipe), `index.jsonl` (one record a case, sorted), `<case>.zarr/` (arrays
`0`, `1`, ... of shape (channel, x, y, z) from fine to coarse; `labels/segmentation/0`; `points`),
`derived/<name>-<recipe hash>/<case>.npz`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float, Float32, Int, Int32, Shaped

from medssl.data.resampling import halve
from medssl.data.volume import Box, Volume

Corner = Sequence[int] | np.ndarray

FORMAT = 1
CHUNK_VOXEL = 32
COARSEST_VOXEL = 96
"""No further level is made once the longest side is at most this long, so that the coarsest is about 64 voxels."""

NEEDS = {
    "pairs": " weights=FILE",
    "embeddings": " weights=FILE",
    "heights": " file=FILE.csv",
    "external_keypoints": " file=FILE.csv",
}
"""What `medssl.derive` has to be told besides, by the name of the table."""

# No chunk cache: crops hardly ever share chunks, and the process must not come to hold whole volumes.
CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Record:
    """What the index knows of a case. `shape`, `spacing_mm`, `affine` are those of level 0, in (x, y, z), RAS.

    `statistics` has one dict a channel (of the whole volume, in file units); stored integers mean `slope * value +
    intercept`.
    `level_factors` are voxels of level 0 per voxel of each level; voxel i of a level lies at (i + 0.5) * factor - 0.5
    of level 0.
    """

    case: str
    shape: tuple[int, int, int]
    channels: int
    affine: tuple[tuple[float, ...], ...]
    spacing_mm: tuple[float, float, float]
    modality: str
    group: str
    split: str
    statistics: tuple[dict[str, float], ...]
    body_lower: tuple[float, float, float]
    body_upper: tuple[float, float, float]
    voxel_hash: str
    source: str
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    level_factors: tuple[tuple[int, int, int], ...]
    labels: tuple[int, ...]

    @cached_property
    def body(self) -> Box:
        """The body box, in voxel faces of level 0."""
        return Box(np.array(self.body_lower), np.array(self.body_upper))

    @cached_property
    def volume_to_mm(self) -> Float[np.ndarray, "4 4"]:
        """Voxel index of level 0 -> RAS millimetres."""
        return np.array(self.affine, dtype=np.float64)

    @cached_property
    def mm_to_volume(self) -> Float[np.ndarray, "4 4"]:
        """RAS millimetres -> voxel index of level 0."""
        return np.linalg.inv(self.volume_to_mm)

    def values(self, stored: Shaped[np.ndarray, " channel *box"]) -> Float32[np.ndarray, " channel *box"]:
        """Stored integers in file units."""
        shape = (-1, *[1] * (stored.ndim - 1))
        slope, intercept = (np.array(v, dtype=np.float32).reshape(shape) for v in (self.slope, self.intercept))
        return stored.astype(np.float32) * slope + intercept

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """The record that `to_json` wrote."""
        frozen: dict[str, Any] = {}
        for key, value in values.items():
            rows = value if isinstance(value, list) else None
            if rows and isinstance(rows[0], list):
                rows = [tuple(row) for row in rows]
            frozen[key] = value if rows is None else tuple(rows)
        return cls(**frozen)


def write_case(
    root: Path,
    *,
    case: str,
    volume: Volume,
    label: Int[np.ndarray, "x y z"] | None,
    modality: str,
    group: str,
    split: str,
    statistics: Sequence[dict[str, float]],
    body: Box,
    points: Int32[np.ndarray, "point 4"],
    voxel_hash: str,
    source: str,
) -> Record:
    """Write one case and return its record; it appears only when it is whole. Equal input gives equal bytes.

    Args:
        root: the store.
        case: file-name safe and unique.
        volume: canonical RAS voxels; stored as int16, exactly where they are integers in its range, else linearly
            quantised.
        label: on the same grid, kept at full resolution only.
        modality: "ct" or "mr".
        group: the cohort the case belongs to.
        split: "train", "validation", "test" or "" where the source does not say.
        statistics: of the whole volume, one dict a channel.
        body: box of the body, voxel faces.
        points: x, y, z (voxels) and value: -1 for a body voxel, else the label there.
        voxel_hash: of the canonical voxels as read.
        source: where the case came from.
    """
    stored, slope, intercept = _to_int16(volume.array, statistics)
    factors = _level_factors(volume.shape, volume.spacing_mm)
    record = Record(
        case=case,
        shape=volume.shape,
        channels=volume.num_channels,
        affine=tuple(tuple(float(x) for x in row) for row in volume.affine),
        spacing_mm=volume.spacing_mm,
        modality=modality,
        group=group,
        split=split,
        statistics=tuple(statistics),
        body_lower=tuple(map(float, body.lower)),  # type: ignore[arg-type]
        body_upper=tuple(map(float, body.upper)),  # type: ignore[arg-type]
        voxel_hash=voxel_hash,
        source=source,
        slope=slope,
        intercept=intercept,
        level_factors=factors,
        labels=() if label is None else tuple(int(v) for v in np.unique(label) if v != 0),
    )
    folder = root / f"{case}.zarr"
    partial = root / f".{case}.zarr.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    level = stored
    for number, factor in enumerate(factors):
        if number:
            step = tuple(a != b for a, b in zip(factor, factors[number - 1], strict=True))
            level = np.clip(np.rint(halve(level.astype(np.float32), axes=step)), -32768, 32767).astype(np.int16)
        _write_array(partial / str(number), level)
    _write_array(partial / "points", points, chunk=points.shape)
    if label is not None:
        labels = label.astype(np.uint8 if label.max() < 256 else np.int32)
        _write_array(partial / "labels" / "segmentation" / "0", labels[None])
        _write_group(partial / "labels", {"ome": {"version": "0.5", "labels": ["segmentation"]}})
        _write_group(
            partial / "labels" / "segmentation",
            {"ome": {"image-label": {"source": {"image": "../../"}}, **_multiscales(volume.spacing_mm, factors[:1])}},
        )
    _write_group(partial, {"ome": _multiscales(volume.spacing_mm, factors), "medssl": record.to_json()})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return record


def read_case_record(folder: Path) -> Record:
    """The record inside a finished case folder, or a ValueError that names the folder."""
    try:
        return Record.from_json(json.loads((folder / "zarr.json").read_text())["attributes"]["medssl"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a finished case of a medssl store ({error}); delete it and prepare again"
        ) from error


def write_index(root: Path, records: Sequence[Record]) -> None:
    """Write `index.jsonl`, sorted by case, all or nothing."""
    lines = "".join(
        json.dumps(record.to_json(), sort_keys=True) + "\n" for record in sorted(records, key=lambda r: r.case)
    )
    partial = root / f".index.jsonl.{os.getpid()}.partial"
    partial.write_text(lines)
    partial.replace(root / "index.jsonl")


class VolumeStore:
    """A prepared store, opened for reading: records by number, asynchronous partial reads, points, derived tables.

    Records are parsed when they are asked for, so that opening costs one pass over the index file.

    Raises:
        ValueError: `root` is not a store, or was not prepared to its end.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        index = self.root / "index.jsonl"
        if not index.is_file():
            state = (
                "is not finished" if (self.root / "store.json").is_file() else "is not a medssl store (no index.jsonl)"
            )
            raise ValueError(
                f"{self.root} {state}; run `python -m medssl.prepare data=... data.root=... store={self.root}`"
            )
        self.lines = index.read_bytes().splitlines()
        if not self.lines:
            raise ValueError(f"{self.root} holds no case; prepare it from readable images (see its rejected.jsonl)")
        self.record = lru_cache(maxsize=65536)(self._record)
        self.points = lru_cache(maxsize=1024)(self._points)
        self.derived = lru_cache(maxsize=1024)(self._derived)
        self.open = lru_cache(maxsize=4096)(self._open)

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.lines)

    def __getstate__(self) -> dict[str, Any]:
        """Only the path travels to another process."""
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the store again."""
        self.__init__(state["root"])  # type: ignore[misc]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """How the store was prepared."""
        return json.loads((self.root / "store.json").read_text())["recipe"]

    @cached_property
    def cohorts(self) -> list[tuple[str, str]]:
        """Group and split of every case, without parsing the records to their end."""
        rows = (json.loads(line) for line in self.lines)
        return [(row["group"], row["split"]) for row in rows]

    @cached_property
    def names(self) -> list[str]:
        """The name of every case, by its number."""
        return [json.loads(line)["case"] for line in self.lines]

    @cached_property
    def label_names(self) -> dict[int, str]:
        """What the label values mean, as far as the source knows; nothing in a store of an earlier version."""
        path = self.root / "labels.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        return {int(value): name for value, name in found.items()}

    def has_label(self, case: int) -> bool:
        """Whether the case has a label map (which may be empty)."""
        return bool(self.record(case).labels) or (self.root / f"{self.names[case]}.zarr" / "labels").is_dir()

    def records(self) -> Iterator[Record]:
        """All records, in order of their number."""
        return (self._record(number) for number in range(len(self)))

    def read(
        self, case: int, level: int, lower: Corner, upper: Corner
    ) -> "tensorstore.Future[Shaped[np.ndarray, 'channel x y z']]":
        """Start to read the voxels `lower <= i < upper` of one level; the future's result is a writable int16 array."""
        return self._box(self.open(case, str(level)), lower, upper).read()

    def read_label(
        self, case: int, lower: Corner, upper: Corner
    ) -> "tensorstore.Future[Shaped[np.ndarray, 'one x y z']]":
        """Start to read the label of a box of level 0; a ValueError where the case has none."""
        if not self.has_label(case):
            raise ValueError(
                f"case {self.record(case).case} of {self.root} has no label; prepare it from a labelled source"
            )
        return self._box(self.open(case, "labels/segmentation/0"), lower, upper).read()

    @staticmethod
    def _box(array: tensorstore.TensorStore, lower: Corner, upper: Corner) -> tensorstore.TensorStore:
        return array[:, lower[0] : upper[0], lower[1] : upper[1], lower[2] : upper[2]]

    def _record(self, case: int) -> Record:
        return Record.from_json(json.loads(self.lines[case]))

    def _open(self, case: int, array: str) -> tensorstore.TensorStore:
        path = self.root / f"{self.record(case).case}.zarr" / array
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "recheck_cached_metadata": "open",
            "fill_missing_data_reads": False,
        }
        try:
            return tensorstore.open(spec, context=CONTEXT, read=True).result()
        except ValueError as error:
            raise ValueError(f"case {self.record(case).case}: cannot open {path}: {error}") from error

    def _points(self, case: int) -> Int32[np.ndarray, "point 4"]:
        """Body voxels (value -1) and label voxels of a case: x, y, z, value."""
        return self._open(case, "points").read().result()

    def _derived(self, name: str, case: int) -> dict[str, np.ndarray]:
        with np.load(self.derived_file(name, case)) as table:
            return dict(table)

    def derived_file(self, name: str, case: int) -> Path:
        """The derived table `name` of a case, as `medssl.derive` made it; `derived` gives its arrays and keeps them."""
        pointer = self.root / "derived" / f"{name}.json"
        if not pointer.is_file():
            options = f"what={name}{NEEDS.get(name, '')} store={self.root}"
            raise ValueError(f"{self.root} has no derived data {name!r}; run `python -m medssl.derive {options}`")
        folder = self.root / "derived" / json.loads(pointer.read_text())["folder"]
        return folder / f"{self.record(case).case}.npz"


def _to_int16(
    array: Shaped[np.ndarray, "channel x y z"], statistics: Sequence[dict[str, float]]
) -> tuple[Shaped[np.ndarray, "channel x y z"], tuple[float, ...], tuple[float, ...]]:
    """Stored integers, slope and intercept of each channel: exact for whole numbers that span at most 65,536 values.

    All else is quantised linearly; values beyond eight times the central range (0.5 to 99.5 %) are clipped,
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


def _level_factors(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[tuple[int, int, int], ...]:
    factors = [np.ones(3, dtype=int)]
    while True:
        sides = -(-np.array(shape) // factors[-1])
        spacing = np.array(spacing_mm) * factors[-1]
        halved = (spacing <= 1.5 * spacing.min()) & (sides > 1)
        if sides.max() <= COARSEST_VOXEL or not halved.any():
            return tuple(tuple(int(x) for x in factor) for factor in factors)  # type: ignore[misc]
        factors.append(factors[-1] * np.where(halved, 2, 1))


def _write_array(path: Path, array: Shaped[np.ndarray, "..."], *, chunk: Sequence[int] | None = None) -> None:
    inner = [max(1, n) for n in chunk] if chunk else [array.shape[0], *[CHUNK_VOXEL] * 3]
    shard = [max(1, -(-n // c)) * c for n, c in zip(array.shape, inner, strict=True)]
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": array.dtype.itemsize, "blocksize": 0}
    little = {"name": "bytes", "configuration": {"endian": "little"}} if array.dtype.itemsize > 1 else {"name": "bytes"}
    compressed = [little, {"name": "blosc", "configuration": blosc}]
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": inner, "codecs": compressed, "index_codecs": index}
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


def _write_group(path: Path, attributes: dict[str, Any]) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(group, indent=1, sort_keys=True))


def _multiscales(spacing_mm: Sequence[float], factors: Sequence[Sequence[int]]) -> dict[str, Any]:
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "millimeter"} for n in "xyz")]
    datasets = []
    for number, factor in enumerate(factors):
        scale = [1.0, *(s * f for s, f in zip(spacing_mm, factor, strict=True))]
        shift = [0.0, *(s * (f - 1) / 2 for s, f in zip(spacing_mm, factor, strict=True))]
        transformations = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    return {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets, "name": "volume"}]}
