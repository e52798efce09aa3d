import math

import numpy as np
import pytest
import torch
from oracles.keypoints import blobs, corners
from scipy.optimize import minimize_scalar

from medssl.data.reading import read_volume
from medssl.data.volume import Volume, resample_volume
from medssl.models import keypoints_peaks
from medssl.models.keypoints import DifferenceOfGaussians, Foerstner, RandomPoints, detect
from medssl.models.keypoints_filters import filtered, gaussian

KNOWN_RANGE = DifferenceOfGaussians(value_range=(0, 1))
DETECTORS = [DifferenceOfGaussians(), Foerstner(), RandomPoints()]


def gaussian_blob(size, middle, width, *, flat=()):
    """A Gaussian of height 1, constant along the axes of `flat`."""
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    square = sum((g - m) ** 2 for axis, (g, m) in enumerate(zip(grid, middle, strict=True)) if axis not in flat)
    return torch.exp(-square / (2 * width**2)).float()


def texture(seed, size):
    """Smooth noise in [0, 1] with structure at several scales."""
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros_like(noise)
    for sigma in (1.0, 2.0, 4.0):
        smooth = noise
        for axis in range(1, noise.ndim):
            smooth = filtered(smooth, axis, gaussian(sigma))
        total += smooth / smooth.std()
    return ((total - total.min()) / (total.max() - total.min()))[None]


def found(image, detector=KNOWN_RANGE, *, max_points=512, mask=None):
    """Points, scales and responses that were found in the first image."""
    result = detect(image, max_points=max_points, detector=detector, mask=mask)
    return tuple(column[0][result.valid[0]] for column in (result.points, result.scale, result.response))


def blob_sigma(width, dims):
    """Where differences of Gaussians over sigma are largest at the middle of a blob that has the usual first blur."""

    def height(sigma):
        return sum(
            sign * (width**2 - 0.25 + (factor * sigma) ** 2) ** (-dims / 2)
            for sign, factor in ((1, 2 ** (1 / 3)), (-1, 1))
        )

    return minimize_scalar(height, bounds=(0.2 * width, 3 * width), method="bounded").x


@pytest.mark.parametrize("bright", [True, False])
@pytest.mark.parametrize(
    ("size", "width"), [((40, 36, 44), 1.5), ((40, 36, 44), 2.0), ((64, 64, 64), 4.0), ((48, 60), 2.5)]
)
def test_a_blob_is_found_at_its_place_and_scale(size, width, bright):
    middle = [n / 2 + shift for n, shift in zip(size, (0.3, -1.25, 0.45)[: len(size)], strict=True)]
    image = gaussian_blob(size, middle, width)
    points, scale, response = found((image if bright else 1 - image)[None, None])
    assert points[0].tolist() == pytest.approx(middle, abs=0.12)
    assert scale[0].item() == pytest.approx(blob_sigma(width, len(size)), rel=0.06)
    assert (response[0] < 0) == bright
    assert (response[1:].abs() < 0.2 * response[0].abs()).all()  # of the ring about it


def test_a_blob_between_two_voxels_is_found_once():
    points, _, _ = found(gaussian_blob((32, 32, 32), (15.5, 15.5, 16), 2.0)[None, None])
    assert points.tolist() == [pytest.approx([15.5, 15.5, 16], abs=0.1)]


def test_blobs_between_two_octaves_are_found_once():
    twice = 0
    for number, width in enumerate(np.linspace(2.2, 2.8, 13)):
        middle = np.random.default_rng(number).uniform(18, 22, 3)
        points, _, response = found(gaussian_blob((40, 40, 40), middle, width)[None, None])
        assert points[0].numpy() == pytest.approx(middle, abs=0.25)
        twice += int((response.abs() > 0.05).sum()) - 1
    assert twice == 0


