"""Preparation of a store from a source: case by case in parallel, resumable, bad files listed with reasons."""

import contextlib
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medssl.data.atomic import alone_in, clear_partial, read_lines, write_lines, write_text
from medssl.data.cases import Case, Scan, Source
from medssl.data.checksums import is_whole_line, sealed
from medssl.data.description import write_description
from medssl.data.fingerprints import Contents
from medssl.data.modality import parsed_modalities
from medssl.data.prepared_case import Job, Outcome, prepare_case
from medssl.data.reading import check_channels
from medssl.data.recipes import assumed_spacing, check_recipe, store_recipe, three_spacings
from medssl.data.store import LABELS, Record, read_case_record
from medssl.data.store_writer import write_index
from medssl.data.workers import check_num_workers, run_all

NUM_LISTED = 20
INDEX, TARGETS = "index.jsonl", "targets.csv"
LOOKS = ".looks.json"
"""The last looks at the files of the source; no part of what the store holds."""


class PrepareError(ValueError):
    """There are too few usable cases. Finished cases and `rejected.jsonl` stay in the store."""


@dataclass(frozen=True)
class PrepareSummary:
    """Counts of prepared, rejected and skipped cases of a source.

    Rows of `rejected` have the keys case, file, reason. `num_moved` counts cases with another group or split than
    before, `num_removed` those that left the index.
    """

    root: Path
    num_cases: int
    num_new: int
    num_rejected: int
    num_skipped: int
    num_moved: int
    num_removed: int
    rejected: list[dict[str, str]] = field(repr=False)

    @property
    def has_changed(self) -> bool:
        """Whether the index differs from the one before."""
        return bool(self.num_new or self.num_moved or self.num_removed)

    def __str__(self) -> str:
        parts = [f"{self.num_cases} cases ({self.num_new} new)"]
        if self.num_moved:
            parts.append(f"{self.num_moved} in another group or split")
        if self.num_removed:
            parts.append(f"{self.num_removed} removed (the source has them no more)")
        if self.num_rejected:
            parts.append(f"{self.num_rejected} rejected (see rejected.jsonl)")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} files skipped (see skipped.jsonl)")
        targets = self.root / TARGETS
        return f"{', '.join(parts)} -> {self.root}" + (f"; targets: {targets}" if targets.is_file() else "")


@dataclass(frozen=True)
class Index:
    """The index that a store holds.

    Args:
        records: The records of its undamaged lines; the cases of others are looked for in folders.
        is_whole: Whether no line is damaged.
    """

    records: list[Record]
    is_whole: bool

    @classmethod
    def read(cls, root: Path) -> "Index":
        """Return the index of the store in a folder; one without lines where there is none."""
        path = root / INDEX
        lines = path.read_bytes().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if is_whole_line(line)]
        records = [Record.from_json({key: row[key] for key in row if key != "checksum"}) for row in rows]
        return cls(records, len(rows) == len(lines))


def prepare_store(
    source: Source,
    store: str | Path,
    *,
    channels: str | int | None = None,
    spacing_mm: float | Sequence[float] | None = None,
    min_side_voxel: int = 8,
    modality: Sequence[str] | str | None = None,
    checksums: bool = False,
    max_rejected_fraction: float = 0.2,
    num_workers: int | None = None,
    progress: bool = True,
    prune: bool = True,
    assume_spacing_mm: float | Sequence[float] | None = None,
    verify: bool = False,
) -> PrepareSummary:
    """Bring the store up to date with the source: finished cases stay, the others are prepared.

    The store does not depend on the number of workers, nor on how often the work was killed before it ended.

    Args:
        source: Source of the cases.
        store: Folder of the store.
        channels: Channels to keep: "all", the number of one, or None, which refuses files with several channels.
        spacing_mm: Spacing to resample to; None keeps the spacing of each file.
        min_side_voxel: Volumes with a shorter side are rejected.
        modality: Modality of all cases, one of all channels or one of each; None for what source, header, voxels say.
        checksums: Whether every chunk carries a checksum that reading verifies: reads take a seventh longer.
        max_rejected_fraction: Share of rejected cases above which the store is not finished.
        num_workers: Number of processes; None means one per core, 0 works in this process.
        progress: Whether to show a bar and to list problems on stderr.
        prune: Whether to delete finished cases that the source no longer has. False only removes them from the index.
        assume_spacing_mm: Spacing along the axes of files whose headers state none; None rejects these files.
        verify: Whether to read all files of finished cases, also those whose size and time are those of the last look.

    Raises:
        PrepareError: Too many cases were rejected, or none is usable.
        ValueError: The folder is not a store, or holds a store with another recipe.
    """
    root = Path(store).expanduser()
    check_channels(channels)
    check_num_workers(num_workers)
    assumed = assumed_spacing(assume_spacing_mm)
    stated = parsed_modalities(modality)
    recipe = store_recipe(
        source,
        channels=channels,
        spacing_mm=spacing_mm,
        min_side_voxel=min_side_voxel,
        modality=stated,
        checksums=checksums,
        assume_spacing_mm=assumed,
    )
    check_recipe(root, recipe)
    scan = source.scan()
    if assumed is not None:
        scan.cases = [replace(case, assume_spacing_mm=assumed) for case in scan.cases]
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        check_recipe(root, recipe)  # by now another process may have begun it
        _begin(root, recipe)
        contents, known = Contents.remembered(root / LOOKS, verify=verify), _remembered(root)
        index = Index.read(root)
        fingerprints, done = _finished(root, scan.cases, contents, index, remembered=known, progress=progress)
        contents.save(root / LOOKS)
        scan = scan.checked(finished=set(done))
        news = _news(root, scan.problems)
        total = len(scan.cases) + len(scan.problems)
        if progress and news:
            _tell(f"{len(news)} of {total} cases cannot be used:", news)
        _check_share(root, scan.problems, total, max_rejected_fraction)
        outcomes, jobs = [], []
        for case in scan.cases:
            before = known.get(case.case)
            if before is not None and before.fingerprint == fingerprints.get(case):
                outcomes.append(before)
            elif case not in done:
                options = channels, three_spacings(spacing_mm), min_side_voxel, stated, checksums
                jobs.append(Job(case, root, fingerprints.get(case), *options))
        outcomes += run_all(
            prepare_case,
            jobs,
            num_workers=num_workers,
            progress=progress,
            description="preparing",
            num_done=len(scan.cases) - len(jobs),
        )
        for outcome in outcomes:
            contents.add(outcome.looks)
        contents.save(root / LOOKS)
        clear_partial(root)  # again: a worker of a killed run may have written a little longer
        _write_label_names(root, source)
        return _finish(
            root,
            scan,
            outcomes,
            done,
            index,
            max_rejected_fraction=max_rejected_fraction,
            progress=progress,
            prune=prune,
        )


