"""Keypoint detectors for batches of images in two or three dimensions, on the device of the images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from medssl.checks import choice
from medssl.models.keypoints_filters import (
    DERIVATIVE,
    blurred,
    check_value_range,
    filtered,
    full_precision,
    halved,
    reach_of,
    stretched,
)
from medssl.models.keypoints_peaks import MOST_MOVES, OWN, Slab, is_blob, local_maxima, refine, slabs, unrefined

INPUT_SIGMA = 0.5
"""Blur that an image is assumed to have, sigma in voxels."""
NEIGHBOURHOODS = ("full", "cross")
TINY = 1e-20
"""Bound below which the second invariant of a structure tensor of images in [0, 1] is rounding."""


class Detections(NamedTuple):
    """Keypoints of a batch, those of the largest response first; rows without a keypoint are 0.

    Args:
        points: Points in voxels of the image; whole numbers are centres.
        valid: Whether a row holds a keypoint.
        scale: Sigma in voxels of the image.
        response: Response of the detector; for differences of Gaussians negative at bright blobs, positive at dark.
    """

    points: Float32[Tensor, "b n axis"]
    valid: Bool[Tensor, "b n"]
    scale: Float32[Tensor, "b n"]
    response: Float32[Tensor, "b n"]


class Found(NamedTuple):
    """Keypoints of a batch in one list: the fields of `Detections`, and the number of each keypoint's image."""

    sample: Int64[Tensor, " k"]
    points: Float32[Tensor, "k axis"]
    scale: Float32[Tensor, " k"]
    response: Float32[Tensor, " k"]

    def chosen(self, rows: Tensor) -> "Found":
        """Return the keypoints at `rows`."""
        return Found(*(column[rows] for column in self))

    def times(self, factor: int) -> "Found":
        """Return the keypoints in an image finer by `factor` whose first voxel has the same centre."""
        return self._replace(points=self.points * factor, scale=self.scale * factor)