@pytest.mark.parametrize("width", [1.5, 2.5, 4.0])
def test_without_refinement_a_blob_is_found_once_at_a_voxel_and_a_level_of_its_octave(width):
    detector = DifferenceOfGaussians(value_range=(0, 1), refine=False)
    middle = (32.4, 31.8, 33.3)
    points, scale, response = found(gaussian_blob((64, 64, 64), middle, width)[None, None], detector)
    octave = int(math.log2(scale[0] / 0.8 - 1e-3))
    assert (points[0] % 2**octave == 0).all()
    assert (points[0] - torch.tensor(middle)).abs().max() <= 0.5 * 2**octave
    level = 3 * math.log2(scale[0] / 0.8)
    assert level == pytest.approx(round(level), abs=1e-4)
    assert abs(level - 3 * math.log2(blob_sigma(width, 3) / 0.8)) < 0.7
    assert (response[1:].abs() < 0.2 * response[0].abs()).all()


def test_a_cross_finds_all_that_the_full_neighbourhood_finds_and_more():
    image = texture(1, (32, 28, 36))
    full, cross = (
        found(image, DifferenceOfGaussians(value_range=(0, 1), neighbourhood=name))[0] for name in ("full", "cross")
    )
    assert len(cross) > 1.2 * len(full)
    assert torch.cdist(full, cross).amin(1).max() < 1e-3


@pytest.mark.parametrize(("flat", "shape"), [((0, 1), "plate"), ((2,), "tube"), ((), "blob")])
def test_plates_and_tubes_are_rejected(flat, shape):
    ridge = gaussian_blob((48, 48, 48), (23.7, 24.1, 24.4), 1.5, flat=flat)
    wobble = gaussian_blob((48, 48, 48), (24, 24, 24), 12.0)  # so that there is a largest value along the flat axes
    points, _, _ = found((ridge * wobble)[None, None])
    assert len(points) == (1 if shape == "blob" else 0)
    lenient = DifferenceOfGaussians(value_range=(0, 1), edge_ratio=1e6)
    assert len(found((ridge * wobble)[None, None], lenient)[0]) >= 1


@pytest.mark.parametrize("size", [(32, 28, 36), (72, 66)])
@pytest.mark.parametrize(("neighbourhood", "refine"), [("full", True), ("cross", True), ("full", False)])
def test_differences_of_gaussians_match_a_slow_search(size, neighbourhood, refine):
    image = texture(1, size)
    rows = blobs(image[0, 0].numpy(), cross=neighbourhood == "cross", refine=refine)
    detector = DifferenceOfGaussians(value_range=(0, 1), neighbourhood=neighbourhood, refine=refine)
    points, scale, response = found(image, detector)
    assert len(rows) > 5
    assert points.shape == (len(rows), len(size))
    assert points.numpy() == pytest.approx(rows[:, :-2], abs=0.01)
    assert scale.numpy() == pytest.approx(rows[:, -2], rel=1e-3)
    assert response.numpy() == pytest.approx(rows[:, -1], rel=1e-3)


@pytest.mark.parametrize("size", [(24, 20, 28), (40, 48)])
def test_foerstners_response_matches_a_slow_search(size):
    image = texture(2, size)
    rows = corners(image[0, 0].numpy())
    points, scale, response = found(image, Foerstner(value_range=(0, 1)))
    assert len(rows) >= 5
    assert points.numpy() == pytest.approx(rows[:, :-1], abs=0)
    assert response.numpy() == pytest.approx(rows[:, -1], rel=1e-3)
    assert scale.unique().tolist() == pytest.approx([1.4])


def test_foerstners_points_are_corners_not_edges_or_faces():
    image = torch.zeros(1, 1, 28, 28, 28)
    image[..., 8:20, 8:20, 8:20] = 1
    points, _, _ = found(image, Foerstner(threshold=1e-4))
    corner = points - 13.5
    assert len(points) == 8
    assert (corner.abs() - 6).abs().max() <= 2  # a corner bends the largest response inwards


def test_keypoints_move_with_the_image_by_whole_voxels_of_the_coarsest_octave():
    content = (texture(3, (24, 24, 24))[0, 0] + gaussian_blob((24, 24, 24), (12, 11, 13), 4.0)) / 2
    detector = DifferenceOfGaussians(value_range=(0, 1), num_octaves=3)
    sets = []
    for shift in ((0, 0, 0), (4, 8, -4)):
        image = torch.full((1, 1, 72, 72, 72), 0.5)
        image[0, 0][tuple(slice(24 + s, 48 + s) for s in shift)] = content
        points, scale, response = found(image, detector)
        sets.append(torch.cat([points - torch.tensor(shift), scale[:, None], response[:, None]], dim=1))
    assert len(sets[0]) > 10
    assert sets[0][:, 3].max() > 2 * 1.6  # in the third octave
    assert torch.allclose(*sets, atol=1e-3)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 3), (7, 7, 7), (8, 16, 16), (1, 9), (16, 16)])
