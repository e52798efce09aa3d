"""Keypoint detectors written out over one image in float64: SciPy's filters, one voxel at a time."""

import itertools
import math

import numpy as np
from scipy import ndimage


def blobs(
    image, *, sigma0=0.8, steps=3, contrast=0.04, edge_ratio=10.0, border=3, num_octaves=None, cross=False, refine=True
):
    """Rows of point, sigma and response: extrema of differences of Gaussians of an image in [0, 1]."""
    image = np.asarray(image, dtype=np.float64)
    num_octaves = num_octaves or max(1, math.floor(math.log2(min(image.shape))) - 3)
    base = ndimage.gaussian_filter(image, math.sqrt(sigma0**2 - 0.25), mode="nearest", truncate=4)
    rows = []
    for octave in range(num_octaves):
        sigmas = [sigma0 * 2 ** (level / steps) for level in range(steps + 3)]
        gaussians = [
            ndimage.gaussian_filter(base, math.sqrt(s**2 - sigma0**2), mode="nearest", truncate=4) if n else base
            for n, s in enumerate(sigmas)
        ]
        field = np.stack([b - a for a, b in itertools.pairwise(gaussians)])
        ends = set()
        for place in np.argwhere(np.abs(field) > 0.5 * contrast / steps):
            place = tuple(map(int, place))
            if inside(place, field.shape, border, steps) and is_extremum(field, place, cross):
                ends |= {settle(field, place, border, steps) if refine else place} - {None}
        for place in sorted(ends):
            gradient, hessian = slopes(field, place)
            offset = -np.linalg.solve(hessian, gradient) if refine else np.zeros(len(place))
            value = field[place] + gradient @ offset / 2
            curvature = np.linalg.eigvalsh(hessian[1:, 1:])
            rounded = curvature[0] * curvature[-1] > 0 and min(abs(curvature)) * edge_ratio > max(abs(curvature))
            if abs(value) >= contrast / steps and rounded:
                level, *point = np.array(place) + offset
                rows.append([*(2**octave * np.array(point)), 2**octave * sigma0 * 2 ** (level / steps), value])
        base = gaussians[steps][(slice(None, None, 2),) * image.ndim]
    rows = sorted(rows, key=lambda row: -abs(row[-1]))
    kept = []
    for row in rows:  # what two octaves have found counts once
        sigma, point = row[-2], np.array(row[:-2])
        edges = [sigma0 * 2 ** (octave + 0.5 / steps) for octave in range(1, num_octaves)]
        twins = [
            edge
            for edge in edges
            for other in kept
            if np.linalg.norm(point - other[:-2]) < (edge / 2 if refine else edge)
            and abs(math.log2(sigma / edge)) < (0.5 if refine else 1) / steps
            and abs(math.log2(other[-2] / edge)) < (0.5 if refine else 1) / steps
        ]
        kept += [] if twins else [row]
    return np.array(kept).reshape(-1, image.ndim + 2)


def inside(place, shape, border, steps):
    fits = all(border <= p <= n - 1 - border for p, n in zip(place[1:], shape[1:], strict=True))
    return fits and 1 <= place[0] <= steps


def is_extremum(field, place, cross):
    around = [
        field[tuple(p + s for p, s in zip(place, shift, strict=True))]
        for shift in itertools.product((-1, 0, 1), repeat=len(place))
        if any(shift) and not (cross and np.count_nonzero(shift[1:]) > 1)
    ]
    assert len(around) == (3 * (2 * field.ndim - 1) if cross else 3**field.ndim) - 1
    return field[place] > max(around) if field[place] > 0 else field[place] < min(around)


def settle(field, place, border, steps):
    for _ in range(6):
        gradient, hessian = slopes(field, place)
        offset = -np.linalg.solve(hessian, gradient)
        if max(abs(offset)) <= 0.6:
            return place
        place = tuple(p + int(np.sign(o)) * (abs(o) > 0.6) for p, o in zip(place, offset, strict=True))
        if not inside(place, field.shape, border, steps):
            return None
    return None


def slopes(field, place):
    """Gradient and Hessian by central differences."""

    def at(*moves):
        moved = list(place)
        for axis, step in moves:
            moved[axis] += step
        return field[tuple(moved)]

    dims = len(place)
    gradient = np.array([(at((a, 1)) - at((a, -1))) / 2 for a in range(dims)])
    hessian = np.zeros((dims, dims))
    for a in range(dims):
        for b in range(dims):
            if a == b:
                hessian[a, a] = at((a, 1)) - 2 * field[place] + at((a, -1))
            else:
                signs = itertools.product((1, -1), repeat=2)
                hessian[a, b] = sum(s * t * at((a, s), (b, t)) for s, t in signs) / 4
    return gradient, hessian


def corners(image, *, sigma=1.4, window=5, threshold=1e-6, border=3):
    """Rows of point and response: the inverse trace of the inverse of the structure tensor, where it is largest."""
    image = np.asarray(image, dtype=np.float64)
    dims = image.ndim
    taps = np.array([1, -8, 0, 8, -1]) / 12
    slope = [ndimage.correlate1d(image, taps, axis=axis, mode="nearest") for axis in range(dims)]
    smooth = [[ndimage.gaussian_filter(a * b, sigma, mode="nearest", truncate=4) for b in slope] for a in slope]
    tensor = np.moveaxis(np.array(smooth), (0, 1), (-2, -1))
    response = 1 / np.trace(np.linalg.inv(tensor), axis1=-2, axis2=-1)
    largest = ndimage.maximum_filter(response, size=window, mode="nearest")
    rows = [
        [*map(float, place), response[tuple(place)]]
        for place in np.argwhere((response == largest) & (response > threshold))
        if all(border <= p <= n - 1 - border for p, n in zip(place, image.shape, strict=True))
    ]
    return np.array(sorted(rows, key=lambda row: -row[-1]))
