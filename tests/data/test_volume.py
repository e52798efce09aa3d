import hashlib
import tracemalloc

import numpy as np
import pytest

from medssl.data.volume import (
    Box,
    Volume,
    coarse_copy,
    draw_points,
    find_body,
    intensity_statistics,
    otsu_threshold,
    resample_label,
    resample_volume,
    voxel_hash,
)


def ball(shape, centre, radius):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return ((grid - centre) ** 2).sum(-1) <= radius**2


def volume_of(array, spacing_mm=(1.0, 1.0, 1.0)):
    return Volume(array if array.ndim == 4 else array[None], np.diag([*spacing_mm, 1.0]), "test")


def test_a_box_maps_its_faces_to_zero_and_one_and_back():
    box = Box(np.array([-0.5, 3.5, 1.5]), np.array([9.5, 7.5, 2.5]))
    corners = np.array([[-0.5, 3.5, 1.5], [9.5, 7.5, 2.5], [4.5, 5.5, 2.0]])
    assert box.to_body(corners) == pytest.approx(np.array([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]))
    assert box.to_volume(box.to_body(corners)) == pytest.approx(corners)
    assert Box.whole((10, 4, 3)).upper.tolist() == [9.5, 3.5, 2.5]
    with pytest.raises(ValueError, match="upper > lower"):
        Box(np.zeros(3), np.array([1.0, 0.0, 1.0]))


def test_spacing_is_the_length_of_the_affine_columns_also_when_oblique():
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.7, 0.8, 5.0])
    assert Volume(np.zeros((1, 4, 5, 6)), affine, "").spacing_mm == pytest.approx((0.7, 0.8, 5.0))


def test_the_hash_sees_voxels_and_shape_but_not_the_voxel_type():
    array = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    assert voxel_hash(array) == voxel_hash(array.astype(np.float64)) == voxel_hash(np.asfortranarray(array))
    assert voxel_hash(array) != voxel_hash(array.reshape(1, 2, 4, 3))
    changed = array.copy()
    changed[0, 1, 2, 3] += 1
    assert voxel_hash(changed) != voxel_hash(array)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.int32])
def test_statistics_from_a_histogram_equal_numpy(dtype):
    array = (
        (np.random.default_rng(0).gamma(2, 30, (1, 9, 8, 7)) - (0 if dtype == np.uint8 else 40))
        .clip(-100, 255)
        .astype(dtype)
    )
    found = intensity_statistics(array)[0]
    for q in (0.5, 1, 5, 50, 95, 99, 99.5):
        assert found[f"p{q:g}".replace(".", "_")] == pytest.approx(np.percentile(array, q), rel=1e-6)
    assert found["mean"] == pytest.approx(array.mean(dtype=np.float64), rel=1e-9)
    assert found["std"] == pytest.approx(array.std(dtype=np.float64), rel=1e-9)
    assert (found["minimum"], found["maximum"]) == (array.min(), array.max())


def test_a_coarse_copy_averages_blocks_and_the_rest_at_the_end():
    array = np.arange(35, dtype=np.float32)[:, None, None] * np.ones((1, 20, 20), np.float32)
    coarse, factor = coarse_copy(array, spacing_mm=(2.0, 1.0, 8.0), target_mm=4.0)
    assert factor.tolist() == [2, 1, 1]
    assert coarse[:, 0, 0].tolist() == [0.5 + 2 * i for i in range(17)] + [34.0]


def test_the_body_of_a_ct_is_the_largest_component_with_its_lungs_and_without_the_table():
    array = np.full((60, 50, 40), -1000, np.int16)
    array[10:50, 12:40, 5:40] = 40
    array[18:30, 18:34, 10:30] = -800  # a lung, closed in each axial slice
    array[5:55, 2:4, :] = 200  # the table
    box, mask, factor = find_body(volume_of(array), modality="ct", copy_spacing_mm=1.0)
    assert factor.tolist() == [1, 1, 1]
    assert box.lower.tolist() == [9.5, 11.5, 4.5]
    assert box.upper.tolist() == [49.5, 39.5, 39.5]
    assert mask.sum() == 40 * 28 * 35


def test_the_body_box_of_a_coarse_copy_covers_the_body_to_within_a_block():
    array = np.where(ball((64, 64, 64), (30, 33, 28), 20), 0, -1000).astype(np.int16)
    box, _, factor = find_body(volume_of(array), modality="ct")
    assert factor.tolist() == [4, 4, 4]
    assert np.abs(box.lower - [9.5, 12.5, 7.5]).max() <= 4
    assert np.abs(box.upper - [50.5, 53.5, 48.5]).max() <= 4


def test_the_body_of_an_mr_follows_otsu_and_an_empty_volume_is_all_body():
    rng = np.random.default_rng(0)
    array = np.where(ball((32, 32, 32), (16, 15, 14), 10), 300, 20) + rng.normal(0, 5, (32, 32, 32))
    box, _, _ = find_body(volume_of(array.astype(np.float32)), modality="mr", copy_spacing_mm=1.0)
    assert box.lower.tolist() == [5.5, 4.5, 3.5]
    assert 50 < otsu_threshold(array) < 270
    air = volume_of(np.full((16, 16, 16), -1000, np.int16))
    assert find_body(air, modality="ct")[0].size.tolist() == [16, 16, 16]


