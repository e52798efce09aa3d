"""A case to be prepared, and what a scan of a source found."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from medssl.data.formats import ReadError, stem
from medssl.data.reading import check_label_file, read_label, read_volume
from medssl.data.volume import Volume

OUTLINE_BYTES = 4096
"""Read at both ends of a file: they hold header and, behind compressed voxels, their checksum."""


@dataclass(frozen=True)
class Case:
    """One volume to be prepared.

    Attributes:
        case: unique and file-name safe.
        image: file, or folder of a DICOM series.
        label: its label map.
        group: cohort, or "".
        split: "train", "validation", "test", or "" where the source does not say.
        modality: "ct" or "mr" where the source says so for sure; None leaves it to the voxels.
        more_channels: files of the channels after the first.
        skip_label_maps: whether a volume that looks like a label map is no image.
    """

    case: str
    image: Path
    label: Path | None = None
    group: str = ""
    split: str = ""
    modality: str | None = None
    more_channels: tuple[Path, ...] = ()
    skip_label_maps: bool = False

    @property
    def has_label(self) -> bool:
        """Whether `read` gives a label map."""
        return self.label is not None

    def fingerprint(self) -> str:
        """A hash that changes when the case is to be made anew: files, their sizes and ends, the modality.

        No times enter, so that copies of the files on another machine or day give the same.
        """
        files = [self.image, *self.more_channels, *([] if self.label is None else [self.label])]
        facts = [self.has_label, self.modality, *([os.fsdecode(file), _outline(file)] for file in files)]
        return _hash(json.dumps(facts))[:32]

    def problem(self) -> tuple[Path, str] | None:
        """The file and the reason why the case cannot be read, as far as names and headers tell."""
        for file in (self.image, *self.more_channels):
            if not file.exists():
                return file, "the image file does not exist"
        if self.label is not None:
            if not self.label.exists():
                return self.label, "the label file does not exist"
            if reason := check_label_file(self.label, self.image):
                return self.label, reason
        return None

    def read(
        self, *, channels: str | int | None, min_side_voxel: int
    ) -> tuple[Volume, Int[np.ndarray, "x y z"] | None]:
        """The volume and its label map. Raises ReadError, and LabelMapError for a label map that is to be skipped."""
        files = (self.image, *self.more_channels)
        if len(files) > 1 and isinstance(channels, int):
            if channels >= len(files):
                raise ReadError(
                    self.image, f"data.channels={channels} is not there: the case has channels 0 to {len(files) - 1}"
                )
            files, channels = (files[channels],), None
        options: dict[str, Any] = {"channels": channels, "min_side_voxel": min_side_voxel}
        volume = read_volume(files[0], **options, skip_label_maps=self.skip_label_maps)
        if len(files) > 1:
            volume = _stack(volume, (read_volume(file, **options) for file in files[1:]))
        return volume, None if self.label is None else read_label(self.label, volume)

    def targets(self, volume: Volume, label: Int[np.ndarray, "x y z"] | None) -> dict[str, float]:
        """What is known of the subject as a number, by name; most sources know nothing."""
        return {}


@dataclass
class Scan:
    """What a source found: usable cases, files left out on purpose, and what is wrong (rows of file, case, reason)."""

    cases: list[Case] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    problems: list[dict[str, str]] = field(default_factory=list)

    def reject(self, file: object, case: str, reason: str) -> None:
        """Note a problem."""
        self.problems.append({"file": str(file), "case": case, "reason": reason})

    def skip(self, file: object, reason: str) -> None:
        """Note a file that is left out."""
        self.skipped.append({"file": str(file), "reason": reason})

    def checked(self, *, finished: Collection[Case] = ()) -> "Scan":
        """The scan with cases turned into problems where files are missing, labels do not fit, or names repeat.

        The files of `finished` cases are not looked at.
        """
        with ThreadPoolExecutor(8) as pool:
            reasons = list(pool.map(lambda case: None if case in finished else case.problem(), self.cases))
        checked = Scan([], self.skipped, list(self.problems))
        seen: dict[str, Case] = {}
        for case, reason in zip(self.cases, reasons, strict=True):
            twin = seen.setdefault(case.case.lower(), case)
            if twin is not case and twin.image == case.image:
                checked.reject(case.image, case.case, "listed twice; drop one of the entries")
            elif reason is not None:
                checked.reject(reason[0], case.case, reason[1])
            elif twin is not case:
                checked.reject(case.image, case.case, f"the case name is taken by {twin.image}; name cases apart")
            else:
                checked.cases.append(case)
        return checked


@runtime_checkable
class Source(Protocol):
    """What `prepare_store` needs of a source; one that knows what label values mean has `label_names()` as well."""

    def scan(self) -> Scan:
        """Find the cases."""

    def recipe(self) -> dict[str, Any]:
        """What a store made from this source depends on, as JSON values."""


def case_names(relative: Sequence[Path], root_name: str) -> list[str]:
    """Names from paths below the root: folders and stem joined by `__`, told apart by a hash where two agree."""
    plain = [file_name("__".join([*path.parts[:-1], stem(path)]) or root_name) for path in relative]
    count = Counter(name.lower() for name, _ in set(zip(plain, relative, strict=True)))
    return [
        name if count[name.lower()] == 1 else f"{name}-{_hash(path)[:8]}"
        for name, path in zip(plain, relative, strict=True)
    ]


def file_name(name: str) -> str:
    """The name with nothing in it that a file system dislikes, at most 120 characters long; "" stays "".

    A hash of the name is added where something had to change, so that other names do not end in the same.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    return safe if safe == name and len(safe) <= 120 else f"{safe[:111] or 'case'}-{_hash(name)[:8]}"


def _hash(text: str | Path) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def _outline(path: Path) -> list[Any]:
    """What changes with a file: size, and hash of both ends. Of a folder: names and sizes, and its first file."""
    try:
        if path.is_dir():
            files = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path) if entry.is_file())
            return [files, *(_outline(path / name) for name, _ in files[:1])]
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            ends = stream.read(OUTLINE_BYTES)
            stream.seek(max(len(ends), size - OUTLINE_BYTES))
            beside = [p for p in (path.with_suffix(s) for s in (".raw", ".zraw", ".raw.gz")) if p != path]
            detached = [p.stat().st_size for p in beside if path.suffix in (".mhd", ".nhdr") and p.is_file()]
            return [size, hashlib.sha256(ends + stream.read()).hexdigest(), *detached]
    except OSError as error:
        return [type(error).__name__]


def _stack(first: Volume, others: Iterable[Volume]) -> Volume:
    arrays = [first.array]
    for other in others:
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise ReadError(Path(other.source), f"the channel lies on another grid than {first.source}")
        arrays.append(other.array)
    return Volume(np.concatenate(arrays), first.affine, first.source)
