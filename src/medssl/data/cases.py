"""The cases that are to be prepared, and the scan of a source that finds them."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from medssl.data.fingerprints import Contents
from medssl.data.formats import ReadError, stem
from medssl.data.modality import by_channel
from medssl.data.reading import check_label_file, read_label, read_volume
from medssl.data.volume import Volume


@dataclass(frozen=True)
class Case:
    """One volume to be prepared.

    Attributes:
        case: Name of the case, unique and safe as a file name.
        image: Image file, or folder of a DICOM series.
        label: File of its label map.
        group: Cohort of the case, or "".
        split: "train", "validation" or "test", or "" where the source does not say.
        modality: Modality where the source states it, one of all channels or one of each (`ct+pet`, or a tuple that has
            None for what is not stated); None leaves the choice to header and voxels.
        more_channels: Files of the channels after the first.
        skip_label_maps: Whether to skip a volume that looks like a label map.
        assume_spacing_mm: Spacing along the axes of the files where their headers state none.
    """

    case: str
    image: Path
    label: Path | None = None
    group: str = ""
    split: str = ""
    modality: str | tuple[str | None, ...] | None = None
    more_channels: tuple[Path, ...] = ()
    skip_label_maps: bool = False
    assume_spacing_mm: tuple[float, ...] | None = None

    @property
    def has_label(self) -> bool:
        """Whether `read` returns a label map."""
        return self.label is not None

    def fingerprint(self, contents: Contents) -> str:
        """Return a hash that changes when the case must be prepared again: files, their contents, the modality.

        No times enter it, so copies of the files on another day give the same hash.
        """
        files = [self.image, *self.more_channels, *([] if self.label is None else [self.label])]
        facts = [self.has_label, self.modality, *([os.fsdecode(file), contents.of(file)] for file in files)]
        return _hash(json.dumps(facts))[:32]

    def problem(self) -> tuple[Path, str] | None:
        """Return the file and the reason why the case cannot be read, as far as names and headers show."""
        for file in (self.image, *self.more_channels):
            if not file.exists():
                return file, "the image file does not exist"
        if self.label is not None:
            if not self.label.exists():
                return self.label, "the label file does not exist"
            if reason := check_label_file(self.label, self.image, assume_spacing_mm=self.assume_spacing_mm):
                return self.label, reason
        return None

    def read(
        self, *, channels: str | int | None, min_side_voxel: int
    ) -> tuple[Volume, Int[np.ndarray, "x y z"] | None]:
        """Return the volume and its label map.

        Raises:
            ReadError: The volume or its label map cannot be read.
            LabelMapError: The volume is a label map that is to be skipped.
        """
        files = (self.image, *self.more_channels)
        if len(files) > 1 and isinstance(channels, int):
            if channels >= len(files):
                raise ReadError(
                    self.image, f"data.channels={channels} is not there: the case has channels 0 to {len(files) - 1}"
                )
            files, channels = (files[channels],), None
        spacing: dict[str, Any] = {"assume_spacing_mm": self.assume_spacing_mm}
        options = spacing | {"channels": channels, "min_side_voxel": min_side_voxel}
        volume = read_volume(files[0], **options, skip_label_maps=self.skip_label_maps)
        if len(files) > 1:
            volume = stacked(volume, (read_volume(file, **options) for file in files[1:]))
        return volume, None if self.label is None else read_label(self.label, volume, **spacing)

    def targets(self, volume: Volume, label: Int[np.ndarray, "x y z"] | None) -> dict[str, float]:
        """Return known numbers of the subject, by name; most sources know none."""
        return {}


@dataclass
class Scan:
    """The findings of a source: usable cases, skipped files, and problems (rows of file, case, reason)."""

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
        """Return the scan with cases turned into problems where files are missing, labels do not fit, or names repeat.

        The files of `finished` cases are not checked.
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
    """A source of cases for `prepare_store`.

    One that knows the names of label values has `label_names()` too, and one with a label that is no class, but stands
    for voxels of unknown class, has `ignored_label()`.
    """

    def scan(self) -> Scan:
        """Return the cases, the skipped files and the problems."""

    def recipe(self) -> dict[str, Any]:
        """Return all that a store made from this source depends on, as JSON values."""


def case_names(relative: Sequence[Path], root_name: str) -> list[str]:
    """Return names from paths below the root: folders and stem joined by `__`, with a hash where two agree."""
    plain = [file_name("__".join([*path.parts[:-1], stem(path)]) or root_name) for path in relative]
    count = Counter(name.lower() for name, _ in set(zip(plain, relative, strict=True)))
    return [
        name if count[name.lower()] == 1 else f"{name}-{_hash(path)[:8]}"
        for name, path in zip(plain, relative, strict=True)
    ]


def file_name(name: str) -> str:
    """Return the name with safe characters only, at most 120 characters long; "" stays "".

    A changed name gets a hash of the original, so that different names stay different.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    return safe if safe == name and len(safe) <= 120 else f"{safe[:111] or 'case'}-{_hash(name)[:8]}"


def _hash(text: str | Path) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()


def stacked(first: Volume, others: Iterable[Volume]) -> Volume:
    """Return the channels of several files as one volume, with what each header states and what lay beside each."""
    volumes = [first]
    for other in others:
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise ReadError(Path(other.source), f"the channel lies on another grid than {first.source}")
        volumes.append(other)
    return replace(
        first,
        array=np.concatenate([volume.array for volume in volumes]),
        stated_modality=tuple(word for v in volumes for word in by_channel(v.stated_modality, v.num_channels)),
        left_out=tuple(row for volume in volumes for row in volume.left_out),
        doubts=tuple(dict.fromkeys(doubt for volume in volumes for doubt in volume.doubts)),
    )
