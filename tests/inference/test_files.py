import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from synthetic import smooth

from medssl.data.formats import ReadError
from medssl.inference.files import find_inputs, read_image, slices_of, write_nifti

GEOMETRY = (
    *("qform_code", "sform_code", "pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y"),
    *("qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units", "dim"),
)


def _oblique():
    turn = nibabel.eulerangles.euler2mat(0.2, -0.1, 0.3)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.5, -0.8, 2.4])
    affine[:3, 3] = 12, -40, 7
    return affine


def _image(kind, array, affine):
    made = {"nifti2": nibabel.Nifti2Image}.get(kind, nibabel.Nifti1Image)(array, affine)
    if kind == "qform alone":
        made.set_qform(affine, code=2)
        made.set_sform(None, code=0)
    elif kind == "sform alone":
        made.set_sform(affine, code=3)
        made.set_qform(None, code=0)
    elif kind == "two places":
        made.set_sform(affine, code=4)
        made.set_qform(np.diag([2.0, 1.0, 1.0, 1.0]), code=1)
    elif kind == "units":
        made = nibabel.Nifti1Image(array, np.diag([1e3, 1e3, 1e3, 1.0]) @ affine)
        made.header.set_xyzt_units("micron", "sec")
    elif kind == "big endian":
        made = nibabel.Nifti1Image(array, affine, made.header.as_byteswapped(">"))
    return made


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "kind", ["nifti1", "nifti2", "qform alone", "sform alone", "two places", "units", "big endian", "one time"]
)
def test_results_have_shape_affine_and_header_codes_of_the_image(tmp_path, kind, suffix):
    array = smooth((9, 8, 7))[0]
    if kind == "one time":
        array = array[..., None]
    nibabel.save(_image(kind, array, _oblique()), tmp_path / f"scan{suffix}")
    file = read_image(tmp_path / f"scan{suffix}")
    classes = np.arange(9 * 8 * 7, dtype=np.int16).reshape(file.volume.shape)
    target = tmp_path / "found.nii.gz"
    own = file.in_file_order(classes)
    write_nifti(target, slices_of(own), like=file, shape=file.shape, dtype=np.dtype(np.int16))
    given, found = nibabel.load(tmp_path / f"scan{suffix}"), nibabel.load(target)
    for field in GEOMETRY:
        np.testing.assert_array_equal(found.header[field], given.header[field], err_msg=field)
    assert type(found) is type(given)
    assert found.shape == array.shape
    np.testing.assert_array_equal(found.affine, given.affine)
    assert found.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(found.dataobj).reshape(own.shape), own)


def test_the_order_of_the_file_is_that_of_its_voxels(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, (9, 8, 7)).astype(np.int16)
    for affine in (np.diag([-1, -1, 2, 1.0]), np.diag([1, 1, 1.0])[[2, 0, 1]], _oblique()):
        own = np.eye(4)
        own[:3, :3] = affine[:3, :3]
        nibabel.save(nibabel.Nifti1Image(array, own), tmp_path / "scan.nii")
        file = read_image(tmp_path / "scan.nii")
        np.testing.assert_array_equal(file.in_file_order(file.volume.array[0]), array)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mhd"])
def test_other_formats_give_a_nifti_in_their_place_and_voxel_order(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 1000, (9, 8, 7)).astype(np.int16)  # (x, y, z)
    image = sitk.GetImageFromArray(array.transpose())
    image.SetSpacing((1.5, 0.8, 2.4))
    image.SetOrigin((-3.0, 20.0, 11.0))
    image.SetDirection((0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0))
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    file = read_image(tmp_path / f"scan{suffix}")
    own = file.in_file_order(file.volume.array[0])
    np.testing.assert_array_equal(own, array)
    write_nifti(tmp_path / "found.nii.gz", slices_of(own), like=file, shape=file.shape, dtype=np.dtype(np.int16))
    found = nibabel.load(tmp_path / "found.nii.gz")
    np.testing.assert_array_equal(np.asarray(found.dataobj), array)
    for index in ((0, 0, 0), (8, 0, 0), (2, 5, 6)):
        x, y, z = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(found.affine @ [*index, 1], [-x, -y, z, 1], atol=1e-4)
    assert (int(found.header["qform_code"]), int(found.header["sform_code"])) == (1, 1)
    assert found.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(found.header.get_qform(), found.affine, atol=1e-4)


