"""Places of one reference's locations in every subject: the derived table `locations`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medssl.checks import choice
from medssl.data.formats import IMAGE_SUFFIXES, open_image, reasons_for
from medssl.data.geometry import apply
from medssl.data.measurements import measure
from medssl.data.reading import read_volume
from medssl.data.store import VolumeStore
from medssl.tables.anchors import (
    NORMS,
    PATCH_ANCHORS,
    AnchorTable,
    atlas_files,
    find_anchors,
    read_atlas,
    roi_on_grid,
    shown,
)
from medssl.tables.derived import Table
from medssl.tables.references import (
    Reference,
    coarse_case,
    copy_spacing_of,
    digest_of,
    file_of_case,
    folder_digest,
    whole_affine,
)
from medssl.tables.registration import (
    Affine,
    Coarse,
    Registration,
    body_box_affine,
    coarse_labels,
    coarse_volume,
    read_affine,
    register,
    similarity,
)

MILLIMETRES = ("spacing_mm", "copy_spacing_mm", "max_inverse_error_mm")
"""Names of the settings that are lengths."""
PROVIDERS = ("reference_affine", "body_box", "raw_grid", "official_atlas")
TRANSFORM_ENDS = (".mat", ".txt", ".tfm", ".h5", "_0GenericAffine.mat", "_Reg_Atlas_Affine_0GenericAffine.mat")


@dataclass(frozen=True, kw_only=True)
class AnatomicalLocations:
    """Places of one reference's locations in each case of a store.

    Table: `centre_mm` (L, 3) RAS mm of the patches' middles in the subject, `coordinate` (L, 3) float32 in [-1, 1],
    `neighbours` (L, k) int64 nearest first, `valid` (L) whether the scan shows half of the patch, `patch_mm` (3) sides,
    `reference_to_subject` (4, 4) RAS mm, `score`, `inverse_error_mm`, `volume_ratio`, `provider` (which gave the
    matrix), `is_fallback`, `problem` (text, why the check failed) and `is_cut` (whether the body reaches both the
    lowest and the highest slice). `coordinate` and `neighbours` are the same in all cases.

    Args:
        reference: "auto" (the case with the median volume of the body box), the name of a case, an image file, or for
            `official_atlas` the folder of the atlas.
        provider: Provider of the matrix: "reference_affine" registers; "body_box" maps the bodies' boxes; "raw_grid"
            maps the whole volumes, whatever they show; "official_atlas" registers `masks`, or reads `transforms`.
        anchors: File with a table of anchors of the reference (npz). None lays a grid over `roi`.
        roi: Region of the anchors: "body" or "volume" of the reference, or a file with a mask for it.
        patch_voxel: Side of a patch in voxels of `spacing_mm`, equal to `size` of the views.
        step_voxel: Distance between patches in voxels of `spacing_mm`.
        spacing_mm: Spacing of the patches, equal to that of the views.
        accept: Share of a patch that must lie in `roi`. It rises where there are more than `max_anchors`.
        max_anchors: Largest number of locations. Beyond it `accept` rises by 0.1, then the step grows.
        coordinate: Rule of the coordinates: "minmax", "official_max", or "auto", which means "official_max" for
            `official_atlas` and "minmax" for all else.
        patch_anchor: Point of a patch that the matrix moves: "centre", or "corner" as in the released code.
        transforms: Folder of ITK or ANTs affines, one file per case, that replace the registration.
        masks: Folder of masks for `official_atlas`, one file per case.
        copy_spacing_mm: Spacing at which volumes are registered. A small reference gets a finer one.
        max_inverse_error_mm: Largest mean distance at which body points may return; beyond it a registration fails.
        max_volume_ratio: Largest volume that a unit of volume may become; a registration fails beyond this value, and
            below its inverse.
        min_shown: Share of a patch that the scan must show.
    """

    reference: str = "auto"
    provider: str = "reference_affine"
    anchors: str | None = None
    roi: str = "body"
    patch_voxel: int = 32
    step_voxel: int = 26
    spacing_mm: float = 1.0
    accept: float = 0.1
    max_anchors: int = 600
    coordinate: str = "auto"
    patch_anchor: str = "centre"
    transforms: str | None = None
    masks: str | None = None
    copy_spacing_mm: float = 6.0
    max_inverse_error_mm: float = 10.0
    max_volume_ratio: float = 2.0
    min_shown: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings."""
        choice("provider", self.provider, PROVIDERS)
        choice("what.coordinate", self.coordinate, ("auto", *NORMS))
        choice("what.patch_anchor", self.patch_anchor, PATCH_ANCHORS)
        for name in ("patch_voxel", "step_voxel", "max_anchors"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"what.{name} must be a whole number from 1 up, got {value!r}")
        for name in ("accept", "min_shown", "max_volume_ratio", *MILLIMETRES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"what.{name} must be a number, got {value!r}")
        for name in MILLIMETRES:
            if getattr(self, name) <= 0:
                raise ValueError(f"what.{name} must be positive, got {getattr(self, name)}")
        if self.max_volume_ratio < 1 or not 0 < self.min_shown <= 1:
            raise ValueError(
                f"what.max_volume_ratio={self.max_volume_ratio} must be at least 1, "
                f"what.min_shown={self.min_shown} in (0, 1]"
            )
        for name in ("transforms", "masks"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).expanduser().is_dir():
                raise ValueError(f"what.{name}={folder} is no folder")
        for name in ("anchors", *(("roi",) if self.roi not in ("body", "volume") else ())):
            file = getattr(self, name)
            if file is not None and not Path(file).expanduser().is_file():
                raise ValueError(f"what.{name}: there is no file {file}")
        if self.transforms is not None and self.provider not in ("reference_affine", "official_atlas"):
            raise ValueError(f"what.transforms replaces a registration, and provider={self.provider} does not register")
        if self.provider == "official_atlas":
            atlas_files(self.reference)
            if (self.transforms is None) == (self.masks is None):
                raise ValueError(
                    "provider=official_atlas needs what.transforms=FOLDER or what.masks=FOLDER, one of them"
                )
        elif self.masks is not None:
            raise ValueError(f"what.masks is for provider=official_atlas, got provider={self.provider}")

    @property
    def name(self) -> str:
        """The name `locations`."""
        return "locations"

    @property
    def norm(self) -> str:
        """The rule of the coordinates."""
        auto = "official_max" if self.provider == "official_atlas" else "minmax"
        return auto if self.coordinate == "auto" else self.coordinate

    def recipe(self) -> dict[str, Any]:
        """Return all settings, and the content of the files that they name (for folders: names, sizes and times)."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.provider == "official_atlas":
            values["reference"] = [digest_of(file) for file in atlas_files(self.reference)]
        elif (file := self.reference_file) is not None:
            values["reference"] = digest_of(file)
        for name in ("anchors", "roi"):
            if values[name] not in (None, "body", "volume"):
                values[name] = digest_of(Path(values[name]).expanduser())
        for name in ("transforms", "masks"):
            if values[name] is not None:
                values[name] = folder_digest(Path(values[name]).expanduser())
        return values

    @property
    def reference_file(self) -> Path | None:
        """Return the image file that is the reference; None where it is a case of the store or an atlas."""
        path = Path(self.reference).expanduser()
        return path if self.provider != "official_atlas" and self.reference != "auto" and path.exists() else None

    def reference_case(self, store: VolumeStore) -> int | None:
        """Return the number of the case that is the reference.

        Raises:
            ValueError: `reference` is neither a file nor a case.
        """
        if self.provider == "official_atlas" or self.reference_file is not None:
            return None
        if self.reference != "auto":
            if self.reference not in store.names:
                raise ValueError(
                    f"reference={self.reference} is neither an image file nor a case of {store.root}; "
                    "give one of them, or auto"
                )
            return store.names.index(self.reference)
        volumes = [float(np.prod(r.body.size * np.array(r.spacing_mm))) for r in store.records()]
        return int(np.argsort(volumes, kind="stable")[(len(volumes) - 1) // 2])

    def rests_on(self, store: VolumeStore, case: int) -> Sequence[int]:
        """Return the reference, where it is a case."""
        number = self.reference_case(store)
        return [] if number is None else [number]

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Place the locations in a case."""
        reference = reference_of(self, store)
        record = store.record(case)
        moving = self.moving(store, case, reference)
        found = self._registration(store, case, reference, moving)
        problem = self.problem(found)
        provider, matrix, anchors = self.provider, found.matrix, reference.anchors
        if problem and moving is not None:
            provider, matrix = "body_box", body_box_affine(reference.coarse, moving)
        centre_mm = anchors.moved_mm(matrix, patch_anchor=self.patch_anchor)
        valid = shown(
            apply(record.mm_to_volume, centre_mm),
            patch_mm=anchors.patch_mm,
            spacing_mm=record.spacing_mm,
            shape=record.shape,
            min_share=self.min_shown,
        )
        if problem and moving is None:  # nothing to fall back on
            provider, valid = "none", np.zeros_like(valid)
        return {
            "centre_mm": centre_mm,
            "coordinate": anchors.coordinate,
            "neighbours": anchors.neighbours,
            "valid": valid,
            "patch_mm": anchors.patch_mm,
            "reference_to_subject": matrix,
            "score": np.array(found.score),
            "inverse_error_mm": np.array(found.inverse_error_mm),
            "volume_ratio": np.array(found.volume_ratio),
            "provider": np.array(provider),
            "is_fallback": np.array(problem != ""),
            "problem": np.array(problem),
            "is_cut": np.array(moving is not None and all(moving.cut)),
        }

    def quality(self, table: Table) -> dict[str, float]:
        """Return score, inverse error, volume ratio, use of the fallback, share of shown locations, and cut."""
        return {
            "score": float(table["score"]),
            "inverse_error_mm": float(table["inverse_error_mm"]),
            "volume_ratio": float(table["volume_ratio"]),
            "fallback": float(table["is_fallback"]),
            "valid": float(table["valid"].mean()),
            "cut": float(table["is_cut"]),
        }

    def moving(self, store: VolumeStore, case: int, reference: Reference) -> Coarse | None:
        """Return the case in its form for registration: first channel or mask; None for the transforms of an atlas."""
        if self.provider != "official_atlas":
            return coarse_case(store, case, spacing_mm=reference.spacing_mm)
        if self.masks is None:
            return None
        file = file_of_case(store, case, self.masks, IMAGE_SUFFIXES)
        with reasons_for(file):
            header, load = open_image(file)
            labels = np.rint(load(None)[..., 0]).astype(np.int32)
            return coarse_labels(labels, header.affine, spacing_mm=reference.spacing_mm)

    def _registration(self, store: VolumeStore, case: int, reference: Reference, moving: Coarse | None) -> Registration:
        """Return the matrix of the provider; `inverse_error_mm` and `score` are NaN without a registration.

        The reference itself is not registered either.
        """
        if self.transforms is not None:
            matrix = read_affine(file_of_case(store, case, self.transforms, TRANSFORM_ENDS))
            score = float("nan") if moving is None else similarity(reference.coarse, moving, matrix)
            return Registration(matrix, score, float("nan"))
        assert moving is not None
        if case == self.reference_case(store):
            return Registration(np.eye(4), similarity(reference.coarse, moving, np.eye(4)), float("nan"))
        if self.provider == "reference_affine" or self.provider == "official_atlas":
            return register(reference.coarse, moving)
        if self.provider == "raw_grid":
            matrix = whole_affine(store.record(case).volume_to_mm, store.record(case).shape)
            matrix = matrix @ np.linalg.inv(reference.whole)
        else:
            matrix = body_box_affine(reference.coarse, moving)
        return Registration(matrix, similarity(reference.coarse, moving, matrix), float("nan"))

    def problem(self, found: Registration) -> str:
        """Return why a registration fails the check; an empty text where it passes, or there is none."""
        if self.provider in ("body_box", "raw_grid"):
            return ""
        if found.inverse_error_mm > self.max_inverse_error_mm:
            return f"body points return {found.inverse_error_mm:.1f} mm off"
        if not 1 / self.max_volume_ratio <= found.volume_ratio <= self.max_volume_ratio:
            return f"volumes change by a factor of {found.volume_ratio:.2f}"
        return ""

    def report(self, store: VolumeStore, folder: Path) -> str:
        """Return text on the reference and the failed cases with the remedy; write the picture and the anchors."""
        from medssl.tables.location_report import report

        reference = reference_of(self, store)
        (folder / "reference").mkdir(exist_ok=True)
        reference.anchors.save(folder / "reference" / "anchors.npz")
        return report(self, store, folder, reference)


