import numpy as np
import pytest
import torch

from medssl.data.augment import Affine
from medssl.data.draw import box_of
from medssl.data.placements import Fixed, RandomCrop
from medssl.data.resampling import SINC_RATIO, halve, resampling_matrix
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.views import ViewPlan


def test_a_ratio_up_to_one_is_linear_interpolation():
    values = np.random.default_rng(0).normal(size=9)
    positions = np.array([0.0, 0.25, 3.5, 7.99, 8.0])
    drawn = resampling_matrix(positions, 9, ratio=1.0, border=True) @ values
    np.testing.assert_allclose(drawn, np.interp(positions, np.arange(9), values), atol=1e-6)


def test_outside_repeats_the_edge_or_counts_as_zero():
    values = np.array([3.0, 5.0, 7.0])
    positions = np.array([-2.0, -0.5, 4.0])
    assert (resampling_matrix(positions, 3, ratio=1.0, border=True) @ values).tolist() == [3, 3, 7]
    assert (resampling_matrix(positions, 3, ratio=1.0, border=False) @ values).tolist() == [0, 1.5, 0]


def test_filtered_constants_stay_constant():
    for ratio in (SINC_RATIO, 1.7, 3.2):
        matrix = resampling_matrix(np.linspace(-3, 40, 30), 38, ratio=ratio, border=True)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)


def test_halving_places_voxels_between_pairs():
    ramp = np.arange(32, dtype=np.float32)[None, :, None, None] * np.ones((1, 32, 4, 4), np.float32)
    half = halve(ramp, axes=(True, False, False))
    assert half.shape == (1, 16, 4, 4)
    np.testing.assert_allclose(half[0, 4:-4, 0, 0], 2 * np.arange(4, 12) + 0.5, atol=1e-4)


def _amplitude(image: torch.Tensor) -> float:
    """Amplitude of the strongest deviation from the mean, away from the faces."""
    inner = image[8:-8]
    return float((inner - inner.mean()).abs().max())


@pytest.mark.parametrize("ratio", [1.3, 2.0, 2.7, 3.2, 4.1, 5.5])
def test_stripes_beyond_the_nyquist_limit_of_a_resized_view_vanish_and_slower_ones_stay(make_store, draw, ratio):
    """An ideal filter keeps all below the limit and nothing above; ours > 80 % up to 0.8 of it, < 5 % from 1.3 on."""
    side, voxels = 64, np.arange(round(64 * ratio))
    nyquist = 0.5 / ratio  # cycles per stored voxel
    for share in (0.3, 0.6, 0.8, 1.3, 1.5, 1.9, 2.3, 3.1):
        frequency = share * nyquist
        if frequency > 0.5:
            continue
        stripes = 1000 * np.sin(2 * np.pi * frequency * voxels + 0.7)
        array = np.rint(stripes[None, :, None, None] * np.ones((1, 1, 8, 8))).astype(np.int16)
        store = make_store(array)
        size = [side, 8, 8]
        plan = ViewPlan(groups={"x": RandomCrop(size=size, fraction=[1, 1], within="volume", outside="border")})
        image = draw(store, plan, [Request((0,), 0)])["x"].image[0, 0, 0, :, 4, 4]
        kept = _amplitude(image) / 1000
        assert kept > 0.8 if share < 1 else kept < 0.05, (ratio, share, kept)


@pytest.mark.parametrize("angle_deg", [0, 15, 30, 45])
@pytest.mark.parametrize("scale", [1.0, 1.3, 2.2])
def test_turning_a_view_costs_no_resolution(make_store, draw, angle_deg, scale):
    """Stripes of 8 voxels, well within the turned grid, keep their amplitude; those of 2.4 vanish at a scale of 2.2."""
    kept = {}
    for period in (2.4, 8.0):
        voxels = np.arange(96)
        stripes = 1000 * np.sin(2 * np.pi * voxels / period)
        store = make_store(np.rint(stripes[None, :, None, None] * np.ones((1, 1, 96, 8))).astype(np.int16))
        turn = [Affine(rotation_deg=[[0, 0], [0, 0], [angle_deg, angle_deg]], scale=[scale, scale])]
        plan = ViewPlan(groups={"x": Fixed(size=[36, 36, 1], outside="border", augment=turn)})
        image = draw(store, plan, [Request((0,), 0)])["x"].image[0, 0, 0, 6:-6, 6:-6]
        kept[period] = float(image.square().mean().sqrt()) * np.sqrt(2) / 1000
    assert kept[8.0] > 0.75
    if scale == 2.2:
        assert kept[2.4] < 0.1


def test_thick_slices_do_not_keep_a_coarse_view_at_full_resolution(make_store):
    array = np.zeros((1, 200, 200, 12), np.int16) + np.arange(12, dtype=np.int16)
    store = make_store(array, affine=np.diag([1, 1, 5.0, 1]))
    spec = RandomCrop(size=[32, 32, 12], spacing_mm=[4.2, 4.2, 3.0])
    (view,) = ViewPlan(groups={"x": spec}).place(Scene(store, Request((0,), 0)), seed=0, step=0)["x"]
    assert store.record(0).level_factors == ((1, 1, 1), (2, 2, 1), (4, 4, 1))
    assert box_of(view.record, view.pose).level == 2


def test_a_view_resized_from_a_pyramid_level_shows_the_same_place(make_store, draw):
    x, y, z = np.meshgrid(*[np.arange(160)] * 3, indexing="ij")
    store = make_store((100 * np.stack([x, y, z])).astype(np.int16))  # levels are rounded to whole units
    assert store.record(0).level_factors == ((1, 1, 1), (2, 2, 2))
    plan = ViewPlan(groups={"x": Fixed(size=[32] * 3, spacing_mm=2.5, outside="border")})
    view = draw(store, plan, [Request((0,), 0)])["x"]
    u = torch.tensor([[[[10.0, 16.0, 21.0]]]])
    expected = view.to_volume(u)[0, 0, 0]
    np.testing.assert_allclose(view.image[0, 0, :, 10, 16, 21].numpy() / 100, expected.numpy(), atol=0.05)
