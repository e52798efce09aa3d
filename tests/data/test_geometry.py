import numpy as np
import pytest
import torch

from medssl.data.geometry import (
    SPLINE_ENERGY,
    Displacement,
    Frame,
    affine_about,
    apply,
    rotation_matrix,
    spline_weights,
)
from medssl.data.views import apply_each


def test_a_frame_about_a_center_maps_its_middle_there_and_back():
    frame = Frame.at([10.0, 20.5, 7.0], [8, 5, 3], step_voxel=[2.0, 1.0, 0.5])
    np.testing.assert_allclose(frame.center, [10.0, 20.5, 7.0])
    np.testing.assert_allclose(frame.to_volume(np.array([0.0, 0.0, 0.0])), [3.0, 18.5, 6.5])
    points = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(frame.to_view(frame.to_volume(points)), points)


def test_faces_are_those_of_the_box_that_holds_the_view():
    frame = Frame.at([8, 4, 2], [4, 6, 2], step_voxel=[2, 1, 1])
    np.testing.assert_allclose(frame.faces, [[4, 1, 1], [12, 7, 3]])
    turn = affine_about(frame.center, rotation_matrix([0, 0, np.pi / 2]), translation=np.zeros(3), to_space=np.eye(3))
    np.testing.assert_allclose(frame.moved(turn).faces, [[5, 0, 1], [11, 8, 3]])


def test_contains_counts_up_to_the_outer_faces():
    frame = Frame.at([4.5, 4.5, 4.5], [10, 10, 10], step_voxel=[1, 1, 1])
    inside = frame.contains(np.array([[-0.5, 0, 0], [9.5, 9.5, 9.5], [9.6, 0, 0], [-0.51, 4, 4]]))
    assert inside.tolist() == [True, True, False, False]


def test_overlap_of_half_shifted_frames_is_a_half():
    frame = Frame.at([8, 8, 8], [16, 16, 16], step_voxel=[1, 1, 1])
    shifted = Frame.at([16, 8, 8], [16, 16, 16], step_voxel=[1, 1, 1])
    assert frame.overlap(frame) == 1
    assert frame.overlap(shifted) == pytest.approx(0.5)
    assert frame.overlap(Frame.at([40, 8, 8], [16, 16, 16], step_voxel=[1, 1, 1])) == 0


def test_flips_and_quarter_turns_stay_aligned_and_an_oblique_frame_is_not():
    frame = Frame.at([8.5, 8.5, 8.5], [4, 4, 4], step_voxel=[1, 1, 1])
    turned = frame.moved(
        affine_about(frame.center, rotation_matrix([0, 0, np.pi / 2]), translation=np.zeros(3), to_space=np.eye(3))
    )
    assert frame.is_aligned
    assert turned.is_aligned
    assert turned.axes == (1, 0, 2)
    assert (
        not Frame.at([8.5, 8.5, 8.5], [4, 4, 4], step_voxel=[2, 1, 1])
        .moved(np.eye(4) + 0.25 * np.eye(4, k=3))
        .is_aligned
    )
    oblique = frame.moved(
        affine_about(frame.center, rotation_matrix([0, 0, 0.1]), translation=np.zeros(3), to_space=np.eye(3))
    )
    assert oblique.axes is None


def test_a_turn_in_millimetres_keeps_the_center_and_true_angles_on_anisotropic_voxels():
    to_mm = np.diag([1.0, 1.0, 5.0])
    center = np.array([10.0, 12.0, 4.0])
    affine = affine_about(center, rotation_matrix([np.pi / 2, 0, 0]), translation=np.zeros(3), to_space=to_mm)
    np.testing.assert_allclose(affine[:3, :3] @ center + affine[:3, 3], center, atol=1e-12)
    moved = affine[:3, :3] @ (center + np.array([0, 5, 0])) + affine[:3, 3]  # 5 mm along y become 1 voxel of z
    np.testing.assert_allclose(moved, center + np.array([0, 0, 1]), atol=1e-12)


def test_bounds_cover_every_voxel_of_a_turned_frame():
    frame = Frame.at([0, 0, 0], [5, 7, 3], step_voxel=[1, 2, 1])
    frame = frame.moved(
        affine_about(np.zeros(3), rotation_matrix([0.3, -0.7, 1.1]), translation=np.ones(3), to_space=np.eye(3))
    )
    grid = np.stack(np.meshgrid(*map(np.arange, frame.shape), indexing="ij"), -1).reshape(-1, 3).astype(float)
    points = frame.to_volume(grid)
    low, high = frame.bounds()
    np.testing.assert_allclose(points.min(0), low, atol=1e-9)
    np.testing.assert_allclose(points.max(0), high, atol=1e-9)


def test_spline_weights_sum_to_one_and_have_the_stated_energy():
    weights = spline_weights(400, node_spacing_voxel=10.0, num_nodes=Displacement.num_nodes(400, 10.0))
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert weights.min() >= 0
    assert (weights**2).sum(1).mean() == pytest.approx(SPLINE_ENERGY, rel=1e-2)


def test_points_are_moved_by_an_affine_in_double_precision():
    matrix = np.array([[0.0, -2, 0, 5], [3, 0, 0, -1], [0, 0, 0.1, 0], [0, 0, 0, 1]])
    assert apply(matrix, np.array([1.0, 2, 3])).tolist() == [1.0, 2.0, 3 * 0.1]
    voxels = np.arange(24).reshape(2, 4, 3)
    moved = apply(matrix, voxels)
    assert moved.dtype == np.float64
    for voxel, point in zip(voxels.reshape(-1, 3), moved.reshape(-1, 3), strict=True):
        np.testing.assert_allclose(point, (matrix @ [*voxel, 1])[:3], rtol=1e-15)
    each = apply_each(torch.tensor(np.stack([matrix, np.eye(4)])), torch.tensor(voxels, dtype=torch.float64))
    np.testing.assert_allclose(each[0].numpy(), moved[0], rtol=1e-15)
    assert each[1].tolist() == voxels[1].tolist()
