"""Intensity augmentations that change each grey value alone: brightness, contrast, gamma."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from medssl.data.augment.base import IntensityAugmentation, Measured, check_range, column, uniform
from medssl.data.store import Record


@dataclass(frozen=True, kw_only=True)
class Brightness(IntensityAugmentation):
    """Multiply by a factor and add a shift.

    Args:
        factor: Range of the factor, 0 or more.
        shift: Range of the shift, in the image's units at this place of the chain.
    """

    factor: Sequence[float] = (1.0, 1.0)
    shift: Sequence[float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        check_range("Brightness: factor", self.factor, low=0)
        check_range("Brightness: shift", self.shift, low=-np.inf)

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the factor and the shift."""
        return [uniform(rng, self.factor), uniform(rng, self.shift)]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        return image.mul_(column(parameters, 0)).add_(column(parameters, 1))


@dataclass(frozen=True, kw_only=True)
class Contrast(IntensityAugmentation):
    """Stretch values about the mean of the view or group.

    Args:
        factor: Range of the stretch, 0 or more; 1 changes nothing.
        keep_range: Whether to clip to the former minimum and maximum.
    """

    factor: Sequence[float] = (0.8, 1.2)
    keep_range: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("Contrast: factor", self.factor, low=0)

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the factor."""
        return [uniform(rng, self.factor)]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        limits = (measured.minimum, measured.maximum) if self.keep_range else None
        factor, mean = column(parameters, 0), measured.mean
        image.mul_(factor).add_(mean * (1 - factor))
        return image if limits is None else image.clamp_(*limits)


@dataclass(frozen=True, kw_only=True)
class Gamma(IntensityAugmentation):
    """Raise values to a power after they are scaled to [0, 1] by minimum and maximum of the view or group.

    The result is scaled back.

    Args:
        gamma: Range of the exponent, above 0, drawn uniformly; below 1 brightens.
        balanced: Whether to draw exponents below and above 1 equally often, uniformly on each side.
        invert: Whether to change the negated image, and negate the result: below 1 darkens.
        keep_statistics: Whether each channel of a view keeps its own mean and standard deviation.

    Source: arXiv:1809.10486 for `invert` and `keep_statistics`.
    """

    gamma: Sequence[float] = (0.7, 1.5)
    balanced: bool = False
    invert: bool = False
    keep_statistics: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        super().__post_init__()
        check_range("Gamma: gamma", self.gamma, low=1e-3)
        if self.balanced and not self.gamma[0] <= 1 <= self.gamma[1]:
            raise ValueError(f"Gamma: balanced needs a range around 1, got {list(self.gamma)}")

    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float]:
        """Draw the exponent."""
        if not self.balanced:
            return [uniform(rng, self.gamma)]
        low, high = self.gamma
        return [uniform(rng, (low, 1.0) if rng.uniform() < 0.5 else (1.0, high))]

    def change(self, image: Tensor, parameters: Tensor, measured: Measured, keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views."""
        low, high = measured.minimum, measured.maximum
        spread, own = high - low, Measured(image)
        before = (own.mean, own.std) if self.keep_statistics else None
        shown = image.neg_().add_(high) if self.invert else image.sub_(low)
        shown.div_(spread + 1e-7).clamp_min_(0).pow_(column(parameters, 0)).mul_(spread)
        image = shown.neg_().add_(high) if self.invert else shown.add_(low)
        if before is None:
            return image
        mean, std = before
        changed = Measured(image)
        scale = std / changed.std.clamp(min=1e-8)
        shift = mean - changed.mean * scale
        return image.mul_(scale).add_(shift)
