"""A case to be prepared, and what a scan of a source found."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from medssl.data.formats import ReadError, stem
from medssl.data.phantoms import draw_phantom
from medssl.data.reading import check_label_file, looks_like_label_map, read_label, read_volume
from medssl.data.volume import Volume


class LabelMapError(ReadError):
    """A label map among the images of a folder: skipped, not rejected."""


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
        volume = read_volume(files[0], channels=channels, min_side_voxel=min_side_voxel)
        if self.skip_label_maps and looks_like_label_map(volume.array):
            raise LabelMapError(
                self.image, "few whole values in pieces: a label map (data.include_labels=true reads it as an image)"
            )
        if len(files) > 1:
            volume = _stack(
                volume, [read_volume(f, channels=channels, min_side_voxel=min_side_voxel) for f in files[1:]]
            )
        return volume, None if self.label is None else read_label(self.label, volume)


@dataclass(frozen=True)
class PhantomCase(Case):
    """A case that is computed, not read."""

    size_voxel: tuple[int, int, int] = (96, 96, 96)
    spacing_mm: float = 4.0
    seed: int = 0

    @property
    def has_label(self) -> bool:
        """Phantoms always have one."""
        return True

    def read(
        self, *, channels: str | int | None, min_side_voxel: int
    ) -> tuple[Volume, Int[np.ndarray, "x y z"] | None]:
        """The torso of this seed and its organs."""
        return draw_phantom(self.seed, size_voxel=self.size_voxel, spacing_mm=self.spacing_mm)


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

    def checked(self) -> "Scan":
        """The scan with cases turned into problems where files are missing, labels do not fit, or names repeat."""
        with ThreadPoolExecutor(8) as pool:
            reasons = list(pool.map(_what_is_wrong, self.cases))
        seen: dict[str, Case] = {}
        good = []
        for case, reason in zip(self.cases, reasons, strict=True):
            twin = seen.setdefault(case.case.lower(), case)
            if reason is not None:
                self.reject(reason[0], case.case, reason[1])
            elif twin is not case:
                self.reject(case.image, case.case, f"the case name is taken by {twin.image}; name cases apart")
            else:
                good.append(case)
        return Scan(good, self.skipped, self.problems)


@runtime_checkable
class Source(Protocol):
    """What `prepare_store` needs of a source."""

    def scan(self) -> Scan:
        """Find the cases."""

    def recipe(self) -> dict[str, Any]:
        """What a store made from this source depends on, as JSON values."""


def case_names(relative: Sequence[Path], root_name: str) -> list[str]:
    """Names from paths below the root: folders and stem joined by `__`, told apart by a hash where two agree."""
    plain = [file_name("__".join([*path.parts[:-1], stem(path)]) or root_name) for path in relative]
    count = Counter(name.lower() for name in plain)
    return [
        name if count[name.lower()] == 1 else f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        for name, path in zip(plain, relative, strict=True)
    ]


def file_name(name: str) -> str:
    """The name with nothing in it that a file system dislikes, at most 120 characters long."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip(".-")
    return safe if len(safe) <= 120 else f"{safe[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _stack(first: Volume, others: Iterable[Volume]) -> Volume:
    arrays = [first.array]
    for other in others:
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
            raise ReadError(Path(other.source), f"the channel lies on another grid than {first.source}")
        arrays.append(other.array)
    return Volume(np.concatenate(arrays), first.affine, first.source)


def _what_is_wrong(case: Case) -> tuple[Path, str] | None:
    for file in (case.image, *case.more_channels):
        if not file.exists():
            return file, "the image file does not exist"
    if case.label is not None:
        if not case.label.exists():
            return case.label, "the label file does not exist"
        if reason := check_label_file(case.label, case.image):
            return case.label, reason
    return None