def test_a_dicom_series_gives_a_nifti_in_its_place(real_data, tmp_path):
    folder = real_data / "ct_dicom"
    file = read_image(folder)
    assert file.shape == (512, 512, 20)
    series = sitk.ImageSeriesReader()
    series.SetFileNames(series.GetGDCMSeriesFileNames(str(folder)))
    image = series.Execute()
    own = file.in_file_order(file.volume.array[0])
    np.testing.assert_array_equal(own, sitk.GetArrayFromImage(image).transpose())
    x, y, z = image.TransformIndexToPhysicalPoint((500, 7, 19))
    np.testing.assert_allclose(file.affine @ [500, 7, 19, 1], [-x, -y, z, 1], atol=1e-3)


def test_what_stops_the_writing_leaves_nothing_behind_and_an_earlier_file_as_it_was(tmp_path):
    nibabel.save(nibabel.Nifti1Image(smooth((9, 8, 7))[0], np.eye(4)), tmp_path / "scan.nii")
    file = read_image(tmp_path / "scan.nii")

    def planes():
        yield np.zeros((9, 8))
        raise KeyboardInterrupt

    (tmp_path / "found.nii.gz").write_bytes(b"earlier")
    with pytest.raises(KeyboardInterrupt):
        write_nifti(tmp_path / "found.nii.gz", planes(), like=file, shape=file.shape, dtype=np.dtype(np.uint8))
    assert (tmp_path / "found.nii.gz").read_bytes() == b"earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.nii.gz", "scan.nii"]


def test_equal_results_are_equal_bytes(tmp_path):
    nibabel.save(nibabel.Nifti1Image(smooth((9, 8, 7))[0], np.eye(4)), tmp_path / "scan.nii")
    file = read_image(tmp_path / "scan.nii")
    for name in ("a", "b"):
        planes = slices_of(np.ones((9, 8, 7), np.uint8))
        write_nifti(tmp_path / f"{name}.nii.gz", planes, like=file, shape=file.shape, dtype=np.dtype(np.uint8))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_single_slice_is_no_volume_and_a_thin_slab_is_one(tmp_path):
    for side in (1, 2):
        nibabel.save(nibabel.Nifti1Image(smooth((9, 8, side))[0], np.eye(4)), tmp_path / f"{side}.nii")
    assert read_image(tmp_path / "2.nii").shape == (9, 8, 2)
    with pytest.raises(ReadError, match="2-D image"):
        read_image(tmp_path / "1.nii")


def test_a_folder_gives_its_images_without_label_maps_and_earlier_results(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("a.nii.gz", "a.mha", "a_seg.nii.gz", "b/a.nii", "results/a.nii.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    inputs, scan = find_inputs(tmp_path, tmp_path / "results")
    names = [image.name for image in inputs]
    assert names[2] == "b__a"
    assert [name[:2] for name in names[:2]] == ["a-", "a-"], "two files of one name are told apart"
    assert {image.path.name for image in inputs} == {"a.nii.gz", "a.mha", "a.nii"}
    assert all(image.skip_label_maps for image in inputs)
    assert [row["file"] for row in scan.skipped] == [str((tmp_path / "a_seg.nii.gz").resolve())]


def test_images_are_found_whatever_lies_above_them_takes_the_results(tmp_path):
    scans = tmp_path / "work" / "scans"
    scans.mkdir(parents=True)
    for name in ("a.nii.gz", "b.nii.gz", "b_seg.nii.gz"):
        (scans / name).write_bytes(b"x")
    for output_dir in (tmp_path, tmp_path / "work", tmp_path / "work" / "elsewhere"):
        inputs, scan = find_inputs(scans, output_dir)
        assert [image.name for image in inputs] == ["a", "b"]
        assert len(scan.skipped) == 1


def test_inputs_that_cannot_be_meant_are_refused(tmp_path, real_data):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "a.nii").write_text("x")
    assert [i.name for i in find_inputs(tmp_path / "a.nii", tmp_path)[0]] == ["a"]
    for path, output, message in (
        (tmp_path / "none.nii", tmp_path / "o", "does not exist"),
        (tmp_path / "notes.txt", tmp_path / "o", "no image file that can be read"),
        (tmp_path, tmp_path / "x" / "..", "one of their own"),
        (next((real_data / "ct_dicom").iterdir()), tmp_path / "o", "DICOM slices are given by their folder"),
    ):
        with pytest.raises(ValueError, match=message):
            find_inputs(path, output)
