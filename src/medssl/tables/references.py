"""A reference volume and its subjects in the form for registration, and the files that stand for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np

from medssl.data.store import VolumeStore
from medssl.tables.anchors import AnchorTable
from medssl.tables.derived import read_coarse
from medssl.tables.registration import Affine, Coarse, coarse_volume

NUM_SIDE = 64
"""Least number of voxels of the reference's longest side in a registration, if the volume is that fine."""


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference in the form for registration. `whole` maps [0, 1]^3 to the faces of its volume in RAS mm."""

    anchors: AnchorTable
    coarse: Coarse
    whole: Affine
    spacing_mm: float


def coarse_case(store: VolumeStore, case: int, *, spacing_mm: float) -> Coarse:
    """Return a case of a store in the form for registration."""
    volume, _ = read_coarse(store, case, spacing_mm=spacing_mm)
    return coarse_volume(volume, modality=store.record(case).modality[0], spacing_mm=spacing_mm)


def whole_affine(affine: Affine, shape: tuple[int, ...]) -> Affine:
    """Return the map from [0, 1]^3 to RAS mm, onto the outer faces of a volume."""
    box = np.diag([*map(float, shape), 1.0])
    box[:3, 3] = -0.5
    return affine @ box


def file_of_case(store: VolumeStore, case: int, folder: str, ends: Sequence[str]) -> Path:
    """Return the file in `folder` with the name of a case and one of the endings.

    Raises:
        ValueError: There is no such file; the message counts all cases without one.
    """
    root = Path(folder).expanduser()

    def found(name: str) -> Path | None:
        return next((root / f"{name}{end}" for end in ends if (root / f"{name}{end}").is_file()), None)

    file = found(store.names[case])
    if file is None:
        missing = [name for name in store.names if found(name) is None]
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{folder} has no file for {len(missing)} of {len(store)} cases ({listed}); a file is called CASE{ends[0]}"
        )
    return file


def copy_spacing_of(shape: tuple[int, ...], affine: Affine, spacing_mm: float) -> float:
    """Return the spacing at which a reference of these sides is registered: `spacing_mm`, or finer if it is small."""
    sides_mm = np.array(shape) * np.linalg.norm(affine[:3, :3], axis=0)
    return min(spacing_mm, float(sides_mm.max()) / NUM_SIDE)


def digest_of(path: Path) -> str:
    """Return a digest of a file's content; a folder (of a DICOM series) is known by names, sizes and times."""
    return folder_digest(path) if path.is_dir() else _file_digest(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _file_digest(path: Path, time_ns: int) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """Return a digest of the files of a folder: their names, sizes and times."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return sha256(repr(files).encode()).hexdigest()[:16]
