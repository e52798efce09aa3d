"""Normalisation: a linear map and a clip, by channel, from stored values (HU, scanner units) to network input."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from medssl.data.augment.base import Measured, Normalisation
from medssl.data.store import Record

KNOWN_PERCENTILES = {0.5: "p0_5", 1: "p1", 5: "p5", 50: "p50", 95: "p95", 99: "p99", 99.5: "p99_5"}


class LinearNormalisation(Normalisation):
    """Map each channel linearly and clip it; nothing is drawn."""

    @abstractmethod
    def limits(self, record: Record, channel: int) -> tuple[float, float, float, float]:
        """Return two values (low, high) and the values that they become (low, high)."""

    def parameters(self, rng: np.random.Generator, record: Record) -> np.ndarray:
        """Return scale, shift, lowest and highest value of every channel."""
        rows = []
        for channel in range(record.channels):
            low, high, out_low, out_high = self.limits(record, channel)
            scale = (out_high - out_low) / max(high - low, 1e-12)
            clip = (out_low, out_high) if self.clips else (-np.inf, np.inf)
            rows.append([scale, out_low - low * scale, *clip])
        return np.array(rows).T.reshape(-1)

    @property
    def clips(self) -> bool:
        """Whether values beyond the limits are clipped."""
        return True

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        scale, shift, low, high = parameters.unflatten(1, (4, -1))[..., None, None, None].unbind(
            1
        )  # each (view c 1 1 1)
        image.mul_(scale).add_(shift)
        return image.clamp_(low, high) if self.clips else image


@dataclass(frozen=True, kw_only=True)
class Window(LinearNormalisation):
    """Clip to [low_hu, high_hu] and map this window to `out`."""

    low_hu: float
    high_hu: float
    out: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the window."""
        super().__post_init__()
        if not self.low_hu < self.high_hu:
            raise ValueError(f"Window: low_hu must be below high_hu, got {self.low_hu} and {self.high_hu}")

    def limits(self, record: Record, channel: int) -> tuple[float, float, float, float]:
        """Return the window."""
        return self.low_hu, self.high_hu, self.out[0], self.out[1]


@dataclass(frozen=True, kw_only=True)
class Percentiles(LinearNormalisation):
    """Clip at two percentiles of the whole volume (of 0.5, 1, 5, 50, 95, 99, 99.5) and map them to `out`."""

    low: float = 0.5
    high: float = 99.5
    out: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the percentiles."""
        super().__post_init__()
        for value in (self.low, self.high):
            if value not in KNOWN_PERCENTILES:
                raise ValueError(
                    f"Percentiles: {value} is not kept in the index; choose among {sorted(KNOWN_PERCENTILES)}"
                )
        if not self.low < self.high:
            raise ValueError(f"Percentiles: low must be below high, got {self.low} and {self.high}")

    def limits(self, record: Record, channel: int) -> tuple[float, float, float, float]:
        """Return the case's percentiles; its range where they coincide."""
        kept = record.statistics[channel]
        low, high = (kept[KNOWN_PERCENTILES[p]] for p in (self.low, self.high))
        if high <= low:
            low, high = kept["minimum"], kept["maximum"]
        return low, high, self.out[0], self.out[1]


@dataclass(frozen=True, kw_only=True)
class ZScore(LinearNormalisation):
    """Map the whole volume to zero mean and unit deviation; clip at `limit` deviations where one is given."""

    limit: float | None = None

    @property
    def clips(self) -> bool:
        """Whether there is a limit."""
        return self.limit is not None

    def limits(self, record: Record, channel: int) -> tuple[float, float, float, float]:
        """Return the values `limit` (or one) standard deviations below and above the mean."""
        kept, reach = record.statistics[channel], self.limit or 1.0
        spread = reach * max(kept["std"], 1e-8)
        return kept["mean"] - spread, kept["mean"] + spread, -reach, reach


@dataclass(frozen=True, kw_only=True)
class ByModality(LinearNormalisation):
    """A window for channels of CT, percentiles of the volume for all else, both mapped to `out`.

    It is the choice for mixed sources, and for cases of several modalities.
    """

    window_hu: Sequence[float] = (-1000.0, 1000.0)
    percentiles: Sequence[float] = (0.5, 99.5)
    out: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the window and the percentiles."""
        super().__post_init__()
        self._of("ct")
        self._of("mr")

    def _of(self, modality: str) -> LinearNormalisation:
        if modality == "ct":
            return Window(low_hu=self.window_hu[0], high_hu=self.window_hu[1], out=self.out)
        return Percentiles(low=self.percentiles[0], high=self.percentiles[1], out=self.out)

    def limits(self, record: Record, channel: int) -> tuple[float, float, float, float]:
        """Return the limits for the modality of the channel."""
        return self._of(record.modality[channel]).limits(record, channel)


@dataclass(frozen=True, kw_only=True)
class MinMax(Normalisation):
    """Map the range of each view, or of a sample's group (`statistics`), to [0, 1]; a constant view becomes 0."""

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Return no parameters."""
        return ()

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        low, high = measured.minimum, measured.maximum
        return image.sub_(low).div_((high - low).clamp_min_(1e-8))


@dataclass(frozen=True, kw_only=True)
class Standardise(Normalisation):
    """Map each view, or a sample's group (`statistics`), to zero mean and unit deviation."""

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Return no parameters."""
        return ()

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        mean, std = measured.mean, measured.std
        return image.sub_(mean).div_(std.clamp_min_(1e-8))
