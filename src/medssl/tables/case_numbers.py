"""Numbers of each case that a table from outside the store holds."""

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from medssl.data.sources import read_table


def read_case_numbers(
    path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, Float64[np.ndarray, "row column"]]:
    """Return the rows of each case in the order of the file, with a value for each of `columns` and `optional`.

    Optional columns that the file does not have are NaN. Cells of all others must be finite numbers.

    Args:
        path: File of a table that `read_table` can read, with the column `case` too.
        columns: Columns that the table must have.
        optional: Columns that the table may have.

    Raises:
        ValueError: There is no such file, column or row, or a cell is not a number.
    """
    if not path.is_file():
        raise ValueError(f"there is no table {path}")
    if not (rows := read_table(path)):
        raise ValueError(f"{path} has no rows below its header")
    header = [name for name in next(iter(rows.values())) if name is not None]
    if absent := [name for name in ("case", *columns) if name not in header]:
        needed = ", ".join(("case", *columns))
        raise ValueError(f"{path} has no column {absent[0]!r}; it needs {needed}, and has {', '.join(header)}")
    found: dict[str, list[list[float]]] = {}
    for number, row in rows.items():
        values = [_number(row, name, f"{path}, line {number}") for name in columns]
        values += [_number(row, name, f"{path}, line {number}") if name in header else math.nan for name in optional]
        found.setdefault((row["case"] or "").strip(), []).append(values)
    return {case: np.array(values) for case, values in found.items()}


def digest(rows: Mapping[str, Float64[np.ndarray, "row column"]]) -> str:
    """Return a digest that is equal for equal rows of all cases, in any order of the cases."""
    return sha256(repr([(case, rows[case].tolist()) for case in sorted(rows)]).encode()).hexdigest()


def _number(row: dict[str, str], column: str, place: str) -> float:
    try:
        value = float(row[column] or "")
    except ValueError as error:
        raise ValueError(f"{place}: {column} must be a number, got {row[column]!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{place}: {column} must be finite, got {row[column]!r}")
    return value
