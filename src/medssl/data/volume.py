"""A volume and its measurements: its body, its intensities, its hash, and points to place crops at."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int32, Shaped

from medssl.data.modality import Stated
from medssl.data.resampling import resample_axis, resampling_matrix

PERCENTILES = (0.5, 1.0, 5.0, 50.0, 95.0, 99.0, 99.5)
BODY_RECIPE = {"threshold_hu": -500.0, "copy_spacing_mm": 4.0, "num_body_points": 4096, "num_label_points": 1024}
"""Settings for finding the body and the points; they are part of a store's recipe."""

BLOCK_VOXEL = 2**20
SAME_SPACING = 1e-4
"""Spacings whose ratio is this close to one are equal up to rounding in the header."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels in RAS index order, (channel, x, y, z), contiguous, in the type of the file.

    `affine` turns a voxel index into RAS millimetres; `source` says where the voxels came from, `stated_modality` what
    the headers call them ("ct", "mr", "pet" or "us", or one word a channel), `left_out` which files beside them were
    not read, and why, `doubts` what the headers say in two ways, and `series` the UID of a DICOM series.
    """

    array: Shaped[np.ndarray, "channel x y z"]
    affine: Float64[np.ndarray, "4 4"]
    source: str
    stated_modality: Stated = None
    left_out: tuple[tuple[str, str], ...] = ()
    doubts: tuple[str, ...] = ()
    series: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along x, y, z."""
        x, y, z = self.array.shape[1:]
        return x, y, z

    @property
    def num_channels(self) -> int:
        """Number of channels of a voxel."""
        return self.array.shape[0]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along x, y, z."""
        x, y, z = (float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


@dataclass(frozen=True, eq=False)
class Box:
    """A box in a volume, in continuous voxel coordinates of its faces: the whole volume is -0.5 to n - 0.5.

    Its body coordinate runs from 0 at `lower` to 1 at `upper` along each axis, float64.
    """

    lower: Float64[np.ndarray, "3"]
    upper: Float64[np.ndarray, "3"]

    def __post_init__(self) -> None:
        if not (self.upper > self.lower).all():
            raise ValueError(f"a box needs upper > lower along each axis, got lower={self.lower}, upper={self.upper}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Return the box of a whole volume."""
        return cls(np.full(3, -0.5), np.asarray(shape, dtype=np.float64) - 0.5)

    @property
    def size(self) -> Float64[np.ndarray, "3"]:
        """Side lengths in voxels."""
        return self.upper - self.lower

    def to_body(self, points_voxel: Shaped[np.ndarray, "*point 3"]) -> Float64[np.ndarray, "*point 3"]:
        """Map volume voxels to body coordinates."""
        return (np.asarray(points_voxel, dtype=np.float64) - self.lower) / self.size

    def to_volume(self, points_body: Shaped[np.ndarray, "*point 3"]) -> Float64[np.ndarray, "*point 3"]:
        """Map body coordinates to volume voxels."""
        return np.asarray(points_body, dtype=np.float64) * self.size + self.lower


def voxel_hash(array: Shaped[np.ndarray, "channel x y z"]) -> str:
    """Return the SHA-256 of the shape and of the voxels as little-endian float32, for any file or voxel type."""
    digest = hashlib.sha256(np.asarray(array.shape, dtype="<i8").tobytes())
    for channel in array:
        for plane in channel:  # plane by plane: no float copy of the whole volume
            digest.update(np.ascontiguousarray(plane, dtype="<f4").tobytes())
    return digest.hexdigest()


def intensity_statistics(array: Shaped[np.ndarray, "channel x y z"]) -> list[dict[str, float]]:
    """Return minimum, maximum, mean, std and percentiles p0_5 p1 p5 p50 p95 p99 p99_5 of each whole channel."""
    return [channel_statistics(channel) for channel in array]


def channel_statistics(channel: Shaped[np.ndarray, "..."]) -> dict[str, float]:
    """Return the statistics of `intensity_statistics` of a channel, or of some of its values in a row."""
    planes = channel if channel.ndim > 1 else np.array_split(channel, channel.size // BLOCK_VOXEL + 1)
    low, high = float(channel.min()), float(channel.max())
    exact = channel.dtype.kind in "iu" and max(-low, high) <= 2**53  # whole numbers that a double can hold
    if exact and high - low < 2**20:  # by a histogram, several times faster than sorting
        counts = np.zeros(int(high - low) + 1, dtype=np.int64)
        for plane in planes:
            counts += np.bincount(plane.ravel().astype(np.int64) - int(low), minlength=len(counts))
        values = np.arange(len(counts), dtype=np.float64)
        mean = float(counts @ values) / channel.size
        std = float(np.sqrt(counts @ (values - mean) ** 2 / channel.size))
        mean += low
        ranks = np.array(PERCENTILES) / 100 * (channel.size - 1)
        below, above = (np.searchsorted(counts.cumsum(), side(ranks), side="right") for side in (np.floor, np.ceil))
        percentiles = low + below + (ranks - np.floor(ranks)) * (above - below)
    else:
        mean = sum(float(plane.sum(dtype=np.float64)) for plane in planes) / channel.size
        squares = sum(float(((plane.astype(np.float64) - mean) ** 2).sum()) for plane in planes)
        std = float(np.sqrt(squares / channel.size))
        percentiles = np.percentile(channel, PERCENTILES)
    named = {f"p{q:g}".replace(".", "_"): float(v) for q, v in zip(PERCENTILES, percentiles, strict=True)}
    return {"minimum": low, "maximum": high, "mean": mean, "std": std, **named}


def coarse_copy(
    channel: Shaped[np.ndarray, "x y z"], *, spacing_mm: Sequence[float], target_mm: float
) -> tuple[Float[np.ndarray, "x2 y2 z2"], Int[np.ndarray, "3"]]:
    """Return block means at about `target_mm` (at least 16 voxels a side are kept), and the block size in voxels."""
    factor = np.array(
        [max(1, min(round(target_mm / s), n // 16)) for s, n in zip(spacing_mm, channel.shape, strict=True)]
    )
    blocks = [channel[x : x + factor[0]] for x in range(0, channel.shape[0], int(factor[0]))]
    coarse = np.stack([block.mean(axis=0, dtype=np.float64) for block in blocks])  # no wide copy of the whole
    for axis, step in enumerate(factor[1:], start=1):
        if step > 1:
            starts = np.arange(0, channel.shape[axis], step)
            counts = np.diff(np.append(starts, channel.shape[axis]))
            coarse = np.add.reduceat(coarse, starts, axis=axis) / counts.reshape(
                [-1 if a == axis else 1 for a in range(3)]
            )
    return coarse, factor


def find_body(
    volume: Volume, *, modality: str, threshold_hu: float = -500.0, copy_spacing_mm: float = 4.0
) -> tuple[Box, Bool[np.ndarray, "x2 y2 z2"], Int[np.ndarray, "3"]]:
    """Return the box of the body, its mask on a coarse copy, and the voxels per voxel of that copy.

    The body is the largest component above `threshold_hu` (CT) or Otsu's threshold (all else) of the first channel,
    with the holes of each axial slice filled, so that lungs belong to it. PET is skewed, a bladder is up to a hundred
    times as bright as muscle: its threshold is Otsu's of fourth roots. A volume without a body is all body.
    """
    coarse, factor = coarse_copy(volume.array[0], spacing_mm=volume.spacing_mm, target_mm=copy_spacing_mm)
    if modality == "pet":
        threshold = otsu_threshold(np.maximum(coarse, 0) ** 0.25) ** 4
    else:
        threshold = threshold_hu if modality == "ct" else otsu_threshold(coarse)
    mask = _largest_filled(coarse > threshold)
    if not mask.any():
        mask = np.ones_like(mask)
    ranges = [np.flatnonzero(mask.any(axis=tuple(b for b in range(3) if b != axis))) for axis in range(3)]
    lower = np.array([r[0] for r in ranges]) * factor - 0.5
    upper = np.minimum((np.array([r[-1] for r in ranges]) + 1) * factor, volume.shape) - 0.5
    return Box(lower, upper), mask, factor


def otsu_threshold(array: Shaped[np.ndarray, "..."], *, num_bins: int = 256) -> float:
    """Return the threshold that maximises the variance between the two classes.

    Source: N. Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 9 (1979).
    """
    counts, edges = np.histogram(array, bins=num_bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()[:-1]
    above = array.size - below
    mass = (counts * centres).cumsum()
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    best = np.nan_to_num(variance) >= np.nanmax(variance) * (1 - 1e-9)  # an empty gap in the histogram is a plateau
    return float(edges[1:-1][best].mean())


def _largest_filled(mask: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    import SimpleITK as sitk

    if not mask.any():
        return mask
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    largest = sitk.RelabelComponent(sitk.ConnectedComponent(image), sortByObjectSize=True) == 1
    body = sitk.GetArrayFromImage(largest).astype(np.uint8)
    for z in range(body.shape[2]):
        body[:, :, z] = sitk.GetArrayFromImage(
            sitk.BinaryFillhole(sitk.GetImageFromArray(np.ascontiguousarray(body[:, :, z])))
        )
    return body > 0


def draw_points(
    mask: Bool[np.ndarray, "x2 y2 z2"],
    label: Int[np.ndarray, "x y z"] | None,
    *,
    factor: Int[np.ndarray, "3"],
    shape: Sequence[int],
    case: str,
    num_body_points: int = 4096,
    num_label_points: int = 1024,
) -> Int32[np.ndarray, "point 4"]:
    """Return rows x, y, z, value of voxels to place crops at: body voxels (value -1), then voxels of each label.

    `mask` and `factor` come from `find_body`. The draw depends on nothing but the case's name and the voxels.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(case.encode()).digest()[:8], "little"))
    blocks = np.argwhere(mask)
    chosen = blocks[rng.integers(len(blocks), size=min(num_body_points, len(blocks) * int(factor.prod())))]
    body = np.minimum(chosen * factor + rng.integers(factor, size=chosen.shape), np.asarray(shape) - 1)
    rows = [np.column_stack([body, np.full(len(body), -1)])]
    if label is not None:
        rows += _label_points(label, rng, num_points=num_label_points)
    return np.concatenate(rows).astype(np.int32)


def _label_points(
    label: Int[np.ndarray, "x y z"], rng: np.random.Generator, *, num_points: int
) -> list[Int[np.ndarray, "point 4"]]:
    """Return, for each value but 0, rows x, y, z, value of at most `num_points` of its voxels.

    The voxels of a value are numbered in C order. Numbers are drawn first and then looked up plane by plane.
    """
    totals: dict[int, int] = {}
    for plane in label:
        for value, count in zip(*np.unique(plane[plane != 0], return_counts=True), strict=True):
            totals[int(value)] = totals.get(int(value), 0) + int(count)
    wanted = {}
    for value, total in sorted(totals.items()):
        few = total <= num_points
        wanted[value] = np.arange(total) if few else np.sort(rng.choice(total, num_points, replace=False))
    passed = dict.fromkeys(wanted, 0)
    rows: dict[int, list[np.ndarray]] = {value: [] for value in wanted}
    for x, plane in enumerate(label):
        where = np.flatnonzero(plane)
        order = where[np.argsort(plane.ravel()[where], kind="stable")]
        values, counts = np.unique(plane.ravel()[order], return_counts=True)
        for value, positions in zip(values.tolist(), np.split(order, counts.cumsum())[:-1], strict=True):
            first, last = np.searchsorted(wanted[value], (passed[value], passed[value] + len(positions)))
            y, z = np.unravel_index(positions[wanted[value][first:last] - passed[value]], plane.shape)
            rows[value].append(np.column_stack([np.full(len(y), x), y, z, np.full(len(y), value)]))
            passed[value] += len(positions)
    return [np.concatenate(parts) for parts in rows.values()]


def resample_volume(volume: Volume, spacing_mm: Sequence[float]) -> Volume:
    """Return the volume on a grid of `spacing_mm` about the same centre, anti-aliased along coarser axes.

    Integer voxels stay integer, within the range they had.
    """
    shape, affine, ratio = _target_grid(volume, spacing_mm)
    channels = []
    for channel in volume.array:
        out = np.asarray(channel, dtype=np.float32)
        for axis in range(3):
            if shape[axis] != out.shape[axis] or ratio[axis] != 1:
                positions = _positions(shape[axis], out.shape[axis], ratio[axis])
                out = resample_axis(out, axis, positions=positions, ratio=ratio[axis])
        out = np.clip(out, channel.min(), channel.max())  # a windowed sinc overshoots at edges: no new intensities
        channels.append((np.rint(out) if channel.dtype.kind in "iu" else out).astype(channel.dtype))
    return replace(volume, array=np.stack(channels), affine=affine)


def resample_label(
    label: Int[np.ndarray, "x y z"], volume: Volume, spacing_mm: Sequence[float]
) -> Int[np.ndarray, "x2 y2 z2"]:
    """Return the label map on the grid of `resample_volume`: each voxel gets the value with the largest share.

    Every value is resampled alone, inside its own bounding box; on a tie the smaller value wins.
    """
    shape, _, ratio = _target_grid(volume, spacing_mm)
    matrices = [
        resampling_matrix(_positions(shape[a], label.shape[a], ratio[a]), label.shape[a], ratio=ratio[a], border=True)
        for a in range(3)
    ]
    result = np.zeros(shape, dtype=label.dtype)
    best = np.zeros(shape, dtype=np.float32)
    total = np.zeros(shape, dtype=np.float32)
    for value in np.unique(label[label != 0]):
        own = label == value
        share = own.astype(np.float32)
        window = []
        for axis in range(3):
            inside = np.flatnonzero(own.any(axis=tuple(b for b in range(3) if b != axis)))
            matrix = matrices[axis][:, inside[0] : inside[-1] + 1]
            rows = np.flatnonzero(matrix.any(axis=1))
            matrix = matrix[rows[0] : rows[-1] + 1] if len(rows) else matrix[:1]
            window.append(slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 1))
            share = share.take(range(inside[0], inside[-1] + 1), axis=axis)
            share = np.moveaxis(np.tensordot(matrix, share, axes=(1, axis)), 0, axis)
        here = tuple(window)
        total[here] += share
        better = share > best[here]
        best[here][better] = share[better]
        result[here][better] = value
    result[1 - total >= best] = 0  # the background has the larger share
    return result


def _target_grid(
    volume: Volume, spacing_mm: Sequence[float]
) -> tuple[tuple[int, int, int], Float64[np.ndarray, "4 4"], list[float]]:
    wanted = np.asarray(spacing_mm, dtype=np.float64)
    if wanted.shape != (3,) or not (wanted > 0).all():
        raise ValueError(f"spacing_mm takes three positive numbers (x, y, z), got {list(spacing_mm)}")
    ratio = wanted / np.array(volume.spacing_mm)
    ratio[np.abs(ratio - 1) < SAME_SPACING] = 1.0
    x, y, z = (max(1, round(n / r)) for n, r in zip(volume.shape, ratio, strict=True))
    first = [_positions(m, n, r)[0] for m, n, r in zip((x, y, z), volume.shape, ratio, strict=True)]
    step = np.diag([*ratio, 1.0])
    step[:3, 3] = first
    return (x, y, z), volume.affine @ step, [float(r) for r in ratio]


def _positions(num_out: int, num_in: int, ratio: float) -> Float64[np.ndarray, " out"]:
    return (np.arange(num_out) - (num_out - 1) / 2) * ratio + (num_in - 1) / 2
