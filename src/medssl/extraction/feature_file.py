"""The file of the features of a store's subjects: one per location and a pooled one, with the names of the cases."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped

from medssl.data.atomic import whole_file, write_text

FILE, CARD = "features.npz", "features.json"


@dataclass(frozen=True, eq=False)
class Features:
    """Features of `n` subjects at `location` places with `dim` numbers each.

    Args:
        case: Names of the subjects, as in their store.
        feature: The feature of each subject and location; NaN where a subject does not show the location.
        valid: Whether a subject shows a location.
        coordinate: Coordinates of the locations, in [-1, 1] along each axis, the same for all subjects.
        centre_mm: Centres of the locations in each subject, RAS mm.
        pooled: The mean over the locations that a subject shows.
        voxel_hash: Hash of the voxels of each subject as read; "" where it is not known.
    """

    case: Shaped[np.ndarray, " n"]
    feature: Float32[np.ndarray, "n location dim"]
    valid: Bool[np.ndarray, "n location"]
    coordinate: Float32[np.ndarray, "location 3"]
    centre_mm: Float32[np.ndarray, "n location 3"]
    pooled: Float32[np.ndarray, "n dim"]
    voxel_hash: Shaped[np.ndarray, " n"]

    @classmethod
    def of(
        cls, cases: Sequence[str], rows: Sequence[Mapping[str, Any]], *, coordinate: Float32[np.ndarray, "location 3"]
    ) -> "Features":
        """Return the features of several subjects, each with `feature`, `valid`, `centre_mm`, `voxel_hash`."""
        feature, valid, centre_mm = (np.stack([row[key] for row in rows]) for key in ("feature", "valid", "centre_mm"))
        total = np.where(valid[..., None], feature, 0).sum(1, dtype=np.float64)
        pooled = (total / valid.sum(1, keepdims=True)).astype(np.float32)
        hashes = np.array([str(row["voxel_hash"]) for row in rows])
        return cls(np.array(cases), feature, valid, coordinate, centre_mm, pooled, hashes)

    def of_location(self, location: int | None) -> Float32[np.ndarray, "n dim"]:
        """Return the features at a location, NaN where it is not shown, or the pooled ones.

        Raises:
            ValueError: There is no such location.
        """
        if location is None:
            return self.pooled
        if not 0 <= location < len(self.coordinate):
            raise ValueError(f"location={location} does not exist; there are {len(self.coordinate)}, from 0 on")
        return self.feature[:, location]

    def save(self, folder: Path, card: Mapping[str, Any]) -> None:
        """Write `features.npz`, then `features.json` with the card of their origin; each all or nothing."""
        with whole_file(folder / FILE) as partial, partial.open("wb") as stream:
            np.savez(stream, **{field.name: getattr(self, field.name) for field in fields(self)})
        write_text(folder / CARD, json.dumps(card, indent=1, sort_keys=True))


def load_features(path: str | Path) -> Features:
    """Return the features in a file, or in the folder that holds `features.npz`.

    Raises:
        ValueError: There is no such file, or it holds something else.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"there are no features at {file}; python -m medssl.features makes them")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            values = {field.name: arrays[field.name] for field in fields(Features) if field.name in arrays}
        values.setdefault("voxel_hash", np.full(len(values["case"]), ""))  # written before there was one
        return Features(**values)
    except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{file} is no file of features ({error}); python -m medssl.features makes them") from error


def read_feature_card(path: str | Path) -> dict[str, Any]:
    """Return the card that says what the features of a file or folder were made from; empty without `features.json`."""
    card = (Path(path) if Path(path).is_dir() else Path(path).parent) / CARD
    return json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
