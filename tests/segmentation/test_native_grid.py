import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from synthetic import reading, smooth

from medssl.data.volume import Volume
from medssl.inference.record import record_of
from medssl.inference.working_grid import WorkingGrid
from medssl.segmentation.native_grid import NativePlane, mean_plane, most_probable, planes

CPU = torch.device("cpu")


def _grid(shape, spacing_mm, window=(8, 8, 8)):
    record = record_of(Volume(smooth(shape), np.diag([1.0, 1.2, 3.0, 1.0]), ""))
    return WorkingGrid.of(record, reading(spacing_mm, window))


def _pieces(whole, heights):
    first = 0
    for height in heights:
        yield first, whole[..., first : first + height]
        first += height


@pytest.mark.parametrize("heights", [[23], [1] * 23, [9, 10, 4], [16, 7]])
@pytest.mark.parametrize("spacing_mm", ["native", (1.0, 1.2, 3.3), (1.0, 1.2, 1.7), (1.0, 1.2, 7.0)])
def test_planes_are_linear_between_slices_whatever_the_slabs(spacing_mm, heights):
    slices = {"native": 23, (1.0, 1.2, 3.3): 25, (1.0, 1.2, 1.7): 13, (1.0, 1.2, 7.0): 54}[spacing_mm]
    grid = _grid((10, 9, slices), spacing_mm)
    assert grid.frame.shape[2] == 23
    whole = torch.rand(2, 4, 5, 23)
    found = torch.stack(list(planes(_pieces(whole, heights), grid.positions(2))), -1)
    expected = np.stack([
        np.interp(grid.positions(2), np.arange(23), line) for line in whole.reshape(-1, 23).numpy()
    ])  # fmt: skip
    np.testing.assert_allclose(found.reshape(-1, slices).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("spacing_mm", ["native", (0.7, 2.0, 3.0), (1.0, 0.9, 3.0), (9.0, 1.2, 3.0)])
def test_a_plane_is_interpolated_at_the_places_of_native_voxels(spacing_mm):
    grid = _grid((20, 5, 8), spacing_mm)
    plane = torch.rand(3, *grid.frame.shape[:2])
    points = np.stack(np.meshgrid(grid.positions(0), grid.positions(1), indexing="ij"))
    expected = [map_coordinates(one.numpy().astype(float), points, order=1) for one in plane]
    found = NativePlane(grid, CPU)(plane)
    assert found.shape == (3, 20, 5)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_leaving_out_classes_that_cannot_win_changes_nothing(sharpness):
    torch.manual_seed(0)
    grids = [_grid((20, 16, 8), spacing_mm) for spacing_mm in ((2.0, 1.9, 3.0), (0.8, 1.2, 3.0))]
    natives, weights = [NativePlane(grid, CPU) for grid in grids], [0.75, 0.25]
    found = [(sharpness * torch.randn(7, *grid.frame.shape[:2])).softmax(0) for grid in grids]
    for plane in found:
        plane[5] = 0.0
        plane /= plane.sum(0)
    mean = mean_plane(found, natives, weights)
    torch.testing.assert_close(mean.sum(0), torch.ones(20, 16))
    expected = weights[0] * natives[0](found[0]) + weights[1] * natives[1](found[1])
    torch.testing.assert_close(mean, expected)
    assert torch.equal(most_probable(found, natives, weights), expected.argmax(0))


def test_the_first_of_classes_that_tie_is_chosen():
    natives = [NativePlane(_grid((20, 16, 8), "native"), CPU)]
    for shares in ([0.2, 0.4, 0.4], [0.5, 0.0, 0.5], [1 / 3] * 3):
        plane = torch.tensor(shares)[:, None, None].expand(3, 20, 16)
        assert torch.all(most_probable([plane], natives, [1.0]) == int(np.argmax(shares)))
