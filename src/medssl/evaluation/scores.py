"""The scores of one segmentation against the truth: Dice, HD95 and normalised surface Dice of every class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Integer

CONVENTION = (
    "Computed on the image's own grid, in mm. Dice: overlap of the voxels, 0 to 1. HD95: the larger of the two "
    "directed 95th percentiles of the distances between the surfaces, in mm. NSD: share of both surfaces that lies "
    "within tolerance_mm of the other, 0 to 1. A surface is made of the voxels of a class with a face outside of it; a "
    "face at the border of the image counts. Voxels with the ignored label, where the data have one, count as lying "
    "beyond the image in both maps. The background is not scored. A class that is absent in both prediction "
    "and truth is missing (null, or an empty cell) and does not enter; one that is absent in only one of them counts "
    "as Dice 0, NSD 0 and HD95 the diagonal of the image (of its sides in mm: number of voxels * spacing). "
    "per_class: mean over the cases in which the class is not missing. "
    "mean: mean over the cases of each case's mean over its classes that are not missing."
)
METRICS = ("dice", "hd95_mm", "nsd")
ROUNDING_MM = 1e-4
"""Headers may state 1 mm as 1.00000001; that error must not move a distance equal to the tolerance outside of it."""


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case; entry k belongs to class index k + 1, NaN where that class is missing."""

    dice: Float[np.ndarray, " classes"]
    hd95_mm: Float[np.ndarray, " classes"]
    nsd: Float[np.ndarray, " classes"]
    tolerance_mm: float


def score_case(
    prediction: Integer[np.ndarray, "x y z"],
    truth: Integer[np.ndarray, "_ _ _"],
    *,
    num_classes: int,
    spacing_mm: Sequence[float],
    tolerance_mm: float = 1.0,
    ignored: Bool[np.ndarray, "_ _ _"] | None = None,
) -> CaseScores:
    """Return the scores of the classes 1 to `num_classes` - 1; background is class 0. `CONVENTION` defines them.

    Voxels that are `ignored` belong to no class in either map.

    Raises:
        ValueError: The maps differ in shape, hold another class index, or spacing or tolerance is no length.
    """
    _check(prediction, truth, num_classes=num_classes, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)
    from scipy.ndimage import find_objects

    if ignored is not None:
        prediction, truth = (np.where(ignored, classes.dtype.type(0), classes) for classes in (prediction, truth))
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    diagonal_mm = float(np.linalg.norm(spacing * truth.shape))
    boxes = zip(find_objects(prediction, num_classes - 1), find_objects(truth, num_classes - 1), strict=True)
    scores = np.full((3, num_classes - 1), np.nan)
    for index, (predicted_box, true_box) in enumerate(boxes):
        if predicted_box is None and true_box is None:
            continue
        if predicted_box is None or true_box is None:
            scores[:, index] = 0, diagonal_mm, 0
            continue
        box = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(predicted_box, true_box, strict=True)
        )
        predicted, true = prediction[box] == index + 1, truth[box] == index + 1
        distances = surface_distances(predicted, true, spacing_mm=spacing)
        near = sum(int((d <= tolerance_mm + ROUNDING_MM).sum()) for d in distances)
        scores[:, index] = (
            2 * (predicted & true).sum() / (predicted.sum() + true.sum()),
            max(np.percentile(d, 95) for d in distances),
            near / sum(map(len, distances)),
        )
    dice, hd95_mm, nsd = scores
    return CaseScores(dice, hd95_mm, nsd, float(tolerance_mm))


def surface_distances(
    first: Bool[np.ndarray, "x y z"], second: Bool[np.ndarray, "x y z"], *, spacing_mm: Float[np.ndarray, "3"]
) -> tuple[Float[np.ndarray, " a"], Float[np.ndarray, " b"]]:
    """Return distances in mm from every surface voxel of `first` to the surface of `second`, and back, in no order.

    Neither mask may be empty. A search tree over the surface voxels replaces a distance transform of the box, since a
    few stray voxels stretch the box over the whole image, and a transform of that takes seconds per class.
    """
    first_surface, second_surface = surface(first), surface(second)
    shared = first_surface & second_surface

    def one_way(points: Bool[np.ndarray, "x y z"], to: Bool[np.ndarray, "x y z"]) -> Float[np.ndarray, " a"]:
        from scipy.spatial import KDTree

        distances = np.zeros(int(points.sum()))  # 0 where the surfaces share a voxel
        apart = np.argwhere(points & ~shared)
        if len(apart):
            tree = KDTree(np.argwhere(to) * spacing_mm, leafsize=32, compact_nodes=False, balanced_tree=False)
            distances[: len(apart)] = tree.query(apart * spacing_mm)[0]
        return distances

    return one_way(first_surface, second_surface), one_way(second_surface, first_surface)


def surface(mask: Bool[np.ndarray, "x y z"]) -> Bool[np.ndarray, "x y z"]:
    """Return the voxels of `mask` that an erosion by one voxel along the axes removes; the outside is no mask."""
    inner = mask.copy()
    for axis in range(mask.ndim):
        kept, along = np.moveaxis(inner, axis, 0), np.moveaxis(mask, axis, 0)  # `kept` writes into `inner`
        kept[1:] &= along[:-1]
        kept[:-1] &= along[1:]
        kept[0] = kept[-1] = False
    return mask & ~inner


def _check(
    prediction: Integer[np.ndarray, "..."],
    truth: Integer[np.ndarray, "..."],
    *,
    num_classes: int,
    spacing_mm: Sequence[float],
    tolerance_mm: float,
) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2: the background and one class to score")
    if prediction.shape != truth.shape:
        raise ValueError(
            f"the prediction has shape {prediction.shape}, the truth {truth.shape}; bring both to the grid of the image"
        )
    if len(spacing_mm) != 3 or not all(np.isfinite(side) and side > 0 for side in spacing_mm):
        raise ValueError(f"spacing_mm={list(spacing_mm)} must be three positive lengths")
    if not np.isfinite(tolerance_mm) or tolerance_mm < 0:
        raise ValueError(f"tolerance_mm={tolerance_mm} must be a length of 0 or more")
    for name, classes in (("prediction", prediction), ("truth", truth)):
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"the {name} holds class indices {low} to {high}, but {num_classes} classes are numbered 0 to "
                f"{num_classes - 1}; bring label values to class indices before scoring"
            )


def dice_by_class(
    prediction: Integer[np.ndarray, "x y z"],
    truth: Integer[np.ndarray, "x y z"],
    *,
    num_classes: int,
    ignored: Bool[np.ndarray, "x y z"] | None = None,
) -> Float64[np.ndarray, " foreground"]:
    """Return the Dice of the classes 1 to `num_classes` - 1; NaN where a class is in neither map, 0 where it is in one.

    Voxels that are `ignored` do not count. `score_case` gives the same numbers among others.
    """
    pairs = np.zeros(num_classes**2, dtype=np.int64)
    for x, (ours, theirs) in enumerate(zip(prediction, truth, strict=True)):  # by plane: no wide copy of the volume
        codes = ours.astype(np.int64) * num_classes + theirs
        codes = codes.ravel() if ignored is None else codes[~ignored[x]]
        pairs += np.bincount(codes, minlength=num_classes**2)
    counts = pairs.reshape(num_classes, num_classes)  # (predicted, true)
    both = counts.sum(axis=1)[1:] + counts.sum(axis=0)[1:]
    with np.errstate(invalid="ignore"):
        return 2 * counts.diagonal()[1:] / both