def test_tiny_and_constant_images_give_no_nan_and_no_points(detector, size):
    for image in (torch.full((2, 1, *size), 3.7), torch.zeros(2, 1, *size)):
        result = detect(image, max_points=6, detector=detector)
        assert result.points.shape == (2, 6, len(size))
        assert all(column.isfinite().all() for column in result)
        if not isinstance(detector, RandomPoints):
            assert not result.valid.any()
    noise = detect(torch.rand(2, 1, *size), max_points=6, detector=detector)
    assert all(column.isfinite().all() for column in noise)
    assert (noise.points >= 0).all()
    assert (noise.points <= torch.tensor(size) - 1).all()


@pytest.mark.parametrize("detector", DETECTORS[:2], ids=lambda d: type(d).__name__)
def test_an_image_that_is_not_a_number_has_no_keypoints(detector):
    image = texture(0, (24, 24, 24))
    image[0, 0, 3, 3, 3] = math.nan
    result = detect(image, max_points=4, detector=detector)
    assert not result.valid.any()
    assert result.points.isfinite().all()


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
def test_the_cap_keeps_the_strongest_in_order(detector):
    image = texture(4, (32, 32, 32))
    all_points, _, response = found(image, detector)
    few, _, strongest = found(image, detector, max_points=10)
    assert len(all_points) > 10
    assert (response.abs().diff() <= 0).all()
    assert torch.equal(few, all_points[:10])
    assert torch.equal(strongest, response[:10])


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
def test_images_do_not_depend_on_their_batch_nor_the_result_on_the_run_or_autocast(detector):
    images = torch.cat([texture(5, (24, 32, 28)), 100 * texture(6, (24, 32, 28)) - 50, torch.zeros(1, 1, 24, 32, 28)])
    together = detect(images, max_points=64, detector=detector)
    again = detect(images, max_points=64, detector=detector)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = detect(images, max_points=64, detector=detector)
    assert all(torch.equal(a, b) for a, b in zip(together, autocast, strict=True))
    for number in range(3):
        alone = detect(images[number : number + 1], max_points=64, detector=detector)
        assert torch.allclose(alone.points[0], together.points[number], atol=1e-3)
        assert torch.equal(alone.valid[0], together.valid[number])


def test_without_a_range_the_unit_of_an_image_does_not_matter_and_a_gradient_is_not_kept():
    image = texture(7, (32, 32, 32)).requires_grad_()
    plain = detect(image, max_points=64, detector=DifferenceOfGaussians())
    scaled = detect(3000 * image - 1000, max_points=64, detector=DifferenceOfGaussians())
    assert not plain.points.requires_grad
    assert torch.allclose(plain.points, scaled.points, atol=1e-2)
    windowed = detect(2000 * image - 1000, max_points=64, detector=DifferenceOfGaussians(value_range=(-1000, 1000)))
    assert torch.allclose(plain.points, windowed.points, atol=1e-2)


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
def test_keypoints_lie_in_the_mask(detector):
    image, mask = texture(8, (32, 32, 32)), torch.zeros(1, 1, 32, 32, 32, dtype=torch.bool)
    mask[..., 10:20] = True
    everywhere, inside = found(image, detector)[0], found(image, detector, mask=mask)[0]
    assert len(inside) > 5
    assert ((inside[:, 2] >= 9.5) & (inside[:, 2] < 19.5)).all()
    if not isinstance(detector, RandomPoints):
        kept = everywhere[(everywhere[:, 2] >= 9.5) & (everywhere[:, 2] < 19.5)]
        assert torch.equal(inside, kept)
    assert len(found(image, detector, mask=torch.zeros_like(mask))[0]) == 0


def test_the_border_stays_free_in_every_octave():
    image = texture(9, (48, 48, 48))
    points, scale, _ = found(image, DifferenceOfGaussians(border=5))
    octave = (scale / 0.8 / 2 ** (0.5 / 3)).log2().floor().clamp_min(0)
    reach = 4.5 * 2 ** octave[:, None]
    assert (points >= reach).all()
    assert (points <= 47 - reach + 1e-3 + (2 ** octave[:, None] - 1)).all()


