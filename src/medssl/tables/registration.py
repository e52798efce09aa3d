"""Affine registration of whole volumes, coarse and robust, with a check that needs no ground truth.

Affines are 4x4, from RAS mm to RAS mm, and map points of the fixed volume to points of the moving one. SimpleITK's
space is LPS: x and y change their sign in `_image`, `_to_ras` and `_to_lps`, nowhere else in this file.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int

from medssl.data.geometry import apply
from medssl.data.volume import Volume, coarse_copy, find_body

Affine = Float64[np.ndarray, "4 4"]

CT_RANGE_HU = (-1024.0, 600.0)
CT_BODY_HU = -300.0
PERCENTILES = (0.5, 99.5)
NUM_BINS = 32
SHIFTS_MM = tuple(float(shift) for shift in range(-180, 181, 20) if shift)
"""Start shifts along z for the registration of a volume that shows a part of the body."""
NUM_SHIFTS_TAKEN = 3
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Coarse:
    """A volume in the form for registration: values in [0, 1] (0 is background), body mask, affine to RAS mm."""

    values: Float32[np.ndarray, "x y z"]
    mask: Bool[np.ndarray, "x y z"]
    affine: Affine

    @cached_property
    def body_mm(self) -> Float64[np.ndarray, "n 3"]:
        """The middles of all body voxels, in RAS mm."""
        return apply(self.affine, np.argwhere(self.mask).astype(np.float64))

    @property
    def cut(self) -> tuple[bool, bool]:
        """Whether the body reaches the lowest and the highest slice."""
        return bool(self.mask[:, :, 0].any()), bool(self.mask[:, :, -1].any())

    @cached_property
    def image(self) -> Any:
        """The values as a SimpleITK image."""
        return _image(self.values, self.affine)

    @cached_property
    def mask_image(self) -> Any:
        """The mask as a SimpleITK image, 0 and 1."""
        return _image(self.mask.astype(np.float32), self.affine)

    def thinned(self, step: int) -> "Coarse":
        """Return the volume with every `step`th voxel along each axis."""
        affine = self.affine @ np.diag([step, step, step, 1.0])
        return Coarse(self.values[::step, ::step, ::step], self.mask[::step, ::step, ::step], affine)


@dataclass(frozen=True, eq=False)
class Registration:
    """An affine from fixed to moving, and measures of its quality.

    `score` is the normalised mutual information on the whole fixed grid. `inverse_error_mm` is the mean distance of
    body points from themselves after the affine and an independent registration back. `volume_ratio` is the
    determinant.
    """

    matrix: Affine
    score: float
    inverse_error_mm: float

    @property
    def volume_ratio(self) -> float:
        """Volume in the moving space of a unit of volume in the fixed one, negative where the map mirrors."""
        return volume_ratio(self.matrix)


def coarse_volume(volume: Volume, *, modality: str, spacing_mm: float) -> Coarse:
    """Return block means of the first channel at about `spacing_mm` (at least 16 voxels a side), clipped, and the body.

    CT is clipped to [-1024, 600] HU, and its body lies above -300 HU. All else is clipped to the 0.5 and 99.5
    percentiles, and its body lies above Otsu's threshold.
    """
    _, mask, factor = find_body(volume, modality=modality, threshold_hu=CT_BODY_HU, copy_spacing_mm=spacing_mm)
    values, _ = coarse_copy(volume.array[0], spacing_mm=volume.spacing_mm, target_mm=spacing_mm)
    low, high = CT_RANGE_HU if modality == "ct" else np.percentile(values, PERCENTILES)
    values = np.clip((values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    return Coarse(values, mask, volume.affine @ block_affine(factor))


def coarse_labels(labels: Int[np.ndarray, "x y z"], affine: Affine, *, spacing_mm: float) -> Coarse:
    """Return a label map for registration: the labelled share of each block, with the first label half as bright.

    Two lungs (1, 2 or 50, 100) thus become two intensities, as the released atlas has them.

    Raises:
        ValueError: Nothing is labelled.
    """
    found = np.unique(labels[labels > 0])
    if not len(found):
        raise ValueError("the mask is empty")
    bright = np.where(labels == found[0], 0.5 if len(found) > 1 else 1.0, 1.0) * (labels > 0)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    values, factor = coarse_copy(bright, spacing_mm=spacing.tolist(), target_mm=spacing_mm)
    mask = values > 0.25 if len(found) > 1 else values > 0.5
    if not mask.any():
        mask = values > 0
    return Coarse(values.astype(np.float32), mask, affine @ block_affine(factor))


def block_affine(factor: Int[np.ndarray, "3"]) -> Affine:
    """Return the map from the index of a block of voxels to the voxel index of its middle."""
    matrix = np.diag([*factor.astype(float), 1.0])
    matrix[:3, 3] = (factor - 1) / 2
    return matrix


def body_box_affine(fixed: Coarse, moving: Coarse) -> Affine:
    """Return the axis-aligned map of the box of one body onto that of the other.

    A box reaches from the 0.5 to the 99.5 percentile of the body's voxels along each axis. Rotations are ignored, and
    a body that is cut by the field of view is stretched over the whole other one.
    """
    (a, b), (c, d) = (np.percentile(image.body_mm, PERCENTILES, axis=0) for image in (fixed, moving))
    return box_affine((a, b), (c, d))


def box_affine(
    fixed: tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"]],
    moving: tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"]],
) -> Affine:
    """Return the axis-aligned map of one box (lower and upper corner) onto another; sides below 1e-3 are kept."""
    (a, b), (c, d) = fixed, moving
    scale = np.where((b - a > 1e-3) & (d - c > 1e-3), (d - c) / np.maximum(b - a, 1e-3), 1.0)
    matrix = np.diag([*scale, 1.0])
    matrix[:3, 3] = (c + d) / 2 - scale * (a + b) / 2
    return matrix


def register(fixed: Coarse, moving: Coarse) -> Registration:
    """Register in both directions, deterministically and in one thread.

    Candidates are optimised from several starts and chosen by `similarity`. The way back is found in the same way and
    independently. A direction in which no start succeeds gives an infinite `inverse_error_mm`.
    """
    there, back = best_affine(fixed, moving), best_affine(moving, fixed)
    if there is None:
        return Registration(body_box_affine(fixed, moving), 0.0, float("inf"))
    error = float("inf")
    if back is not None:
        points = fixed.body_mm
        returned = apply(back, apply(there, points))
        error = float(np.linalg.norm(returned - points, axis=1).mean())
    return Registration(there, similarity(fixed, moving, there), error)


def best_affine(fixed: Coarse, moving: Coarse) -> Affine | None:
    """Return the candidate with the largest `similarity`, preferring those with a volume ratio within a factor of 4.

    Candidates: mutual information from the bodies' centres of mass and from the volumes' middles, mean squares of the
    masks, and, where a body is cut by its field of view, mutual information from the best of several shifts along z.
    """
    import SimpleITK as sitk

    thin = fixed.thinned(2) if min(fixed.values.shape) >= 32 else fixed
    initialise = sitk.CenteredTransformInitializerFilter
    moments = _centred(fixed.mask_image, moving.mask_image, initialise.MOMENTS)
    middles = _centred(fixed.image, moving.image, initialise.GEOMETRY)
    starts = [moments, middles]
    if any((*fixed.cut, *moving.cut)):
        shifted = [_shifted(moments, shift) for shift in SHIFTS_MM]
        scores = [similarity(thin, moving, _to_ras(start)) for start in shifted]
        starts += [shifted[n] for n in np.argsort(scores, kind="stable")[::-1][:NUM_SHIFTS_TAKEN]]
    found = [_optimised(fixed.image, moving.image, start, shrink=2) for start in starts]
    found.append(_optimised(fixed.mask_image, moving.mask_image, moments, shrink=2, masks=True))
    candidates = [matrix for matrix in found if matrix is not None]
    if not candidates:
        return None

    def merit(matrix: Affine) -> tuple[bool, float]:
        return 0.25 < volume_ratio(matrix) < 4, similarity(fixed, moving, matrix)

    best = max(candidates, key=merit)
    refined = _optimised(fixed.image, moving.image, _to_lps(best, centre=fixed.body_mm.mean(axis=0)), shrink=1)
    return best if refined is None else max(best, refined, key=merit)


def similarity(fixed: Coarse, moving: Coarse, matrix: Affine) -> float:
    """Return normalised mutual information (H(a) + H(b)) / H(a, b) of the moved volume and the fixed one, from 1 to 2.

    It is taken on the whole fixed grid, with background beyond the moving volume, because values on different overlaps
    cannot be compared.
    """
    moved = resampled(moving, fixed, matrix)
    a, b = (np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1) for values in (fixed.values, moved))
    joint = np.bincount((a * NUM_BINS + b).ravel(), minlength=NUM_BINS**2).reshape(NUM_BINS, NUM_BINS) / a.size
    both = _entropy(joint)
    return float((_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / both) if both > 0 else 1.0


def resampled(moving: Coarse, fixed: Coarse, matrix: Affine) -> Float32[np.ndarray, "x y z"]:
    """Return the moving volume on the grid of the fixed one, trilinear, 0 beyond its end."""
    import SimpleITK as sitk

    resample = sitk.ResampleImageFilter()
    resample.SetReferenceImage(fixed.image)
    resample.SetTransform(_to_lps(matrix))
    resample.SetInterpolator(sitk.sitkLinear)
    return sitk.GetArrayFromImage(resample.Execute(moving.image)).T


def volume_ratio(matrix: Affine) -> float:
    """Return the determinant of the linear part."""
    return float(np.linalg.det(matrix[:3, :3]))


def read_affine(path: str | Path) -> Affine:
    """Return the affine in an ITK or ANTs transform file (`.mat`, `.txt`, `.tfm`, `.h5`), from RAS mm to RAS mm.

    ANTs and ITK map points of the fixed image to points of the moving one: `0GenericAffine.mat` is taken as it is.

    Raises:
        ValueError: The file is not a transform, or its transform is not linear in three dimensions.
    """
    import SimpleITK as sitk

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no transform file {path}")
    try:
        transform = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} is no transform that ITK can read ({last})") from error
    if transform.GetDimension() != 3 or not transform.IsLinear():
        raise ValueError(f"{path} holds no affine of three dimensions; give the affine stage (0GenericAffine.mat)")
    return _to_ras(transform)


def _to_ras(transform: Any) -> Affine:
    """Return a linear ITK transform of LPS points as a matrix of RAS points."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    for axis in range(3):
        matrix[:3, axis] = np.array(transform.TransformPoint(tuple(np.eye(3)[axis]))) - origin
    matrix[:3, 3] = origin
    return LPS @ matrix @ LPS


