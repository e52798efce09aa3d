"""The volume store: one OME-Zarr multiscale group per case, an index, and derived tables.

Layout of a store: `store.json` (format and recipe), `index.jsonl` (one record per case, sorted), a folder per case that
its record names, `<case>-<content hash>.zarr/` (arrays `0`, `1`, ... of shape (channel, x, y, z) from fine to coarse;
`labels/segmentation/0`; `points`), `derived/<name>-<recipe hash>/<case>.npz`.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Float, Float32, Int32, Shaped

from medssl.data.checksums import checksum, is_whole_line, read_sealed
from medssl.data.description import read_description
from medssl.data.volume import Box

Corner = Sequence[int] | np.ndarray

LABELS = "labels.json"
"""Names of the label values, and the value that is ignored."""
REPAIR = "delete it and prepare again"
SAFE_NAME = re.compile(r"[^\x00-\x1f/\\.][^\x00-\x1f/\\]*")
"""Names of cases and of their folders: none leads out of the store."""
NEEDS = {
    "pairs": " weights=FILE",
    "embeddings": " weights=FILE",
    "heights": " file=FILE.csv",
    "external_keypoints": " file=FILE.csv",
}
"""Further arguments that `medssl.derive` needs, by the name of the table."""

DAMAGES = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged archive of arrays raises."""

# No chunk cache: crops hardly ever share chunks, and the process must not hold whole volumes.
CONTEXT = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Record:
    """The entry of a case in the index. `shape`, `spacing_mm`, `affine` are those of level 0, in (x, y, z), RAS.

    `modality` has one word per channel, and `modality_from` says who stated it: the setting, the source, the header, or
    the voxels. `statistics` has one dict per channel (over the whole volume without its padding, in file units).
    `padding` has the values of each channel that stood for "no voxel here", with their shares of the volume; the stored
    voxels have the smallest other value there. `doubts` are sentences on what a person should look at. Stored integers
    mean `slope * value + intercept`. `level_factors` are voxels of level 0 per voxel of each level; voxel i of a level
    lies at (i + 0.5) * factor - 0.5 of level 0. `left_out` are files beside the image that were passed over, with the
    reason. `metadata` has the checksum of the description of each array.
    """

    case: str
    folder: str
    shape: tuple[int, int, int]
    channels: int
    affine: tuple[tuple[float, ...], ...]
    spacing_mm: tuple[float, float, float]
    modality: tuple[str, ...]
    modality_from: str
    group: str
    split: str
    statistics: tuple[dict[str, float], ...]
    padding: tuple[tuple[tuple[float, float], ...], ...]
    doubts: tuple[str, ...]
    body_lower: tuple[float, float, float]
    body_upper: tuple[float, float, float]
    voxel_hash: str
    source: str
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    level_factors: tuple[tuple[int, int, int], ...]
    labels: tuple[int, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    targets: tuple[tuple[str, float], ...] = ()
    fingerprint: str = ""
    series: str = ""
    metadata: tuple[tuple[str, str], ...] = ()

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
        return cls(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """Return a JSON value with tuples in place of lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def read_case_record(folder: Path) -> Record:
    """Return the record inside a finished case folder.

    Raises:
        ValueError: The folder is not a finished case, or its description is damaged.
    """
    try:
        return Record.from_json(read_sealed(folder / "zarr.json", remedy=REPAIR, inside="attributes")["medssl"])
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a finished case of a medssl store ({error}); {REPAIR}") from error


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
        if not (self.root / "store.json").is_file():
            raise ValueError(f"{self.root} is not a medssl store (no store.json); copy it whole, or prepare again")
        self.recipe: dict[str, Any] = read_description(self.root)["recipe"]
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
    def cohorts(self) -> list[tuple[str, str]]:
        """Group and split of every case, without building the records."""
        rows = (self._row(number) for number in range(len(self)))
        return [(row["group"], row["split"]) for row in rows]

    @cached_property
    def names(self) -> list[str]:
        """The name of every case, by its number."""
        return [self._row(number)["case"] for number in range(len(self))]

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
        return read_sealed(path, remedy=REPAIR) if path.is_file() else {}

    def folder(self, case: int) -> Path:
        """Return the folder of a case, as its record names it."""
        return self.root / self.record(case).folder

    def has_label(self, case: int) -> bool:
        """Return whether the case has a label map (which may be empty)."""
        return bool(self.record(case).labels) or (self.folder(case) / "labels").is_dir()

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

    def _row(self, case: int) -> dict[str, Any]:
        """Return a line of the index, checked."""
        line = self.lines[case]
        if not is_whole_line(line):
            name = re.search(rb'"case": "([^"]*)"', line)
            which = f" (case {name[1].decode(errors='replace')})" if name else ""
            raise ValueError(
                f"{self.root / 'index.jsonl'}, line {case + 1}{which} is damaged: it does not fit its checksum; "
                "prepare again (finished cases are kept)"
            )
        row = json.loads(line)
        for name in (row["case"], row["folder"]):
            if not SAFE_NAME.fullmatch(name):
                where = f"{self.root / 'index.jsonl'}, line {case + 1}"
                raise ValueError(f"{where} names {name!r}, which may lie outside of the store; prepare it again")
        return row

    def _record(self, case: int) -> Record:
        row = self._row(case)
        del row["checksum"]
        return Record.from_json(row)

    def _open(self, case: int, array: str) -> tensorstore.TensorStore:
        record = self.record(case)
        path = self.root / record.folder / array
        try:
            described = (path / "zarr.json").read_bytes()
            if checksum(described) != dict(record.metadata).get(array):
                raise ValueError(f"{path / 'zarr.json'} is damaged: it does not fit its checksum")
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(path)},
                "metadata": json.loads(described),
                "fill_missing_data_reads": False,
            }
            return tensorstore.open(spec, context=CONTEXT, read=True, open=True, assume_metadata=True).result()
        except (OSError, ValueError) as error:
            raise ValueError(f"case {record.case}: cannot open {path}: {error}; {REPAIR}") from error

    def _points(self, case: int) -> Int32[np.ndarray, "point 4"]:
        """Return body voxels (value -1) and label voxels of a case: x, y, z, value."""
        return self._open(case, "points").read().result()

    def _derived(self, name: str, case: int) -> dict[str, np.ndarray]:
        path = self.derived_file(name, case)
        try:
            with path.open("rb") as stream, np.load(stream) as table:  # closed where its beginning is damaged, too
                return dict(table)
        except FileNotFoundError:
            raise
        except DAMAGES as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and derive again") from error

    def derived_file(self, name: str, case: int) -> Path:
        """Return the file of the derived table `name` of a case; `derived` returns its arrays and caches them."""
        found = self.pointer(name)
        if found is None:
            options = f"what={name}{NEEDS.get(name, '')} store={self.root}"
            raise ValueError(f"{self.root} has no derived data {name!r}; run `python -m medssl.derive {options}`")
        return self.root / "derived" / found["folder"] / f"{self.record(case).case}.npz"

    def pointer(self, name: str) -> dict[str, Any] | None:
        """Return folder and recipe of the derived table `name` that was made last; None where there is none."""
        path = self.root / "derived" / f"{name}.json"
        return read_sealed(path, remedy=f"run `python -m medssl.derive what={name}` again") if path.is_file() else None
