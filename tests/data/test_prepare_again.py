from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import volume_files
from volume_files import tree

import medssl.data.prepare as preparing
from medssl.data.prepare import PrepareError, prepare_store
from medssl.data.recipes import check_recipe
from medssl.data.sources import Csv, Folder
from medssl.data.store import VolumeStore
from medssl.phantoms.source import Phantoms

SMALL = {"size_voxel": 24, "spacing_mm": 16.0}
image = partial(volume_files.image, shape=(12, 12, 12))


def test_another_recipe_or_other_files_in_the_folder_are_refused(tmp_path):
    prepare_store(Phantoms(num_cases=1, **SMALL), tmp_path / "s", num_workers=0, progress=False)
    with pytest.raises(ValueError, match=r"another recipe \(source.num_cases was 1, is now 2\)"):
        prepare_store(Phantoms(num_cases=2, **SMALL), tmp_path / "s", num_workers=0)
    with pytest.raises(ValueError, match=r"spacing_mm was None, is now \[8.0, 8.0, 8.0\]"):
        prepare_store(Phantoms(num_cases=1, **SMALL), tmp_path / "s", spacing_mm=8, num_workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex, ...\) and no store.json"):
        prepare_store(Phantoms(num_cases=1, **SMALL), tmp_path / "other", num_workers=0)
    with pytest.raises(ValueError, match="is a file; a store is a folder"):
        check_recipe(tmp_path / "other" / "thesis.tex", {})
    with pytest.raises(ValueError, match="one or three positive numbers"):
        prepare_store(Phantoms(num_cases=1, **SMALL), tmp_path / "t", spacing_mm=[1, 2], num_workers=0)


def test_another_recipe_replaces_one_under_which_no_case_was_finished(tmp_path):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", shape=(10, 10, 10, 2), seed=number)
    source = Folder(root=tmp_path / "in")
    with pytest.raises(PrepareError, match=r"choose with data\.channels=all"):
        prepare_store(source, tmp_path / "s", num_workers=0, progress=False)
    summary = prepare_store(source, tmp_path / "s", channels="all", num_workers=0, progress=False)
    assert (summary.num_cases, summary.num_rejected) == (3, 0)
    prepare_store(source, tmp_path / "fresh", channels="all", num_workers=0, progress=False)
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")
    with pytest.raises(ValueError, match="channels was 'all', is now None"):
        prepare_store(source, tmp_path / "s", num_workers=0)


def test_a_case_is_made_anew_when_image_label_or_modality_is_another_one(tmp_path):
    image(tmp_path / "a.nii.gz", seed=1)
    image(tmp_path / "b.nii.gz", seed=2)
    mask = np.zeros((12, 12, 12), np.uint8)
    for value in (1, 2):
        mask[4:8, 4:8, 4:8] = value
        image(tmp_path / f"l{value}.nii.gz", mask)

    def prepared(row, store="s"):
        (tmp_path / "t.csv").write_text(f"case,image,label,modality\nx,a.nii.gz,{row}\ny,b.nii.gz,,\n")
        summary = prepare_store(Csv(root=tmp_path / "t.csv"), tmp_path / store, num_workers=0, progress=False)
        record = VolumeStore(tmp_path / store).record(0)
        return summary.num_new, record.labels, *record.modality

    assert prepared("l1.nii.gz,") == (2, (1,), "mr")
    assert prepared("l1.nii.gz,") == (0, (1,), "mr")
    assert prepared("l2.nii.gz,") == (1, (2,), "mr")
    assert prepared("l2.nii.gz,pet") == (1, (2,), "pet")
    mask[4:8, 4:8, 4:8] = 5
    image(tmp_path / "l2.nii.gz", mask)
    image(tmp_path / "a.nii.gz", seed=3)
    assert prepared("l2.nii.gz,pet") == (1, (5,), "pet")
    prepared("l2.nii.gz,pet", "fresh")
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")


def test_a_corrected_header_beside_the_file_that_a_table_names_is_noticed(tmp_path):
    array = np.random.default_rng(0).normal(100, 20, (12, 12, 12)).astype(np.float32)
    for spacing in (1.0, 3.0):
        pair = nibabel.Nifti1Pair(array, np.diag([spacing, spacing, spacing, 1.0]))
        nibabel.save(pair, tmp_path / "a.img")
        (tmp_path / "t.csv").write_text("image\na.img\n")
        prepare_store(Csv(root=tmp_path / "t.csv"), tmp_path / "s", num_workers=0, progress=False)
        assert VolumeStore(tmp_path / "s").record(0).spacing_mm == (spacing,) * 3


