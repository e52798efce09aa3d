"""Keypoints that another program found: the derived table `external_keypoints`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from medssl.data.geometry import apply
from medssl.data.store import VolumeStore
from medssl.tables.case_numbers import digest, read_case_numbers
from medssl.tables.derived import Table

POSITION, FEATURES = ("x_mm", "y_mm", "z_mm"), ("sigma_mm", "response")


@dataclass(frozen=True, kw_only=True)
class ExternalKeypoints:
    """Keypoints of each case from a file, the strongest first.

    Table: `points_voxel` (row, 3) float32, voxels of level 0, and `features` (row, 2) float32, sigma in mm and
    response. All cases have as many rows as the case with the most keypoints; unused rows are NaN.

    Args:
        file: CSV with columns case, x_mm, y_mm and z_mm, RAS positions in the file that the case was prepared from,
            and, where known, sigma_mm and response. Keypoints are sorted by the size of their response, or without one
            stay in the order of the file. A case without a row has no keypoints.
    """

    file: str | Path | None

    @property
    def name(self) -> str:
        """The name `external_keypoints`."""
        return "external_keypoints"

    def check(self) -> None:
        """Read the file once, before any work."""
        _ = self.rows

    @property
    def rows(self) -> Mapping[str, Float64[np.ndarray, "row 5"]]:
        """Return position, sigma and response of the keypoints of each case in the file, the strongest first.

        Raises:
            ValueError: There is no such file or column, or a cell is not a number.
        """
        if self.file is None:
            columns = ", ".join(("case", *POSITION))
            raise ValueError(f"derive what=external_keypoints needs file=FILE.csv with the columns {columns}")
        return _read(Path(self.file).expanduser())

    def recipe(self) -> dict[str, Any]:
        """Return a digest of the file's numbers."""
        return {"rows": digest(self.rows)}

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the points and their features."""
        if unknown := sorted(self.rows.keys() - {record.case for record in store.records()}):
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(f"{self.file} has rows of {shown}, which {store.root} does not hold; leave them out")
        record = store.record(case)
        rows = self.rows.get(record.case, np.empty((0, 5)))
        points = apply(record.mm_to_volume, rows[:, :3])
        is_outside = ((points < -0.5) | (points > np.array(record.shape) - 0.5)).any(axis=1)
        if is_outside.any():
            first = ", ".join(f"{value:g}" for value in rows[is_outside][0, :3])
            raise ValueError(
                f"{self.file}: {is_outside.sum()} of {len(rows)} points of case {record.case} lie outside of its "
                f"volume, the first at ({first}) mm; positions are RAS, so negate x and y of ITK's or DICOM's"
            )
        table = np.full((max(map(len, self.rows.values())), 5), np.nan, dtype=np.float32)
        table[: len(rows)] = np.column_stack([points, rows[:, 3:]])
        return {"points_voxel": table[:, :3], "features": table[:, 3:]}

    def quality(self, table: Table) -> dict[str, float]:
        """Return the number of keypoints."""
        return {"points": float(np.isfinite(table["points_voxel"][:, 0]).sum())}


@lru_cache(maxsize=1)
def _read(path: Path) -> Mapping[str, Float64[np.ndarray, "row 5"]]:
    found = read_case_numbers(path, POSITION, optional=FEATURES)
    return {case: rows[np.argsort(-np.abs(rows[:, 4]), kind="stable")] for case, rows in found.items()}
