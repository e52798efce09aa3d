"""Tables derived from a store, case by case: in parallel, resumable, with a summary of their quality."""

import collections
import csv
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from medssl.data.atomic import alone_in, clear_partial, whole_file, write_text
from medssl.data.checksums import sealed
from medssl.data.recipes import recipe_hash
from medssl.data.store import DAMAGES, VolumeStore
from medssl.data.volume import Volume, find_body
from medssl.data.workers import check_num_workers, run_all

Table = Mapping[str, np.ndarray]
Read = TypeVar("Read")
DAMAGED = b"damaged"
"""Origin of a file that is not an archive. It is not overwritten, because a person should look at it."""


@runtime_checkable
class Derivation(Protocol):
    """A derivation: a picklable object, usually a frozen dataclass named by `_target_` in a file of `what/`.

    It may have more methods. `needs()` returns derivations with tables that are made first, for `table_of` to read.
    `rests_on(store, case)` returns the numbers of further cases that a table is made from; the table is valid as long
    as all of them are. `report(store, folder)` returns a closing message once all tables exist, and may write pictures
    into their folder.
    """

    @property
    def name(self) -> str:
        """The name of the table for `VolumeStore.derived`."""

    def recipe(self) -> dict[str, Any]:
        """Return all that the tables depend on besides the store, as JSON values."""

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the arrays of one case, a pure function of store, case and recipe."""

    def quality(self, table: Table) -> dict[str, float]:
        """Return the numbers by which a person judges a case's table."""


@dataclass(frozen=True)
class DeriveSummary:
    """The folder of the tables, the number made now, the mean of each quality, and the report of the derivation."""

    folder: Path
    num_cases: int
    num_new: int
    mean_quality: dict[str, float]
    report: str = ""

    def __str__(self) -> str:
        means = ", ".join(f"{name} {value:.4g}" for name, value in self.mean_quality.items())
        head = f"{self.num_cases} tables ({self.num_new} new) -> {self.folder}\nmean quality: {means}"
        return f"{head}\n{self.report}" if self.report else head


@dataclass(frozen=True)
class TableJob:
    """A table that is to be made."""

    root: Path
    folder: Path
    derivation: Derivation
    case: int
    origin: bytes


def derive(
    store: str | Path, derivation: Derivation, *, num_workers: int | None = None, progress: bool = True
) -> DeriveSummary:
    """Make the tables that are missing, then `quality.csv`, then point the store's `derived/<name>.json` to them.

    A table is valid as long as its case: if voxels or files change, the next `derive` rebuilds the table. Tables of
    other recipes are kept. A killed run continues where it stopped.

    Args:
        store: The prepared store.
        derivation: Derivation that makes the tables.
        num_workers: Number of processes; None means one per core, 0 works in this process.
        progress: Whether to show a bar.
    """
    check_num_workers(num_workers)
    opened = VolumeStore(store)
    for needed in derivation.needs() if hasattr(derivation, "needs") else ():
        derive(store, needed, num_workers=num_workers, progress=progress)
    folder = folder_of(opened.root, derivation)
    folder.mkdir(parents=True, exist_ok=True)
    cases = [record.case for record in opened.records()]
    with alone_in(folder):
        clear_partial(folder)
        jobs = [
            TableJob(opened.root, folder, derivation, number, origin)
            for number, origin in enumerate(_origins(opened, derivation))
            if _origin_of(folder / f"{cases[number]}.npz") not in (origin, DAMAGED)
        ]
        run = run_all(
            derive_case,
            jobs,
            num_workers=num_workers,
            progress=progress,
            description=f"deriving {derivation.name}",
            num_done=len(cases) - len(jobs),
        )
        collections.deque(run, maxlen=0)  # runs the generator to its end
        quality = {case: _quality(derivation, folder / f"{case}.npz") for case in cases}
        _write_quality(folder / "quality.csv", quality)
        pointer = sealed({"folder": folder.name, "recipe": derivation.recipe()})
        write_text(folder.parent / f"{derivation.name}.json", json.dumps(pointer, indent=1, sort_keys=True))
        report = derivation.report(opened, folder) if hasattr(derivation, "report") else ""
    means = {name: _mean([row[name] for row in quality.values()]) for name in next(iter(quality.values()))}
    return DeriveSummary(folder, len(cases), len(jobs), means, report)


def derive_case(job: TableJob) -> None:
    """Make and write the table of one case; the file appears under its name only when it is whole."""
    store = _opened(job.root, (job.root / "index.jsonl").stat().st_mtime_ns)
    case = store.record(job.case).case
    table = job.derivation(store, job.case)
    with whole_file(job.folder / f"{case}.npz") as partial:
        with partial.open("wb") as stream:
            np.savez(stream, **{name: np.asarray(array) for name, array in table.items()})  # type: ignore[arg-type]
        with zipfile.ZipFile(partial, "a") as archive:
            archive.comment = job.origin


