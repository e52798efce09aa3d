"""Intensity augmentations that depend on neighbours or places: blur, low resolution, noise, bias field, cutout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from medssl.data.augment.base import IntensityAugmentation, Measured, check_axes, check_range, column, uniform
from medssl.data.geometry import spline_weights
from medssl.data.randomness import hash_normal
from medssl.data.resampling import resampling_matrix
from medssl.data.store import Record


def apply_axis_matrices(image: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Filter views (view c x y z) along x, y, z by matrices (view, out, in); one without a view axis serves all."""
    x, y, z = (m if m.ndim == 3 else m[None] for m in matrices)
    image = torch.matmul(x[:, None], image.flatten(3)).unflatten(3, image.shape[3:])
    image = torch.matmul(y[:, None, None], image)
    return torch.matmul(image, z[:, None, None].mT)


def _filtered(image: Tensor, matrices: Sequence[Sequence[np.ndarray]]) -> Tensor:
    """Filter views along each axis; `matrices` holds, for each axis, one matrix per view."""
    return apply_axis_matrices(image, [torch.from_numpy(np.stack(m)).to(image.device) for m in matrices])


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(IntensityAugmentation):
    """Blur views with a Gaussian; edge voxels repeat outside.

    Args:
        sigma_voxel: Range of the Gaussian's width, 0 or more.
        axes: The axes that are blurred.
        radius_voxel: Reach of the filter; None means four widths.
    """

    sigma_voxel: Sequence[float] = (0.5, 1.0)
    axes: Sequence[int] = (0, 1, 2)
    radius_voxel: int | None = None

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("GaussianBlur: sigma_voxel", self.sigma_voxel, low=0)
        check_axes("GaussianBlur: axes", self.axes)

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the width."""
        return [uniform(rng, self.sigma_voxel)]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        sigmas = [[s if axis in self.axes else 0.0 for s in parameters[:, 0].tolist()] for axis in range(3)]
        return _filtered(
            image, [[self._matrix(n, s) for s in row] for n, row in zip(image.shape[2:], sigmas, strict=True)]
        )

    def _matrix(self, side: int, sigma: float) -> Float[np.ndarray, "side side"]:
        radius = self.radius_voxel if self.radius_voxel is not None else int(np.ceil(4 * sigma))
        taps = np.arange(-radius, radius + 1)
        weight = np.exp(-0.5 * (taps / max(sigma, 1e-6)) ** 2)
        matrix = np.zeros((side, side))
        rows = np.broadcast_to(np.arange(side)[:, None], (side, len(taps)))
        np.add.at(matrix, (rows, np.clip(rows + taps, 0, side - 1)), weight / weight.sum())
        return matrix.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class LowResolution(IntensityAugmentation):
    """Resample the view coarser and back: a Lanczos filter down, linear interpolation up.

    Args:
        zoom: Range of the share of voxels kept along each of `axes`, in (0, 1].
        axes: The axes that lose resolution.
    """

    zoom: Sequence[float] = (0.5, 1.0)
    axes: Sequence[int] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("LowResolution: zoom", self.zoom, low=0.01, high=1)
        check_axes("LowResolution: axes", self.axes)

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the zoom."""
        return [uniform(rng, self.zoom)]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        zooms = [[s if axis in self.axes else 1.0 for s in parameters[:, 0].tolist()] for axis in range(3)]
        return _filtered(
            image, [[self._matrix(n, s) for s in row] for n, row in zip(image.shape[2:], zooms, strict=True)]
        )

    @staticmethod
    def _matrix(side: int, zoom: float) -> Float[np.ndarray, "side side"]:
        coarse = max(1, round(side * zoom))
        ratio = side / coarse
        down = resampling_matrix((np.arange(coarse) + 0.5) * ratio - 0.5, side, ratio=ratio, border=True)
        up = resampling_matrix((np.arange(side) + 0.5) / ratio - 0.5, coarse, ratio=1 / ratio, border=True)
        return up @ down


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(IntensityAugmentation):
    """Add independent normal noise to every voxel of every view.

    Args:
        std: Range of the noise's standard deviation, in the image's units at this place of the chain.
    """

    std: Sequence[float] = (0.0, 0.1)

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("GaussianNoise: std", self.std, low=0)

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the standard deviation."""
        return [uniform(rng, self.std)]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        noise = hash_normal(image[0].numel(), keys).view_as(image)
        return image.addcmul_(noise, column(parameters, 0))


@dataclass(frozen=True, kw_only=True)
class BiasField(IntensityAugmentation):
    """Multiply by a smooth field, as the coil of an MR scanner does: the exponential of a cubic surface.

    Args:
        strength: Range of the standard deviation of the surface's coefficients.
    """

    strength: Sequence[float] = (0.1, 0.5)

    NUM_NODES = 4
    """Control points per axis: one span of a cubic spline, so that the surface is one cubic polynomial per axis."""

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("BiasField: strength", self.strength, low=0)

    def parameters(self, rng: np.random.Generator, record: Record) -> np.ndarray:
        """Draw the coefficients."""
        return rng.standard_normal(self.NUM_NODES**3) * uniform(rng, self.strength)

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        nodes = parameters.view(-1, 1, *[self.NUM_NODES] * 3)
        weights = [
            torch.from_numpy(spline_weights(side, node_spacing_voxel=max(side - 1, 1), num_nodes=self.NUM_NODES))
            for side in image.shape[2:]
        ]
        return image.mul_(apply_axis_matrices(nodes, [w.to(image.device) for w in weights]).exp_())


@dataclass(frozen=True, kw_only=True)
class Cutout(IntensityAugmentation):
    """Overwrite boxes of the view with one value.

    Args:
        num_boxes: Number of boxes per view.
        fraction: Range of each side of a box, as a share of the view's side, in (0, 1].
        fill: Value of the boxes: "minimum" or "mean" of the view or group, or a number.
    """

    num_boxes: int = 1
    fraction: Sequence[float] = (0.1, 0.4)
    fill: str | float = "minimum"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_range("Cutout: fraction", self.fraction, low=0, high=1)
        if isinstance(self.fill, str) and self.fill not in ("minimum", "mean"):
            raise ValueError(f"Cutout: fill must be minimum, mean or a number, got {self.fill!r}")

    def parameters(self, rng: np.random.Generator, record: Record) -> np.ndarray:
        """Draw the lower and upper corner of every box, as shares of the view."""
        low, high = self.fraction
        side = rng.uniform(low, high, (self.num_boxes, 3))
        lower = rng.uniform(size=(self.num_boxes, 3)) * (1 - side)
        return np.concatenate([lower, lower + side], axis=1).reshape(-1)

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        fill = (
            getattr(measured, self.fill) if isinstance(self.fill, str) else image.new_full((1, 1, 1, 1, 1), self.fill)
        )
        inside = torch.zeros_like(image[:, :1], dtype=torch.bool)
        for box in parameters.unflatten(1, (self.num_boxes, 2, 3)).unbind(1):  # (view, 2, 3)
            masks = []
            for axis, side in enumerate(image.shape[2:]):
                place = (torch.arange(side, device=image.device) + 0.5) / side
                masks.append((place >= box[:, :1, axis]) & (place < box[:, 1:, axis]))
            x, y, z = masks
            inside |= (x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :])[:, None]
        return torch.where(inside, fill, image)
