"""The preparation of one case: read, measure and store it, in any process."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from medssl.data.cases import Case
from medssl.data.fingerprints import Contents, Looks
from medssl.data.formats import NO_MEMORY, ReadError
from medssl.data.measurements import measure, resampled
from medssl.data.reading import LabelMapError, check_sides
from medssl.data.store import Record
from medssl.data.store_writer import write_case
from medssl.data.volume import (
    BODY_RECIPE,
    draw_points,
    find_body,
    resample_label,
    voxel_hash,
)

LEAST_BODY = 0.01
"""Share of the volume below which a body is doubtful."""


@dataclass(frozen=True)
class Job:
    """One case and the settings of its preparation; a fingerprint of None is not known yet."""

    case: Case
    root: Path
    fingerprint: str | None
    channels: str | int | None
    spacing_mm: tuple[float, ...] | None
    min_side_voxel: int
    modality: tuple[str, ...] | None = None
    checksums: bool = False

    def __str__(self) -> str:
        return f"{self.case.case} ({self.case.image})"


@dataclass(frozen=True)
class Outcome:
    """The result for one case: `kind` is done, rejected or skipped.

    An outcome with a fingerprint is valid as long as the case has this fingerprint. A case that is done has its record.
    `looks` are those at its files, where they had to be read.
    """

    case: str
    kind: str
    file: str = ""
    reason: str = ""
    fingerprint: str = ""
    record: Record | None = None
    looks: Looks = field(default_factory=dict)

    def row(self) -> dict[str, str]:
        """Return the line in `rejected.jsonl` or `skipped.jsonl`."""
        row = {"case": self.case, "file": self.file, "reason": self.reason}
        return {**row, "fingerprint": self.fingerprint} if self.fingerprint else row


def prepare_case(job: Job) -> Outcome:
    """Read, measure and store one case; a problem with it becomes an outcome, not an exception."""
    contents = Contents()
    if job.fingerprint is None:
        job = replace(job, fingerprint=job.case.fingerprint(contents))
    return replace(_prepared(job), looks=contents.looks)


def _prepared(job: Job) -> Outcome:
    case, fingerprint = job.case, job.fingerprint or ""
    try:
        volume, label = case.read(channels=job.channels, min_side_voxel=job.min_side_voxel)
        digest = voxel_hash(volume.array)
        try:
            measured = measure(volume, setting=job.modality, source=case.modality, chosen=job.channels)
        except ValueError as error:
            raise ReadError(case.image, str(error)) from error
        if job.spacing_mm is not None:
            label = None if label is None else resample_label(label, volume, job.spacing_mm)
            measured = resampled(measured, job.spacing_mm)
            check_sides(case.image, measured.volume.shape, job.min_side_voxel)
    except ReadError as error:
        kind = "skipped" if isinstance(error, LabelMapError) else "rejected"
        lasting = fingerprint if error.lasting else ""
        return Outcome(case.case, kind, str(error.path), error.reason, lasting)
    except MemoryError:
        return Outcome(case.case, "rejected", str(case.image), NO_MEMORY)
    volume, doubts = measured.volume, list(measured.doubts)
    body, mask, factor = find_body(
        volume,
        modality=measured.modality[0],
        threshold_hu=BODY_RECIPE["threshold_hu"],
        copy_spacing_mm=BODY_RECIPE["copy_spacing_mm"],
    )
    if mask.mean() < LEAST_BODY:
        doubts.append(f"the body is {100 * mask.mean():.2g} % of the volume")
    points = draw_points(
        mask,
        label,
        factor=factor,
        shape=volume.shape,
        case=case.case,
        num_body_points=int(BODY_RECIPE["num_body_points"]),
        num_label_points=int(BODY_RECIPE["num_label_points"]),
    )
    record = write_case(
        job.root,
        case=case.case,
        volume=volume,
        label=label,
        modality=measured.modality,
        modality_from=measured.modality_from,
        group=case.group,
        split=case.split,
        statistics=measured.statistics,
        padding=measured.padding,
        doubts=doubts,
        body=body,
        points=points,
        voxel_hash=digest,
        source=str(case.image),
        left_out=volume.left_out,
        targets=case.targets(volume, label),
        fingerprint=fingerprint,
        checksums=job.checksums,
    )
    return Outcome(case.case, "done", record=record)
