"""The source of phantom cases, which are drawn, not read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from medssl.data.cases import Case, Scan
from medssl.data.fingerprints import Contents
from medssl.data.volume import Volume
from medssl.phantoms.emphysema import VERSION as EMPHYSEMA_VERSION
from medssl.phantoms.emphysema import draw_severity, low_attenuation
from medssl.phantoms.torso import LABELS, VERSION, draw_phantom


@dataclass(frozen=True)
class PhantomCase(Case):
    """A phantom case, which is computed, not read."""

    size_voxel: tuple[int, int, int] = (96, 96, 96)
    spacing_mm: float = 4.0
    seed: int = 0
    emphysema: bool = False

    @property
    def has_label(self) -> bool:
        """True: phantoms always have a label map."""
        return True

    def fingerprint(self, contents: Contents) -> str:
        """Return a hash of the settings of the drawing; there are no files."""
        facts = [self.size_voxel, self.spacing_mm, self.seed, *(["emphysema"] if self.emphysema else [])]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def problem(self) -> None:
        """Return None, because a phantom has no problems."""

    def read(
        self, *, channels: str | int | None, min_side_voxel: int
    ) -> tuple[Volume, Int[np.ndarray, "x y z"] | None]:
        """Return the torso of this seed and its organs."""
        return draw_phantom(self.seed, size_voxel=self.size_voxel, spacing_mm=self.spacing_mm, emphysema=self.emphysema)

    def targets(self, volume: Volume, label: Int[np.ndarray, "x y z"] | None) -> dict[str, float]:
        """Return, with emphysema, the severity drawn and `laa950`, the share of the lungs below -950 HU."""
        if not self.emphysema or label is None:
            return {}
        laa950 = low_attenuation(volume.array[0], label == LABELS["lungs"])
        return {"severity": draw_severity(self.seed), "laa950": laa950}


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Procedural torso CTs: `num_cases` subjects, the same for the same seed.

    With `emphysema` most of them have the disease.
    """

    num_cases: int = 32
    size_voxel: int | Sequence[int] = 96
    spacing_mm: float = 4.0
    seed: int = 0
    emphysema: bool = False

    def recipe(self) -> dict[str, Any]:
        """Return all parameters, and the version of the drawing."""
        own = {"num_cases": self.num_cases, "spacing_mm": float(self.spacing_mm), "seed": self.seed}
        own |= {"emphysema": EMPHYSEMA_VERSION} if self.emphysema else {}
        return {"kind": "phantoms", "version": VERSION, "size_voxel": list(self._size()), **own}

    def label_names(self) -> dict[int, str]:
        """Return the names of the organs of the atlas."""
        return {value: name for name, value in LABELS.items()}

    def scan(self) -> Scan:
        """Return one case per subject."""
        scan, size = Scan(), self._size()
        for number in range(self.num_cases):
            name, seed = f"phantom_{number:04d}", self.seed * 1_000_003 + number
            case = PhantomCase(name, Path(name), group="phantoms", modality="ct", size_voxel=size, seed=seed)
            scan.cases.append(replace(case, spacing_mm=float(self.spacing_mm), emphysema=self.emphysema))
        return scan

    def _size(self) -> tuple[int, int, int]:
        size = [self.size_voxel] * 3 if isinstance(self.size_voxel, int) else list(self.size_voxel)
        if len(size) != 3 or min(size) < 8 or self.num_cases < 1:
            raise ValueError(
                f"phantoms need three sides of 8 voxels or more and num_cases >= 1, got {size}, {self.num_cases}"
            )
        x, y, z = (int(n) for n in size)
        return x, y, z
