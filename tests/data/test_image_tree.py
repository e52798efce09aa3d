"""Every file of an image kind below the root is a case, or a line says why it is none."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_slices import dataset, saved, series
from volume_files import image, label, names, reasons

from medssl.data.cases import Case
from medssl.data.fingerprints import Contents
from medssl.data.prepare import prepare_store
from medssl.data.sources import Csv, Decathlon, Folder, NnUnet


def noise(shape=(9, 10, 11), seed=0):
    return np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)


def skipped(scan):
    return {(Path(row["file"]).name, row["reason"]) for row in scan.skipped}


def test_images_of_every_kind_are_found(tmp_path):
    image(tmp_path / "good.nii.gz", noise())
    nibabel.save(nibabel.Nifti1Pair(noise(), np.eye(4)), tmp_path / "pair.hdr")
    nibabel.save(nibabel.MGHImage(noise(), np.eye(4)), tmp_path / "fs.mgz")
    for folder, name in (("bare", "IM{}.ima"), ("zipped", "IM{}.dcm.gz"), ("unnamed", "{}")):
        series(tmp_path / folder, noise(), name=name)
    scan = Folder(root=tmp_path).scan()
    assert sorted(names(scan)) == ["bare", "fs", "good", "pair", "unnamed", "zipped"]
    assert (scan.skipped, scan.problems) == ([], [])
    root = tmp_path / "store"
    summary = prepare_store(Folder(root=tmp_path), root, num_workers=0, progress=False)
    assert summary.num_cases == 6


def test_what_is_not_read_is_named_or_counted(tmp_path):
    image(tmp_path / "a" / "good.nii.gz")
    for name in (".hidden.nii.gz", "._good.nii.gz", ".DS_Store", "x.mnc", "y.tif", "y.png", "dicom.zip", "lone.img"):
        (tmp_path / "a" / name).write_bytes(b"1")
    (tmp_path / "a" / "b.zarr").mkdir()
    (tmp_path / "a" / ".cache").mkdir()
    scan = Folder(root=tmp_path).scan()
    assert names(scan) == ["a__good"]
    assert skipped(scan) == {
        ("a", "3 hidden images or folders are left out (._good.nii.gz, .cache, .hidden.nii.gz)"),
        ("a", "1 folders .zarr are not read (b.zarr)"),
        ("a", "2 pictures are not read: no format of volumes (y.png, y.tif)"),
        ("a", "1 archives are not opened; unpack them (dicom.zip)"),
        ("a", "1 images of a format that is not read (x.mnc)"),
    }
    assert reasons(scan) == {("lone.img", "its .hdr is missing (lone.hdr)")}


@pytest.mark.parametrize("name", ["a.nii.gz", "a.dcm", "a.img", "a"])
def test_a_pipe_is_noted_and_never_opened(name, tmp_path):
    image(tmp_path / "good.nii.gz")
    os.mkfifo(tmp_path / name)
    scan = Folder(root=tmp_path).scan()
    rows = scan.problems if name != "a" else scan.skipped
    assert [(Path(r["file"]).name, r["reason"]) for r in rows] == [
        (name, "a pipe, not a file; only files and folders are opened")
    ]
    assert names(scan) == ["good"]
    assert Case("a", tmp_path / name).fingerprint(Contents())


def test_a_table_that_lists_a_pipe_does_not_hang(tmp_path):
    image(tmp_path / "good.nii.gz", noise())
    os.mkfifo(tmp_path / "a.nii.gz")
    (tmp_path / "list.csv").write_text("image,label\ngood.nii.gz,\na.nii.gz,\ngood.nii.gz,a.nii.gz\n")
    options = {"num_workers": 0, "progress": False, "max_rejected_fraction": 1}
    summary = prepare_store(Csv(root=tmp_path / "list.csv"), tmp_path / "store", **options)
    assert summary.num_cases == 1
    assert {row["reason"] for row in summary.rejected} >= {"a pipe, not a file; only files and folders are opened"}


def test_files_that_are_named_like_slices_and_are_none_are_rejected_when_they_are_read(tmp_path):
    image(tmp_path / "good.nii.gz", noise())
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "IM1.dcm").write_bytes(b"")
    (tmp_path / "s" / "IM2.dcm").write_text("no slice" * 99)
    options = {"num_workers": 0, "progress": False, "max_rejected_fraction": 1}
    summary = prepare_store(Folder(root=tmp_path), tmp_path / "store", **options)
    assert [row["reason"] for row in summary.rejected] == ["IM1.dcm: the file is empty (0 bytes)"]
    saved(dataset(noise()[..., 0], kind="1.2.840.10008.5.1.4.1.1.88.22"), tmp_path / "r" / "report.dcm")
    assert ("r", "DICOM objects, none of them an image (structures, plans, reports, ...)") in skipped(
        Folder(root=tmp_path).scan()
    )


def test_images_that_a_list_or_layout_does_not_name_are_noted(tmp_path):
    for name in ("imagesTr/a_0000", "imagesTr/extra/b_0000", "old/c"):
        image(tmp_path / f"{name}.nii.gz")
    label(tmp_path / "labelsTr" / "a.nii.gz")
    why = "no case: the list or the layout of the source does not name it"
    scan = NnUnet(root=tmp_path).scan()
    assert names(scan) == ["a"]
    assert skipped(scan) == {("b_0000.nii.gz", why), ("c.nii.gz", why)}
    (tmp_path / "dataset.json").write_text('{"training": ["./imagesTr/a_0000.nii.gz"]}')
    scan = Decathlon(root=tmp_path).scan()
    assert skipped(scan) == {("a.nii.gz", why), ("b_0000.nii.gz", why), ("c.nii.gz", why)}


def test_a_prepared_store_below_the_root_is_passed_over(tmp_path):
    image(tmp_path / "good.nii.gz", noise())
    prepare_store(Folder(root=tmp_path), tmp_path / "store", num_workers=0, progress=False)
    image(tmp_path / "store" / "report.nii.gz", noise())
    scan = Folder(root=tmp_path).scan()
    assert names(scan) == ["good"]
    assert scan.skipped == scan.problems == []


def test_images_that_are_compressed_otherwise_or_renamed_by_a_browser_are_counted(tmp_path):
    image(tmp_path / "good.nii.gz", noise())
    odd = ("x.mgh.gz", "x.nii.lz4", "x.nrrd.bz2", "x.dcm.zst", "x.minc", "cp.nii (1).gz", "y.nii.gz.part", "z.nii~")
    for name in odd:
        (tmp_path / name).write_bytes(b"1")
    scan = Folder(root=tmp_path).scan()
    ((name, reason),) = skipped(scan)
    assert reason.startswith(f"{len(odd)} images of a format that is not read (")
    assert names(scan) == ["good"]


@pytest.mark.parametrize("ending", ["img", "raw"])
def test_slices_may_end_as_other_files_do(ending, tmp_path):
    series(tmp_path / "s", noise(), name=f"IM{{:03d}}.{ending}")
    scan = Folder(root=tmp_path).scan()
    assert names(scan) == ["s"]
    assert scan.problems == []
