import math

import numpy as np
import pytest
import torch

from medssl.data import augment as A
from medssl.data.placements import Fixed, RandomCrop, Same
from medssl.data.randomness import counter_generator, counter_key, hash_normal
from medssl.data.sampling import Request
from medssl.data.views import ViewPlan


@pytest.fixture
def record(noise_store):
    return noise_store.record(0)


def _apply(augmentation, image: torch.Tensor, record, *, seed: int = 0) -> torch.Tensor:
    """The augmentation on a copy of (b v c x y z), every view with parameters of its own."""
    b, v = image.shape[:2]
    rows = [augmentation.draw(counter_generator(seed, n), record) for n in range(b * v)]
    keys = np.array([counter_key(seed, n) for n in range(b * v)]).reshape(b, v)
    return augmentation.apply(image.clone(), np.stack(rows).reshape(b, v, -1), keys)


@pytest.fixture
def image():
    return torch.rand(2, 3, 1, 10, 12, 14, generator=torch.Generator().manual_seed(0))


def test_a_window_maps_its_ends_and_clips(record):
    values = torch.tensor([-2000.0, -1000, 0, 500, 1000, 3000]).view(1, 1, 1, 6, 1, 1)
    shown = _apply(A.Window(low_hu=-1000, high_hu=1000), values, record).flatten()
    np.testing.assert_allclose(shown, [0, 0, 0.5, 0.75, 1, 1], atol=1e-6)
    shown = _apply(A.Window(low_hu=-1000, high_hu=1000, out=[-0.5, 0.5]), values, record).flatten()
    np.testing.assert_allclose(shown, [-0.5, -0.5, 0, 0.25, 0.5, 0.5], atol=1e-6)


