"""Supervoxels of the volumes of a store: the derived table `supervoxels`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medssl.data.augment.normalise import ByModality
from medssl.data.store import VolumeStore
from medssl.data.volume import resample_volume
from medssl.tables.derived import Table, read_coarse


@dataclass(frozen=True, kw_only=True)
class Supervoxels:
    """SLIC on the first channel of each case, windowed to [0, 1], at half the resolution.

    Table: `regions` (x y z), numbers from 1 on, and `to_volume` (4, 4), the map from its voxels to voxels of level 0.

    Args:
        side_voxel: Side of an average supervoxel, in voxels of the case: their number is the volume over its cube.
        compactness: Weight of distance against grey values from 0 to 1: 0.1 follows edges, 10 makes cubes, 0.01 leaves
            a few of any shape.
        window_hu: Window for CT: the two values that become 0 and 1.
        percentiles: Percentiles that become 0 and 1 in other modalities.

    Source: arXiv:2504.14737 (in slices); skimage.segmentation.slic.
    """

    side_voxel: float = 32.0
    compactness: float = 0.1
    window_hu: Sequence[float] = (-160.0, 240.0)
    percentiles: Sequence[float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.side_voxel < 4 or self.compactness <= 0:
            raise ValueError(
                f"what.side_voxel={self.side_voxel} must be at least 4 and what.compactness={self.compactness} positive"
            )
        _ = self.normalisation

    @property
    def name(self) -> str:
        """The name `supervoxels`."""
        return "supervoxels"

    @property
    def normalisation(self) -> ByModality:
        """The normalisation by window or percentiles."""
        return ByModality(window_hu=self.window_hu, percentiles=self.percentiles)

    def check(self) -> None:
        """Check before any work that scikit-image is installed."""
        _slic()

    def recipe(self) -> dict[str, Any]:
        """Return all settings."""
        return {
            "side_voxel": self.side_voxel,
            "compactness": self.compactness,
            "window_hu": list(self.window_hu),
            "percentiles": list(self.percentiles),
        }

    def __call__(self, store: VolumeStore, case: int) -> Table:
        """Return the regions and their place in the volume."""
        record = store.record(case)
        spacing_mm = 2 * np.array(record.spacing_mm)
        read, _ = read_coarse(store, case, spacing_mm=float(spacing_mm.min()))
        volume = resample_volume(read, spacing_mm.tolist())
        low, high, *_ = self.normalisation.limits(record, 0)
        shown = np.clip((volume.array[0].astype(np.float32) - low) / max(high - low, 1e-12), 0, 1)
        number = max(1, round(float(np.prod(record.shape)) / self.side_voxel**3))
        relative = spacing_mm / np.prod(spacing_mm) ** (1 / 3)  # millimetres would make it more compact
        regions = _slic()(
            shown,
            n_segments=number,
            compactness=self.compactness,
            channel_axis=None,
            spacing=relative.tolist(),
            start_label=1,
        )
        kind = np.uint16 if regions.max() < 2**16 else np.int32
        return {"regions": regions.astype(kind), "to_volume": record.mm_to_volume @ volume.affine}

    def quality(self, table: Table) -> dict[str, float]:
        """Return the number of supervoxels, and the largest one's share of the volume."""
        counts = np.bincount(table["regions"].ravel())[1:]
        counts = counts[counts > 0]
        return {"regions": float(len(counts)), "largest_share": float(counts.max() / counts.sum())}


def _slic() -> Any:
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ValueError('supervoxels need scikit-image: pip install "medssl[supervoxels]"') from error
    return slic