def test_cases_that_the_source_has_no_more_are_deleted_or_only_taken_off_the_index(tmp_path):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    source, options = Folder(root=tmp_path / "in"), {"num_workers": 0, "progress": False}
    prepare_store(source, tmp_path / "s", **options)
    (tmp_path / "in" / "0.nii.gz").rename(tmp_path / "in" / "renamed.nii.gz")
    kept = prepare_store(source, tmp_path / "s", prune=False, **options)
    assert (kept.num_cases, kept.num_new, kept.num_removed, kept.has_changed) == (3, 1, 1, True)
    assert "1 removed (the source has them no more)" in str(kept)
    assert list((tmp_path / "s").glob("0-*.zarr"))
    again = prepare_store(source, tmp_path / "s", **options)
    assert not again.has_changed
    prepare_store(source, tmp_path / "fresh", **options)
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")


def test_what_was_rejected_or_skipped_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch, capfd):
    image(tmp_path / "in" / "good.nii.gz")
    image(tmp_path / "in" / "flat.nii.gz", np.zeros((12, 12, 12), np.int16))
    mask = np.zeros((12, 12, 12), np.uint8)
    mask[4:8, 4:8, 4:8] = 1
    image(tmp_path / "in" / "mask.nii.gz", mask)
    read = []
    prepare = preparing.prepare_case
    monkeypatch.setattr(preparing, "prepare_case", lambda job: read.append(job.case.case) or prepare(job))

    def again():
        read.clear()
        source = Folder(root=tmp_path / "in")
        summary = prepare_store(source, tmp_path / "s", num_workers=0, max_rejected_fraction=0.5)
        return sorted(read), summary.num_rejected, summary.num_skipped, "flat" in capfd.readouterr().err

    assert again() == (["flat", "good", "mask"], 1, 1, True)
    before = tree(tmp_path / "s")
    assert again() == ([], 1, 1, False)
    assert tree(tmp_path / "s") == before
    image(tmp_path / "in" / "flat.nii.gz", np.ones((12, 12, 12), np.int16))
    assert again() == (["flat"], 1, 1, True)
    (tmp_path / "s" / "rejected.jsonl").unlink()
    assert again() == (["flat"], 1, 1, True)


def test_a_finished_store_that_may_not_be_written_is_still_checked(tmp_path, monkeypatch):
    image(tmp_path / "in" / "a.nii.gz")
    prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0, progress=False)

    def refuse(*arguments, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert not prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0).has_changed


def test_a_table_may_give_a_finished_case_another_group_or_image(tmp_path):
    image(tmp_path / "a.nii.gz", seed=1)
    image(tmp_path / "b.nii.gz", seed=2)
    table = tmp_path / "t.csv"

    def prepared(text):
        table.write_text(text)
        summary = prepare_store(Csv(root=table), tmp_path / "s", num_workers=0, progress=False)
        return summary.num_new, VolumeStore(tmp_path / "s").record(0)

    assert prepared("case,image,group\nx,a.nii.gz,one\n")[1].group == "one"
    new, record = prepared("case,image,group,split\nx,a.nii.gz,two,val\n")
    assert (new, record.group, record.split) == (0, "two", "validation")
    new, changed = prepared("case,image,group\nx,b.nii.gz,two\n")
    assert new == 1
    assert changed.voxel_hash != record.voxel_hash


def test_names_of_labels_join_a_store_that_was_finished_without_them(tmp_path):
    source, root = Phantoms(num_cases=1, **SMALL), tmp_path / "s"
    prepare_store(source, root, num_workers=0, progress=False)
    assert VolumeStore(root).label_names == source.label_names()
    whole = tree(root)
    (root / "labels.json").unlink()  # as an earlier version left it
    store = VolumeStore(root)
    assert (store.label_names, store.has_label(0)) == ({}, True)
    assert not prepare_store(source, root, num_workers=0, progress=False).has_changed
    assert tree(root) == whole


def test_a_whole_index_is_left_alone_and_a_damaged_line_behind_it_is_removed(tmp_path, monkeypatch):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", seed=number)
    prepare = partial(prepare_store, Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0, progress=False)
    prepare()
    index = tmp_path / "s" / "index.jsonl"
    whole = index.read_bytes()
    for damage in (b'{"case": "0"', b"\n", whole.splitlines()[0][:-9]):
        index.write_bytes(whole + damage)
        assert prepare().num_new == 0
        assert index.read_bytes() == whole
    monkeypatch.setattr(preparing, "write_index", None)
    assert prepare().num_new == 0
