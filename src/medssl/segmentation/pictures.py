"""Pictures of a predicted case: image, label and prediction in three planes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Integer

from medssl.data.store import VolumeStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class CasePicture:
    """Three slices of a case, one per axis, each through the largest part of its label.

    Args:
        case: Name of the case.
        dice: Mean Dice over the classes that are present.
        image: Grey values of each slice.
        truth: Classes of each slice.
        prediction: Predicted classes of each slice.
        aspect: Height over width of a pixel of each slice.
    """

    case: str
    dice: float
    image: tuple[np.ndarray, ...]
    truth: tuple[np.ndarray, ...]
    prediction: tuple[np.ndarray, ...]
    aspect: tuple[float, ...]


def picture_case(
    store: VolumeStore,
    case: int,
    prediction: Integer[np.ndarray, "x y z"],
    truth: Integer[np.ndarray, "x y z"],
    *,
    dice: float,
) -> CasePicture:
    """Return the picture of a case; only its three slices are read from the store."""
    record = store.record(case)
    images, truths, predictions, aspects = [], [], [], []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = (truth > 0).sum(axis=others)
        place = int(filled.argmax()) if filled.any() else truth.shape[axis] // 2
        lower, upper = [0, 0, 0], list(record.shape)
        lower[axis], upper[axis] = place, place + 1
        values = record.values(store.read(case, 0, lower, upper).result())[0]
        images.append(values.take(0, axis=axis))
        truths.append(truth.take(place, axis=axis).astype(np.int16))
        predictions.append(prediction.take(place, axis=axis).astype(np.int16))
        width, height = (record.spacing_mm[other] for other in others)
        aspects.append(height / width)
    return CasePicture(record.case, dice, tuple(images), tuple(truths), tuple(predictions), tuple(aspects))


def case_figure(picture: CasePicture, *, num_classes: int, title: str = "") -> "Figure":
    """Return a figure of image, label and prediction side by side, one row per plane.

    Anterior and superior point up.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    colours = colormaps["turbo"](np.linspace(0.05, 0.95, max(num_classes - 1, 1)))
    palette = ListedColormap(colours)
    limits = {"vmin": 0.5, "vmax": len(colours) + 0.5}  # class n has colour n - 1
    low, high = np.percentile(np.concatenate([image.ravel() for image in picture.image]), (1, 99))
    figure = Figure(figsize=(8.4, 8.4), layout="constrained")
    axes = figure.subplots(3, 3)
    for row, plane in enumerate(PLANES):
        columns = {"image": None, "label": picture.truth[row], "prediction": picture.prediction[row]}
        for panel, (name, classes) in zip(axes[row], columns.items(), strict=True):
            shown = np.flipud(picture.image[row].T)  # second axis of the slice upwards
            options = {"interpolation": "nearest", "aspect": picture.aspect[row]}
            panel.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), **options)
            if classes is not None:
                overlay = np.ma.masked_equal(np.flipud(classes.T), 0)
                panel.imshow(overlay, cmap=palette, alpha=0.6, **limits, **options)
            panel.set(xticks=[], yticks=[])
            if row == 0:
                panel.set_title(name)
            if panel is axes[row][0]:
                panel.set_ylabel(plane)
    figure.suptitle(title or f"{picture.case}: mean Dice {picture.dice:.3f}")
    return figure
