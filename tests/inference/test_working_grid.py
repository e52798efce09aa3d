import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from synthetic import reading, smooth

from medssl.data.volume import Volume, resample_volume
from medssl.inference.record import fetch_from, record_of
from medssl.inference.working_grid import WorkingGrid, WorkingImage

CPU = torch.device("cpu")
AFFINE = np.diag([0.9, 1.1, 2.5, 1.0])


def _image(array, how, affine=AFFINE):
    record = record_of(Volume(array, affine, "synthetic"))
    return WorkingImage(record, how, fetch_from(array), CPU)


@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 2.5), (0.7, 1.1, 2.0), (2.0, 0.8, 5.0), (0.90005, 1.1, 2.5)])
def test_the_image_is_that_of_resampling_the_volume(spacing_mm):
    array = smooth((30, 26, 22))
    image = _image(array, reading(spacing_mm, window=(4, 4, 4)))
    drawn = image.layer(0, image.grid.frame.shape[2])
    expected = resample_volume(Volume(array, AFFINE, ""), spacing_mm)
    assert drawn.shape == expected.array.shape
    np.testing.assert_allclose(np.clip(drawn.numpy(), array.min(), array.max()), expected.array, atol=0.02)
    np.testing.assert_allclose((AFFINE @ image.grid.frame.matrix), expected.affine, atol=1e-9)


@pytest.mark.parametrize("spacing_mm", ["native", (1.5, 1.0, 2.0)])
def test_a_located_image_says_where_in_the_body_each_voxel_lies(spacing_mm):
    array = np.full((1, 40, 40, 20), -1000, np.int16)
    array[:, 8:32, 12:28, 4:20] = 40
    volume, how = Volume(array, AFFINE, "synthetic"), reading(spacing_mm, window=(8, 8, 24))
    record = record_of(volume, with_body=True, modality="ct")
    assert record.modality == ("ct",)
    assert record_of(volume).body.size.tolist() == [40, 40, 20]
    image = WorkingImage(record, how, fetch_from(array), CPU, located=True)
    image.layer(0, 11)
    drawn = image.layer(4, 24)  # two calls: kept slices and new ones
    assert drawn.shape[0] == 4
    plain = WorkingImage(record, how, fetch_from(array), CPU)
    plain.layer(0, 11)  # the same slabs: sums of other slabs may round otherwise
    assert torch.equal(drawn[:1], plain.layer(4, 24))
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in image.grid.frame.shape], indexing="ij"), axis=-1)[:, :, 4:24]
    expected = 2 * record.body.to_body(image.grid.frame.to_volume(grid.astype(float))) - 1
    assert expected.max() > 1.2, "the volume reaches beyond the body"
    np.testing.assert_allclose(drawn[1:].permute(1, 2, 3, 0).numpy(), expected.clip(-1, 1), atol=1e-5)
    np.testing.assert_allclose(record.body.size, [24, 16, 16], atol=8)


@pytest.mark.parametrize("spacing_mm", ["native", (1.5, 1.5, 2.0), (0.7, 0.8, 1.2)])
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float64])
def test_overlapping_layers_are_slices_of_the_whole(spacing_mm, dtype):
    array = (smooth((20, 18, 40)) + 1000).astype(dtype)
    whole = _image(array, reading(spacing_mm))
    height = whole.grid.frame.shape[2]
    expected, image = whole.layer(0, height), _image(array, reading(spacing_mm))
    for first in (0, 5, 21, height - 19):
        torch.testing.assert_close(image.layer(first, first + 19), expected[..., first : first + 19], rtol=1e-5, atol=0)


def test_equal_spacings_give_the_voxels_themselves():
    array = smooth((20, 18, 17)).astype(np.int16)
    for spacing_mm in ("native", (0.90004, 1.1, 2.4999)):
        image = _image(array, reading(spacing_mm, window=(8, 8, 8)))
        np.testing.assert_array_equal(image.layer(0, 17).numpy(), array)
        for axis, side in enumerate((20, 18, 17)):
            np.testing.assert_array_equal(image.grid.positions(axis), np.arange(side))


@pytest.mark.parametrize("spacing_mm", ["native", (1.2, 1.1, 2.5)])
def test_an_image_smaller_than_the_window_lies_in_its_middle_and_is_padded_as_in_training(spacing_mm):
    array = smooth((7, 30, 5))
    how = reading(spacing_mm, window=(16, 16, 16), outside=-55.0)
    image = _image(array, how)
    grid = image.grid
    assert grid.frame.shape == (16, 30, 16)
    assert grid.before == ((16 - grid.shape[0]) // 2, 0, 5)
    drawn = image.layer(0, 16)
    assert torch.all(drawn[..., :5] == -55)
    assert torch.all(drawn[..., 10:] == -55)
    if spacing_mm == "native":
        assert torch.all(drawn[:, :4] == -55)
        np.testing.assert_array_equal(drawn[:, 4:11, :, 5:10].numpy(), array)


def test_positions_of_native_voxels_invert_the_frame_and_end_at_the_outer_voxels():
    grid = WorkingGrid.of(record_of(Volume(smooth((31, 20, 9)), AFFINE, "")), reading((2.0, 1.5, 4.0), (8, 8, 8)))
    for axis in range(3):
        positions = grid.positions(axis)
        back = grid.frame.matrix[axis, 3] + grid.frame.matrix[axis, axis] * positions
        first, last = grid.before[axis], grid.before[axis] + grid.shape[axis] - 1
        between = (positions > first) & (positions < last)
        np.testing.assert_allclose(back[between], np.arange(len(positions))[between], atol=1e-9)
        assert positions.min() >= first
        assert positions.max() <= last
        assert np.all(np.diff(positions) >= 0)


def test_a_finer_grid_is_linear_interpolation():
    array = smooth((14, 12, 10))
    image = _image(array, reading((0.5, 0.6, 1.1), (8, 8, 8)))
    shape, matrix = image.grid.frame.shape, image.grid.frame.matrix
    axes = [matrix[a, 3] + matrix[a, a] * np.arange(n) for a, n in enumerate(shape)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    expected = map_coordinates(array[0].astype(float), points, order=1, mode="nearest")
    np.testing.assert_allclose(image.layer(0, shape[2])[0].numpy(), expected, atol=0.02)
