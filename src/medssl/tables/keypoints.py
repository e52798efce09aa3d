"""Keypoints of the volumes of a store: the derived table `keypoints`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from medssl.data.atomic import whole_file
from medssl.data.augment.normalise import ByModality
from medssl.data.geometry import apply
from medssl.data.randomness import counter_key
from medssl.data.store import VolumeStore
from medssl.data.volume import Volume, find_body, resample_volume
from medssl.inference.device import find_device
from medssl.models.keypoints import Detector, RandomPoints, detect
from medssl.tables.derived import Table, read_coarse, table_of
from medssl.tables.keypoint_pictures import keypoint_figure, planes_of

PICTURE = "keypoints.png"
WITHIN = ("volume", "body")
BODY_COPY_MM = 4.0


@dataclass(frozen=True, kw_only=True)
class KeypointTables:
    """Keypoints of each case, found on an isotropic copy of its first channel, the strongest first.

    Table: `points_voxel` (num_points, 3) float32, voxels of level 0, and `features` (num_points, 2) float32, sigma in
    mm and response. Unused rows are NaN.

    Args:
        detector: Detector that finds the keypoints. `RandomPoints` get another seed for each case.
        num_points: Number of rows.
        spacing_mm: Spacing of the copy. A volume with larger voxels keeps their size (the cube root of the voxel's
            volume).
        window_hu: Window for CT: the two values that become 0 and 1.
        percentiles: Percentiles that become 0 and 1 in other modalities.
        within: Region to search: "volume", or "body" for the largest component above -500 HU (CT) or Otsu's threshold.
        device: Device of the detector: "auto", "cpu" or "cuda".
    """

    detector: Detector
    num_points: int = 4096
    spacing_mm: float = 1.0
    window_hu: Sequence[float] = (-160.0, 240.0)
    percentiles: Sequence[float] = (0.5, 99.5)
    within: str = "volume"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the settings."""
        if not is_dataclass(self.detector) or not hasattr(self.detector, "find"):
            raise ValueError(f"what.detector must be a detector of medssl.models.keypoints, got {self.detector!r}")
        if self.num_points < 1 or self.spacing_mm <= 0:
            raise ValueError(
                f"what.num_points={self.num_points} must be at least 1 and what.spacing_mm={self.spacing_mm} positive"
            )
        if self.within not in WITHIN:
            raise ValueError(f"what.within must be volume or body, got {self.within!r}")
        _ = self.normalisation
        find_device(self.device)

    @property
    def name(self) -> str:
        """The name `keypoints`."""
        return "keypoints"

    @property
    def normalisation(self) -> ByModality:
        """The normalisation by window or percentiles."""
        return ByModality(window_hu=self.window_hu, percentiles=self.percentiles)

    def recipe(self) -> dict[str, Any]:
        """Return the detector with its settings, and the settings of its input."""
        kind = type(self.detector)
        detector = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **_as_json(asdict(self.detector))}  # type: ignore[call-overload]
        return {
            "detector": detector,
            "num_points": self.num_points,
            "spacing_mm": self.spacing_mm,
            "window_hu": list(self.window_hu),
            "percentiles": list(self.percentiles),
            "within": self.within,
        }

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the points and their features."""
        record = store.record(case)
        spacing_mm = max(self.spacing_mm, float(np.prod(record.spacing_mm)) ** (1 / 3))
        read, _ = read_coarse(store, case, spacing_mm=spacing_mm)
        volume = resample_volume(read, [spacing_mm] * 3)
        low, high, *_ = self.normalisation.limits(record, 0)
        shown = np.clip((volume.array[0] - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
        device = find_device(self.device)
        detector = self.detector
        if isinstance(detector, RandomPoints):
            detector = replace(detector, seed=counter_key("keypoints", detector.seed, record.case))
        mask = None
        if self.within == "body":
            mask = torch.from_numpy(body_mask(volume, modality=record.modality[0]))[None, None].to(device)
        image = torch.from_numpy(shown)[None, None].to(device)
        found = detect(image, max_points=self.num_points, detector=detector, mask=mask)
        to_voxel = record.mm_to_volume @ volume.affine
        points = apply(to_voxel, found.points[0].double().cpu().numpy())
        features = torch.stack([found.scale[0] * spacing_mm, found.response[0]], dim=1).cpu().numpy()
        padding = ~found.valid[0].cpu().numpy()
        points[padding], features[padding] = np.nan, np.nan
        return {"points_voxel": points.astype(np.float32), "features": features}

    def quality(self, table: Table) -> dict[str, float]:
        """Return the number of keypoints, whether the table is full, the median sigma and the weakest response."""
        features = table["features"]
        known = features[np.isfinite(features[:, 0])]
        nothing = np.full((1, 2), np.nan)
        sigma_mm, response = (known if len(known) else nothing).T
        return {
            "points": float(len(known)),
            "full": float(len(known) == len(features)),
            "sigma_mm": float(np.median(sigma_mm)),
            "weakest": float(np.abs(response).min()),
        }

    def report(self, store: VolumeStore, folder: Path) -> str:
        """Draw the case with the median number of keypoints, and return where the picture is."""
        counts = [np.isfinite(table_of(store, self, case)["features"][:, 0]).sum() for case in range(len(store))]
        case = int(np.argsort(counts, kind="stable")[len(counts) // 2])
        record, table = store.record(case), table_of(store, self, case)
        limits = self.normalisation.limits(record, 0)
        planes = planes_of(store, case, table["points_voxel"], table["features"])
        title = f"{record.case}: {counts[case]} keypoints"
        with whole_file(folder / PICTURE) as partial:
            figure = keypoint_figure(planes, low=limits[0], high=limits[1], title=title)
            figure.savefig(partial, format="png", dpi=80)
        full = sum(count == self.num_points for count in counts)
        told = f"; {full} of {len(counts)} tables are full: num_points leaves weaker ones out" if full else ""
        return f"picture of {record.case}: {folder / PICTURE}{told}"


def body_mask(volume: Volume, *, modality: str) -> Bool[np.ndarray, "x y z"]:
    """Return the body on the volume's own grid, in blocks of about 4 mm."""
    _, mask, factor = find_body(volume, modality=modality, copy_spacing_mm=BODY_COPY_MM)
    for axis, (step, side) in enumerate(zip(factor.tolist(), volume.shape, strict=True)):
        mask = mask.repeat(step, axis=axis).take(range(side), axis=axis)
    return mask


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