def test_percentiles_and_z_score_use_the_whole_volume_by_channel(make_store):
    array = np.random.default_rng(0).normal([[[[100.0]]], [[[5000.0]]]], [[[[10.0]]], [[[900.0]]]], (2, 20, 20, 20))
    store = make_store(array.astype(np.float32), modality="mr")
    record = store.record(0)
    values = torch.from_numpy(array)[None, None].float()
    shown = _apply(A.Percentiles(low=1, high=99), values, record)
    low, high = np.percentile(array, [1, 99], axis=(1, 2, 3))
    expected = np.clip((array - low[:, None, None, None]) / (high - low)[:, None, None, None], 0, 1)
    np.testing.assert_allclose(shown[0, 0], expected, atol=1e-3)
    normal = _apply(A.ZScore(), values, record)[0, 0]
    np.testing.assert_allclose(normal.mean((1, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(normal.std((1, 2, 3)), 1, atol=1e-2)


def test_by_modality_windows_ct_and_takes_percentiles_of_the_rest(make_store, draw):
    array = np.random.default_rng(0).integers(-1000, 1000, (1, 12, 12, 12)).astype(np.int16)
    for modality in ("ct", "mr"):
        store = make_store(array, modality=modality)
        plan = ViewPlan(groups={"x": Fixed(size=[12] * 3, augment=[A.ByModality(window_hu=[-160, 240])])})
        shown = draw(store, plan, [Request((0,), 0)])["x"].image[0, 0, 0].numpy()
        low, high = (-160, 240) if modality == "ct" else np.percentile(array, [0.5, 99.5])
        np.testing.assert_allclose(shown, np.clip((array[0] - low) / (high - low), 0, 1), atol=1e-4)


def test_statistics_are_taken_by_view_or_by_group(image, record):
    image = image + torch.arange(3)[None, :, None, None, None, None]
    each = _apply(A.MinMax(), image, record)
    assert torch.all(each.amin((2, 3, 4, 5)) == 0)
    assert torch.all(each.amax((2, 3, 4, 5)) == 1)
    joint = _apply(A.MinMax(statistics="group"), image, record)
    assert torch.all(joint.amin((1, 2, 3, 4, 5)) == 0)
    assert torch.all(joint[:, 0].amax((1, 2, 3, 4)) < 0.4)
    standard = _apply(A.Standardise(statistics="group"), image, record)
    np.testing.assert_allclose(standard.mean((1, 2, 3, 4, 5)), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std((1, 2, 3, 4, 5)), 1, atol=1e-3)


def test_gamma_keeps_the_range_and_is_the_power_between(image, record):
    shown = _apply(A.Gamma(gamma=[2, 2]), image * 4 - 1, record)
    low, high = (image * 4 - 1).amin((3, 4, 5), keepdim=True), (image * 4 - 1).amax((3, 4, 5), keepdim=True)
    expected = ((image * 4 - 1 - low) / (high - low)) ** 2 * (high - low) + low
    np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_gamma_by_group_uses_the_groups_range(image, record):
    image = image.clone()
    image[:, 0] *= 0.5
    shown = _apply(A.Gamma(gamma=[3, 3], statistics="group"), image, record)
    low, high = image.amin((1, 3, 4, 5), keepdim=True), image.amax((1, 3, 4, 5), keepdim=True)
    expected = ((image - low) / (high - low)) ** 3 * (high - low) + low
    np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_gamma_of_the_negated_image_darkens_where_that_of_the_image_brightens(image, record):
    values = image * 4 - 1
    plain, inverted = (_apply(A.Gamma(gamma=[0.5, 0.5], invert=invert), values, record) for invert in (False, True))
    assert plain.mean() > values.mean() > inverted.mean()
    np.testing.assert_allclose(inverted, -_apply(A.Gamma(gamma=[0.5, 0.5]), -values, record), atol=1e-5)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("statistics", ["view", "group"])
def test_gamma_keeps_mean_and_deviation_of_each_view_and_channel(image, record, invert, statistics):
    values = torch.cat([image * 4 - 1, 9 - image], dim=2)
    shown = _apply(A.Gamma(gamma=[2, 3], invert=invert, keep_statistics=True, statistics=statistics), values, record)
    np.testing.assert_allclose(shown.mean((3, 4, 5)), values.mean((3, 4, 5)), atol=1e-5)
    np.testing.assert_allclose(shown.std((3, 4, 5)), values.std((3, 4, 5)), atol=1e-5)
    assert (shown - values).abs().amax((3, 4, 5)).min() > 0.01
    flat = torch.full((1, 1, 1, 4, 4, 4), 2.5)
    np.testing.assert_allclose(_apply(A.Gamma(keep_statistics=True, invert=invert), flat, record), flat, atol=1e-5)


def test_balanced_exponents_lie_below_and_above_1_equally_often_and_uniformly_on_each_side(record):
    gamma = A.Gamma(gamma=[0.7, 1.5], balanced=True)
    drawn = np.array([gamma.parameters(counter_generator(0, n), record)[0] for n in range(2000)])
    below, above = drawn[drawn < 1], drawn[drawn > 1]
    assert len(below) / 2000 == pytest.approx(0.5, abs=0.04)
    assert (below.min(), above.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.5, abs=0.01))
    assert (below.mean(), above.mean()) == (pytest.approx(0.85, abs=0.01), pytest.approx(1.25, abs=0.02))
    with pytest.raises(ValueError, match="balanced needs a range around 1"):
        A.Gamma(gamma=[1.1, 2], balanced=True)


def test_contrast_stretches_about_the_mean_and_brightness_is_linear(image, record):
    shown = _apply(A.Contrast(factor=[0.5, 0.5]), image, record)
    np.testing.assert_allclose(shown.mean((2, 3, 4, 5)), image.mean((2, 3, 4, 5)), atol=1e-5)
    np.testing.assert_allclose(shown.std((2, 3, 4, 5)), image.std((2, 3, 4, 5)) / 2, atol=1e-5)
    kept = _apply(A.Contrast(factor=[3, 3], keep_range=True), image, record)
    assert torch.equal(kept.amax((2, 3, 4, 5)), image.amax((2, 3, 4, 5)))
    np.testing.assert_allclose(
        _apply(A.Brightness(factor=[2, 2], shift=[1, 1]), image, record), image * 2 + 1, atol=1e-6
    )


def test_blur_is_the_gaussian_of_its_width(record):
    from scipy.ndimage import gaussian_filter

    image = torch.rand(1, 2, 1, 16, 18, 20)
    shown = _apply(A.GaussianBlur(sigma_voxel=[1.3, 1.3]), image, record)
    for v in range(2):
        expected = gaussian_filter(image[0, v, 0].numpy(), 1.3, mode="nearest", truncate=6 / 1.3)
        np.testing.assert_allclose(shown[0, v, 0], expected, atol=1e-5)
    flat = _apply(A.GaussianBlur(sigma_voxel=[2, 2], axes=[0, 1], radius_voxel=1), image, record)
    weight = np.exp(-0.5 / 4)
    kernel = np.array([weight, 1, weight]) / (1 + 2 * weight)
    expected = np.apply_along_axis(
        np.convolve, 0, np.apply_along_axis(np.convolve, 1, image[0, 0, 0].numpy(), kernel, "same"), kernel, "same"
    )
    np.testing.assert_allclose(flat[0, 0, 0, 1:-1, 1:-1].numpy(), expected[1:-1, 1:-1], atol=1e-5)


def test_low_resolution_removes_fast_stripes_and_keeps_slow_ones(record):
    x = torch.arange(64.0)
    for period, low, high in ((2.2, 0.0, 0.05), (16, 0.85, 1.0)):
        image = torch.sin(2 * math.pi * x / period).view(1, 1, 1, 64, 1, 1).expand(1, 1, 1, 64, 8, 8)
        shown = _apply(A.LowResolution(zoom=[0.5, 0.5], axes=[0]), image, record)[0, 0, 0, 8:-8]
        assert low <= shown.abs().max() <= high


def test_noise_has_its_deviation_and_is_independent_between_views(record):
    image = torch.zeros(2, 2, 1, 24, 24, 24)
    shown = _apply(A.GaussianNoise(std=[0.2, 0.2]), image, record)
    np.testing.assert_allclose(shown.std((2, 3, 4, 5)), 0.2, rtol=0.03)
    np.testing.assert_allclose(shown.mean((2, 3, 4, 5)), 0, atol=0.01)
    assert abs(torch.corrcoef(shown.reshape(4, -1)) - torch.eye(4)).max() < 0.04


def test_the_hashed_numbers_are_normal_and_a_function_of_their_key():
    key = torch.tensor([counter_key("a"), counter_key("b"), counter_key("a")])
    numbers = hash_normal(100_001, key)
    assert torch.equal(numbers[0], numbers[2])
    assert abs(float(numbers[0].mean())) < 0.02
    assert float(numbers[0].std()) == pytest.approx(1, abs=0.02)
    assert float((numbers[0] ** 4).mean()) == pytest.approx(3, abs=0.15)
    assert abs(float((numbers[0, 1:] * numbers[0, :-1]).mean())) < 0.02
    assert abs(float((numbers[0] * numbers[1]).mean())) < 0.02
    inside = [(numbers[1].abs() < z).float().mean().item() for z in (1, 2, 3)]
    np.testing.assert_allclose(inside, [0.6827, 0.9545, 0.9973], atol=5e-3)


def test_a_bias_field_is_smooth_and_positive(record):
    shown = _apply(A.BiasField(strength=[0.5, 0.5]), torch.ones(1, 2, 1, 32, 32, 32), record)
    assert shown.min() > 0
    assert shown.std() > 0.02
    assert shown.diff(dim=3).abs().max() < 0.15


def test_cutout_overwrites_a_box_of_the_stated_size(image, record):
    shown = _apply(A.Cutout(fraction=[0.5, 0.5], fill=-9.0), image, record)
    counts = (shown == -9).sum((2, 3, 4, 5))
    assert torch.all(counts == 5 * 6 * 7)
    assert torch.equal(shown[shown != -9], image[shown != -9])


def test_a_probability_of_a_half_acts_on_about_half_of_the_views(record):
    image = torch.zeros(20, 20, 1, 2, 2, 2)
    acted = _apply(A.Brightness(shift=[1, 1], probability=0.5), image, record).amax((2, 3, 4, 5))
    assert set(acted.unique().tolist()) == {0, 1}
    assert acted.mean() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(_apply(A.Brightness(shift=[1, 1], probability=0.0), image, record), image)


def test_shares_decide_who_has_the_same_parameters(noise_store, draw):
    def groups(share_a: str, share_b: str):
        augment = lambda share: [A.Affine(rotation_deg=20, share=share), A.Brightness(shift=[-9e3, 9e3], share=share)]  # noqa: E731
        return {
            "a": RandomCrop(size=[6] * 3, augment=augment(share_a)),
            "b": Same(of="a", count=2, augment=augment(share_b)),
        }

    def drawn(*shares):
        views = draw(noise_store, ViewPlan(groups=groups(*shares)), [Request((0,), 0)])
        return views["a"].image[0, 0], views["b"].image[0, 0], views["b"].image[0, 1]

    a, b0, b1 = drawn("view", "view")
    assert not torch.equal(b0, b1)
    a, b0, b1 = drawn("view", "group")
    assert torch.equal(b0, b1)
    assert not torch.equal(a, b0)
    a, b0, b1 = drawn("twins", "twins")
    assert torch.equal(a, b0)
    assert torch.equal(a, b1)


def test_an_affine_draws_within_its_ranges(noise_store, draw):
    augment = [
        A.Affine(
            rotation_deg=[[0, 0], [0, 0], [0, 360]],
            scale=[0.7, 1.3],
            balanced=True,
            translation=[3, 0, 0],
            space="voxel",
        )
    ]
    groups = {"a": RandomCrop(size=[8] * 3, spacing_mm=0.5), "b": Same(of="a", count=200, augment=augment)}
    views = draw(noise_store, ViewPlan(groups=groups), [Request((0,), 0)])
    relative = (torch.linalg.inv(views["a"].matrix[0]) @ views["b"].matrix[0]).numpy()
    scales = np.linalg.norm(relative[:, :3, :3], axis=1)
    np.testing.assert_allclose(scales[:, 0], scales[:, 1])
    assert scales.min() > 0.7
    assert scales.max() < 1.3
    assert (scales[:, 0] < 1).mean() == pytest.approx(0.5, abs=0.12)
    np.testing.assert_allclose(relative[:, 2, :2], 0, atol=1e-9)
    angles = np.degrees(np.arctan2(relative[:, 1, 0], relative[:, 0, 0])) % 360
    assert np.histogram(angles, 4, (0, 360))[0].min() > 25
    moved = relative @ [3.5, 3.5, 3.5, 1] - [3.5, 3.5, 3.5, 1]
    assert np.abs(moved[:, 0]).max() == pytest.approx(3, abs=0.1)
    np.testing.assert_allclose(moved[:, 1:], 0, atol=1e-9)


def test_sometimes_moves_all_or_nothing(noise_store, draw):
    augment = [A.Sometimes(probability=0.5, augment=[A.Affine(rotation_deg=[[9, 9]] * 3), A.Elastic(rms_voxel=[1, 1])])]
    groups = {"a": RandomCrop(size=[8] * 3), "b": Same(of="a", count=60, augment=augment)}
    views = draw(noise_store, ViewPlan(groups=groups), [Request((0,), 0)])
    turned = (views["b"].matrix[0] - views["a"].matrix[0]).abs().amax((1, 2)) > 1e-3
    bent = views["b"].displacement[0].abs().amax((1, 2, 3, 4)) > 0
    assert torch.equal(turned, bent)
    assert 15 < int(turned.sum()) < 45


def test_a_slice_is_bent_within_its_plane(noise_store, draw):
    groups = {"slice": Fixed(size=[12, 12, 1], count=8, augment=[A.Elastic(rms_voxel=[2, 2])])}
    view = draw(noise_store, ViewPlan(groups=groups), [Request((0,), 0)])["slice"]
    in_plane, through = view.displacement[0, :, :2], view.displacement[0, :, 2]
    assert in_plane.square().mean().sqrt() > 1
    assert through.count_nonzero() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: A.Flip(probability=2), r"probability must lie in \[0, 1\], got 2"),
        (lambda: A.Affine(scale=[1.2, 0.8]), r"scale must be \[a, b\]"),
        (lambda: A.Affine(space="inch"), "space must be mm or voxel"),
        (lambda: A.Percentiles(low=3), "3 is not kept in the index"),
        (lambda: A.Percentiles(low=99, high=1), "low must be below high"),
        (lambda: A.Flip(axes=[-1]), "axes must be different ones of 0"),
        (lambda: A.GaussianBlur(axes=[3]), "axes must be different ones of 0"),
        (lambda: A.Sometimes(augment=[A.Flip(share="group")]), "without a share of their own, got Flip"),
        (lambda: A.Window(low_hu=5, high_hu=5), "low_hu must be below high_hu"),
        (lambda: A.Cutout(fill="noise"), "fill must be minimum, mean or a number"),
        (lambda: A.Gamma(statistics="batch"), "statistics must be view or group"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_is_allowed(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()