def reference_of(derivation: AnatomicalLocations, store: VolumeStore) -> Reference:
    """Return the reference of a derivation, which is made once per process."""
    number = derivation.reference_case(store)
    token = "" if number is None else store.record(number).voxel_hash
    return _reference(derivation, store.root, number, token, json.dumps(derivation.recipe()))


@lru_cache(maxsize=2)
def _reference(derivation: AnatomicalLocations, root: Path, number: int | None, token: str, recipe: str) -> Reference:
    """Return the cached reference; `token` and `recipe` stand for its origin, so that none is outdated."""
    if derivation.provider == "official_atlas":
        anchors, mask = read_atlas(derivation.reference, norm=derivation.norm, patch_voxel=derivation.patch_voxel)
        affine = anchors.grid_to_mm  # affine of the mask's file; given anchors may lie on another grid
        whole = whole_affine(affine, mask.shape)
        if derivation.anchors is not None:
            anchors = _given_anchors(derivation.anchors, whole, anchors.reference)
        spacing = copy_spacing_of(mask.shape, affine, derivation.copy_spacing_mm)
        return Reference(anchors, coarse_labels(mask, affine, spacing_mm=spacing), whole, spacing)
    if (file := derivation.reference_file) is not None:
        measured = measure(read_volume(file))
        volume = measured.volume
        shape, affine, name = volume.shape, volume.affine, file.name
        spacing = copy_spacing_of(shape, affine, derivation.copy_spacing_mm)
        coarse = coarse_volume(volume, modality=measured.modality[0], spacing_mm=spacing)
    else:
        assert number is not None
        store = VolumeStore(root)
        record = store.record(number)
        shape, affine, name = record.shape, record.volume_to_mm, record.case
        spacing = copy_spacing_of(shape, affine, derivation.copy_spacing_mm)
        coarse = coarse_case(store, number, spacing_mm=spacing)
    whole = whole_affine(affine, shape)
    if derivation.anchors is not None:
        anchors = _given_anchors(derivation.anchors, whole, name)
    else:
        anchors = _grid_of_anchors(derivation, coarse, shape, affine, name)
    return Reference(anchors, coarse, whole, spacing)


