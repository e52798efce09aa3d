import numpy as np
import pytest
import SimpleITK as sitk

from medssl.data.geometry import apply, rotation_matrix
from medssl.data.reading import read_volume
from medssl.data.volume import Volume
from medssl.phantoms.torso import draw_phantom
from medssl.tables.registration import (
    Coarse,
    best_affine,
    body_box_affine,
    box_affine,
    coarse_labels,
    coarse_volume,
    read_affine,
    register,
    resampled,
    similarity,
    volume_ratio,
)


@pytest.fixture(scope="module")
def torso():
    """A phantom of 12 mm, all of it inside the volume: both ends are cut off by air."""
    volume, _ = draw_phantom(3, size_voxel=(36, 36, 36), spacing_mm=12.0)
    array = volume.array.copy()
    array[..., :3] = array[..., -3:] = -1000
    return coarse_volume(Volume(array, volume.affine, "phantom"), modality="ct", spacing_mm=12.0)


def affine_of(angles_deg, scale, shift_mm):
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_matrix(np.deg2rad(angles_deg)) @ np.diag(scale)
    matrix[:3, 3] = shift_mm
    return matrix


def moved(fixed, matrix, *, shape=(44, 40, 42), spacing=12.0, share_of_z=1.0):
    """What a scanner sees of `fixed` after `matrix` on a grid of its own, which shows a share of the height."""
    low, high = (limit(apply(matrix, fixed.body_mm), axis=0) for limit in (np.min, np.max))
    grid = np.diag([spacing] * 3 + [1.0])
    grid[:3, 3] = (low + high) / 2 - spacing * (np.array(shape) - 1) / 2
    if share_of_z < 1:
        shape = (*shape[:2], round((high[2] - low[2]) * share_of_z / spacing))
        grid[2, 3] = low[2]
    empty = Coarse(np.zeros(shape, np.float32), np.zeros(shape, bool), grid)
    back = np.linalg.inv(matrix)
    mask = Coarse(fixed.mask.astype(np.float32), fixed.mask, fixed.affine)
    return Coarse(resampled(fixed, empty, back), resampled(mask, empty, back) > 0.5, grid)


def error_mm(fixed, found, truth):
    points = fixed.body_mm
    return np.linalg.norm(apply(found, points) - apply(truth, points), axis=1).mean()


def test_a_known_affine_is_found_in_both_directions_and_body_points_return(torso):
    truth = affine_of((8, -6, 7), (1.2, 0.85, 1.1), (40, -25, 30))
    subject = moved(torso, truth)
    found = register(torso, subject)
    assert error_mm(torso, found.matrix, truth) < 3
    assert found.inverse_error_mm < 4
    assert found.volume_ratio == pytest.approx(volume_ratio(truth), rel=0.04)
    assert found.score > similarity(torso, subject, body_box_affine(torso, subject)) + 0.1


def test_a_scan_that_shows_two_thirds_of_the_height_is_placed_right(torso):
    truth = affine_of((-5, 4, -8), (0.9, 0.95, 1.15), (-30, 20, -40))
    subject = moved(torso, truth, share_of_z=0.65)
    assert any(subject.cut)
    found = best_affine(torso, subject)
    assert error_mm(torso, found, truth) < 6
    assert error_mm(torso, body_box_affine(torso, subject), truth) > 20


def test_a_registration_is_the_same_each_time(torso):
    small = torso.thinned(2)
    subject = moved(small, affine_of((3, 3, 3), (1, 1.05, 1), (5, 5, 5)), shape=(20, 20, 20))
    first = best_affine(small, subject)
    assert all(np.array_equal(best_affine(small, subject), first) for _ in range(2))


def test_noise_does_not_pass_for_a_body(torso):
    small = torso.thinned(2)
    noise = np.random.default_rng(0).uniform(size=small.values.shape).astype(np.float32)
    found = register(small, Coarse(noise, noise > 0.5, small.affine))
    assert found.inverse_error_mm > 10 or not 0.5 < found.volume_ratio < 2


def test_the_score_is_two_for_a_volume_itself_and_one_for_independent_ones(torso):
    assert similarity(torso, torso, np.eye(4)) == pytest.approx(2, abs=1e-6)
    away = np.eye(4)
    away[0, 3] = 1e4
    assert similarity(torso, torso, away) == pytest.approx(1, abs=1e-6)


