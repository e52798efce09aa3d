import gzip
import locale
import pickle
import shutil
import tracemalloc

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff

from medssl.data.formats import MAX_VOXELS, ReadError, dicom_class, is_dicom, is_image_class, stem
from medssl.data.reading import check_label_file, looks_like_label_map, read_label, read_volume

FAULTY = {
    "constant": "all voxels have the same value (0): the image is constant",
    "empty": "the file is empty (0 bytes)",
    "four_d": "a 4-D image with 2 channels; choose with data.channels=all or data.channels=N (0 to 1)",
    "inf_voxel": "1 of 13,824 voxels are infinite; repair or drop the image",
    "nan_voxels": "1,728 of 13,824 voxels are NaN; repair or drop the image",
    "not_an_image": "the file is not a NIfTI image, whatever its name says",
    "singular_affine": "the affine is singular or not finite: voxels have no place in space; repair the header",
    "smaller_than_crop": "a side of 5 voxels (7 x 9 x 5) is under min_side_voxel=8",
    "tiny_spacing": "the spacing 0.001 x 1 x 1 mm is absurd (allowed: 0.005 to 100); repair the header",
    "truncated": "the file is truncated: the voxels end early",
    "two_d": "a 2-D image (24 x 24 x 1), not a volume",
}


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(-500, 500, (10, 12, 14)).astype(np.int16)


def save(path, array, affine=None, **header):
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        getattr(image.header, f"set_{key}")(*value)
    nibabel.save(image, path)
    return path


def reason(path, **options):
    with pytest.raises(ReadError) as caught:
        read_volume(path, **options)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.reason


@pytest.mark.parametrize("name", FAULTY)
def test_every_faulty_file_has_its_own_reason(name, real_data, capfd):
    assert reason(real_data / "faulty" / f"{name}.nii.gz") == FAULTY[name]
    assert capfd.readouterr() == ("", "")


def test_the_good_file_passes_and_faulty_labels_have_their_reasons(real_data):
    good = read_volume(real_data / "faulty" / "good.nii.gz")
    assert (good.shape, good.array.dtype) == ((24, 24, 24), np.int16)
    reasons = {
        "label_wrong_shape": "label of the wrong shape: 24 x 24 x 21, its image is 24 x 24 x 24",
        "label_fractional": "fractional labels: 13,824 voxels are no whole numbers (such as 0.5)",
    }
    for name, expected in reasons.items():
        label = real_data / "faulty" / f"{name}.nii.gz"
        assert check_label_file(label, real_data / "faulty" / "good.nii.gz") == expected
        with pytest.raises(ReadError) as caught:
            read_label(label, good)
        assert caught.value.reason == expected
    assert len({*FAULTY.values()}) == len(FAULTY)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_a_header_that_claims_an_absurd_size_is_refused_before_memory_is_taken(suffix, tmp_path):
    path = tmp_path / f"huge{suffix}"
    if suffix.startswith(".nii"):
        header = nibabel.Nifti1Header()
        header.set_data_dtype(np.int16)
        header.set_data_shape((30000, 30000, 30000))
        header["vox_offset"] = 352
        raw = header.binaryblock + bytes(1000)
        path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    elif suffix == ".mha":
        path.write_bytes(b"ObjectType = Image\nNDims = 3\nDimSize = 30000 30000 30000\nElementType = MET_SHORT\n"
                         b"ElementDataFile = LOCAL\n" + bytes(1000))  # fmt: skip
    else:
        path.write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: raw\n"
                         b"endian: little\n\n" + bytes(1000))  # fmt: skip
    tracemalloc.start()
    found = reason(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (
        found
        == f"the header claims 30000 x 30000 x 30000 voxels (50,291 GiB); more than {MAX_VOXELS:,} are not believed"
    )
    assert peak < 50e6


def test_a_header_that_claims_more_than_the_file_can_hold_is_refused(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1000, 1000, 1000))
    header["vox_offset"] = 352
    path = tmp_path / "claim.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(1000)))
    assert reason(path).endswith("bytes of file cannot hold them")
    raw = tmp_path / "short.nii"
    header.set_data_shape((20, 20, 20))
    raw.write_bytes(header.binaryblock + bytes(10000))
    assert reason(raw) == "the file is truncated: its voxels need 16,352 bytes, it has 10,348"


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA", "IAR"])
def test_any_orientation_becomes_ras_with_voxels_at_their_place(axes, voxels, tmp_path):
    affine = np.array([[0.7, 0, 0, -10], [0, 0.9, 0, 5], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    turned = apply_orientation(voxels, axcodes2ornt(axes))
    back = inv_ornt_aff(axcodes2ornt(axes), voxels.shape)  # index in the turned array -> index in the original
    volume = read_volume(save(tmp_path / "a.nii.gz", turned, affine @ back))
    assert np.array_equal(volume.array[0], voxels)
    assert volume.affine == pytest.approx(affine, abs=1e-5)
    assert volume.array.flags.c_contiguous
    assert volume.spacing_mm == pytest.approx((0.7, 0.9, 2.5))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".mhd"])
