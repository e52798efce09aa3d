"""The volume store: one OME-Zarr multiscale group per case, an index, and derived tables.

Layout of a store: `store.json` (format and recipe), `index.jsonl` (one record per case, sorted), `<case>.zarr/` (arrays
`0`, `1`, ... of shape (channel, x, y, z) from fine to coarse; `labels/segmentation/0`; `points`),
`derived/<name>-<recipe hash>/<case>.npz`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float, Float32, Int32, Shaped

from medssl.data.volume import Box

Corner = Sequence[int] | np.ndarray

FORMAT = 1
LABELS = "labels.json"
"""Names of the label values, and the value that is ignored."""
NEEDS = {
    "pairs": " weights=FILE",
    "embeddings": " weights=FILE",
    "heights": " file=FILE.csv",
    "external_keypoints": " file=FILE.csv",
}
"""Further arguments that `medssl.derive` needs, by the name of the table."""

# No chunk cache: crops hardly ever share chunks, and the process must not hold whole volumes.
CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Record:
    """The entry of a case in the index. `shape`, `spacing_mm`, `affine` are those of level 0, in (x, y, z), RAS.

    `statistics` has one dict per channel (over the whole volume, in file units). Stored integers mean
    `slope * value + intercept`. `level_factors` are voxels of level 0 per voxel of each level; voxel i of a level lies
    at (i + 0.5) * factor - 0.5 of level 0.
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
        """The map from voxel indices of level 0 to RAS millimetres."""
        return np.array(self.affine, dtype=np.float64)

    @cached_property
    def mm_to_volume(self) -> Float[np.ndarray, "4 4"]:
        """The map from RAS millimetres to voxel indices of level 0."""
        return np.linalg.inv(self.volume_to_mm)

    def values(self, stored: Shaped[np.ndarray, " channel *box"]) -> Float32[np.ndarray, " channel *box"]:
        """Return stored integers in file units."""
        shape = (-1, *[1] * (stored.ndim - 1))
        slope, intercept = (np.array(v, dtype=np.float32).reshape(shape) for v in (self.slope, self.intercept))
        return stored.astype(np.float32) * slope + intercept

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Return the record that `to_json` wrote."""
        frozen: dict[str, Any] = {}
        for key, value in values.items():
            rows = value if isinstance(value, list) else None
            if rows and isinstance(rows[0], list):
                rows = [tuple(row) for row in rows]
            frozen[key] = value if rows is None else tuple(rows)
        return cls(**frozen)


def read_case_record(folder: Path) -> Record:
    """Return the record inside a finished case folder.

    Raises:
        ValueError: The folder is not a finished case.
    """
    try:
        return Record.from_json(json.loads((folder / "zarr.json").read_text(encoding="utf-8"))["attributes"]["medssl"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} is not a finished case of a medssl store ({error}); delete it and prepare again"
        ) from error


class VolumeStore:
    """A prepared store, opened for reading: records by number, asynchronous partial reads, points, derived tables.

    Records are parsed on demand, so that opening costs one pass over the index file.

    Raises:
        ValueError: `root` is not a store, or its preparation did not finish.
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
        """Return the number of cases."""
        return len(self.lines)

    def __getstate__(self) -> dict[str, Any]:
        """Return the path alone, which is all that travels to another process."""
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the store again."""
        self.__init__(state["root"])  # type: ignore[misc]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe that the store was prepared with."""
        return json.loads((self.root / "store.json").read_text(encoding="utf-8"))["recipe"]

    @cached_property
    def cohorts(self) -> list[tuple[str, str]]:
        """Group and split of every case, without building the records."""
        rows = (json.loads(line) for line in self.lines)
        return [(row["group"], row["split"]) for row in rows]

    @cached_property
    def names(self) -> list[str]:
        """The name of every case, by its number."""
        return [json.loads(line)["case"] for line in self.lines]

    @cached_property
    def label_names(self) -> dict[int, str]:
        """Names of the label values, as far as the source knows them, without that of the ignored one."""
        return {int(value): name for value, name in self._labels.get("names", {}).items()}

    @property
    def ignored_label(self) -> int | None:
        """The label value whose voxels are of unknown class: they count neither in a loss nor in a score."""
        return self._labels.get("ignore")

    @cached_property
    def _labels(self) -> dict[str, Any]:
        path = self.root / LABELS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def has_label(self, case: int) -> bool:
        """Return whether the case has a label map (which may be empty)."""
        return bool(self.record(case).labels) or (self.root / f"{self.names[case]}.zarr" / "labels").is_dir()

    def records(self) -> Iterator[Record]:
        """Return all records, in order of their number."""
        return (self._record(number) for number in range(len(self)))

    def read(
        self, case: int, level: int, lower: Corner, upper: Corner
    ) -> "tensorstore.Future[Shaped[np.ndarray, 'channel x y z']]":
        """Start to read the voxels `lower <= i < upper` of one level; the future's result is a writable int16 array."""
        return self._box(self.open(case, str(level)), lower, upper).read()

    def read_label(
        self, case: int, lower: Corner, upper: Corner
    ) -> "tensorstore.Future[Shaped[np.ndarray, 'one x y z']]":
        """Start to read the label of a box of level 0.

        Raises:
            ValueError: The case has no label.
        """
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
        """Return body voxels (value -1) and label voxels of a case: x, y, z, value."""
        return self._open(case, "points").read().result()

    def _derived(self, name: str, case: int) -> dict[str, np.ndarray]:
        with np.load(self.derived_file(name, case)) as table:
            return dict(table)

    def derived_file(self, name: str, case: int) -> Path:
        """Return the file of the derived table `name` of a case; `derived` returns its arrays and caches them."""
        pointer = self.root / "derived" / f"{name}.json"
        if not pointer.is_file():
            options = f"what={name}{NEEDS.get(name, '')} store={self.root}"
            raise ValueError(f"{self.root} has no derived data {name!r}; run `python -m medssl.derive {options}`")
        folder = self.root / "derived" / json.loads(pointer.read_text(encoding="utf-8"))["folder"]
        return folder / f"{self.record(case).case}.npz"