def test_points_lie_in_the_body_and_on_their_labels_and_repeat_by_case_name():
    array = np.where(ball((40, 40, 40), (20, 20, 20), 12), 0, -1000).astype(np.int16)
    label = np.zeros(array.shape, np.int16)
    label[18:22, 18:22, 18:22] = 3
    label[10:30, 20, 20] = 7
    _, mask, factor = find_body(volume_of(array), modality="ct", copy_spacing_mm=2.0)

    def draw(case):
        return draw_points(
            mask, label, factor=factor, shape=array.shape, case=case, num_body_points=500, num_label_points=16
        )

    points = draw("a")
    assert np.array_equal(points, draw("a"))
    assert not np.array_equal(points, draw("b"))
    body = points[points[:, 3] == -1]
    assert len(body) == 500
    assert mask[tuple((body[:, :3] // factor).T)].all()
    for value in (3, 7):
        chosen = points[points[:, 3] == value]
        assert len(chosen) == 16
        assert len(np.unique(chosen, axis=0)) == 16
        assert (label[tuple(chosen[:, :3].T)] == value).all()


def test_resampling_keeps_the_centre_in_place_and_linear_ramps_straight():
    ramp = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 20, 12), np.float32)
    volume = volume_of(ramp, (1.0, 2.0, 3.0))
    finer = resample_volume(volume, (0.5, 2.0, 1.5))
    assert finer.shape == (80, 20, 24)
    assert finer.spacing_mm == pytest.approx((0.5, 2.0, 1.5))
    x_mm = (finer.affine @ [30, 0, 0, 1])[0]
    assert finer.array[0, 30, 5, 5] == pytest.approx(x_mm, abs=1e-4)
    centre = volume.affine @ [*((np.array(volume.shape) - 1) / 2), 1]
    assert finer.affine @ [*((np.array(finer.shape) - 1) / 2), 1] == pytest.approx(centre)


def test_resampling_removes_stripes_beyond_the_new_limit_and_keeps_slow_ones():
    x = np.arange(96)
    fast, slow = np.cos(np.pi * x * 0.8), np.cos(np.pi * x * 0.08)
    for wave, keeps in ((fast, False), (slow, True)):
        array = np.broadcast_to((100 * wave).astype(np.float32)[:, None, None], (96, 16, 16)).copy()
        out = resample_volume(volume_of(array), (3.0, 1.0, 1.0)).array[0, 4:-4, 8, 8]
        assert (np.abs(out).max() > 80) if keeps else (np.abs(out).max() < 5)


def test_resampling_keeps_integers_their_range_and_their_channels():
    rng = np.random.default_rng(0)
    array = rng.integers(-1000, 1000, (2, 24, 24, 24)).astype(np.int16)
    out = resample_volume(volume_of(array), (2.0, 2.0, 2.0))
    assert out.array.dtype == np.int16
    assert out.array.shape == (2, 12, 12, 12)
    assert out.array.min() >= -1000
    assert np.array_equal(resample_volume(volume_of(array), (1.0, 1.00001, 1.0)).array, array)


def test_a_resampled_label_holds_only_values_that_were_there_and_keeps_their_volume():
    label = np.zeros((48, 48, 48), np.int16)
    label[ball(label.shape, (20, 24, 24), 12)] = 4
    label[30:44, 10:40, 10:40] = 117
    volume = volume_of(np.zeros(label.shape, np.int16), (1.0, 1.0, 1.0))
    for spacing in ((2.0, 2.0, 2.0), (0.8, 1.5, 1.0)):
        out = resample_label(label, volume, spacing)
        assert out.shape == resample_volume(volume, spacing).shape
        assert set(np.unique(out)) == {0, 4, 117}
        for value in (4, 117):
            assert (out == value).sum() * np.prod(spacing) == pytest.approx((label == value).sum(), rel=0.05)


def test_a_spacing_that_is_no_spacing_is_refused():
    with pytest.raises(ValueError, match="three positive numbers"):
        resample_volume(volume_of(np.zeros((8, 8, 8), np.int16)), (1.0, 0.0, 1.0))


def test_label_points_are_those_of_a_plain_sort_and_take_little_memory():
    label = np.random.default_rng(0).integers(0, 4, (96, 96, 96)).astype(np.int16)
    label[:, :, 50:] = 0
    label[3, 4, 5] = 9
    mask, factor = np.ones((2, 2, 2), bool), np.array([48, 48, 48])
    options = {"factor": factor, "shape": label.shape, "case": "a", "num_body_points": 10, "num_label_points": 20}
    draw_points(mask, label, **options)
    tracemalloc.start()
    points = draw_points(mask, label, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < label.nbytes
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(b"a").digest()[:8], "little"))
    rng.integers(8, size=10)
    rng.integers(factor, size=(10, 3))
    expected = []
    for value in (1, 2, 3, 9):
        positions = np.flatnonzero(label == value)
        if len(positions) > 20:
            positions = np.sort(rng.choice(positions, 20, replace=False))
        expected += [(*np.unravel_index(p, label.shape), value) for p in positions]
    assert points[10:].tolist() == [list(map(int, row)) for row in expected]


def test_measuring_a_volume_takes_no_wide_copy_of_it():
    array = np.random.default_rng(0).normal(0, 300, (1, 128, 128, 128)).astype(np.float32)
    volume = Volume(array, np.diag([1.0, 1.0, 1.0, 1.0]), "synthetic")
    tracemalloc.start()
    (statistics,) = intensity_statistics(array)
    find_body(volume, modality="ct")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * array.nbytes  # the percentiles sort one copy
    assert statistics["mean"] == pytest.approx(array.mean(dtype=np.float64))
    assert statistics["std"] == pytest.approx(array.std(dtype=np.float64))
