"""Synthetic scans for tests: readings, smooth volumes, an oracle in place of a network."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medssl.data.augment import Window
from medssl.inference.reading import Reading


def smooth(shape: tuple[int, ...], *, seed: int = 0, sigma: float = 2.0) -> np.ndarray:
    """A smooth volume of one channel, float32, of about -1000 to 1000."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    field = gaussian_filter(noise, sigma, mode="nearest")
    return (1000 * field / np.abs(field).max()).astype(np.float32)[None]


def reading(spacing_mm="native", window=(16, 16, 16), **other) -> Reading:
    """A reading that maps -1000 to 1000 to 0 to 1."""
    settings = {"outside": "border", "normalise": (Window(low_hu=-1000, high_hu=1000),), **other}
    return Reading(spacing_mm=spacing_mm, crop_voxel=window, **settings)


def classes_of_grey(num_classes: int = 3) -> Callable[[torch.Tensor], torch.Tensor]:
    """Probabilities that depend on the grey value alone, so that they commute with cutting windows."""
    middles = torch.linspace(0, 1, num_classes)[:, None, None, None]
    return lambda windows: (-30 * (windows[:, :1] - middles).square()).softmax(1)


def oracle(label: np.ndarray, *, num_classes: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The true label as probabilities: the share that each class has in a voxel of the working grid, linearly.

    It looks at images of three channels: the index of each voxel, which says where in the label it lies.
    """
    truth = torch.nn.functional.one_hot(torch.from_numpy(label.astype(np.int64)), num_classes)
    truth, sides = truth.movedim(-1, 0)[None].float(), torch.tensor(label.shape)

    def predict(windows: torch.Tensor) -> torch.Tensor:
        grid = ((2 * windows.movedim(1, -1) + 1) / sides - 1).flip(-1)
        labels = truth.expand(len(windows), -1, -1, -1, -1)
        return torch.nn.functional.grid_sample(labels, grid, padding_mode="border", align_corners=False)

    return predict


def index_channels(shape: tuple[int, ...]) -> np.ndarray:
    """The image that `oracle` looks at, (3 x y z) float32."""
    return np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
