"""From a source to a store: case by case in parallel, resumable at any moment, bad files set aside with reasons."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medssl.data.cases import Case, LabelMapError, Scan, Source
from medssl.data.formats import ReadError
from medssl.data.reading import check_channels, check_sides
from medssl.data.store import FORMAT, Record, read_case_record, write_case, write_index
from medssl.data.volume import (
    BODY_RECIPE,
    draw_points,
    find_body,
    guess_modality,
    intensity_statistics,
    resample_label,
    resample_volume,
    voxel_hash,
)
from medssl.data.workers import run_all

NUM_LISTED = 20


class PrepareError(ValueError):
    """Too few usable cases. Finished cases and `rejected.jsonl` stay in the store."""


@dataclass(frozen=True)
class PrepareSummary:
    """What became of the cases of a source; rows of `rejected` have the keys case, file, reason."""

    root: Path
    num_cases: int
    num_new: int
    num_rejected: int
    num_skipped: int
    rejected: list[dict[str, str]] = field(repr=False)

    def __str__(self) -> str:
        parts = [f"{self.num_cases} cases ({self.num_new} new)"]
        if self.num_rejected:
            parts.append(f"{self.num_rejected} rejected (see rejected.jsonl)")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} label maps skipped (see skipped.jsonl)")
        return f"{', '.join(parts)} -> {self.root}"


@dataclass(frozen=True)
class Job:
    """One case and how to prepare it."""

    case: Case
    root: Path
    channels: str | int | None
    spacing_mm: tuple[float, ...] | None
    min_side_voxel: int


@dataclass(frozen=True)
class Outcome:
    """`kind` is done, rejected or skipped."""

    case: str
    kind: str
    file: str = ""
    reason: str = ""


def prepare_store(
    source: Source,
    store: str | Path,
    *,
    channels: str | int | None = None,
    spacing_mm: float | Sequence[float] | None = None,
    min_side_voxel: int = 8,
    max_rejected_fraction: float = 0.2,
    num_workers: int | None = None,
    progress: bool = True,
) -> PrepareSummary:
    """Bring the store to what the source holds: finished cases stay as they are, the others are made.

    The store does not depend on the number of workers, nor on how often the work was killed on the way.

    Args:
        source: where the cases come from.
        store: folder of the store.
        channels: "all", the number of a channel, or None, which refuses files with several.
        spacing_mm: resample to it; None keeps the spacing of each file.
        min_side_voxel: volumes with a shorter side are rejected.
        max_rejected_fraction: share of rejected cases above which the store is not finished.
        num_workers: processes; None means one a core, 0 works in this one.
        progress: whether to show a bar and to list problems on stderr.

    Raises:
        PrepareError: too many cases rejected, or none usable.
        ValueError: the folder is no store, or one with another recipe.
    """
    root = Path(store).expanduser()
    check_channels(channels)
    options: dict[str, Any] = {"channels": channels, "spacing_mm": spacing_mm, "min_side_voxel": min_side_voxel}
    recipe = store_recipe(source, **options)
    scan = source.scan()
    total = len(scan.cases) + len(scan.problems)
    if progress and scan.problems:
        _tell(f"{len(scan.problems)} of {total} cases cannot be used:", scan.problems)
    check_recipe(root, recipe)
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        check_recipe(root, recipe)  # by now another process may have begun it
        write_text(root / "store.json", json.dumps({"format": FORMAT, "recipe": recipe}, indent=1, sort_keys=True))
        clear_partial(root)
        _check_share(root, scan.problems, total, max_rejected_fraction)
        done = {case.case for case in scan.cases if _is_finished(root, case)}
        jobs = [
            Job(case, root, channels, _three_spacings(spacing_mm), min_side_voxel)
            for case in scan.cases
            if case.case not in done
        ]
        outcomes = list(
            run_all(
                prepare_case,
                jobs,
                num_workers=num_workers,
                progress=progress,
                description="preparing",
                num_done=len(done),
            )
        )
        clear_partial(root)  # again: a worker of a killed run may have written on for a moment
        return _finish(root, scan, outcomes, max_rejected_fraction=max_rejected_fraction, progress=progress)


def store_recipe(
    source: Source,
    *,
    channels: str | int | None = None,
    spacing_mm: float | Sequence[float] | None = None,
    min_side_voxel: int = 8,
) -> dict[str, Any]:
    """All that the content of a store depends on, as JSON values."""
    spacing = _three_spacings(spacing_mm)
    return {
        "source": source.recipe(),
        "channels": channels,
        "spacing_mm": None if spacing is None else list(spacing),
        "min_side_voxel": min_side_voxel,
        "body": BODY_RECIPE,
    }


def recipe_hash(recipe: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def locate_store(data: Any, store: str | Path | None) -> Path:
    """The folder of the store that a configuration's `data` and `store` mean.

    Raises: ValueError: none is named for `data=store`, or the named one was prepared with another recipe.
    """
    if data.get("source") is None:
        root = store or data.get("root")
        if not root:
            raise ValueError("data=store needs the prepared store: give store=PATH")
        return Path(root).expanduser()
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(data, "root"):
        raise ValueError(f"data={data.name} needs data.root=PATH")
    recipe = store_recipe(
        instantiate(data.source, _convert_="all"),
        channels=data.channels,
        spacing_mm=data.spacing_mm,
        min_side_voxel=data.min_side_voxel,
    )
    if store is None:
        return Path("stores") / f"{data.name}-{recipe_hash(recipe)}"
    root = Path(store).expanduser()
    check_recipe(root, recipe)
    return root


def check_recipe(root: Path, recipe: dict[str, Any]) -> None:
    """Raise a ValueError where `root` holds something else than a store of this recipe."""
    if not root.exists():
        return
    if not root.is_dir():
        raise ValueError(f"store={root} is a file; a store is a folder")
    description = root / "store.json"
    if not description.is_file():
        foreign = [f.name for f in root.iterdir() if not f.name.endswith(".partial")]
        if foreign:
            raise ValueError(f"store={root} holds other files ({foreign[0]}, ...) and no store.json; name a new folder")
        return
    found = json.loads(description.read_text())
    if found.get("format") != FORMAT:
        raise ValueError(f"store={root} has format {found.get('format')}, this version writes {FORMAT}; name another")
    old, new = _flat(found["recipe"]), _flat(json.loads(json.dumps(recipe)))
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if changed:
        what = "; ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in changed)
        raise ValueError(f"store={root} was prepared with another recipe ({what}); name another store or delete it")


def prepare_case(job: Job) -> Outcome:
    """Read, measure and store one case; what is wrong with it is an outcome, not an exception."""
    case = job.case
    try:
        volume, label = case.read(channels=job.channels, min_side_voxel=job.min_side_voxel)
        digest = voxel_hash(volume.array)
        if job.spacing_mm is not None:
            label = None if label is None else resample_label(label, volume, job.spacing_mm)
            volume = resample_volume(volume, job.spacing_mm)
            check_sides(case.image, volume.shape, job.min_side_voxel)
    except LabelMapError as error:
        return Outcome(case.case, "skipped", str(error.path), error.reason)
    except ReadError as error:
        return Outcome(case.case, "rejected", str(error.path), error.reason)
    except MemoryError:
        return Outcome(case.case, "rejected", str(case.image), "the image does not fit into memory")
    modality = case.modality or guess_modality(volume.array)
    body, mask, factor = find_body(
        volume,
        modality=modality,
        threshold_hu=BODY_RECIPE["threshold_hu"],
        copy_spacing_mm=BODY_RECIPE["copy_spacing_mm"],
    )
    points = draw_points(
        mask,
        label,
        factor=factor,
        shape=volume.shape,
        case=case.case,
        num_body_points=int(BODY_RECIPE["num_body_points"]),
        num_label_points=int(BODY_RECIPE["num_label_points"]),
    )
    write_case(
        job.root,
        case=case.case,
        volume=volume,
        label=label,
        modality=modality,
        group=case.group,
        split=case.split,
        statistics=intensity_statistics(volume.array),
        body=body,
        points=points,
        voxel_hash=digest,
        source=str(case.image),
    )
    return Outcome(case.case, "done")


def _finish(
    root: Path, scan: Scan, outcomes: Sequence[Outcome], *, max_rejected_fraction: float, progress: bool
) -> PrepareSummary:
    bad = {outcome.case: outcome for outcome in outcomes if outcome.kind != "done"}
    records = []
    for case in scan.cases:
        if case.case not in bad:  # a table may give a finished case another group or split: the index has the last word
            records.append(replace(read_case_record(root / f"{case.case}.zarr"), group=case.group, split=case.split))
    rejected = [{"case": o.case, "file": o.file, "reason": o.reason} for o in bad.values() if o.kind == "rejected"]
    records, odd = _same_channels(records)
    rejected += odd
    if progress and rejected:
        _tell(f"{len(rejected)} cases were rejected:", rejected)
    rejected += scan.problems
    skipped = scan.skipped + [{"file": o.file, "reason": o.reason} for o in bad.values() if o.kind == "skipped"]
    _write_lines(root / "skipped.jsonl", skipped)
    _check_share(root, rejected, len(records) + len(rejected), max_rejected_fraction)
    if not records:
        found = f"{len(rejected)} rejected, {len(skipped)} skipped as label maps"
        raise PrepareError(f"no usable image in the source ({found}); see {root}/rejected.jsonl and skipped.jsonl")
    write_index(root, records)
    num_new = sum(outcome.kind == "done" for outcome in outcomes)
    return PrepareSummary(root, len(records), num_new, len(rejected), len(skipped), rejected)


def _same_channels(records: Sequence[Record]) -> tuple[list[Record], list[dict[str, str]]]:
    """Records with the usual number of channels, the others as rejected rows: a batch has one number of channels."""
    if not records:
        return [], []
    counts = Counter(record.channels for record in records)
    usual = max(counts, key=lambda channels: (counts[channels], -channels))
    reason = f"channels; most cases of the source have {usual} (data.channels=N picks one)"
    odd = [
        {"case": r.case, "file": r.source, "reason": f"{r.channels} {reason}"} for r in records if r.channels != usual
    ]
    return [record for record in records if record.channels == usual], odd


def _check_share(root: Path, rejected: list[dict[str, str]], total: int, max_rejected_fraction: float) -> None:
    """Write `rejected.jsonl`; raise where it is too long."""
    _write_lines(root / "rejected.jsonl", rejected)
    if len(rejected) > max_rejected_fraction * total:
        share = (
            f"{len(rejected)} of {total} cases are rejected, more than max_rejected_fraction={max_rejected_fraction:g}"
        )
        ways = (
            f"see {root / 'rejected.jsonl'}; mend the files, or raise max_rejected_fraction (finished cases are kept)"
        )
        raise PrepareError("\n".join([share, *_listed(rejected), ways]))


def _is_finished(root: Path, case: Case) -> bool:
    folder = root / f"{case.case}.zarr"
    if not folder.is_dir() or (folder / "labels").is_dir() != case.has_label:
        return False
    return read_case_record(folder).source == str(case.image)


def _three_spacings(spacing_mm: float | Sequence[float] | None) -> tuple[float, ...] | None:
    if spacing_mm is None:
        return None
    values = [spacing_mm] * 3 if isinstance(spacing_mm, int | float) else list(spacing_mm)
    if len(values) != 3 or min(values) <= 0:
        raise ValueError(f"data.spacing_mm takes one or three positive numbers, or null; got {spacing_mm}")
    return tuple(float(value) for value in values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    if rows:
        write_text(path, "".join(sorted(json.dumps(row, sort_keys=True) + "\n" for row in rows)))
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file, all or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def _listed(rows: list[dict[str, str]]) -> list[str]:
    lines = [f"  {row['file']}: {row['reason']}" for row in sorted(rows, key=lambda r: r["file"])[:NUM_LISTED]]
    return lines + ([f"  ... and {len(rows) - NUM_LISTED} more"] if len(rows) > NUM_LISTED else [])


def _tell(heading: str, rows: list[dict[str, str]]) -> None:
    print("\n".join([heading, *_listed(rows)]), file=sys.stderr, flush=True)


def clear_partial(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for partial in folder.glob(".*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Hold the lock of the folder: two processes never prepare one store at once; a killed one lets go of it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process works on {root}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
