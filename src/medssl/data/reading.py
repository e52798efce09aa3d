"""Reading of image files as volumes in canonical RAS; an unusable file gives one readable reason."""

import contextlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from medssl.data.formats import Header, ReadError, open_image, reasons_for, size_text
from medssl.data.geometry import apply
from medssl.data.volume import Volume

SPACING_LIMITS_MM = (0.005, 100.0)
LABEL_MAP_VALUES = 256
MAX_ONE_HOT_CHANNELS = 256
MAX_OFF_PLACE_VOXEL = 0.5
FLOAT32_MAX = float(np.finfo(np.float32).max)
LEAST_LEVELS = 256
"""Grey values that a float32 must be able to tell apart between the least and the largest of an image."""

_ONE_LABEL = threading.Lock()


class LabelMapError(ReadError):
    """A label map lies among the images of a folder; it is skipped, not rejected."""


def read_volume(
    path: str | Path,
    *,
    channels: str | int | None = None,
    min_side_voxel: int = 8,
    skip_label_maps: bool = False,
    assume_spacing_mm: Sequence[float] | None = None,
) -> Volume:
    """Return the volume in an image file, or in the DICOM series of a folder, in canonical RAS.

    Args:
        path: Image file, or folder of a DICOM series.
        channels: Choice from a file with several channels: "all", the number of one, or None, which refuses it.
        min_side_voxel: Volumes with a shorter side are refused.
        skip_label_maps: Whether to refuse a volume that looks like a label map.
        assume_spacing_mm: Spacing along the axes of the file where its header states none. None refuses such files.

    Raises:
        LabelMapError: The volume looks like a label map. One with a channel for each structure counts too.
        ReadError: The volume cannot be used. The reason says what to do, where something can be done.
    """
    path = Path(path)
    check_channels(channels)
    with reasons_for(path):
        header, load = open_image(path, assume_spacing_mm=assume_spacing_mm)
        _check_grid(path, header, min_side_voxel)
        if skip_label_maps and channels is None and 1 < header.num_channels <= MAX_ONE_HOT_CHANNELS:
            _refuse_label_map(path, (load(channel)[..., 0] for channel in range(header.num_channels)))
        array, affine = _canonical(load(_chosen_channel(path, header, channels)), header.affine)
        if skip_label_maps:
            _refuse_label_map(path, array)
        _check_voxels(path, array)
    return Volume(array, affine, str(path), header.modality, header.left_out, header.doubts, header.series)


def read_label(
    path: str | Path, volume: Volume, *, assume_spacing_mm: Sequence[float] | None = None
) -> Int[np.ndarray, "x y z"]:
    """Return the label map in a file, on the grid of `volume`, as int16 or int32.

    Raises:
        ReadError: The map has another shape or place than the volume, or fractional, negative or non-finite values.
    """
    path = Path(path)
    with reasons_for(path):
        header, load = open_image(path, assume_spacing_mm=assume_spacing_mm)
        _check_grid(path, header, 1)
        if header.num_channels > 1:
            raise ReadError(path, f"a label map has one channel, this one has {header.num_channels}")
        if (shape := _canonical_shape(header.shape, header.affine)) != volume.shape:
            raise ReadError(path, _wrong_shape(shape, volume.shape))
        whole = _whole_numbers(path, load(None))  # narrow before the turn to RAS, which copies
        array, affine = _canonical(whole, header.affine)
        _check_place(path, affine, volume)
        return array[0]


def _wrong_shape(label: Sequence[int], image: Sequence[int]) -> str:
    return f"label of the wrong shape: {size_text(label)}, its image is {size_text(image)}"


def check_label_file(path: Path, image: Path, *, assume_spacing_mm: Sequence[float] | None = None) -> str | None:
    """Return why `path` cannot be the label map of `image`, by the image's header; None if it can."""
    try:
        with reasons_for(path):
            header, load = open_image(path, assume_spacing_mm=assume_spacing_mm)
            if image.is_file():
                with contextlib.suppress(ReadError):  # a broken image is reported as such when it is read
                    with reasons_for(image):
                        other = open_image(image, assume_spacing_mm=assume_spacing_mm)[0]
                    shapes = [_canonical_shape(h.shape, h.affine) for h in (header, other)]
                    if shapes[0] != shapes[1]:
                        return _wrong_shape(*shapes)
            if not header.integer:
                _check_grid(path, header, 1)
                with _ONE_LABEL:  # threads look at labels side by side: their voxels must not be in memory at once
                    _check_labels(path, load(None))
    except ReadError as error:
        return error.reason
    return None