def test_simpleitk_formats_give_the_volume_that_nifti_gives(suffix, voxels, tmp_path, capfd):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    image.SetSpacing((0.7, 0.9, 2.5))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((-1, 0, 0, 0, 0, 1, 0, 1, 0))
    for name in (f"a{suffix}", "a.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
    one, other = (read_volume(tmp_path / name) for name in (f"a{suffix}", "a.nii.gz"))
    assert np.array_equal(one.array, other.array)
    assert one.affine == pytest.approx(other.affine, abs=1e-5)
    assert one.array.dtype == np.int16
    whole = (tmp_path / f"a{suffix}").read_bytes()
    if suffix != ".mhd":
        (tmp_path / f"cut{suffix}").write_bytes(whole[: len(whole) // 2])
        cut = reason(tmp_path / f"cut{suffix}")
        assert cut.startswith("the file is truncated: its voxels need 3,360 bytes, it has")
    (tmp_path / f"text{suffix}").write_text("no image " * 50)
    assert reason(tmp_path / f"text{suffix}") == "the file is not an image of the kind its name says"
    assert capfd.readouterr() == ("", "")


def test_channels_are_stored_picked_or_refused_by_name_of_the_option(voxels, tmp_path):
    path = save(tmp_path / "two.nii.gz", np.stack([voxels, voxels + 7], -1))
    assert "data.channels=all or data.channels=N (0 to 1)" in reason(path)
    assert np.array_equal(read_volume(path, channels="all").array, np.stack([voxels, voxels + 7]))
    assert np.array_equal(read_volume(path, channels=1).array, voxels[None] + 7)
    assert reason(path, channels=2) == "data.channels=2 is not there: the image has channels 0 to 1"
    with pytest.raises(ValueError, match="channels takes all, null or the number"):
        read_volume(path, channels="first")
    single = save(tmp_path / "one.nii.gz", voxels[..., None])
    assert np.array_equal(read_volume(single).array, voxels[None])


def test_scaled_and_big_endian_nifti_give_their_true_values(voxels, tmp_path):
    image = nibabel.Nifti1Image(voxels.astype(">i2"), np.eye(4))
    nibabel.save(image, tmp_path / "big.nii")
    volume = read_volume(tmp_path / "big.nii")
    assert np.array_equal(volume.array[0], voxels)
    assert volume.array.dtype == np.dtype("<i2")
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(2, -24)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    stored = nibabel.load(tmp_path / "scaled.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "scaled.nii.gz").array[0], stored.get_fdata().astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [(np.complex64, "complex numbers"), (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours")],
)
def test_voxels_that_are_no_grey_values_are_refused(dtype, words, tmp_path):
    assert (
        reason(save(tmp_path / "a.nii.gz", np.zeros((10, 10, 10), dtype)))
        == f"the voxels are {words}; grey values are needed"
    )


def test_damaged_compression_and_missing_files_are_said_so(voxels, tmp_path):
    path = save(tmp_path / "a.nii.gz", voxels // 100)
    raw = bytearray(path.read_bytes())
    raw[300:400] = b"damaged!!!" * 10
    path.write_bytes(raw)
    assert reason(path) == "the compressed voxels are damaged"
    assert reason(tmp_path / "nowhere.nii.gz") == "the file does not exist"


def test_a_dicom_folder_without_extensions_becomes_the_volume_of_its_slices(real_data, tmp_path, capfd):
    volume = read_volume(real_data / "ct_dicom")
    assert volume.shape == (512, 512, 20)
    assert volume.spacing_mm == pytest.approx((0.9765625, 0.9765625, 2.0))
    assert volume.affine[:3, 3] == pytest.approx([-249.51171875, -61.51171875, -804.5])
    assert volume.array.min() < -900
    files = sorted((real_data / "ct_dicom").iterdir())
    gap, cut = tmp_path / "gap", tmp_path / "cut"
    for folder in (gap, cut):
        folder.mkdir()
        for file in files:
            shutil.copyfile(file, folder / file.name)
        (folder / "readme.txt").write_text("not a slice")
    by_place = sorted(files, key=lambda f: f.name)
    (gap / by_place[9].name).unlink()
    assert reason(gap) == "the slices are not evenly spaced (2 to 4 mm apart): some are missing"
    (cut / files[3].name).write_bytes(files[3].read_bytes()[:2000])
    assert reason(cut) == f"{files[3].name}: the file is cut: it ends before its voxels"
    assert reason(tmp_path) == "the folder holds no DICOM series; each series needs a folder of its own"
    assert is_dicom(files[0])
    assert not is_dicom(gap / "readme.txt")
    assert capfd.readouterr() == ("", "")


def test_a_label_follows_its_image_into_ras_and_must_lie_on_it(voxels, tmp_path):
    flipped = np.diag([-1.0, 1, 1, 1])
    flipped[0, 3] = 9
    image = save(tmp_path / "image.nii.gz", voxels)
    values = np.zeros(voxels.shape, np.float32)
    values[1, 2, 3] = 70000
    label = save(tmp_path / "label.nii.gz", values[::-1], flipped)
    volume = read_volume(image)
    found = read_label(label, volume)
    assert found.dtype == np.int32
    assert np.array_equal(found, values)
    assert check_label_file(label, image) is None
    moved = flipped.copy()
    moved[0, 3] += 5
    with pytest.raises(ReadError, match="lies elsewhere than its image: corners are up to 5 x 0 x 0 voxels apart"):
        read_label(save(tmp_path / "moved.nii.gz", values[::-1], moved), volume)
    with pytest.raises(ReadError, match="0 is the background"):
        read_label(save(tmp_path / "negative.nii.gz", -values), volume)


def series(folder, num_slices=10):
    """Write a CT series of noise."""
    import SimpleITK as sitk

    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in range(num_slices):
        voxels = np.random.default_rng(z).integers(0, 900, (1, 16, 16)).astype(np.int16)
        image = sitk.GetImageFromArray(voxels)
        image.SetOrigin((0.0, 0.0, 2.0 * z))
        values = {"0008|0016": CT, "0008|0018": f"1.2.3.{z + 1}", "0008|0060": "CT", "0020|000d": "1.2.3",
                  "0020|000e": "1.2.4", "0020|0013": str(z), "0020|0032": f"0\\0\\{2 * z}",
                  "0020|0037": "1\\0\\0\\0\\1\\0"}  # fmt: skip
        for key, value in values.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{z:03d}.dcm"))
        before = locale.setlocale(locale.LC_ALL)
        writer.Execute(image)
        locale.setlocale(locale.LC_ALL, before)  # the writer leaves "C" behind


CT = "1.2.840.10008.5.1.4.1.1.2"
NO_IMAGES = {
    "structures": "1.2.840.10008.5.1.4.1.1.481.3",
    "plan": "1.2.840.10008.5.1.4.1.1.481.5",
    "report": "1.2.840.10008.5.1.4.1.1.88.22",
    "presentation": "1.2.840.10008.5.1.4.1.1.11.1",
    "selection": "1.2.840.10008.5.1.4.1.1.88.59",
    "registration": "1.2.840.10008.5.1.4.1.1.66.1",
    "spectrum": "1.2.840.10008.5.1.4.1.1.4.2",
    "directory": "1.2.840.10008.1.3.10",
    "private": "1.3.12.2.1107.5.9.1",
}


def test_objects_that_are_no_images_may_lie_beside_a_series_and_damaged_slices_may_not(tmp_path, capfd):
    series(tmp_path / "s")
    alone = read_volume(tmp_path / "s")
    first = (tmp_path / "s" / "000.dcm").read_bytes()
    assert dicom_class(tmp_path / "s" / "000.dcm") == CT
    for name, kind in NO_IMAGES.items():  # the meta information of a slice with another class, and nothing behind it
        at = first.index(CT.encode()) - 8
        was = first[at : at + 8 + len(CT) + len(CT) % 2]
        value = kind.encode() + b"\0" * (len(kind) % 2)
        now = was[:6] + len(value).to_bytes(2, "little") + value
        (tmp_path / "s" / f"{name}.dcm").write_bytes(first[:at] + now + first[at + len(was) : at + len(was) + 150])
        assert dicom_class(tmp_path / "s" / f"{name}.dcm") == kind
        assert not is_image_class(kind)
    assert np.array_equal(read_volume(tmp_path / "s").array, alone.array)
    (tmp_path / "s" / "cut.dcm").write_bytes(first[:400])
    assert reason(tmp_path / "s") == "cut.dcm: the file is cut: it ends before its voxels"
    assert capfd.readouterr() == ("", "")


def test_a_label_half_a_voxel_off_is_refused_in_voxels_along_each_axis(voxels, tmp_path):
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    volume = read_volume(save(tmp_path / "image.nii.gz", voxels, affine))
    label = np.ones(voxels.shape, np.uint8)
    for shift, fits in (((0.2, 0, 0), True), ((2.0, 0, 0), False), ((0, 0, 2.0), True), ((0, 0, 4.0), False)):
        moved = affine.copy()
        moved[:3, 3] = shift
        path = save(tmp_path / "label.nii.gz", label, moved)
        if fits:
            assert (read_label(path, volume) == 1).all()
        else:
            with pytest.raises(ReadError, match="voxels apart"):
                read_label(path, volume)


def test_checking_a_label_of_fractional_type_takes_no_copies(tmp_path):
    label = np.zeros((128, 128, 128), np.float32)
    label[20:60] = 3
    image = save(tmp_path / "image.nii.gz", label.astype(np.int16))
    path = save(tmp_path / "label.nii", label)
    check_label_file(path, image)  # imports
    tracemalloc.start()
    assert check_label_file(path, image) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * label.nbytes


def test_label_maps_are_told_from_images_by_their_values(real_data):
    for name in ("ct_slab_3mm_organs", "ct_torso_3mm_vertebrae"):
        assert looks_like_label_map(read_volume(real_data / "ct_abdomen" / f"{name}.nii.gz").array)
    for label in sorted((real_data / "Task04_Hippocampus" / "labelsTr").iterdir())[:10]:
        assert looks_like_label_map(read_volume(label).array)
    for image in (real_data / "ct_abdomen" / "ct_slab_3mm.nii.gz", real_data / "mr_abdomen" / "mr_slab_3mm.nii.gz",
                  *sorted((real_data / "Task04_Hippocampus" / "imagesTr").iterdir())[:20]):  # fmt: skip
        assert not looks_like_label_map(read_volume(image).array)


def test_read_errors_travel_between_processes_and_stems_lose_double_suffixes(tmp_path):
    error = pickle.loads(pickle.dumps(ReadError(tmp_path / "a.nii.gz", "is broken", lasting=False)))
    assert (error.reason, stem(error.path), error.lasting) == ("is broken", "a", False)
