"""The features of a store by an encoder: one per location and subject, pooled ones, and maps."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from tqdm import tqdm

from medssl.building import build_network
from medssl.checks import triple
from medssl.config import config_dir
from medssl.data.atomic import alone_in, clear_partial, whole_file, write_text
from medssl.data.augment import ByModality
from medssl.data.geometry import apply
from medssl.data.placements import GridCrop, Locations
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.data.view_notes import other_size
from medssl.extraction.embedder import reading_of
from medssl.extraction.feature_file import CARD, FILE, Features
from medssl.extraction.patch_encoder import (
    CellGrid,
    PatchEncoder,
    coordinate_at,
    measure_batch_norm,
    reading_recipe,
)
from medssl.extraction.settings import FeatureSettings
from medssl.inference.device import find_device
from medssl.inference.files import save_image
from medssl.inference.reading import Reading
from medssl.weights import encoder_recipe, load_encoder, read_card

DEFAULT_GRID = (3, 3, 3)
MEASURED_CASES = 8
"""Cases over which the batch norms of an untrained network are measured."""


@dataclass(frozen=True)
class Extraction:
    """The checked plan of an extraction, with the encoder on its device.

    Args:
        encoder: The encoder of patches.
        locations: The locations of a subject's patches.
        folder: Folder of the results.
        overwrite: Whether features that exist are made again.
        stride_voxel: Steps between the patches of a map; None for no maps.
        untrained: Seed of random weights; None for those of the file.
        origin: All that the features follow from besides the store, as JSON values.
    """

    encoder: PatchEncoder
    locations: GridCrop
    folder: Path
    overwrite: bool
    stride_voxel: tuple[int, int, int] | None
    untrained: int | None
    origin: Mapping[str, Any]

    @classmethod
    def of(cls, settings: FeatureSettings) -> "Extraction":
        """Return the extraction that settings ask for.

        Raises:
            ValueError: The weight file is wrong, or does not go with the settings.
        """
        path, device = settings.weights, find_device(settings.device)
        modules, layout, branch = settings.allow_modules, settings.layout, settings.branch
        card = read_card(path) if settings.layout is None else {}
        reading = _reading(settings, card)
        if settings.untrained is None:
            network = load_encoder(path, layout=layout, branch=branch, allow_modules=modules)
        else:
            torch.manual_seed(settings.untrained)
            network = build_network(encoder_recipe(path, layout=layout, branch=branch), allow_modules=modules).eval()
        if getattr(network, "spatial_dims", 3) == 2:
            raise ValueError(
                f"{path} holds an encoder of slices, and features are of volumes; medssl.load_encoder gives it to "
                "your own code, and fine-tuning makes a network for volumes of it"
            )
        locations = _locations(settings, card, reading)
        x, y, z = (max(1, side // 2) for side in reading.crop_voxel)
        stride = (settings.stride_voxel or (x, y, z)) if settings.dense else None
        origin = {
            "weights": {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "layout": layout, "branch": branch},
            "untrained": settings.untrained,
            "reading": reading_recipe(reading),
            "locations": {"table": locations.table, "grid": locations.grid, "within": locations.within},
            "stride_voxel": stride,
        }
        return cls(
            encoder=PatchEncoder(network.to(device), reading, device, settings.batch_size),
            locations=locations,
            folder=settings.output_dir,
            overwrite=settings.overwrite,
            stride_voxel=stride,
            untrained=settings.untrained,
            origin=json.loads(json.dumps(origin)),
        )

    def claim(self, store: VolumeStore) -> dict[str, Any]:
        """Make the folder, emptied with `overwrite`, and return all that the features of the store follow from.

        Raises:
            ValueError: The folder holds features that follow from something else.
        """
        table = self.locations.table
        recipe = _table_of(store, table).parent.name if table else None
        origin = {**self.origin, "store": str(store.root.resolve()), "table": recipe}
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output_dir={self.folder} is a file; name a folder")
        card = self.folder / CARD
        found = json.loads(card.read_text(encoding="utf-8"))["origin"] if card.is_file() else None
        if self.overwrite:
            for file in (FILE, CARD):
                (self.folder / file).unlink(missing_ok=True)
            for part in ("cases", "dense"):
                shutil.rmtree(self.folder / part, ignore_errors=True)
        elif found is not None and (changed := [key for key, value in origin.items() if found.get(key) != value]):
            raise ValueError(
                f"{self.folder} holds features made with another {' and another '.join(changed)}; give another "
                "output_dir, or replace them by overwrite=true"
            )
        elif found is None and (self.folder / FILE).exists():
            raise ValueError(f"{self.folder / FILE} lies there without its {CARD}; give another output_dir")
        (self.folder / "cases").mkdir(parents=True, exist_ok=True)
        if self.stride_voxel:
            (self.folder / "dense").mkdir(exist_ok=True)
        write_text(card, json.dumps({"origin": origin}, indent=1, sort_keys=True))
        return origin


def extract_all(extraction: Extraction, store: VolumeStore) -> int:
    """Make the features that the cases of the store lack, and their file; return the number of cases that failed.

    Raises:
        ValueError: `Extraction.claim` refuses the folder, or no case has features.
    """
    origin, failed, made = extraction.claim(store), {}, 0
    if (note := _other_size(extraction, store)) is not None:
        print(f"warning: {note}", file=sys.stderr)
    with alone_in(extraction.folder):
        for part in ("", "cases", "dense"):
            clear_partial(extraction.folder / part)
        if extraction.untrained is not None:
            measure_batch_norm(extraction.encoder, _first_patches(extraction, store))
        rows: dict[str, Mapping[str, np.ndarray]] = {}
        bar = tqdm(store.names, desc="features", unit=" cases", mininterval=0.1 if sys.stderr.isatty() else 30)
        for case, name in enumerate(bar):
            try:
                known = _locations_of(extraction, store, case)
                row = _finished(extraction, store, case, known)
                if row is None:
                    row, made = _extract(extraction, store, case, known), made + 1
                first = next(iter(rows.values()), row)
                if not np.array_equal(first["coordinate"], row["coordinate"]):
                    raise ValueError("its table has other locations than that of the first case; derive them together")
                rows[name] = row
            except ValueError as error:
                failed[name] = str(error)
                bar.write(f"error: {name}: {error}", file=sys.stderr)
        if not rows:
            raise ValueError(f"none of the {len(store)} cases of {store.root} has features")
        coordinate = next(iter(rows.values()))["coordinate"]
        features = Features.of(list(rows), list(rows.values()), coordinate=coordinate)
        versions = {package: version(package) for package in ("medssl", "torch", "numpy")}
        features.save(extraction.folder, {"origin": origin, "failed": failed, "versions": versions})
    n, num_locations, dim = features.feature.shape
    shown = features.valid.mean()
    print(f"{n} subjects ({made} new), {num_locations} locations ({shown:.0%} shown), {dim} numbers each")
    print(f"-> {extraction.folder / FILE}" + (f" and {extraction.folder / 'dense'}" * bool(extraction.stride_voxel)))
    return len(failed)


def _extract(extraction: Extraction, store: VolumeStore, case: int, known: Locations) -> dict[str, np.ndarray]:
    """Return the features of a case; they are written to a file of their own, so that a stopped run can continue.

    The map of the case is written before.
    """
    record, encoder = store.record(case), extraction.encoder
    if not known.valid.any():
        raise ValueError("it shows none of the locations")
    try:
        if extraction.stride_voxel:
            _write_map(extraction, store, case, known)
        found = encoder(
            store, case, centers_voxel=known.center_voxel[known.valid], coordinate=known.coordinate[known.valid]
        )
        shown = np.concatenate(list(found))
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise ValueError("it does not fit into memory; batch_size=1 needs least") from None
    feature = np.full((len(known.valid), shown.shape[1]), np.nan, dtype=np.float32)
    feature[known.valid] = shown
    row: dict[str, Any] = {
        "feature": feature,
        "valid": known.valid,
        "coordinate": known.coordinate.astype(np.float32),
        "centre_mm": apply(record.volume_to_mm, known.center_voxel).astype(np.float32),
        "voxel_hash": np.array(record.voxel_hash),
        "locations_hash": np.array(_digest(known)),
    }
    with whole_file(_file_of(extraction, record.case)) as partial, partial.open("wb") as stream:
        np.savez(stream, **row)
    return row


def _finished(extraction: Extraction, store: VolumeStore, case: int, known: Locations) -> dict[str, np.ndarray] | None:
    """Return the features of a case that an earlier run made from the same voxels at the same locations."""
    record = store.record(case)
    file = _file_of(extraction, record.case)
    if not file.is_file() or (extraction.stride_voxel and not _map_of(extraction, record.case).is_file()):
        return None
    with np.load(file) as arrays:
        row = dict(arrays)
    made_from = [str(row.get(name, "")) for name in ("voxel_hash", "locations_hash")]
    return row if made_from == [record.voxel_hash, _digest(known)] else None


def _digest(known: Locations) -> str:
    """Return a hash of the places and coordinates of a case, whose table may be derived again on another reference."""
    arrays = [known.center_voxel, known.coordinate, known.valid]
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[:16]


def _write_map(extraction: Extraction, store: VolumeStore, case: int, known: Locations) -> None:
    """Write `dense/CASE.nii.gz`: the features of patches at every stride, the channels along the fourth axis."""
    import nibabel

    record, encoder = store.record(case), extraction.encoder
    grid = CellGrid.over(record, encoder.step_voxel(record) * np.array(extraction.stride_voxel))
    centers = grid.centers_voxel
    coordinate = coordinate_at(centers, centers_voxel=known.center_voxel, coordinate=known.coordinate)
    found = np.concatenate(list(encoder(store, case, centers_voxel=centers, coordinate=coordinate)))
    image = nibabel.Nifti1Image(  # type: ignore[attr-defined]
        found.reshape(*grid.shape, -1), record.volume_to_mm @ grid.cell_to_voxel
    )
    image.header.set_xyzt_units("mm")
    save_image(_map_of(extraction, record.case), image)


def _locations_of(extraction: Extraction, store: VolumeStore, case: int) -> Locations:
    try:
        return extraction.locations.locations(Scene(store, Request((case,), 0)))
    except FileNotFoundError as error:
        raise ValueError(f"it has no table {extraction.locations.table!r} ({error.filename}); derive again") from error


def _table_of(store: VolumeStore, name: str) -> Path:
    """Return the first file of a derived table.

    Raises:
        ValueError: There is no such table.
    """
    folder = store.root / "derived"
    if not (folder / f"{name}.json").is_file() and not (config_dir() / "what" / f"{name}.yaml").is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
        raise ValueError(f"{store.root} has no table {name!r} for locations=TABLE; it has {there}")
    return store.derived_file(name, 0)


def _other_size(extraction: Extraction, store: VolumeStore) -> str | None:
    try:
        return other_size(extraction.locations, store)
    except FileNotFoundError:  # the first case has no table, which is reported with its name
        return None


def _first_patches(
    extraction: Extraction, store: VolumeStore
) -> Iterator[tuple[Float32[torch.Tensor, "batch c x y z"], np.ndarray]]:
    """Return the patches of the first cases, with their coordinates."""
    for case in range(min(MEASURED_CASES, len(store))):
        known = _locations_of(extraction, store, case)
        for part, patches in extraction.encoder.batches(store, case, known.center_voxel[known.valid]):
            yield patches, known.coordinate[known.valid][part]


def _file_of(extraction: Extraction, case: str) -> Path:
    return extraction.folder / "cases" / f"{case}.npz"


def _map_of(extraction: Extraction, case: str) -> Path:
    return extraction.folder / "dense" / f"{case}.nii.gz"


def _reading(settings: FeatureSettings, card: Mapping[str, Any]) -> Reading:
    """Return how patches are read: by the card or the layout, with the changes of the settings."""
    layout, size, spacing_mm, window_hu = settings.layout, settings.size_voxel, settings.spacing_mm, settings.window_hu
    if layout is None and card.get("kind") == "segmenter":
        reading = Reading.from_card(card["reading"], allow_modules=settings.allow_modules)
    elif layout is None:
        reading = reading_of(card, source=str(settings.weights), allow_modules=settings.allow_modules)
    elif (published := Reading.from_layout(layout)) is not None:
        reading = published
    elif size is None or spacing_mm is None or window_hu is None:
        raise ValueError(
            f"weights.layout={layout} does not say how images are read; give size_voxel, spacing_mm and window_hu"
        )
    else:
        reading = Reading(spacing_mm="native", crop_voxel=(1, 1, 1))
    if size is not None:
        reading = replace(reading, crop_voxel=size)
    if spacing_mm is not None:
        reading = replace(reading, spacing_mm=spacing_mm)
    if window_hu is not None:
        reading = replace(reading, normalise=(ByModality(window_hu=window_hu),))
    return reading


def _locations(settings: FeatureSettings, card: Mapping[str, Any], reading: Reading) -> GridCrop:
    """Return the locations of the settings, else those of the first group of the card's views that has any."""
    table, grid, within = settings.table, settings.grid, "body"
    if table is None and grid is None:
        views = card.get("reading", {}).get("views", {}).get("groups", {})
        stated = [view for view in views.values() if view.get("grid") or view.get("table")]
        group: Mapping[str, Any] = stated[0] if stated else {"grid": DEFAULT_GRID}
        table, grid, within = group.get("table"), group.get("grid"), group.get("within", within)
    cells = None if grid is None else list(triple("grid", grid))
    return GridCrop(size=reading.crop_voxel, spacing_mm=reading.spacing_mm, grid=cells, table=table, within=within)
