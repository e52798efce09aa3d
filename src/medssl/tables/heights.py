"""Heights on a common scale, which another program found: the derived table `heights`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from medssl.data.store import VolumeStore
from medssl.tables.case_numbers import digest, read_case_numbers
from medssl.tables.derived import Table

COLUMNS = ("z_mm", "score")


@dataclass(frozen=True, kw_only=True)
class Heights:
    """The heights that each case shows, from a file that a body-part regression or a person made.

    Table: `points_voxel` (row, 3) float32, on the line through the middle of the volume, and `features` (row, 1)
    float32, the score there, sorted upwards. All cases have equally many rows: the last row may be repeated.

    Args:
        file: CSV with columns case, z_mm and score, at least two rows per case. `z_mm` is the RAS position of the file
            that the case was prepared from; scores rise with it, and equal scores mean equal heights in all cases.
            Rows of other cases are ignored.
    """

    file: str | Path | None

    @property
    def name(self) -> str:
        """The name `heights`."""
        return "heights"

    def check(self) -> None:
        """Read the file once, before any work."""
        _ = self.rows

    @property
    def rows(self) -> Mapping[str, Float64[np.ndarray, "row 2"]]:
        """Return the positions and scores of each case in the file.

        Raises:
            ValueError: There is no such file or column, or the rows of a case do not form a height scale.
        """
        if self.file is None:
            raise ValueError("derive what=heights needs file=FILE.csv with the columns case, z_mm and score")
        return _read(Path(self.file).expanduser())

    def recipe(self) -> dict[str, Any]:
        """Return a digest of the file's numbers, independent of the order of its rows."""
        return {"rows": digest(self.rows)}

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the points and their scores."""
        record, rows = store.record(case), self.rows
        if record.case not in rows:
            lacking = [other.case for other in store.records() if other.case not in rows]
            shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            raise ValueError(f"{self.file} has no row of case {shown}; every case of {store.root} needs heights")
        z_mm, score = rows[record.case].T
        middle = (np.array(record.shape, dtype=np.float64) - 1) / 2
        matrix = record.volume_to_mm
        if matrix[2, 2] <= 0:
            raise ValueError(f"case {record.case}: the axis z of the store does not run upwards; prepare it again")
        base = matrix[2, :2] @ middle[:2] + matrix[2, 3]
        z_voxel = (z_mm - base) / matrix[2, 2]
        points = np.column_stack([np.broadcast_to(middle[:2], (len(z_voxel), 2)), z_voxel])
        missing = max(map(len, rows.values())) - len(points)
        points = np.pad(points, ((0, missing), (0, 0)), mode="edge")
        return {"points_voxel": points.astype(np.float32), "features": _column(score, missing)}

    def quality(self, table: Table) -> dict[str, float]:
        """Return the number of rows, and the lowest and highest score."""
        score, z_voxel = table["features"][:, 0], table["points_voxel"][:, 2]
        return {"rows": float(len(np.unique(z_voxel))), "lowest": float(score[0]), "highest": float(score[-1])}


def _column(score: Float64[np.ndarray, " row"], missing: int) -> np.ndarray:
    return np.pad(score, (0, missing), mode="edge").astype(np.float32)[:, None]


@lru_cache(maxsize=1)
def _read(path: Path) -> Mapping[str, Float64[np.ndarray, "row 2"]]:
    tables = {case: rows[np.lexsort(rows.T[::-1])] for case, rows in read_case_numbers(path, COLUMNS).items()}
    for case, table in tables.items():
        if len(table) < 2 or np.diff(table, axis=0).min() <= 0:
            raise ValueError(
                f"{path}: case {case} needs at least two rows whose z_mm differ and whose score rises with z_mm; "
                "smooth noisy scores, and turn a scale round that falls from feet to head"
            )
    return tables
