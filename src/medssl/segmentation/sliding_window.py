"""Sliding-window prediction by slabs: it holds predictions for the height of one window, not for the whole image."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

Predict = Callable[..., Tensor]
"""Windows (b c x y z) to class probabilities (b k x y z) that sum to one; see `segment.takes_coordinate`."""
Layer = Callable[[int, int], Tensor]
"""The slices from `first` to before `last` of an image, (c x y height)."""

SIGMA = 0.125
"""Width of the importance map, in sides of the window."""
LEAST_IMPORTANCE = 1e-3


class SlidingWindow:
    """Predicts an image window by window and averages overlapping predictions with Gaussian weights.

    Places, padding and weights are those of MONAI's `SlidingWindowInferer(mode="gaussian")`.

    Args:
        window_voxel: Sides of the window along x, y, z.
        overlap: Share of the window that neighbours have in common, in [0, 1).
        batch_size: Windows per call of the network.
    """

    def __init__(self, window_voxel: Sequence[int], overlap: float = 0.5, *, batch_size: int = 2) -> None:
        if len(window_voxel) != 3 or min(window_voxel) < 1:
            raise ValueError(f"window_voxel takes three positive sides (x, y, z), got {list(window_voxel)}")
        check_windows(overlap, batch_size)
        self.window = tuple(int(n) for n in window_voxel)
        self.overlap, self.batch_size = overlap, batch_size

    def num_windows(self, sides: Sequence[int]) -> int:
        """Return the number of windows on an image of these sides."""
        x, y, z = (len(starts) for starts in self._starts(sides))
        return x * y * z

    def __call__(
        self, image: Float[Tensor, "c x y z"], predict: Predict, *, on_window: Callable[[int], None] | None = None
    ) -> Float32[Tensor, "k x y z"]:
        """Return the class probabilities of a whole image; a small one is padded with zeros on both sides."""
        sides = [max(n, w) for n, w in zip(image.shape[1:], self.window, strict=True)]
        before = [(side - n) // 2 for side, n in zip(sides, image.shape[1:], strict=True)]
        after = [side - n - b for side, n, b in zip(sides, image.shape[1:], before, strict=True)]
        padding = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
        padded = F.pad(image, padding) if any(padding) else image
        sums = _Sums(sides, depth=sides[2])
        for _ in self._run(lambda first, last: padded[..., first:last], sums, predict, on_window):
            pass
        x, y, z = (slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
        return sums.values[:, x, y, z]

    def slabs(
        self,
        layer: Layer,
        sides: Sequence[int],
        predict: Predict,
        *,
        on_window: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Float32[Tensor, "k x y height"]]]:
        """Yield slabs of class probabilities from the first slice to the last, each with the number of its first slice.

        A slab is a view of memory that is used again: it is valid until the next one is taken.

        Args:
            layer: The function that gives slices of the image; called for one window's height at a time, upwards.
            sides: Sides of the image, none shorter than the window.
            predict: The network.
            on_window: Called after each batch with the number of its windows.
        """
        yield from self._run(layer, _Sums(sides, depth=self.window[2]), predict, on_window)

    def _run(
        self, layer: Layer, sums: "_Sums", predict: Predict, on_window: Callable[[int], None] | None
    ) -> Iterator[tuple[int, Tensor]]:
        wx, wy, wz = self.window
        starts_x, starts_y, starts_z = self._starts(sums.sides)
        importance = None
        for z, following in zip(starts_z, [*starts_z[1:], sums.sides[2]], strict=True):
            slices = layer(z, z + wz)
            if importance is None:
                importance = importance_map(self.window, slices.device)
            corners = list(product(starts_x, starts_y))
            for number in range(0, len(corners), self.batch_size):
                places = corners[number : number + self.batch_size]
                windows = torch.stack([slices[:, x : x + wx, y : y + wy] for x, y in places])
                predictions = predict(windows)
                if predictions.ndim != 5 or predictions.shape[2:] != windows.shape[2:]:
                    shapes = f"{tuple(predictions.shape)} for windows of {tuple(windows.shape)}"
                    raise ValueError(f"the network must give maps (b k x y z) of the window's sides, got {shapes}")
                for (x, y), prediction in zip(places, predictions, strict=True):
                    sums.add(prediction.float(), importance, (x, y, z))
                del windows, predictions, prediction  # frees their memory before the next batch
                if on_window is not None:
                    on_window(len(places))
            yield from sums.finished(z, following)

    def _starts(self, sides: Sequence[int]) -> list[list[int]]:
        return [window_starts(n, w, self.overlap) for n, w in zip(sides, self.window, strict=True)]


def check_windows(overlap: object, batch_size: object) -> None:
    """Check the overlap of windows and the number of windows in a batch.

    Raises:
        ValueError: The overlap does not lie in [0, 1), or the number is not a whole number from 1 up.
    """
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"window_batch must be a whole number from 1 up, got {batch_size!r}")


class _Sums:
    """Weighted sums of predictions on the `depth` slices of z that windows still touch, in a ring buffer."""

    def __init__(self, sides: Sequence[int], *, depth: int) -> None:
        self.sides, self.depth = tuple(sides), depth
        self.values = self.weights = torch.empty(0)

    def add(
        self, prediction: Float32[Tensor, "k x y z"], weight: Float32[Tensor, "x y z"], start: tuple[int, int, int]
    ) -> None:
        """Add a window's prediction."""
        if not self.values.numel():
            shape = (*self.sides[:2], self.depth)
            self.values = torch.zeros(len(prediction), *shape, device=prediction.device)
            self.weights = torch.zeros(shape, device=prediction.device)
        x, y = (slice(s, s + n) for s, n in zip(start[:2], weight.shape[:2], strict=True))
        for ring, window in self._pieces(start[2], start[2] + weight.shape[2]):
            self.values[:, x, y, ring].addcmul_(prediction[..., window], weight[..., window])
            self.weights[x, y, ring] += weight[..., window]

    def finished(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the means of slices that no window touches any more; their place is free afterwards."""
        for ring, part in self._pieces(first, last):
            values, weights = self.values[..., ring], self.weights[..., ring]
            yield first + part.start, values.div_(weights)
            if self.depth < self.sides[2]:
                values.zero_()
                weights.zero_()

    def _pieces(self, first: int, last: int) -> Iterator[tuple[slice, slice]]:
        """Yield the places of slices in the ring: one piece, or two if they run over its end."""
        done = 0
        while first + done < last:
            start = (first + done) % self.depth
            length = min(last - first - done, self.depth - start)
            yield slice(start, start + length), slice(done, done + length)
            done += length


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Return the starts of windows along an axis: equal steps, the last window moved back to end with the axis."""
    if side < window:
        raise ValueError(f"a side of {side} voxels is shorter than the window of {window}; pad the image first")
    step = window if side == window else max(1, int(window * (1 - overlap)))
    return [*range(0, side - window, step), side - window]


def importance_map(window: Sequence[int], device: torch.device | str = "cpu") -> Float32[Tensor, "x y z"]:
    """Return the weight of each voxel of a window: a Gaussian about its middle, nowhere below 0.001."""
    axes = []
    for side in window:
        offset = torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2
        axes.append(torch.exp(-(offset**2) / (2 * (SIGMA * side) ** 2)))
    x, y, z = axes
    return (x[:, None, None] * y[:, None] * z).clamp_min(LEAST_IMPORTANCE)
