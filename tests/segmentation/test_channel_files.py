"""Prediction of folders with a file for each channel, CASE_0000, CASE_0001, ..., as nnU-Net has them."""

import json

import nibabel
import numpy as np
import pytest
from tiny_segmenter import load, predict

from medssl.inference.files import find_inputs, read_image


@pytest.fixture
def folder(tmp_path, scan):
    """A folder of images in files called as given."""

    def make(*files, place="imagesTs", **listed):
        for seed, file in enumerate(files):
            scan(f"{place}/{file}", seed=seed)
        if listed:
            (tmp_path / "scans" / "dataset.json").write_text(json.dumps(listed))
        return tmp_path / "scans" / place

    return make


def found(path, **options):
    """The names of the inputs with their files."""
    inputs, _ = find_inputs(path, path / "results", **options)
    return {image.name: [file.name for file in (image.path, *image.more_channels)] for image in inputs}


def test_the_channels_of_a_case_are_predicted_together_under_its_name(tmp_path, save, folder):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    weights = save("two", channels=2)
    assert predict(weights=weights, input=path, output_dir=tmp_path / "o") == 0
    assert sorted(file.name for file in (tmp_path / "o").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    pair = [nibabel.load(path / f"b_000{channel}.nii.gz") for channel in range(2)]
    stacked = np.stack([image.get_fdata(dtype=np.float32) for image in pair], axis=-1)
    nibabel.save(nibabel.Nifti1Image(stacked, pair[0].affine), tmp_path / "whole.nii.gz")
    assert predict(weights=weights, input=tmp_path / "whole.nii.gz", output_dir=tmp_path / "p") == 0
    np.testing.assert_array_equal(load(tmp_path / "o" / "b.nii.gz")[0], load(tmp_path / "p" / "whole.nii.gz")[0])


def test_a_missing_channel_is_an_error_with_its_name_and_one_too_many_is_left_out(tmp_path, save, folder, capsys):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz")
    assert predict(weights=save("two", channels=2), input=path, output_dir=tmp_path / "o") == 1
    said = capsys.readouterr()
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["a.nii.gz"]
    reason = "channel 0002 is one too many: the network reads 2 channels, numbered from 0000"
    assert f"{path / 'a_0002.nii.gz'}: skipped, {reason}" in said.out
    assert f"error: {path / 'b_0000.nii.gz'}: channel 0001 is missing" in said.err
    assert f"error: {path / 'c_0001.nii.gz'}: channel 0000 is missing" in said.err


def test_channels_on_two_grids_are_an_error(tmp_path, save, folder, capsys):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz")
    image = nibabel.load(path / "a_0001.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), 2 * image.affine), path / "a_0001.nii.gz")
    assert predict(weights=save("two", channels=2), input=path, output_dir=tmp_path / "o") == 1
    assert "the channel lies on another grid" in capsys.readouterr().err


def test_files_of_one_channel_are_called_by_their_case_where_all_are_numbered_0000(folder):
    assert found(folder("a_0000.nii.gz", "b_0000.nii.gz")) == {"a": ["a_0000.nii.gz"], "b": ["b_0000.nii.gz"]}
    plain = folder("amos_0001.nii.gz", "amos_0000.nii.gz", place="amos")
    assert list(found(plain)) == ["amos_0000", "amos_0001"], "numbers of cases, not of channels"
    mixed = folder("a_0000.nii.gz", "b.nii.gz", place="mixed")
    assert list(found(mixed)) == ["a_0000", "b"]


def test_each_folder_of_a_tree_is_looked_at_by_itself(folder):
    folder("a_0000.nii.gz", "a_0001.nii.gz", place="in/first")
    path = folder("a_0000.nii.gz", "a_0001.nii.gz", place="in/second").parent
    assert list(found(path, num_channels=2)) == ["first__a", "second__a"]


def test_files_that_hold_all_channels_of_a_case_stay_whole(folder, scan):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz")
    scan("imagesTs/whole_0000.nii.gz", channels=2)
    scan("imagesTs/whole_0001.nii.gz", channels=2)
    assert found(path, num_channels=2) == {
        "whole_0000": ["whole_0000.nii.gz"],
        "whole_0001": ["whole_0001.nii.gz"],
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
    }


def test_a_network_of_one_channel_picks_it_from_the_channels_that_the_list_states(tmp_path, save, folder):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz", channel_names={"0": "CT", "1": "PET"})
    assert found(path) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}
    weights = save(channels=1)
    assert predict(weights=weights, input=path, output_dir=tmp_path / "o", data__channels=1) == 0
    assert predict(weights=weights, input=path / "a_0001.nii.gz", output_dir=tmp_path / "p") == 0
    np.testing.assert_array_equal(load(tmp_path / "o" / "a.nii.gz")[0], load(tmp_path / "p" / "a_0001.nii.gz")[0])
    assert predict(weights=weights, input=path, output_dir=tmp_path / "q") == 1


def test_the_place_of_a_chosen_channel_is_that_of_its_own_file(folder):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz")
    image = nibabel.load(path / "a_0001.nii.gz")
    moved = image.affine.copy()
    moved[:3, 3] += 5
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), moved), path / "a_0001.nii.gz")
    file = read_image(path / "a_0000.nii.gz", more_channels=(path / "a_0001.nii.gz",), channels=1)
    np.testing.assert_array_equal(file.affine, moved)
    np.testing.assert_array_equal(file.header.get_sform(), moved)


def test_a_list_beside_the_folder_that_is_none_changes_nothing(tmp_path, folder):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz")
    (tmp_path / "scans" / "dataset.json").write_text("{broken")
    assert list(found(path)) == ["a_0000", "a_0001"]


def test_a_single_file_of_one_channel_says_which_folder_to_give(tmp_path, save, folder, capsys):
    path = folder("a_0000.nii.gz", "a_0001.nii.gz")
    assert predict(weights=save("two", channels=2), input=path / "a_0000.nii.gz", output_dir=tmp_path / "o") == 1
    assert "the network reads 2; give 4-D files that hold all of a case, or the folder of" in capsys.readouterr().err
