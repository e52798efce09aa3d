"""Pictures of volumes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def orthogonal_slices(volumes: Mapping[str, Float[Tensor, "x y z"]], *, title: str = "") -> "Figure":
    """One column a volume, with its sagittal, coronal and axial middle slice as rows; NaN is drawn in blue.

    The grey scale is that of the first volume, shared by all. Anterior and superior point up.
    """
    from matplotlib.figure import Figure

    arrays = {name: volume.detach().float().cpu() for name, volume in volumes.items()}
    first = next(iter(arrays.values()))
    low, high = first.min().item(), first.max().item()
    figure = Figure(figsize=(2.4 * len(arrays), 7.6), layout="constrained")
    axes = figure.subplots(3, len(arrays), squeeze=False)
    for column, (name, volume) in enumerate(arrays.items()):
        axes[0, column].set_title(name)
        for axis, plane in enumerate(("sagittal", "coronal", "axial")):
            panel = axes[axis, column]
            panel.set_facecolor("steelblue")
            middle = volume.select(axis, volume.shape[axis] // 2)
            picture = torch.flip(middle.T, dims=[0]).numpy()  # second axis of the slice upwards
            panel.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            if column == 0:
                panel.set_ylabel(plane)
    figure.suptitle(title)
    return figure