def _given_anchors(file: str, whole: Affine, name: str) -> AnchorTable:
    """Return the anchors of a file.

    Raises:
        ValueError: None of them lies in the reference.
    """
    anchors = AnchorTable.load(Path(file).expanduser())
    inside = apply(np.linalg.inv(whole), anchors.centre_mm)
    if not ((inside > 0) & (inside < 1)).all(axis=1).any():
        raise ValueError(f"{file}: no anchor lies in the reference {name}; they are of another one")
    return anchors


def _grid_of_anchors(
    derivation: AnatomicalLocations, coarse: Coarse, shape: tuple[int, int, int], affine: Affine, name: str
) -> AnchorTable:
    if derivation.roi == "body":
        mask, mask_affine = coarse.mask, coarse.affine
    elif derivation.roi == "volume":
        mask, mask_affine = np.ones(shape, dtype=bool), affine
    else:
        volume = read_volume(derivation.roi, min_side_voxel=1)
        mask, mask_affine = volume.array[0] > 0, volume.affine
    roi, grid = roi_on_grid(mask, mask_affine, shape=shape, volume_affine=affine, spacing_mm=derivation.spacing_mm)
    corners, share = find_anchors(
        roi,
        patch_voxel=derivation.patch_voxel,
        step_voxel=derivation.step_voxel,
        accept=derivation.accept,
        max_anchors=derivation.max_anchors,
    )
    return AnchorTable.of_corners(
        corners, grid, patch_voxel=derivation.patch_voxel, norm=derivation.norm, roi_fraction=share, reference=name
    )
