"""The segmentation of a volume: the class of each of its voxels, on its own grid."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int16, Shaped, UInt8
from torch import Tensor, nn

from medssl.data.store import Record, VolumeStore
from medssl.inference.reading import Reading
from medssl.inference.record import fetch_from
from medssl.inference.working_grid import Fetch, WorkingImage
from medssl.segmentation.native_grid import NativePlane, mean_plane, most_probable, planes
from medssl.segmentation.sliding_window import Predict, SlidingWindow

Classes = UInt8[np.ndarray, "x y z"] | Int16[np.ndarray, "x y z"]
"""Class numbers; 8 bits where they suffice."""


class Averaged:
    """Class probabilities of windows: the mean over networks and flips of their softmax.

    Args:
        networks: The networks; each gives logits (b k x y z) for windows (b c x y z).
        flips: Axes of flips; predictions are averaged over every combination of flips along them.
        dtype: The type of automatic mixed precision; None leaves that to the caller.
    """

    def __init__(
        self, networks: Sequence[nn.Module], *, flips: Sequence[int] = (), dtype: torch.dtype | None = None
    ) -> None:
        if not networks:
            raise ValueError("give at least one network")
        if len(set(flips)) != len(flips) or not set(flips) <= {0, 1, 2}:
            raise ValueError(f"flips must be different ones of 0 (x), 1 (y), 2 (z), got {list(flips)}")
        self.networks, self.dtype = list(networks), dtype
        self.takes_coordinate = any(getattr(network, "takes_coordinate", False) for network in networks)
        dims = [2 + axis for axis in flips]
        self.flips = [some for count in range(len(dims) + 1) for some in combinations(dims, count)]

    @torch.inference_mode()
    def __call__(
        self, windows: Float[Tensor, "b c x y z"], coordinate: Float[Tensor, "b 3 x y z"] | None = None
    ) -> Float32[Tensor, "b k x y z"]:
        """Return the probabilities of the windows; `coordinate` places each voxel, for networks that take it."""
        total, own = None, self.dtype is not None
        for network in self.networks:
            for dims in self.flips:
                with torch.autocast(windows.device.type, dtype=self.dtype) if own else nullcontext():
                    inputs = (windows, coordinate) if getattr(network, "takes_coordinate", False) else (windows,)
                    logits = network(*(x.flip(dims) if dims and x is not None else x for x in inputs))
                probabilities = (logits.flip(dims) if dims else logits).float().softmax(1)
                total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        return total.div_(len(self.networks) * len(self.flips))


@dataclass(frozen=True)
class Member:
    """A part of an ensemble: the networks that predict, their reading, and their weight in the mean."""

    predict: Predict
    reading: Reading
    weight: float = 1.0


class NotFiniteError(ValueError):
    """The error of a network that gave NaN or infinity for a case."""

    def __init__(self, case: str) -> None:
        super().__init__(
            f"the network's output is not finite for case {case}; its training diverged: lower optimizer.lr"
        )


class _StopAskedFor(Exception):
    pass


def segment(
    members: Sequence[Member],
    fetch: Fetch,
    record: Record,
    *,
    num_classes: int,
    device: str | torch.device = "cpu",
    overlap: float = 0.5,
    window_batch: int = 2,
    should_stop: Callable[[], bool] | None = None,
    on_window: Callable[[int, int], None] | None = None,
    probabilities: Float16[np.ndarray, "k x y z"] | None = None,
) -> Classes | None:
    """Return the most probable class of every voxel of a case, by the mean of the members; None if it was stopped.

    The work is done slice by slice: memory besides the result does not grow with the number of slices.

    Args:
        members: Networks, each with its own reading.
        fetch: The function that gives voxels of the case.
        record: The record of the case.
        num_classes: Number of classes, background included.
        device: The device on which images are drawn and predictions are summed.
        overlap: Share that neighbouring windows have in common.
        window_batch: Windows per call of a network.
        should_stop: Called after every batch of windows; True stops the work.
        on_window: Called after every batch with the number of windows that are done, and the number of all.
        probabilities: Array that receives the probabilities; written slice by slice.

    Raises:
        NotFiniteError: A network gave NaN or infinity.
    """
    device = torch.device(device)
    windows = [SlidingWindow(m.reading.crop_voxel, overlap, batch_size=window_batch) for m in members]
    images = [WorkingImage(record, m.reading, fetch, device, located=takes_coordinate(m.predict)) for m in members]
    total = sum(w.num_windows(image.grid.frame.shape) for w, image in zip(windows, images, strict=True))
    done = 0

    def after_windows(number: int) -> None:
        nonlocal done
        done += number
        if on_window is not None:
            on_window(done, total)
        if should_stop is not None and should_stop():
            raise _StopAskedFor

    streams = [
        planes(
            _finite(
                window.slabs(
                    image.layer, image.grid.frame.shape, _normalised(member, record, device), on_window=after_windows
                ),
                record,
            ),
            image.grid.positions(2),
        )
        for member, window, image in zip(members, windows, images, strict=True)
    ]
    natives = [NativePlane(image.grid, device) for image in images]
    weights = [member.weight / sum(m.weight for m in members) for member in members]
    slices_first = (record.shape[2], *record.shape[:2])  # each slice is written in one piece
    classes = np.empty(slices_first, np.uint8 if num_classes <= 256 else np.int16).transpose(1, 2, 0)
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            for z, found in enumerate(zip(*streams, strict=True)):
                if probabilities is None:
                    chosen = most_probable(found, natives, weights)
                else:
                    mean = mean_plane(found, natives, weights)
                    chosen = mean.max(0).indices
                    probabilities[..., z] = mean.half().cpu().numpy()
                classes[:, :, z] = chosen.cpu().numpy()
    except _StopAskedFor:
        return None
    return classes


def segment_volume(
    predict: Predict,
    voxels: Shaped[np.ndarray, "c x y z"],
    record: Record,
    reading: Reading,
    *,
    num_classes: int,
    device: str | torch.device = "cpu",
    overlap: float = 0.5,
    window_batch: int = 2,
    should_stop: Callable[[], bool] | None = None,
    on_window: Callable[[int, int], None] | None = None,
    probabilities: Float16[np.ndarray, "k x y z"] | None = None,
) -> Classes | None:
    """Call `segment` with one network, for a volume in memory (canonical RAS); `record_of` makes its record."""
    return segment(
        [Member(predict, reading)],
        fetch_from(voxels),
        record,
        num_classes=num_classes,
        device=device,
        overlap=overlap,
        window_batch=window_batch,
        should_stop=should_stop,
        on_window=on_window,
        probabilities=probabilities,
    )


def segment_stored(
    predict: Predict,
    store: VolumeStore,
    case: int,
    reading: Reading,
    *,
    num_classes: int,
    device: str | torch.device = "cpu",
    overlap: float = 0.5,
    window_batch: int = 2,
    should_stop: Callable[[], bool] | None = None,
    on_window: Callable[[int, int], None] | None = None,
    probabilities: Float16[np.ndarray, "k x y z"] | None = None,
) -> Classes | None:
    """Call `segment` with one network, for a case of a store, which is read slab by slab."""
    return segment(
        [Member(predict, reading)],
        lambda lower, upper: store.read(case, 0, lower, upper).result(),
        store.record(case),
        num_classes=num_classes,
        device=device,
        overlap=overlap,
        window_batch=window_batch,
        should_stop=should_stop,
        on_window=on_window,
        probabilities=probabilities,
    )


def takes_coordinate(predict: Predict) -> bool:
    """Return whether networks need the place in the body of each voxel, as a second argument of `predict`."""
    return getattr(predict, "takes_coordinate", False)


def _finite(slabs: Iterable[tuple[int, Tensor]], record: Record) -> Iterator[tuple[int, Tensor]]:
    """Yield the slabs, checked by their sums, which NaN or infinity in a slab makes NaN or infinity.

    Raises:
        NotFiniteError: A slab holds NaN or infinity.
    """
    for first, slab in slabs:
        if not slab.sum().isfinite():
            raise NotFiniteError(record.case or record.source)
        yield first, slab


def _normalised(member: Member, record: Record, device: torch.device) -> Predict:
    """Return the member's network behind its normalisation; the caller's mixed precision is for the network alone."""
    normalise = member.reading.normaliser(record)
    mixed, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    located = takes_coordinate(member.predict)

    def predict(windows: Tensor) -> Tensor:
        coordinate = (windows[:, -3:],) if located else ()
        windows = normalise(windows[:, :-3] if located else windows)
        with torch.autocast(device.type, dtype=dtype, enabled=mixed):
            return member.predict(windows, *coordinate)

    return predict