def looks_like_label_map(channels: Iterable[Shaped[np.ndarray, "x y z"]]) -> bool:
    """Return whether each channel holds few whole values from -1 on, in pieces: most neighbours in a piece are equal.

    A constant channel stands for an absent structure. If all are constant, they are a label map if stored in bytes.
    """
    kinds = []
    for channel in channels:
        low, high = channel.min(), channel.max()
        constant = low == high
        if low < -1 or not _whole(low) or not (constant or _few_values_in_pieces(channel)):
            return False
        kinds.append(channel.dtype.itemsize == 1 if constant else True)
    return all(kinds) if len(kinds) == 1 else any(kinds)


def _whole(value: Any) -> bool:
    return bool(np.isfinite(value) and value == np.rint(value))


def _few_values_in_pieces(channel: Shaped[np.ndarray, "x y z"]) -> bool:
    values: set[float] = set()
    for plane in channel[:: max(1, channel.shape[0] // 16)], channel:  # a few planes rule out most images
        for part in plane:
            if not np.array_equal(part, np.rint(part)):
                return False
            values.update(np.unique(part).tolist())
            if len(values) > LABEL_MAP_VALUES:
                return False
    pairs = equal = 0
    for x in range(len(channel)):
        here = channel[x]
        for a, b in ((here, channel[x - 1] if x else here[:0]), (here[1:], here[:-1]), (here[:, 1:], here[:, :-1])):
            if len(b):
                inside = (a != 0) | (b != 0)
                pairs += int(inside.sum())
                equal += int((inside & (a == b)).sum())
    return equal >= 0.5 * pairs


def _refuse_label_map(path: Path, channels: Iterable[Shaped[np.ndarray, "x y z"]]) -> None:
    if looks_like_label_map(channels):
        ways = "data.include_labels=true reads it as an image"
        raise LabelMapError(path, f"few whole values in pieces: a label map ({ways})")


def _canonical(
    array: Shaped[np.ndarray, "x y z c"], affine: Float[np.ndarray, "4 4"]
) -> tuple[Shaped[np.ndarray, "c x2 y2 z2"], Float[np.ndarray, "4 4"]]:
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(affine)
    turned = apply_orientation(array, orientation)
    return np.ascontiguousarray(np.moveaxis(turned, -1, 0)), affine @ inv_ornt_aff(orientation, array.shape[:3])


def _canonical_shape(shape: Sequence[int], affine: Float[np.ndarray, "4 4"]) -> tuple[int, ...]:
    from nibabel.orientations import io_orientation

    if not _is_regular(affine):
        return tuple(shape)
    to = io_orientation(affine)[:, 0].astype(int)
    return tuple(shape[int(np.flatnonzero(to == axis)[0])] for axis in range(3))


def _is_regular(affine: Float[np.ndarray, "4 4"]) -> bool:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(
        np.isfinite(affine).all() and (lengths > 0).all() and abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3
    )


def _check_grid(path: Path, header: Header, min_side_voxel: int) -> None:
    if not _is_regular(header.affine):
        raise ReadError(path, "the affine is singular or not finite: voxels have no place in space; repair the header")
    spacing = np.linalg.norm(header.affine[:3, :3], axis=0)
    low, high = SPACING_LIMITS_MM
    if spacing.min() < low or spacing.max() > high:
        found = " x ".join(f"{s:.3g}" for s in spacing)
        raise ReadError(path, f"the spacing {found} mm is absurd (allowed: {low} to {high:g}); repair the header")
    if min(header.shape) == 1 < min_side_voxel:
        raise ReadError(path, f"a 2-D image ({size_text(header.shape)}), not a volume")
    check_sides(path, header.shape, min_side_voxel)


def check_sides(path: Path, shape: Sequence[int], min_side_voxel: int) -> None:
    """Raise a ReadError where a side has fewer voxels than `min_side_voxel`."""
    if min(shape) < min_side_voxel:
        text = f"a side of {min(shape)} voxels ({size_text(shape)}) is under min_side_voxel={min_side_voxel}"
        raise ReadError(path, text)


def check_channels(channels: str | int | None) -> None:
    """Raise a ValueError unless `channels` is "all", None or the number of a channel."""
    if channels in (None, "all") or (isinstance(channels, int) and not isinstance(channels, bool) and channels >= 0):
        return
    raise ValueError(f"channels takes all, null or the number of a channel (from 0), got {channels!r}")


def _chosen_channel(path: Path, header: Header, channels: str | int | None) -> int | None:
    last = header.num_channels - 1
    if channels is None and last > 0:
        choice = f"choose with data.channels=all or data.channels=N (0 to {last})"
        raise ReadError(path, f"a 4-D image with {header.num_channels} channels; {choice}")
    if channels is None or isinstance(channels, str):
        return None
    if channels > last:
        raise ReadError(path, f"data.channels={channels} is not there: the image has channels 0 to {last}")
    return channels


def _check_voxels(path: Path, array: Shaped[np.ndarray, "c x y z"]) -> None:
    if array.dtype.kind == "f" and not all(np.isfinite(plane).all() for channel in array for plane in channel):
        for name, count in (("NaN", int(np.isnan(array).sum())), ("infinite", int(np.isinf(array).sum()))):
            if count:
                raise ReadError(path, f"{count:,} of {array.size:,} voxels are {name}; repair or drop the image")
    for channel, voxels in enumerate(array):
        low, high = voxels.min().item(), voxels.max().item()
        if low == high:
            which = f" of channel {channel}" if len(array) > 1 else ""
            raise ReadError(path, f"all voxels{which} have the same value ({low:g}): the image is constant")
        _check_levels(path, low, high, voxels.dtype)


def _check_levels(path: Path, low: float, high: float, dtype: np.dtype[Any]) -> None:
    """Check that values that a float32 cannot hold exactly differ by enough of its steps."""
    largest = max(abs(low), abs(high))
    exact = dtype.itemsize <= 4 if dtype.kind == "f" else largest <= 2**24
    if not exact and (high - low) < LEAST_LEVELS * float(np.spacing(np.float32(min(largest, FLOAT32_MAX)))):
        raise ReadError(
            path,
            f"values from {low} to {high} are too large for their range: a float32 hardly tells them apart; "
            "subtract a constant from the image",
        )


def _check_place(path: Path, affine: Float[np.ndarray, "4 4"], volume: Volume) -> None:
    last = [n - 1 for n in volume.shape]
    corners = np.array([[x, y, z] for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])])
    in_image = apply(np.linalg.inv(volume.affine) @ affine, corners)
    apart = np.abs(in_image - corners).max(axis=0)
    if apart.max() > MAX_OFF_PLACE_VOXEL + 1e-3:
        far = f"corners are up to {' x '.join(f'{a:.3g}' for a in apart)} voxels apart"
        raise ReadError(path, f"the label lies elsewhere than its image: {far}; repair one of the headers")


def _check_labels(path: Path, array: Shaped[np.ndarray, "..."]) -> None:
    """Raise a ReadError unless all values are whole numbers from 0 on; slab by slab, without copies of the whole."""
    num_fractional, example = 0, 0.0
    channels = np.moveaxis(array, -1, 0) if array.dtype.kind == "f" else ()
    for part in (slab for c in channels for slab in (c.T if c.flags.f_contiguous else c)):
        if not np.isfinite(part).all():
            raise ReadError(path, "the label holds values that are NaN or infinite")
        fractional = part != np.rint(part)
        if fractional.any():
            example = example if num_fractional else float(part[fractional].flat[0])
            num_fractional += int(fractional.sum())
    if num_fractional:
        raise ReadError(
            path, f"fractional labels: {num_fractional:,} voxels are no whole numbers (such as {example:g})"
        )
    if array.min() < 0 or array.max() >= 2**31:
        found = f"{array.min():g} to {array.max():g}"
        raise ReadError(path, f"label values from {found}; 0 is the background, others are positive")


def _whole_numbers(path: Path, array: Shaped[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    _check_labels(path, array)
    return array.astype(np.int16 if array.max() < 2**15 else np.int32)