@pytest.mark.parametrize("detector", DETECTORS[:2], ids=lambda d: type(d).__name__)
def test_slabs_of_a_large_volume_give_what_the_whole_gives(detector, monkeypatch):
    image = texture(10, (150, 20, 22))
    whole = found(image, detector)
    monkeypatch.setattr(keypoints_peaks, "SLAB_VOXELS", 1)
    parts = found(image, detector)
    assert len(whole[0]) > 20
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(a, b, atol=2e-3)


def test_random_points_depend_on_the_seed_alone_and_are_distinct_voxels():
    image = texture(11, (12, 12, 12))
    one, two = (found(image, RandomPoints(seed=seed), max_points=300)[0] for seed in (0, 1))
    assert len(one.unique(dim=0)) == 300
    assert torch.equal(one, one.round())
    assert torch.equal(one, found(0 * image, RandomPoints(seed=0), max_points=300)[0])
    assert not torch.equal(one, two)
    assert len(found(image, RandomPoints(), max_points=5000)[0]) == 12**3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sigma0": 0.5}, "sigma0 must exceed 0.5"),
        ({"border": 0}, "must be at least 1"),
        ({"neighbourhood": "cube"}, "neighbourhood is 'cube', allowed are full, cross"),
        ({"contrast": -1.0}, "must not be negative"),
        ({"value_range": (1.0, 0.0)}, "two ascending values"),
    ],
)
def test_mistakes_are_told(setting, message):
    with pytest.raises(ValueError, match=message):
        DifferenceOfGaussians(**setting)


def test_mistakes_of_calls_and_of_foerstner_are_told():
    with pytest.raises(ValueError, match="window must be odd"):
        Foerstner(window=4)
    with pytest.raises(ValueError, match="threshold"):
        Foerstner(threshold=-1.0)
    with pytest.raises(ValueError, match="max_points must be at least 1"):
        detect(torch.zeros(1, 1, 8, 8, 8), max_points=0, detector=RandomPoints())
    with pytest.raises(ValueError, match="keypoints are found in images"):
        detect(torch.zeros(1, 1, 8), max_points=1, detector=RandomPoints())


def test_counts_on_a_real_ct_are_those_of_the_method_card(real_data):
    volume = read_volume(real_data / "ct_abdomen" / "ct_torso_3mm.nii.gz")
    low, high = np.percentile(volume.array[0], (0.5, 99.5))
    middle = tuple(slice(n // 2 - 14, n // 2 + 14) for n in volume.shape)
    part = resample_volume(Volume(volume.array[(slice(None), *middle)], volume.affine, ""), [1.5] * 3).array[0]
    crop = torch.tensor(np.clip((part[4:52, 4:52, 4:52] - low) / (high - low), 0, 1), dtype=torch.float32)[None, None]
    counts = [
        len(found(crop, DifferenceOfGaussians(sigma0=sigma0, value_range=(0, 1)))[0]) for sigma0 in (1.6, 1.2, 1.0, 0.8)
    ]
    card = [(10, 11), (20, 21), (20, 27), (40, 51)]  # another CT at 1.5 mm
    for count, (few, many) in zip(counts, card, strict=True):
        assert few / 2 <= count <= 2 * many
    assert counts == sorted(counts)


@pytest.mark.gpu
@pytest.mark.parametrize("detector", [KNOWN_RANGE, Foerstner()])
def test_cpu_and_gpu_find_the_same(detector):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image = texture(0, (48, 40, 44))
    places, _, responses = found(image, detector)
    on_gpu, _, responses_on_gpu = (column.cpu() for column in found(image.cuda(), detector))
    assert len(places) > 20
    assert abs(len(places) - len(on_gpu)) <= 1  # one may lie at the bound of the contrast
    distance, partner = torch.cdist(places, on_gpu, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    same = distance < 0.01
    assert same.sum() >= len(places) - 1
    assert torch.allclose(responses[same], responses_on_gpu[partner[same]], rtol=1e-3, atol=1e-6)