def folder_of(root: Path, derivation: Derivation) -> Path:
    """Return the folder of a derivation's tables in the store at `root`."""
    return root / "derived" / f"{derivation.name}-{recipe_hash(derivation.recipe())}"


def table_of(store: VolumeStore, derivation: Derivation, case: int) -> Table:
    """Return the table of a case that exactly this derivation made."""
    return _load(folder_of(store.root, derivation) / f"{store.record(case).case}.npz")


def read_coarse(store: VolumeStore, case: int, *, spacing_mm: float) -> tuple[Volume, np.ndarray]:
    """Return the first channel of the coarsest level at least as fine as `spacing_mm`.

    The second value is the number of level-0 voxels per voxel of that level, along x, y, z.
    """
    record = store.record(case)
    factors = np.array(record.level_factors)
    fine = [level for level, f in enumerate(factors) if (f * record.spacing_mm).max() <= spacing_mm]
    level = fine[-1] if fine else 0
    factor = factors[level]
    sides = -(-np.array(record.shape) // factor)
    stored = store.read(case, level, [0, 0, 0], sides.tolist()).result()[:1]
    step = np.diag([*factor.astype(float), 1.0])
    step[:3, 3] = (factor - 1) / 2
    return Volume(record.values(stored), record.volume_to_mm @ step, record.source), factor


def _origins(store: VolumeStore, derivation: Derivation) -> list[bytes]:
    """Return the origin of each table, which is kept as the comment of its archive.

    It holds the hash of the voxels, the folder of the case (its name ends in a hash of all that is stored), and a
    digest of those of all cases that it rests on.
    """
    own = [f"{record.voxel_hash} {record.folder}".encode() for record in store.records()]
    if not hasattr(derivation, "rests_on"):
        return own
    others = [b"\n".join(own[other] for other in derivation.rests_on(store, case)) for case in range(len(own))]
    return [b"%s %s" % (mine, sha256(rest).hexdigest().encode()) for mine, rest in zip(own, others, strict=True)]


def _origin_of(path: Path) -> bytes | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except FileNotFoundError:
        return None
    except (OSError, zipfile.BadZipFile):
        return DAMAGED


@dataclass(frozen=True, kw_only=True)
class Body:
    """The body of each case, measured on a coarse level of the store.

    Table: `lower_voxel` and `upper_voxel` (3) are faces in voxels of level 0. `fill`, the share of that box, and
    `volume_ml` are one number each.
    """

    threshold_hu: float = -500.0
    copy_spacing_mm: float = 4.0

    @property
    def name(self) -> str:
        """The name `body`."""
        return "body"

    def recipe(self) -> dict[str, Any]:
        """Return the threshold and the spacing."""
        return asdict(self)

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the box, its fill and the volume."""
        record = store.record(case)
        volume, factor = read_coarse(store, case, spacing_mm=self.copy_spacing_mm)
        box, mask, block = find_body(
            volume, modality=record.modality[0], threshold_hu=self.threshold_hu, copy_spacing_mm=self.copy_spacing_mm
        )
        voxel_ml = float(np.prod(np.array(volume.spacing_mm) * block)) / 1000
        inside = [
            slice(int(a), int(b))
            for a, b in zip((box.lower + 0.5) // block, -(-(box.upper + 0.5) // block), strict=True)
        ]
        upper = np.minimum((box.upper + 0.5) * factor, record.shape) - 0.5
        return {
            "lower_voxel": (box.lower + 0.5) * factor - 0.5,
            "upper_voxel": upper,
            "fill": mask[tuple(inside)].mean(),
            "volume_ml": np.float64(mask.sum() * voxel_ml),
        }

    def quality(self, table: Table) -> dict[str, float]:
        """Return the fill of the box and the volume of the body."""
        return {"fill": float(table["fill"]), "volume_ml": float(table["volume_ml"])}


@lru_cache(maxsize=2)
def _opened(root: Path, index_time: int) -> VolumeStore:
    """Return the open store; another index is another store, whose cases may lie in other folders."""
    return VolumeStore(root)


def _load(path: Path) -> Table:
    return _read(path, dict)


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _quality(derivation: Derivation, path: Path) -> dict[str, float]:
    return _read(path, derivation.quality)  # a large table is read only as far as needed


def _read(path: Path, what: Callable[[Table], Read]) -> Read:
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:
            return what(arrays)
    except DAMAGES as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and derive again") from error


def _write_quality(path: Path, rows: dict[str, dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *next(iter(rows.values()))])
    writer.writerows([case, *(repr(float(value)) for value in row.values())] for case, row in sorted(rows.items()))
    write_text(path, text.getvalue())
