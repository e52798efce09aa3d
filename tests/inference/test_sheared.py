"""Results on images whose axes are not at right angles, as in a CT with a tilted gantry: one place in all programs."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from tiny_segmenter import load, predict, save_segmenter

from medssl.inference.files import read_image, slices_of, write_nifti, write_nrrd

SHAPE = (9, 8, 7)
CORNERS = [(x, y, z) for x in (0, SHAPE[0] - 1) for y in (0, SHAPE[1] - 1) for z in (0, SHAPE[2] - 1)]


def sheared_affine(rng, *, tilt_deg):
    """Axes turned, permuted and flipped at random, the slices shifted along one of the others."""
    rotation = nibabel.eulerangles.euler2mat(*rng.uniform(-0.4, 0.4, 3))
    tilt = np.eye(3)
    tilt[rng.integers(2), 2] = np.tan(np.radians(tilt_deg))
    linear = rotation @ tilt @ np.diag(rng.uniform(0.6, 4, 3) * rng.choice([-1, 1], 3))
    affine = np.eye(4)
    affine[:3, :3] = linear[:, rng.permutation(3)]
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def write_image(path, array, affine, rng):
    """Write an image as the format of the path does; a NIfTI has any mixture of codes that states the shear."""
    if path.suffix == ".nii":
        image = nibabel.Nifti1Image(array, affine)
        image.set_sform(affine, code=int(rng.integers(1, 5)))
        image.set_qform(affine, code=int(rng.integers(0, 5)), strip_shears=True)
        nibabel.save(image, path)
        return
    image = sitk.GetImageFromArray(array.transpose())
    lps = np.diag([-1, -1, 1]) @ affine[:3, :3]
    spacing = np.linalg.norm(lps, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps / spacing).ravel().tolist())
    image.SetOrigin((np.array([-1, -1, 1]) * affine[:3, 3]).tolist())
    sitk.WriteImage(image, str(path))


def places_itk(path):
    """Where SimpleITK sees the corners, in RAS mm."""
    image = sitk.ReadImage(str(path))
    return np.array([image.TransformIndexToPhysicalPoint(corner) for corner in CORNERS]) * [-1, -1, 1]


def places(affine):
    return np.array([(affine @ [*corner, 1])[:3] for corner in CORNERS])


@pytest.mark.parametrize("seed", range(50))
def test_nibabel_and_simpleitk_see_a_result_where_its_image_is(tmp_path, seed):
    rng = np.random.default_rng(seed)
    tilt_deg = float(rng.uniform(1, 30)) if seed % 5 else 0.0
    affine, array = sheared_affine(rng, tilt_deg=tilt_deg), rng.integers(0, 999, SHAPE).astype(np.int16)
    path = tmp_path / f"scan{rng.choice(['.nii', '.nrrd', '.mha'])}"
    write_image(path, array, affine, rng)
    file = read_image(path)
    own = file.in_file_order(file.volume.array[0])
    nifti, nrrd = tmp_path / "found.nii.gz", tmp_path / "found.nrrd"
    write_nifti(nifti, slices_of(own), like=file, shape=file.shape, dtype=np.dtype(np.int16))
    write_nrrd(nrrd, slices_of(own), like=file, dtype=np.dtype(np.int16))
    voxels, found = load(nifti)
    np.testing.assert_array_equal(voxels, array)
    np.testing.assert_allclose(places(found.affine), places(affine), atol=1e-3)
    assert file.is_sheared == (tilt_deg > 0)
    if file.is_sheared:
        assert (int(found.header["qform_code"]), int(found.header["sform_code"]) > 0) == (0, True)
        with pytest.raises(RuntimeError, match="orthonormal"):  # refused, where it saw another place before
            sitk.ReadImage(str(nifti))
    else:
        np.testing.assert_allclose(places_itk(nifti), places(affine), atol=0.1)
    np.testing.assert_allclose(places_itk(nrrd), places(affine), atol=1e-3)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(nrrd))).transpose(), array)


def test_a_sheared_image_is_predicted_into_two_files_of_one_place(tmp_path, capsys):
    rng = np.random.default_rng(0)
    affine = sheared_affine(rng, tilt_deg=15)
    write_image(tmp_path / "scan.nii", rng.integers(-500, 500, SHAPE).astype(np.int16), affine, rng)
    given = {"weights": save_segmenter(tmp_path), "input": tmp_path / "scan.nii", "output_dir": tmp_path / "o"}
    assert predict(**given, probabilities="true") == 0
    assert f"{tmp_path / 'o' / 'scan.nii.gz'} and scan_sheared.nrrd (for ITK, which" in capsys.readouterr().out
    files = {file.name for file in (tmp_path / "o").iterdir()}
    assert files == {"scan.nii.gz", "scan_sheared.nrrd", "scan_probabilities.nii.gz", "scan_probabilities.json"}
    voxels, found = load(tmp_path / "o" / "scan.nii.gz")
    second = sitk.ReadImage(str(tmp_path / "o" / "scan_sheared.nrrd"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(second).transpose(), voxels)
    assert voxels.dtype == np.uint8
    np.testing.assert_allclose(places_itk(tmp_path / "o" / "scan_sheared.nrrd"), places(found.affine), atol=1e-3)
    assert load(tmp_path / "o" / "scan_probabilities.nii.gz")[1].header["qform_code"] == 0


def test_a_shear_that_moves_no_corner_by_a_twentieth_of_a_millimetre_is_rounding(tmp_path):
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for shear, sheared in ((0.002, False), (0.05, True)):
        affine[0, 2] = shear
        nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random(SHAPE), affine), tmp_path / "scan.nii")
        assert read_image(tmp_path / "scan.nii").is_sheared == sheared
