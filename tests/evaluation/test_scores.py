"""Scores against MONAI, a plain loop and values worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from medssl.evaluation.scores import CONVENTION, score_case, surface

SPACING_MM = (0.7, 1.3, 2.5)


def blobs(seed, shape=(22, 18, 14), num_classes=5):
    """A truth of boxes that may touch the border, and a prediction that moves them and drops some of their voxels."""
    rng = np.random.default_rng(seed)
    truth = np.zeros(shape, dtype=np.int64)
    for index in range(1, num_classes):
        low = [rng.integers(0, side - 5) for side in shape]
        truth[tuple(slice(start, start + rng.integers(3, 9)) for start in low)] = index
    prediction = np.roll(truth, rng.integers(-1, 2, 3), axis=(0, 1, 2))
    prediction[rng.random(shape) < 0.05] = 0
    prediction[tuple(rng.integers(0, side) for side in shape)] = 1
    return prediction, truth


def one_hot(classes, num_classes):
    return torch.nn.functional.one_hot(torch.from_numpy(classes), num_classes).movedim(-1, 0)[None].float()


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy")  # MONAI warns about its own call
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tolerance_mm", [1.0, 2.6])
def test_scores_agree_with_monai_on_anisotropic_grids(seed, tolerance_mm):
    from monai.metrics import DiceMetric, compute_hausdorff_distance, compute_surface_dice

    prediction, truth = blobs(seed)
    both = set(np.unique(prediction)) & set(np.unique(truth))
    pair = [one_hot(classes, 5) for classes in (prediction, truth)]
    dice = DiceMetric(include_background=False, reduction="none")(*pair)[0].numpy()
    hd95_mm = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING_MM)[0].numpy()
    nsd = compute_surface_dice(*pair, class_thresholds=[tolerance_mm] * 4, spacing=SPACING_MM)[0].numpy()

    scores = score_case(prediction, truth, num_classes=5, spacing_mm=SPACING_MM, tolerance_mm=tolerance_mm)
    present = [index for index in range(4) if index + 1 in both]
    assert len(present) >= 3
    np.testing.assert_allclose(scores.dice[present], dice[present], atol=1e-4)
    np.testing.assert_allclose(scores.hd95_mm[present], hd95_mm[present], atol=1e-4)
    np.testing.assert_allclose(scores.nsd[present], nsd[present], atol=1e-4)


def test_scores_agree_with_a_plain_loop():
    prediction, truth = blobs(3, shape=(9, 8, 7), num_classes=2)

    def outline(mask):
        inside = {tuple(voxel) for voxel in np.argwhere(mask)}
        steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, step)) == 1]
        return [v for v in inside if any(tuple(a + b for a, b in zip(v, s, strict=True)) not in inside for s in steps)]

    surfaces = outline(prediction == 1), outline(truth == 1)
    distances = []
    for own, other in (surfaces, surfaces[::-1]):
        distances.append(
            [min(math.dist(np.multiply(a, SPACING_MM), np.multiply(b, SPACING_MM)) for b in other) for a in own]
        )
    together = distances[0] + distances[1]

    scores = score_case(prediction, truth, num_classes=2, spacing_mm=SPACING_MM)
    assert scores.nsd[0] == pytest.approx(sum(d <= 1 for d in together) / len(together))
    assert scores.hd95_mm[0] == pytest.approx(max(np.percentile(d, 95) for d in distances))
    overlap = ((prediction == 1) & (truth == 1)).sum()
    assert scores.dice[0] == pytest.approx(2 * overlap / ((prediction == 1).sum() + (truth == 1).sum()))


def test_a_class_absent_in_both_is_missing_and_one_absent_in_one_has_the_worst_scores():
    prediction, truth = np.zeros((2, 10, 20, 5), dtype=np.uint8)
    prediction[2, 2, 2], truth[4:6, 4:6, 1:3], prediction[4:6, 4:6, 1:3] = 1, 3, 3
    truth[9, 9, 4] = 4
    scores = score_case(prediction, truth, num_classes=5, spacing_mm=(1, 2, 3))
    diagonal_mm = math.sqrt(10**2 + 40**2 + 15**2)
    np.testing.assert_array_equal(scores.dice, [0, np.nan, 1, 0])
    np.testing.assert_array_equal(scores.nsd, [0, np.nan, 1, 0])
    np.testing.assert_allclose(scores.hd95_mm, [diagonal_mm, np.nan, 0, diagonal_mm])
    for words in ("Dice 0", "NSD 0", "diagonal", "missing", "mm"):
        assert words in CONVENTION


@pytest.mark.parametrize("spacing", [1.0, 1.00000001, 1.00003])
def test_a_surface_at_the_tolerance_is_within_it_whatever_the_header_rounds(spacing):
    prediction, truth = np.zeros((2, 12, 8, 8), dtype=np.int32)
    truth[3:7, 2:6, 2:6], prediction[4:8, 2:6, 2:6] = 1, 1
    scores = score_case(prediction, truth, num_classes=2, spacing_mm=(spacing,) * 3)
    assert (scores.nsd[0], scores.hd95_mm[0]) == (1, pytest.approx(1, abs=1e-4))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_scores_do_not_depend_on_how_class_indices_are_stored(kind):
    prediction, truth = blobs(1)
    expected = score_case(prediction, truth, num_classes=5, spacing_mm=SPACING_MM)
    scores = score_case(prediction.astype(kind), truth[::-1].astype(kind)[::-1], num_classes=5, spacing_mm=SPACING_MM)
    np.testing.assert_array_equal(
        [scores.dice, scores.hd95_mm, scores.nsd], [expected.dice, expected.hd95_mm, expected.nsd]
    )


def test_the_surface_is_what_an_erosion_takes_away():
    from scipy.ndimage import binary_erosion

    for shape in ((6, 7, 8), (1, 5, 5), (2, 2, 2)):
        mask = np.random.default_rng(0).random(shape) < 0.8
        np.testing.assert_array_equal(surface(mask), mask & ~binary_erosion(mask))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spacing_mm": (1, 0, 1)}, "spacing_mm"),
        ({"spacing_mm": (1, 1)}, "spacing_mm"),
        ({"tolerance_mm": -1.0}, "tolerance_mm"),
        ({"tolerance_mm": math.nan}, "tolerance_mm"),
        ({"num_classes": 4}, "0 to 4, but 4 classes"),
        ({"num_classes": 1}, "at least 2"),
        ({"truth": np.zeros((3, 3, 3), int)}, r"\(22, 18, 14\)"),
        ({"truth": np.full((22, 18, 14), -1)}, "truth holds class indices -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, words):
    prediction, truth = blobs(0)
    with pytest.raises(ValueError, match=words):
        score_case(**{"prediction": prediction, "truth": truth, "num_classes": 5, "spacing_mm": SPACING_MM} | change)
