"""The encoder of patches: the network of a file, and how its patches are cut and normalised."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from medssl.data.augment.base import Pose
from medssl.data.draw import box_of, draw_image
from medssl.data.geometry import apply
from medssl.data.placements import Fixed
from medssl.data.store import Record, VolumeStore
from medssl.inference.reading import Reading

"""Patches a call: a conditioned encoder makes a kernel for each, of 4 MB."""
NOT_FINITE = "the network's features are not finite; its training diverged: take other weights"


@dataclass(frozen=True)
class PatchEncoder:
    """Gives one feature per patch: the mean of the encoder's deepest map.

    Args:
        network: An encoder in evaluation mode; one that `takes_coordinate` gets the coordinate of each patch.
        reading: Sides and spacing of a patch, what lies beyond the volume, normalisation.
        device: Device of the network.
        batch_size: Patches per call of the network.
    """

    network: nn.Module
    reading: Reading
    device: torch.device
    batch_size: int = 32

    def step_voxel(self, record: Record) -> Float64[np.ndarray, "3"]:
        """Return the number of stored voxels per voxel of a patch, along each axis."""
        return self._spec.step_voxel(record)

    def __call__(
        self,
        store: VolumeStore,
        case: int,
        *,
        centers_voxel: Float[np.ndarray, "patch 3"],
        coordinate: Float[np.ndarray, "patch 3"],
    ) -> Iterator[Float32[np.ndarray, "batch dim"]]:
        """Yield the features of the patches about `centers_voxel` of a case, by batch; the next one is read meanwhile.

        Raises:
            ValueError: The case has other channels, cannot be read, or the features are not finite.
        """
        for part, patches in self.batches(store, case, centers_voxel):
            with torch.inference_mode():
                feature = self.encode(patches, coordinate[part])
            if not feature.isfinite().all():
                raise ValueError(NOT_FINITE)
            yield feature.float().cpu().numpy()

    def encode(
        self, patches: Float[Tensor, "batch c x y z"], coordinate: Float[np.ndarray, "batch 3"]
    ) -> Float[Tensor, "batch dim"]:
        """Return the features of normalised patches; a network that takes coordinates gets that of each patch."""
        inputs: list[Tensor] = [patches]
        if getattr(self.network, "takes_coordinate", False):
            inputs.append(torch.from_numpy(np.asarray(coordinate, dtype=np.float32)).to(self.device))
        return self.network(*inputs)[-1].mean(dim=(2, 3, 4))

    @property
    def _spec(self) -> Fixed:
        return Fixed(size=self.reading.crop_voxel, spacing_mm=self.reading.spacing_mm, outside=self.reading.outside)

    def _start(self, store: VolumeStore, case: int, centers_voxel: Float[np.ndarray, "batch 3"]) -> list[Any]:
        """Start reading the voxels of patches, and return the patches with their boxes."""
        record, reads = store.record(case), []
        for center in centers_voxel:
            pose = Pose(self._spec.frame(center, self.step_voxel(record)), None)
            box = box_of(record, pose)
            reads.append((pose, box, store.read(case, box.level, box.lower, box.upper)))
        return reads

    def batches(
        self, store: VolumeStore, case: int, centers_voxel: Float[np.ndarray, "patch 3"]
    ) -> Iterator[tuple[slice, Float32[Tensor, "batch c x y z"]]]:
        """Yield the normalised patches about `centers_voxel` of a case, each batch with the slice of its patches.

        The next batch is read meanwhile.

        Raises:
            ValueError: The case has other channels, or cannot be read.
        """
        record = store.record(case)
        wanted = getattr(self.network, "in_channels", None) or record.channels
        if record.channels != wanted:
            raise ValueError(f"it has {record.channels} channels, the encoder reads {wanted}")
        normalise = self.reading.normaliser(record)
        parts = [slice(n, n + self.batch_size) for n in range(0, len(centers_voxel), self.batch_size)]
        ahead = self._start(store, case, centers_voxel[parts[0]]) if parts else []
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            reads, ahead = ahead, [] if following is None else self._start(store, case, centers_voxel[following])
            yield part, normalise(self._drawn(reads, record))

    def _drawn(self, reads: list[Any], record: Record) -> Float32[Tensor, "batch c x y z"]:
        out = torch.empty(len(reads), record.channels, *self.reading.crop_voxel, device=self.device)
        for patch, (pose, box, future) in zip(out, reads, strict=True):
            try:
                voxels = torch.from_numpy(future.result()).to(self.device)
            except ValueError as error:
                raise ValueError(f"it cannot be read from the store ({error}); prepare it again") from error
            draw_image(voxels, box, record, pose, outside=self.reading.outside, out=patch)
        return out


@dataclass(frozen=True)
class CellGrid:
    """A grid of equal steps over a whole volume, about its middle.

    Args:
        shape: Number of cells along x, y, z.
        cell_to_voxel: The map from index of a cell to the voxel of the volume at its middle.
    """

    shape: tuple[int, int, int]
    cell_to_voxel: Float64[np.ndarray, "4 4"]

    @classmethod
    def over(cls, record: Record, step_voxel: Float64[np.ndarray, "3"]) -> "CellGrid":
        """Return a grid of cells of `step_voxel` stored voxels that cover the volume."""
        x, y, z = np.maximum(1, np.ceil(np.array(record.shape) / step_voxel - 1e-6)).astype(int).tolist()
        matrix = np.diag([*step_voxel, 1.0])
        matrix[:3, 3] = (np.array(record.shape) - 1) / 2 - step_voxel * (np.array([x, y, z]) - 1) / 2
        return cls((x, y, z), matrix)

    @property
    def centers_voxel(self) -> Float64[np.ndarray, "cell 3"]:
        """The middles of all cells, z fastest."""
        cells = np.indices(self.shape).reshape(3, -1).T
        return apply(self.cell_to_voxel, cells)


def coordinate_at(
    points_voxel: Float[np.ndarray, "point 3"],
    *,
    centers_voxel: Float[np.ndarray, "location 3"],
    coordinate: Float[np.ndarray, "location 3"],
) -> Float64[np.ndarray, "point 3"]:
    """Return the coordinates of points, kept within [-1, 1], by the affine map of the locations' centres to theirs."""

    def with_one(points: np.ndarray) -> np.ndarray:
        return np.c_[points, np.ones(len(points))]

    middle = centers_voxel.mean(0)
    matrix = np.linalg.lstsq(with_one(centers_voxel - middle), coordinate, rcond=1e-9)[0]
    return np.clip(with_one(points_voxel - middle) @ matrix, -1, 1)


def measure_batch_norm(encoder: PatchEncoder, batches: Iterator[tuple[Tensor, np.ndarray]]) -> None:
    """Set the running statistics of the network's batch norms to their means over batches of patches.

    The statistics of an untrained network belong to no data, and its features then hardly differ.
    """
    norms = [m for m in encoder.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    with torch.no_grad():
        for patches, coordinate in batches if norms else ():
            if len(patches) > 1:  # one value has no variance
                encoder.encode(patches, coordinate)
    for norm in norms:
        norm.momentum = before[norm]
        norm.eval()


def reading_recipe(reading: Reading) -> Mapping[str, Any]:
    """Return a reading as JSON values."""
    return {
        "spacing_mm": reading.spacing_mm if isinstance(reading.spacing_mm, str) else list(reading.spacing_mm),
        "size_voxel": list(reading.crop_voxel),
        "outside": reading.outside,
        "normalise": [repr(step) for step in reading.normalise],
        "channels": reading.channels,
    }