def _to_lps(matrix: Affine, centre: Float64[np.ndarray, "3"] | None = None) -> Any:
    """Return the ITK transform; `centre` (RAS mm) is the fixed point of its linear part, which steers a descent."""
    import SimpleITK as sitk

    flipped = LPS @ matrix @ LPS
    middle = np.zeros(3) if centre is None else centre * [-1, -1, 1]
    flipped[:3, 3] += flipped[:3, :3] @ middle - middle
    transform = sitk.AffineTransform(3)
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(flipped[:3, :3].ravel().tolist())
    transform.SetTranslation(flipped[:3, 3].tolist())
    return transform


def _image(array: Float32[np.ndarray, "x y z"], affine: Affine) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    flipped = LPS @ affine
    spacing = np.linalg.norm(flipped[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flipped[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(flipped[:3, 3].tolist())
    return image


def _centred(fixed: Any, moving: Any, mode: int) -> Any:
    import SimpleITK as sitk

    return sitk.AffineTransform(sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3), mode))


def _shifted(start: Any, shift_mm: float) -> Any:
    import SimpleITK as sitk

    moved = sitk.AffineTransform(start)
    x, y, z = start.GetTranslation()
    moved.SetTranslation((x, y, z + shift_mm))
    return moved


def _optimised(fixed: Any, moving: Any, start: Any, *, shrink: int, masks: bool = False) -> Affine | None:
    """Return the affine after descent from `start`; None where the volumes do not meet."""
    import SimpleITK as sitk

    with _one_thread():
        method = sitk.ImageRegistrationMethod()
    if masks:
        method.SetMetricAsMeanSquares()
    else:
        method.SetMetricAsMattesMutualInformation(NUM_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(0.5, 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 200, relaxationFactor=0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([shrink - 1])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(sitk.AffineTransform(start), inPlace=False)
    try:
        with _one_thread():
            matrix = _to_ras(method.Execute(fixed, moving))
    except RuntimeError:  # all samples lie beyond the moving volume
        return None
    return matrix if np.isfinite(matrix).all() and volume_ratio(matrix) > 0 else None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: with more, sums vary in their last digits per run, and `SetNumberOfThreads` has no effect."""
    import SimpleITK as sitk

    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _entropy(shares: Float[np.ndarray, "..."]) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
