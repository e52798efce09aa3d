"""The working grid of a network, and the image on it, drawn slab by slab on demand."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Shaped
from torch import Tensor

from medssl.data.augment.base import Pose
from medssl.data.draw import box_of, draw_image
from medssl.data.geometry import Frame
from medssl.data.store import Record
from medssl.inference.reading import Reading

Fetch = Callable[[np.ndarray, np.ndarray], Shaped[np.ndarray, "c x y z"]]
"""Stored voxels `lower <= i < upper` of a case at level 0."""

EQUAL_RATIO = 1e-4
"""Spacings that differ by no more than this share are the same but for rounding in a header."""
DRAWN_SLICES = 16
"""Slices drawn at once: the part of the image behind them is the largest float copy in memory."""


@dataclass(frozen=True)
class WorkingGrid:
    """A grid of the working spacing about the centre of a volume, with a margin where it is smaller than the window.

    Args:
        frame: The map from working voxel to volume voxel, margin included.
        before: Number of voxels of the margin in front, along each axis.
        shape: Number of voxels without the margin, along each axis.
        volume_shape: Number of voxels of the volume, along each axis.
    """

    frame: Frame
    before: tuple[int, int, int]
    shape: tuple[int, int, int]
    volume_shape: tuple[int, int, int]

    @classmethod
    def of(cls, record: Record, reading: Reading) -> "WorkingGrid":
        """Return the grid of a case."""
        step = np.ones(3)
        if not isinstance(reading.spacing_mm, str):
            step = np.array(reading.spacing_mm) / np.array(record.spacing_mm)
            step[np.abs(step - 1) < EQUAL_RATIO] = 1.0
        x, y, z = (max(1, round(n / s)) for n, s in zip(record.shape, step, strict=True))
        sides = np.maximum((x, y, z), reading.crop_voxel)
        before = (sides - (x, y, z)) // 2
        inner = Frame.at((np.array(record.shape) - 1) / 2, (x, y, z), step_voxel=step)
        matrix = inner.matrix.copy()
        matrix[:3, 3] -= before * step
        frame = Frame((int(sides[0]), int(sides[1]), int(sides[2])), matrix)
        return cls(frame, (int(before[0]), int(before[1]), int(before[2])), (x, y, z), record.shape)

    def positions(self, axis: int) -> Float64[np.ndarray, " voxel"]:
        """Return the places of the volume's voxels along an axis of the grid, moved onto its outer voxels if beyond."""
        step, start = self.frame.matrix[axis, axis], self.frame.matrix[axis, 3]
        found = (np.arange(self.volume_shape[axis]) - start) / step
        first = self.before[axis]
        return np.clip(found, first, first + self.shape[axis] - 1)

    def part(self, first: int, last: int) -> Frame:
        """Return the frame of the slices from `first` to before `last`."""
        matrix = self.frame.matrix.copy()
        matrix[2, 3] += first * matrix[2, 2]
        return Frame((*self.frame.shape[:2], last - first), matrix)


class WorkingImage:
    """A case on its working grid, in file units.

    Args:
        record: The record of the case.
        reading: The rules that give the grid and the values beyond the volume.
        fetch: The function that gives voxels of the case.
        device: The device on which the image is drawn.
        located: Whether three channels follow, with the coordinate of each voxel: -1 to 1 from face to face of the body
            box, and that of the nearest face beyond the box.
    """

    def __init__(
        self, record: Record, reading: Reading, fetch: Fetch, device: torch.device, *, located: bool = False
    ) -> None:
        self.record, self.fetch, self.device, self.located = record, fetch, device, located
        self.grid = WorkingGrid.of(record, reading)
        self.outside = reading.outside
        self.first = self.last = 0
        channels = record.channels + 3 * located
        self.slices = torch.empty(channels, *self.grid.frame.shape[:2], 0, device=device)

    def layer(self, first: int, last: int) -> Float32[Tensor, "c x y height"]:
        """Return the slices from `first` to before `last`; neither may be below that of the call before.

        The slices of the call before are kept.
        """
        layer = self.slices.new_empty(*self.slices.shape[:3], last - first)
        known = min(max(self.last, first), last)
        layer[..., : known - first] = self.slices[..., first - self.first : known - self.first]
        self.slices, self.first, self.last = layer, first, last
        for start in range(known, last, DRAWN_SLICES):
            stop = min(start + DRAWN_SLICES, last)
            self._draw(self.grid.part(start, stop), layer[..., start - first : stop - first])
        return layer

    def _draw(self, frame: Frame, out: Float32[Tensor, "c x y height"]) -> None:
        pose = Pose(frame, None)
        box = box_of(self.record, pose, finest=True)
        voxels = self.fetch(box.lower, box.upper)
        if voxels.dtype not in (np.uint8, np.int16, np.float32):
            voxels = voxels.astype(np.float32)
        image = out[: self.record.channels]
        draw_image(torch.from_numpy(voxels).to(self.device), box, self.record, pose, outside=self.outside, out=image)
        if self.located:
            corners = frame.to_volume(np.array([[0, 0, 0], frame.shape], dtype=np.float64))
            start, stop = 2 * self.record.body.to_body(corners) - 1
            for axis, n in enumerate(frame.shape):
                at = np.arange(n) * (stop[axis] - start[axis]) / n + start[axis]
                line = torch.from_numpy(at.clip(-1, 1)).to(out).reshape([-1 if a == axis else 1 for a in range(3)])
                out[self.record.channels + axis] = line
