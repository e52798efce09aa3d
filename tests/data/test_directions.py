"""Headers that state no directions, or directions of no known space, are read and named as doubtful."""

import re

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medssl.data.formats import ReadError
from medssl.data.reading import read_volume

ARRAY = np.random.default_rng(0).integers(0, 100, (9, 8, 8)).astype(np.int16)
ASSUMED = "the header states no directions ({}); its axes are taken to run to {}"
LPS = "left, posterior, superior"


def nrrd(path, *lines, scale=""):
    head = ["NRRD0004", "type: short", "dimension: 3", "sizes: 9 8 8", *lines, "encoding: raw", "endian: little", ""]
    path.write_bytes("\n".join([*head, ""]).encode() + ARRAY.tobytes("F"))
    return path


VECTORS = ("space directions: (2,0,0) (0,3,0) (0,0,4)", "space origin: (1,2,3)")


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("LPS", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("RAS", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
    ],
)
def test_an_anatomical_space_of_an_nrrd_file_turns_the_axes_and_is_no_doubt(space, signs, tmp_path):
    volume = read_volume(nrrd(tmp_path / "a.nrrd", f"space: {space}", *VECTORS))
    assert volume.doubts == ()
    turned = ARRAY[:: signs[0], :: signs[1]]
    assert np.array_equal(volume.array[0], turned)
    first = np.where(signs, np.array([1, 2, 3]) * signs, 0) + np.where(np.array(signs) < 0, -np.array([16, 21, 0]), 0)
    np.testing.assert_allclose(volume.affine[:3, 3], first)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("space: scanner-xyz", *VECTORS), "its space is scanner-xyz"),
        (("space: 3D-left-handed", *VECTORS), "its space is 3D-left-handed"),
        (("space dimension: 3", *VECTORS), "no entry space"),
        (("spacings: 2 3 4",), "no entry space directions"),
    ],
)
def test_an_nrrd_file_without_anatomical_directions_is_a_doubt(lines, why, tmp_path):
    assert read_volume(nrrd(tmp_path / "a.nrrd", *lines)).doubts == (ASSUMED.format(why, LPS),)


@pytest.mark.parametrize("names", [("old min", "old max"), ("oldmin", "oldmax")])
def test_an_nrrd_file_whose_values_were_quantised_is_refused(names, tmp_path):
    path = nrrd(tmp_path / "a.nrrd", "space: LPS", *VECTORS, *(f"{n}: {v}" for n, v in zip(names, (0, 1), strict=True)))
    with pytest.raises(ReadError, match="entries old min and old max state a scale, which is not read"):
        read_volume(path)


def test_a_metaimage_without_a_matrix_is_a_doubt(tmp_path):
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(ARRAY.T.copy()), str(path))
    assert read_volume(path).doubts == ()
    path.write_bytes(re.sub(rb"TransformMatrix = .*\n", b"", path.read_bytes()))
    volume = read_volume(path)
    assert volume.doubts == (ASSUMED.format("no entry TransformMatrix", LPS),)
    assert np.array_equal(volume.array[0], ARRAY[::-1, ::-1])


def test_a_nifti_file_with_both_codes_0_and_an_analyze_pair_are_doubts(tmp_path):
    made = nibabel.Nifti1Image(ARRAY, np.diag([2.0, 3, 4, 1]))
    made.to_filename(tmp_path / "stated.nii")
    made.header["vox_offset"] = 352
    made.header["sform_code"] = made.header["qform_code"] = 0
    (tmp_path / "a.nii").write_bytes(made.header.binaryblock + bytes(4) + ARRAY.tobytes("F"))
    nibabel.AnalyzeImage(ARRAY, None).to_filename(tmp_path / "b.hdr")
    assert read_volume(tmp_path / "stated.nii").doubts == ()
    for name, why in (("a.nii", "the codes of qform and sform are 0"), ("b.hdr", "Analyze")):
        volume = read_volume(tmp_path / name)
        assert volume.doubts == (ASSUMED.format(why, "left, anterior, superior"),)
        assert np.array_equal(volume.array[0], ARRAY[::-1])


def test_the_distance_between_qform_and_sform_is_told_in_mm_whatever_the_unit(tmp_path):
    made = nibabel.Nifti1Image(np.arange(210, dtype=np.int16).reshape(7, 6, 5), np.diag([2000.0, 2000, 3000, 1]))
    other = made.affine.copy()
    other[0, 3] = 9000
    made.set_sform(made.affine, 1)
    made.set_qform(other, 1)
    made.header.set_xyzt_units("micron")
    made.to_filename(tmp_path / "a.nii")
    assert (
        read_volume(tmp_path / "a.nii", min_side_voxel=1)
        .doubts[0]
        .startswith("sform and qform place voxels up to 9 mm apart")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ARRAY.astype(np.uint64) + np.uint64(2**60), "values from 1152921504606846976 to 1152921504606847075 are too"),
        (ARRAY.astype(np.uint64) + np.uint64(2**63), "a float32 hardly tells them apart; subtract a constant"),
        (ARRAY.astype(np.int64) - 2**60, "too large for their range"),
        (ARRAY.astype(np.int64) + 2**25, "too large for their range"),
        (ARRAY / 100 + 1e6, "too large for their range"),
    ],
)
def test_values_that_lose_their_levels_in_float32_are_refused(values, message, tmp_path):
    nibabel.Nifti1Image(values, np.eye(4), dtype=values.dtype).to_filename(tmp_path / "a.nii")
    with pytest.raises(ReadError, match=message):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    "values", [ARRAY.astype(np.int64) + 2**23, (ARRAY / 100 + 1e6).astype(np.float32), ARRAY * 1e9 + 2.0**40]
)
def test_large_values_that_keep_their_levels_are_read(values, tmp_path):
    nibabel.Nifti1Image(values, np.eye(4), dtype=values.dtype).to_filename(tmp_path / "a.nii")
    assert np.array_equal(read_volume(tmp_path / "a.nii").array[0], values)
