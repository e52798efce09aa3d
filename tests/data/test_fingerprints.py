import hashlib
import json
import os
from functools import partial
from pathlib import Path

import dicom_slices
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import volume_files
from volume_files import tree

from medssl.data.cases import Case
from medssl.data.fingerprints import Contents
from medssl.data.prepare import LOOKS, prepare_store
from medssl.data.sources import Folder

QUIET = {"num_workers": 0, "progress": False}
image = partial(volume_files.image, shape=(40, 40, 40))


def write_nifti(name):
    def write(folder, array):
        kind = nibabel.Nifti1Pair if name.endswith(".hdr") else nibabel.Nifti1Image
        nibabel.save(kind(array, np.eye(4)), folder / name)
        return folder / name

    return write


def write_itk(name, *, data="", compressed=False):
    def write(folder, array):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / name), compressed)
        if data:  # voxels under a name that does not follow from that of the header
            header, (raw,) = folder / name, (f for f in folder.iterdir() if f.suffix == ".raw")
            header.write_bytes(header.read_bytes().replace(raw.name.encode(), data.encode()))
            raw.rename(folder / data)
        return folder / name

    return write


def write_dicom(folder, array):
    dicom_slices.series(folder / "s", array)
    return folder / "s"


KINDS = {
    "nii": write_nifti("a.nii"),
    "nii.gz": write_nifti("a.nii.gz"),
    "hdr": write_nifti("a.hdr"),
    "mha": write_itk("a.mha"),
    "mhd": write_itk("a.mhd"),
    "mhd, voxels named otherwise": write_itk("a.mhd", data="voxels.bin"),
    "nrrd": write_itk("a.nrrd"),
    "nhdr": write_itk("a.nhdr"),
    "nhdr, voxels named otherwise": write_itk("a.nhdr", data="voxels.bin"),
    "dicom": write_dicom,
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_voxel_in_the_middle_that_keeps_the_size_changes_the_fingerprint(kind, tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (24, 24, 24)).astype(np.int16)
    path = KINDS[kind](tmp_path, array)
    first = Case("a", path).fingerprint(Contents())
    array[12, 12, 12] += 1
    KINDS[kind](tmp_path, array)
    assert Case("a", path).fingerprint(Contents()) != first
    array[12, 12, 12] -= 1
    KINDS[kind](tmp_path, array)
    assert Case("a", path).fingerprint(Contents()) == first


@pytest.fixture
def hashed(monkeypatch):
    """The files that are read to be hashed, by name."""
    names, digest = [], hashlib.file_digest

    def watched(stream, kind):
        names.append(Path(stream.name).name)
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", watched)
    return names


def aged(*paths, seconds=100):
    for path in paths:
        os.utime(path, (1e9 - seconds, 1e9 - seconds))


def test_unchanged_files_are_not_read_again_and_a_changed_time_is_enough(hashed, tmp_path):
    files = [tmp_path / "in" / f"{name}.nii.gz" for name in "ab"]
    for number, file in enumerate(files):
        image(file, seed=number)
    aged(*files)
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
    prepare()
    assert sorted(hashed) == ["a.nii.gz", "b.nii.gz"]
    hashed.clear()
    assert not prepare().has_changed
    assert hashed == []
    aged(files[0], seconds=99)
    assert not prepare().has_changed
    assert hashed == ["a.nii.gz"], "touched, and still the same"
    hashed.clear()
    assert not prepare(verify=True).has_changed
    assert sorted(hashed) == ["a.nii.gz", "b.nii.gz"]


def test_a_change_under_the_same_size_and_time_needs_verify(hashed, tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (12, 12, 12)).astype(np.int16)
    file = tmp_path / "in" / "a.nii"
    image(file, array)
    aged(file)
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
    prepare()
    array[6, 6, 6] += 1
    image(file, array)
    aged(file)
    assert not prepare().has_changed
    assert prepare(verify=True).num_new == 1


def test_a_file_of_the_last_seconds_is_read_again(hashed, tmp_path):
    image(tmp_path / "a.nii.gz")
    contents = Contents()
    contents.of(tmp_path / "a.nii.gz")
    assert contents.looks == {}
    aged(tmp_path / "a.nii.gz")
    contents.of(tmp_path / "a.nii.gz")
    assert list(contents.looks) == [str(tmp_path)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"in": 3}', '{"in": {"a": [1]}}', "\udcff", '{"in": {"a": [1e999, 1, "x"]}}']
)
def test_damaged_looks_cost_a_look_and_no_case(text, hashed, tmp_path):
    image(tmp_path / "in" / "a.nii.gz")
    aged(tmp_path / "in" / "a.nii.gz")
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
    prepare()
    looks = (tmp_path / "s" / LOOKS).read_bytes()
    (tmp_path / "s" / LOOKS).write_text(text, errors="surrogateescape")
    hashed.clear()
    assert not prepare().has_changed
    assert hashed == ["a.nii.gz"]
    assert (tmp_path / "s" / LOOKS).read_bytes() == looks


def test_looks_are_no_part_of_the_store_and_forget_files_that_are_gone(tmp_path):
    for name in "ab":
        image(tmp_path / "in" / f"{name}.nii.gz", seed=ord(name))
        aged(tmp_path / "in" / f"{name}.nii.gz")
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
    prepare()
    whole = tree(tmp_path / "s")
    aged(tmp_path / "in" / "a.nii.gz", seconds=50)
    prepare()
    assert tree(tmp_path / "s") == whole
    (tmp_path / "in" / "b.nii.gz").unlink()
    prepare()
    ((_, names),) = json.loads((tmp_path / "s" / LOOKS).read_text()).items()
    assert list(names) == ["a.nii.gz"]


def test_a_file_that_cannot_be_opened_hides_no_change_of_the_others(tmp_path):
    array = np.random.default_rng(0).integers(0, 900, (12, 12, 12)).astype(np.int16)
    folder = write_dicom(tmp_path, array)
    (folder / "lock").symlink_to("lock")
    case = Case("a", folder)
    first = case.fingerprint(Contents())
    array[6, 6, 6] += 1
    write_dicom(tmp_path, array)
    assert case.fingerprint(Contents()) != first


def test_a_log_that_grows_beside_slices_is_no_change_and_slices_under_its_ending_are(tmp_path):
    folder = write_dicom(tmp_path, np.random.default_rng(0).integers(0, 900, (12, 12, 12)).astype(np.int16))
    case = Case("a", folder)
    (folder / "scan.log").write_text("begun\n")
    first = case.fingerprint(Contents())
    (folder / "scan.log").write_text("begun\nended\n")
    assert case.fingerprint(Contents()) == first
    slice_of = next(file for file in sorted(folder.iterdir()) if file.suffix != ".log")
    slice_of.rename(folder / "slice.txt")
    assert case.fingerprint(Contents()) != first


def test_a_folder_in_the_place_of_the_looks_costs_a_look_and_no_case(hashed, tmp_path):
    image(tmp_path / "in" / "a.nii.gz")
    aged(tmp_path / "in" / "a.nii.gz")
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
    prepare()
    (tmp_path / "s" / LOOKS).unlink()
    (tmp_path / "s" / LOOKS).mkdir()
    hashed.clear()
    assert not prepare().has_changed
    assert hashed == ["a.nii.gz"]
