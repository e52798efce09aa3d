"""The two kinds of augmentation and what they share: first draw the parameters on the host, then apply them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from medssl.data.geometry import Displacement, Frame
from medssl.data.store import Record


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Settings of every augmentation.

    Args:
        probability: Probability that the augmentation acts at all.
        share: Views that share the drawn parameters: "view" (none), "group" (all views of the group), or a NAME: all
            views of the sample, in any group, with an augmentation of the same class under that name. Voxel noise is
            always independent.
    """

    probability: float = 1.0
    share: str = "view"

    def __post_init__(self) -> None:
        """Check the probability."""
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{type(self).__name__}: probability must lie in [0, 1], got {self.probability}")


class Pose(NamedTuple):
    """The place of a view while spatial augmentations move it."""

    frame: Frame
    displacement: Displacement | None


class SpatialAugmentation(Augmentation, ABC):
    """Move the frame of a view; no voxel is touched until the one interpolation at the end."""

    @abstractmethod
    def move(self, pose: Pose, rng: np.random.Generator, *, record: Record) -> Pose:
        """Return the pose after a move with parameters drawn from `rng`."""


@dataclass(frozen=True, kw_only=True)
class IntensityAugmentation(Augmentation, ABC):
    """Change grey values of image batches, with separate parameters for each view.

    Args:
        statistics: Voxels over which minimum, maximum and mean are taken: each "view", or the whole "group" of a
            sample. They are always taken by channel.
    """

    statistics: str = "view"

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.statistics not in ("view", "group"):
            raise ValueError(f"{type(self).__name__}: statistics must be view or group, got {self.statistics!r}")

    @abstractmethod
    def parameters(self, rng: np.random.Generator, record: Record) -> Sequence[float] | np.ndarray:
        """Draw the parameters of one view, always equally many."""

    @abstractmethod
    def change(self, image: Tensor, parameters: Tensor, measured: "Measured", keys: Int64[Tensor, " view"]) -> Tensor:
        """Return the changed views (view c x y z); parameters are (view, k). It may work in place."""

    def draw(self, rng: np.random.Generator, record: Record) -> np.ndarray:
        """Draw whether to act (1 or 0), then the parameters."""
        acts = rng.uniform() < self.probability
        return np.concatenate([[acts], self.parameters(rng, record)])

    def apply(
        self,
        image: Float[Tensor, "b v c x y z"],
        parameters: Float[np.ndarray, "b v k"],
        keys: Int64[np.ndarray, "b v"],
    ) -> Float[Tensor, "b v c x y z"]:
        """Return the batch after a change of the views that act; `keys` seed the numbers drawn for each voxel."""
        rows = np.flatnonzero(parameters[..., 0])
        if not len(rows):
            return image
        flat = image.flatten(0, 1)
        everything = len(rows) == len(flat)
        chosen = flat if everything else flat[torch.as_tensor(rows, device=image.device)]
        values = torch.as_tensor(
            parameters[..., 1:].reshape(len(flat), -1)[rows], dtype=torch.float32, device=image.device
        )
        row_keys = torch.as_tensor(keys.reshape(-1)[rows], device=image.device)
        measured = Measured(chosen) if self.statistics == "view" else Measured(image, rows)
        changed = self.change(chosen, values, measured, row_keys)
        if everything:
            return changed.unflatten(0, image.shape[:2])
        flat[torch.as_tensor(rows, device=image.device)] = changed
        return flat.unflatten(0, image.shape[:2])


class Normalisation(IntensityAugmentation, ABC):
    """Turn file units into those of the network, as part of how images are read; nothing is drawn.

    Whatever uses a trained network applies its normalisations, and no other augmentation.
    """


class Measured:
    """Minimum, maximum, mean and standard deviation of views, by channel, (view c 1 1 1).

    Args:
        image: The views (view c x y z); or, with `rows`, all views of the batch (b v c x y z), measured over each
            sample's group.
        rows: Numbers of the views to measure, among b * v.
    """

    def __init__(self, image: Tensor, rows: np.ndarray | None = None) -> None:
        self.image = image
        self.rows = None if rows is None else torch.as_tensor(rows // image.shape[1], device=image.device)
        self.dims = (2, 3, 4) if rows is None else (1, 3, 4, 5)

    def _pick(self, value: Tensor) -> Tensor:
        return value if self.rows is None else value.squeeze(1)[self.rows]

    @property
    def minimum(self) -> Tensor:
        """The smallest value."""
        return self._pick(self.image.amin(self.dims, keepdim=True))

    @property
    def maximum(self) -> Tensor:
        """The largest value."""
        return self._pick(self.image.amax(self.dims, keepdim=True))

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self._pick(self.image.mean(self.dims, keepdim=True))

    @property
    def std(self) -> Tensor:
        """The standard deviation (dividing by n)."""
        return self._pick(self.image.std(self.dims, correction=0, keepdim=True))


def check_range(name: str, values: Sequence[float], *, low: float, high: float = np.inf) -> None:
    """Raise a ValueError unless `values` is [a, b] with low <= a <= b <= high."""
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise ValueError(f"{name} must be [a, b] with {low:g} <= a <= b <= {high:g}, got {list(values)}")


def check_axes(name: str, axes: Sequence[int]) -> None:
    """Raise a ValueError unless `axes` are different ones of 0, 1, 2."""
    if len(set(axes)) != len(axes) or not set(axes) <= {0, 1, 2}:
        raise ValueError(f"{name} must be different ones of 0 (x), 1 (y), 2 (z), got {list(axes)}")


def uniform(rng: np.random.Generator, interval: Sequence[float]) -> float:
    """Draw a uniform number from [low, high]."""
    low, high = interval
    return float(rng.uniform(low, high))


def column(parameters: Tensor, number: int) -> Tensor:
    """Return one parameter, shaped to multiply views (view c x y z)."""
    return parameters[:, number, None, None, None, None]