def joined(parts: list[Found]) -> Found:
    """Return the keypoints of all parts, in order."""
    return Found(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@runtime_checkable
class Detector(Protocol):
    """Detector of keypoints: a small frozen dataclass, named by `_target_` in a recipe."""

    def find(
        self, image: Float32[Tensor, " b *spatial"], *, mask: Bool[Tensor, " b *spatial"] | None, max_points: int
    ) -> Found:
        """Return all keypoints in a fixed order; the caller applies `mask` and `max_points` once more."""


@torch.no_grad()
def detect(
    image: Float[Tensor, "b c *spatial"],
    *,
    max_points: int,
    detector: Detector,
    mask: Bool[Tensor, "b 1 *spatial"] | None = None,
) -> Detections:
    """Return the `max_points` keypoints of each image with the largest absolute response; the result is deterministic.

    Only the first channel is used. Images without structure have no keypoints. Computed in float32, also under
    autocast.

    Args:
        image: Images in any unit.
        max_points: Rows of the result.
        detector: Detector that finds the keypoints.
        mask: Where keypoints may lie; the voxel nearest to a point decides.

    Raises:
        ValueError: `max_points` is not positive, or the image has neither two nor three axes.
    """
    dims = image.ndim - 2
    if max_points < 1:
        raise ValueError(f"max_points must be at least 1, got {max_points}")
    if dims not in (2, 3):
        raise ValueError(f"keypoints are found in images (b c x y) or (b c x y z), got {tuple(image.shape)}")
    allowed = None if mask is None else mask[:, 0]
    with torch.autocast(image.device.type, enabled=False), full_precision():
        found = detector.find(image[:, 0].float(), mask=allowed, max_points=max_points)
    if allowed is not None:
        nearest = (found.points + 0.5).floor().long().unbind(1)
        found = found.chosen(allowed[(found.sample, *nearest)])
    return _padded(found, batch=len(image), max_points=max_points)


def _padded(found: Found, *, batch: int, max_points: int) -> Detections:
    """Return the strongest keypoints of each image; of equal ones the first comes first."""
    order = found.response.abs().sort(descending=True, stable=True).indices
    order = order[found.sample[order].sort(stable=True).indices]
    found = found.chosen(order)
    count = torch.bincount(found.sample, minlength=batch)
    rank = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[found.sample]
    kept = rank < max_points
    place = (found.sample[kept], rank[kept])

    def column(values: Tensor) -> Tensor:
        rows = values.new_zeros(batch, max_points, *values.shape[1:])
        rows[place] = values[kept]
        return rows

    return Detections(column(found.points), column(torch.ones_like(kept)), column(found.scale), column(found.response))


@dataclass(frozen=True, kw_only=True)
class DifferenceOfGaussians:
    """Detector of blobs: extrema of differences of Gaussians over place and scale, as SIFT's, in two or three axes.

    Args:
        sigma0: Sigma of the finest Gaussian, in voxels. SIFT's 1.6 without its doubled image finds few points in
            volumes.
        levels_per_octave: Scales at which blobs are searched before the image is halved.
        contrast: Keypoints have a difference of at least this over `levels_per_octave`, in units of `value_range`.
        edge_ratio: Largest ratio of curvatures; plates, tubes and edges exceed it.
        border: Voxels at the faces, in each octave, without keypoints.
        refine: Whether place and scale are those of a parabola; otherwise of the voxel and the level, in each octave.
        neighbourhood: Neighbours that an extremum exceeds. `full`: all that touch it in place and scale, 80 in a
            volume. `cross`: those that share a face with it, and these at the adjacent scales, 20 in a volume.
        num_octaves: Number of octaves of scales; null is log2 of the shortest side less 3, at least 1.
        value_range: Values of contrast 1 between them, such as [0, 1] for windowed images; null is each image's range.

    Source: Lowe, IJCV 2004; arXiv:2310.01680 takes OpenCV's detector, whose finest sigma is 0.8 pixels.
    """

    sigma0: float = 0.8
    levels_per_octave: int = 3
    contrast: float = 0.04
    edge_ratio: float = 10.0
    border: int = 3
    refine: bool = True
    neighbourhood: str = "full"
    num_octaves: int | None = None
    value_range: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        choice("neighbourhood", self.neighbourhood, NEIGHBOURHOODS)
        if self.sigma0 <= INPUT_SIGMA:
            raise ValueError(f"sigma0 must exceed {INPUT_SIGMA}, the blur of the image itself; got {self.sigma0}")
        if self.levels_per_octave < 1 or self.border < 1 or (self.num_octaves is not None and self.num_octaves < 1):
            raise ValueError(
                f"levels_per_octave={self.levels_per_octave}, border={self.border} and num_octaves={self.num_octaves} "
                "must be at least 1"
            )
        if self.contrast < 0 or self.edge_ratio < 1:
            raise ValueError(
                f"contrast={self.contrast} must not be negative and edge_ratio={self.edge_ratio} not be below 1"
            )
        check_value_range(self.value_range)

    def find(
        self, image: Float32[Tensor, " b *spatial"], *, mask: Bool[Tensor, " b *spatial"] | None, max_points: int
    ) -> Found:
        """Find keypoints as described in `Detector`."""
        octaves = self.num_octaves or max(1, int(math.log2(min(image.shape[1:]))) - 3)
        image, before = stretched(image, self.value_range), math.sqrt(self.sigma0**2 - INPUT_SIGMA**2)
        found: list[Found] = []
        for octave in range(octaves):
            halves, parts = [], []
            for slab in slabs(image.shape, halo=self._reach(before) + MOST_MOVES + 2):
                levels = self._levels(image[:, slab.read], before)
                parts.append(self._extrema(levels, slab).times(2**octave))
                if octave < octaves - 1:
                    halves.append(halved(levels[self.levels_per_octave][:, slab.own]))
            found.append(joined(parts))
            if octave:
                found[-2:] = self._without_twins(*found[-2:], octave=octave)
            image, before = torch.cat(halves, dim=1) if halves else image, 0.0
        return joined(found)

    def _without_twins(self, fine: Found, coarse: Found, *, octave: int) -> tuple[Found, Found]:
        """Drop the weaker of two keypoints that adjacent octaves have both found, at scales where the octaves meet."""
        half_step = 2 ** (0.5 / self.levels_per_octave)
        meeting = self.sigma0 * 2**octave * half_step
        slack = 1 if self.refine else 2  # voxels and levels are off by up to a half
        upper = (fine.scale > meeting / half_step**slack).nonzero()[:, 0]
        lower = (coarse.scale < meeting * half_step**slack).nonzero()[:, 0]
        one, two = fine.chosen(upper), coarse.chosen(lower)
        exact = "donot_use_mm_for_euclid_dist"
        is_twin = torch.cdist(one.points, two.points, compute_mode=exact) < slack * meeting / 2
        is_twin &= one.sample[:, None] == two.sample
        is_stronger = one.response.abs()[:, None] >= two.response.abs()
        keep_fine, keep_coarse = (torch.ones_like(part.sample, dtype=torch.bool) for part in (fine, coarse))
        keep_fine[upper] = ~(is_twin & ~is_stronger).any(1)
        keep_coarse[lower] = ~(is_twin & is_stronger).any(0)
        return fine.chosen(keep_fine), coarse.chosen(keep_coarse)

    def _reach(self, before: float) -> int:
        """Return how many voxels on each side the coarsest Gaussian of an octave covers."""
        return reach_of(self._sigmas()[-1]) + reach_of(before)

    def _sigmas(self) -> list[float]:
        """Return sigmas of the Gaussians that make the levels of an octave from its first level."""
        levels = range(self.levels_per_octave + 3)
        return [self.sigma0 * math.sqrt(4 ** (level / self.levels_per_octave) - 1) for level in levels]

    def _levels(self, image: Float32[Tensor, " b *spatial"], before: float) -> list[Tensor]:
        """Return the image at the scales of an octave; a Gaussian of `before` blurs it to `sigma0`."""
        base = blurred(image, before) if before else image
        return [base, *(blurred(base, sigma) for sigma in self._sigmas()[1:])]

    def _extrema(self, levels: list[Tensor], slab: Slab) -> Found:
        """Return the keypoints of a slab, in voxels of its octave."""
        differences = torch.stack([after - before for before, after in pairwise(levels)], dim=1)  # (b level *spatial)
        bound = self.contrast / self.levels_per_octave
        cross = self.neighbourhood == "cross"
        place = local_maxima(differences, reach=1, above=bound / 2, minima=True, cross=cross)
        lower = [1, *slab.lower(self.border)]
        upper = [self.levels_per_octave, *slab.upper(self.border)]
        peaks = (refine if self.refine else unrefined)(differences, place, lower=lower, upper=upper)
        kept = (peaks.offset.abs() <= OWN).all(1) & (peaks.value.abs() >= bound) & slab.owns(peaks.place[:, 2])
        kept &= is_blob(peaks.hessian[:, 1:, 1:], edge_ratio=self.edge_ratio)
        position = (peaks.place[:, 1:] + peaks.offset)[kept]
        scale = self.sigma0 * 2 ** (position[:, 0] / self.levels_per_octave)
        points = slab.in_whole(position[:, 1:])
        return Found(peaks.place[kept, 0], points, scale, peaks.value[kept])


@dataclass(frozen=True, kw_only=True)
class Foerstner:
    """Detector of corners: voxels where the smoothed structure tensor has a gradient in every direction.

    The response is the determinant over the second invariant of the tensor (in two dimensions over the trace), which
    is the inverse of the trace of its inverse. Points are voxels.

    Args:
        sigma: Sigma of the Gaussian that smooths the tensor, in voxels.
        window: Side of the cube in which a keypoint has the largest response, odd.
        threshold: Bound that responses exceed, in (units of `value_range` per voxel) squared.
        border: Voxels at the faces without keypoints.
        value_range: Values that become 0 and 1; null is each image's own range.

    Source: Foerstner and Guelch 1987; repository multimodallearning/Lung250M-4B, corrfield/corrfield.py.
    """

    sigma: float = 1.4
    window: int = 5
    threshold: float = 1e-6
    border: int = 3
    value_range: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.sigma <= 0 or self.threshold < 0:
            raise ValueError(f"sigma={self.sigma} must be positive and threshold={self.threshold} not negative")
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window must be odd and at least 3, got {self.window}")
        if self.border < 1:
            raise ValueError(f"border must be at least 1, got {self.border}")
        check_value_range(self.value_range)

    def find(
        self, image: Float32[Tensor, " b *spatial"], *, mask: Bool[Tensor, " b *spatial"] | None, max_points: int
    ) -> Found:
        """Find keypoints as described in `Detector`."""
        image, found = stretched(image, self.value_range), []
        for slab in slabs(image.shape, halo=len(DERIVATIVE) // 2 + reach_of(self.sigma) + self.window // 2):
            response = self._response(image[:, slab.read])
            place = local_maxima(response, reach=self.window // 2, above=self.threshold)
            kept = slab.owns(place[:, 1])
            for axis, (low, high) in enumerate(zip(slab.lower(self.border), slab.upper(self.border), strict=True)):
                kept &= (place[:, 1 + axis] >= low) & (place[:, 1 + axis] <= high)
            place = place[kept]
            points = slab.in_whole(place[:, 1:].float())
            values = response[tuple(place.unbind(1))]
            found.append(Found(place[:, 0], points, torch.full_like(values, self.sigma), values))
        return joined(found)

    def _response(self, image: Float32[Tensor, " b *spatial"]) -> Float32[Tensor, " b *spatial"]:
        axes = range(image.ndim - 1)
        slopes = [filtered(image, 1 + axis, DERIVATIVE) for axis in axes]
        tensor = {(a, b): blurred(slopes[a] * slopes[b], self.sigma) for a in axes for b in axes if a <= b}
        minors = {(a, b): tensor[a, a] * tensor[b, b] - tensor[a, b] ** 2 for a, b in tensor if a < b}
        if image.ndim == 3:
            determinant, invariant = minors[0, 1], tensor[0, 0] + tensor[1, 1]
        else:
            xy, xz, yz = tensor[0, 1], tensor[0, 2], tensor[1, 2]
            determinant = (
                tensor[0, 0] * minors[1, 2] - xy * (xy * tensor[2, 2] - yz * xz) + xz * (xy * yz - tensor[1, 1] * xz)
            )
            invariant = minors[0, 1] + minors[0, 2] + minors[1, 2]
        return torch.where(invariant > TINY, determinant / invariant.clamp_min(TINY), 0.0)


@dataclass(frozen=True, kw_only=True)
class RandomPoints:
    """Detector that returns random voxels, for comparison with places of structure.

    They depend only on the seed, the size of the image and the mask, so all images of a batch get the same without one.

    Args:
        seed: Seed of the draw.
    """

    seed: int = 0

    def find(
        self, image: Float32[Tensor, " b *spatial"], *, mask: Bool[Tensor, " b *spatial"] | None, max_points: int
    ) -> Found:
        """Find keypoints as described in `Detector`; the response is the random number."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(image.shape[1:], generator=generator).to(image.device).expand(image.shape)
        drawn = drawn if mask is None else drawn.masked_fill(~mask, -1.0)
        response, flat = drawn.flatten(1).topk(min(max_points, drawn[0].numel()), dim=1)
        sample, column = (response >= 0).nonzero().unbind(1)
        place = torch.stack(torch.unravel_index(flat[sample, column], image.shape[1:]), dim=1).float()
        return Found(sample, place, torch.ones_like(place[:, 0]), response[sample, column])