def test_the_body_box_is_exact_for_shifts_and_scales_along_the_axes(torso):
    truth = np.diag([1.2, 0.85, 1.1, 1.0])
    truth[:3, 3] = (40, -35, 20)
    subject = Coarse(torso.values, torso.mask, truth @ torso.affine)
    assert body_box_affine(torso, subject) == pytest.approx(truth, abs=1e-9)
    flat = (np.zeros(3), np.array([10.0, 10, 0]))
    other = (np.full(3, 5.0), np.array([25.0, 10, 5]))
    assert box_affine(flat, other) == pytest.approx(
        np.array([[2, 0, 0, 5], [0, 0.5, 0, 5], [0, 0, 1, 5], [0, 0, 0, 1]])
    )


def test_a_moved_volume_lies_where_the_affine_says_in_ras_even_on_a_turned_grid():
    values = np.zeros((12, 14, 16), np.float32)
    values[3, 9, 5] = 1
    affine = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 3, 11], [0, 0, 0, 1]])
    moving = Coarse(values, values > 0, affine)
    spot = apply(affine, np.array([3.0, 9, 5]))
    truth = affine_of((0, 0, 90), (1, 1, 1), (4, -6, 8))  # fixed -> moving
    grid = np.diag([0.5, 0.5, 0.5, 1])
    grid[:3, 3] = apply(np.linalg.inv(truth), spot) - 0.5 * np.array([4, 5, 6])
    fixed = Coarse(np.zeros((9, 9, 9), np.float32), np.zeros((9, 9, 9), bool), grid)
    found = resampled(moving, fixed, truth)
    assert np.unravel_index(found.argmax(), found.shape) == (4, 5, 6)
    assert found.max() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["a_0GenericAffine.mat", "a.txt", "a.tfm"])
def test_an_affine_of_itk_is_read_from_lps_to_ras(tmp_path, name):
    linear = np.array([[1.1, 0.1, 0], [-0.2, 0.9, 0.05], [0, 0.1, 1.2]])
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(linear.ravel().tolist())
    transform.SetTranslation((10.0, -20.0, 30.0))
    transform.SetCenter((5.0, 6.0, 7.0))
    sitk.WriteTransform(transform, str(tmp_path / name))
    matrix = read_affine(tmp_path / name)
    for point in np.random.default_rng(0).normal(0, 50, (5, 3)):
        lps = np.array(transform.TransformPoint((point * [-1, -1, 1]).tolist()))
        assert apply(matrix, point) == pytest.approx(lps * [-1, -1, 1])


def test_files_without_an_affine_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no transform file"):
        read_affine(tmp_path / "none.mat")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match="is no transform that ITK can read"):
        read_affine(tmp_path / "text.txt")
    sitk.WriteTransform(sitk.BSplineTransform(3), str(tmp_path / "bent.tfm"))
    with pytest.raises(ValueError, match="holds no affine of three dimensions"):
        read_affine(tmp_path / "bent.tfm")


def test_two_lungs_become_two_intensities_and_an_empty_mask_is_refused():
    labels = np.zeros((32, 32, 32), np.int32)
    labels[2:14, 4:28, 4:28], labels[18:30, 4:28, 4:28] = 1, 2
    lungs = coarse_labels(labels, np.eye(4), spacing_mm=2.0)
    assert np.unique(lungs.values).tolist() == [0, 0.5, 1]
    assert lungs.mask.sum() * 8 == (labels > 0).sum()
    assert lungs.body_mm[0] == pytest.approx([2.5, 4.5, 4.5])
    with pytest.raises(ValueError, match="the mask is empty"):
        coarse_labels(np.zeros((32, 32, 32), np.int32), np.eye(4), spacing_mm=2.0)


def test_a_real_torso_that_was_turned_scaled_shifted_and_cut_is_found_again(real_data):
    volume = read_volume(real_data / "ct_abdomen" / "ct_torso_3mm.nii.gz")
    fixed = coarse_volume(volume, modality="ct", spacing_mm=9.0)
    truth = affine_of((6, -8, 5), (1.15, 0.9, 1.2), (40, -20, 30))
    for share, goal_mm in ((1.0, 4), (0.65, 6)):
        subject = moved(fixed, truth, shape=(58, 50, 58), spacing=9.0, share_of_z=share)
        assert error_mm(fixed, best_affine(fixed, subject), truth) < goal_mm