def _begin(root: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe, and delete the lists of another recipe under which no case was finished."""
    description = root / "store.json"
    before = description.read_bytes() if description.is_file() else None
    write_description(root, recipe)
    if before is not None and before != description.read_bytes():
        for name in (INDEX, "rejected.jsonl", "skipped.jsonl"):
            (root / name).unlink(missing_ok=True)
    clear_partial(root)


def _finished(
    root: Path,
    cases: Sequence[Case],
    contents: Contents,
    index: Index,
    *,
    remembered: Collection[str],
    progress: bool,
) -> tuple[dict[Case, str], dict[Case, Record]]:
    """Return the fingerprints of the cases that the store has met, and the records that it holds with the same ones.

    The index is believed as far as the folders are there. Folders that it does not name, left by a run that was killed
    before it wrote the index, are looked into. A case that the store has not met is hashed when it is prepared.
    """
    indexed = {record.case: record for record in index.records}
    folders: dict[str, list[str]] = defaultdict(list)
    for name in sorted(entry.name for entry in os.scandir(root) if entry.name.endswith(".zarr")):
        folders[name.removesuffix(".zarr").rpartition("-")[0]].append(name)
    met = [case for case in cases if case.case in folders or case.case in remembered]

    def found(case: Case) -> tuple[str, Record | None]:
        fingerprint = case.fingerprint(contents)
        known, there = indexed.get(case.case), folders.get(case.case, [])
        if known is not None and known.fingerprint == fingerprint and known.folder in there:
            return fingerprint, known
        for name in there:
            if known is None or name != known.folder:
                with contextlib.suppress(ValueError):
                    record = read_case_record(root / name)
                    if record.fingerprint == fingerprint:
                        return fingerprint, record
        return fingerprint, None

    bar = {"total": len(met), "desc": "looking for changed files", "unit": " cases", "leave": False, "delay": 2}
    with ThreadPoolExecutor(8) as pool:
        both = dict(zip(met, tqdm(pool.map(found, met), disable=not progress, **bar), strict=True))
    records = {case: record for case, (_, record) in both.items() if record is not None}
    return {case: fingerprint for case, (fingerprint, _) in both.items()}, records


def _remembered(root: Path) -> dict[str, Outcome]:
    """Return the cases that earlier runs rejected or skipped after reading them."""
    rows = [(kind, row) for kind in ("rejected", "skipped") for row in read_lines(root / f"{kind}.jsonl")]
    return {row["case"]: Outcome(kind=kind, **row) for kind, row in rows if "fingerprint" in row}


def _news(root: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows that were not yet rejected when the store was finished."""
    told = read_lines(root / "rejected.jsonl") if (root / INDEX).is_file() else []
    return [row for row in rows if row not in told]


def _finish(
    root: Path,
    scan: Scan,
    outcomes: Sequence[Outcome],
    finished: Mapping[Case, Record],
    index: Index,
    *,
    max_rejected_fraction: float,
    progress: bool,
    prune: bool,
) -> PrepareSummary:
    bad = {outcome.case: outcome for outcome in outcomes if outcome.kind != "done"}
    made = {outcome.case: outcome.record for outcome in outcomes if outcome.record is not None}
    stored = [  # a table may give a finished case another group or split: the index has the last word
        _placed(made.get(case.case) or finished[case], case) for case in scan.cases if case.case not in bad
    ]
    records, odd = _same_channels(stored)
    rejected = [outcome.row() for outcome in bad.values() if outcome.kind == "rejected"] + odd
    news = _news(root, rejected)
    if progress and news:
        _tell(f"{len(news)} cases were rejected:", news)
    rejected += scan.problems
    skipped = scan.skipped + [outcome.row() for outcome in bad.values() if outcome.kind == "skipped"]
    skipped += [{"file": file, "reason": reason} for record in records for file, reason in record.left_out]
    write_lines(root / "skipped.jsonl", skipped)
    write_lines(root / "rejected.jsonl", rejected)
    _check_share(root, rejected, len(records) + len(rejected), max_rejected_fraction)
    if not records:
        found = f"{len(rejected)} rejected, {len(skipped)} skipped as label maps"
        raise PrepareError(f"no usable image in the source ({found}); see {root}/rejected.jsonl and skipped.jsonl")
    before = {record.case: (record.group, record.split) for record in index.records}
    now = {record.case: (record.group, record.split) for record in records}
    num_new = len(made)
    records.sort(key=lambda record: record.case)
    if not index.is_whole or records != index.records:  # to write ten thousand lines takes seconds
        write_index(root, records)
    _write_targets(root, records)
    if prune:
        _prune(root, {record.folder for record in stored})
    return PrepareSummary(
        root=root,
        num_cases=len(records),
        num_new=num_new,
        num_rejected=len(rejected),
        num_skipped=len(skipped),
        num_moved=sum(before.get(case, where) != where for case, where in now.items()),
        num_removed=len(before.keys() - now.keys()),
        rejected=[{key: row[key] for key in ("case", "file", "reason")} for row in rejected],
    )


def _placed(record: Record, case: Case) -> Record:
    """Return the record with the group and the split of its case."""
    kept = (record.group, record.split) == (case.group, case.split)
    return record if kept else replace(record, group=case.group, split=case.split)


def _write_label_names(root: Path, source: Source) -> None:
    """Write the names of label values and the ignored value; no file where the source knows neither."""
    names: dict[int, str] = getattr(source, "label_names", dict)()
    ignored: int | None = getattr(source, "ignored_label", lambda: None)()
    path = root / LABELS
    if names or ignored is not None:
        known = {"names": {str(value): names[value] for value in sorted(names)}, "ignore": ignored}
        write_text(path, json.dumps(sealed(known), indent=1) + "\n")
    elif path.exists():
        path.unlink()


def _write_targets(root: Path, records: Sequence[Record]) -> None:
    """Write `targets.csv`, the known numbers of each subject; no file where there are none."""
    known = {record.case: dict(record.targets) for record in records if record.targets}
    if known:
        names = list(dict.fromkeys(name for targets in known.values() for name in targets))
        lines = [[case, *(repr(targets.get(name, float("nan"))) for name in names)] for case, targets in known.items()]
        write_text(root / TARGETS, "".join(",".join(line) + "\n" for line in [["case", *names], *lines]))
    else:
        (root / TARGETS).unlink(missing_ok=True)


def _prune(root: Path, folders: Collection[str]) -> None:
    """Remove all other folders of cases; the index names none of them any more."""
    for folder in root.glob("*.zarr"):
        if folder.name not in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _same_channels(records: Sequence[Record]) -> tuple[list[Record], list[dict[str, str]]]:
    """Return records with the usual number of channels, and the others as rejected rows, as batches need one number."""
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
    """Raise a PrepareError where too many cases are rejected, after writing `rejected.jsonl`."""
    if len(rejected) > max_rejected_fraction * total:
        write_lines(root / "rejected.jsonl", rejected)
        share = f"{len(rejected)} of {total} cases are rejected, more than max_rejected_fraction"
        ways = "repair the files, or raise max_rejected_fraction (finished cases are kept)"
        heading, where = f"{share}={max_rejected_fraction:g}", f"see {root / 'rejected.jsonl'}; {ways}"
        raise PrepareError("\n".join([heading, *_listed(rejected), where]))


def _listed(rows: list[dict[str, str]]) -> list[str]:
    lines = [f"  {row['file']}: {row['reason']}" for row in sorted(rows, key=lambda r: r["file"])[:NUM_LISTED]]
    return lines + ([f"  ... and {len(rows) - NUM_LISTED} more"] if len(rows) > NUM_LISTED else [])


def _tell(heading: str, rows: list[dict[str, str]]) -> None:
    print("\n".join([heading, *_listed(rows)]), file=sys.stderr, flush=True)
