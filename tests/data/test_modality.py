"""The modality of a channel: what is stated, by whom, and the guess from the values, in fifty drawn variants."""

import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom
from volume_files import image

from medssl.data.augment import ByModality
from medssl.data.cases import stacked
from medssl.data.measurements import measure
from medssl.data.modality import (
    by_channel,
    doubt_about,
    guess_modality,
    listed_modalities,
    named_modality,
    parsed_modalities,
)
from medssl.data.prepare import prepare_store
from medssl.data.reading import read_volume
from medssl.data.sources import Csv, Decathlon, Folder, NnUnet
from medssl.data.store import VolumeStore
from medssl.data.volume import Volume, find_body
from medssl.phantoms.torso import draw_phantom


def body_of(shape, generator):
    """A body in the middle: an ellipsoid, and a smooth field from -1 to 1."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = sum((a / generator.uniform(0.6, 0.8)) ** 2 for a in axes) < 1
    field = gaussian_filter(generator.standard_normal(shape), 2)
    return body, field / np.abs(field).max()


def mr(number):
    """An MR image with negative values, as interpolation, a bias correction or a subtraction leaves them."""
    generator = np.random.default_rng(number)
    body, field = body_of((28, 26, 24), generator)
    bright = generator.uniform(500, 4000)
    values = np.where(body, bright * (1 + 0.3 * field), 0) + np.abs(generator.normal(0, 0.01 * bright, body.shape))
    kind = ("spline", "corrected", "subtracted", "shifted")[number % 4]
    if kind == "spline":
        values = zoom(values, 1.3, order=3)
        values -= 250 * (values < -1) * (values == values.min())  # the deepest overshoot
    elif kind == "corrected":
        values = values / (1 + 0.2 * field) - generator.normal(0, 100, body.shape) * (~body)
    elif kind == "subtracted":
        values = values * 0.2 - generator.normal(0, 0.2 * bright, body.shape) * body
    else:
        values = values / bright * 600 - 300
    return values.astype(np.float32) if number % 3 else np.rint(values).astype(np.int16)


@pytest.mark.parametrize("number", range(50))
def test_an_mr_image_with_negative_voxels_is_no_ct(number):
    array = mr(number)
    assert array.min() < 0
    assert guess_modality(array)[0] in ("mr", "unknown")
    if number % 4 != 2:
        assert guess_modality(array)[:2] == ("mr", "")


@pytest.mark.parametrize("number", range(50))
def test_phantoms_are_ct_whole_cut_or_rescaled_and_named_without_their_intercept(number):
    volume, _ = draw_phantom(number, size_voxel=(40, 36, 32), spacing_mm=(8.0, 10.0, 12.0)[number % 3])
    array = volume.array[0]
    assert guess_modality(array)[:2] == ("ct", "")
    assert guess_modality(array.astype(np.float32) + 0.25)[:2] == ("ct", "")
    assert guess_modality(np.where(array < -990, -2000, array))[:2] == ("ct", "")  # the corners of a scanner
    modality, doubt, _ = guess_modality((array.clip(-1024) + 1024).astype(np.uint16))
    assert modality == "unknown"
    assert "stored without its intercept (water near 1024)" in doubt


def test_what_the_rules_cannot_place_is_unknown_and_says_why():
    generator = np.random.default_rng(0)
    assert guess_modality(generator.uniform(0, 1, 5000))[0] == "unknown"
    assert "a normalised image?" in guess_modality(generator.normal(0, 1, 5000))[1]
    modality, doubt, _ = guess_modality(generator.uniform(-2000, 2000, 5000))
    assert modality == "unknown"
    assert "neither as in CT nor as in MR" in doubt


def test_the_real_volumes_keep_their_modality_without_a_doubt_or_padding(real_data):
    files = [real_data / "ct_abdomen" / "ct_torso_3mm.nii.gz", real_data / "ct_abdomen" / "ct_slab_3mm.nii.gz"]
    files += [real_data / "ct_dicom", real_data / "mr_abdomen" / "mr_slab_3mm.nii.gz"]
    files += sorted(real_data.glob("Task04_Hippocampus/imagesTr/hippo*.nii.gz"))[::4]
    for file in files:
        volume = read_volume(file)
        measured = measure(volume)
        expected = "ct" if volume.array[0].min() < -200 else "mr"
        assert (measured.modality, measured.doubts, measured.padding) == ((expected,), (), ((),)), file
        assert measured.volume is volume


def test_words_of_lists_and_settings_become_modalities():
    words = (
        "CT",
        "MRI",
        "T1",
        "T1-weighted",
        "FLAIR",
        "t1gd",
        "FDG-PET",
        "SUV",
        "Ultrasound",
        "zscore",
        "noNorm",
        "CT-PET",
        3,
    )
    found = [named_modality(word) for word in words]
    assert found == ["ct", "mr", "mr", "mr", "mr", "mr", "pet", "pet", "us", None, None, None, None]
    assert listed_modalities(["CT", "PET"]) == ("ct", "pet")
    assert listed_modalities(["rescale_to_0_1", "x", "T2"]) == (None, None, "mr")
    assert listed_modalities(["zscore"]) is listed_modalities([]) is None
    assert parsed_modalities(None) is parsed_modalities("") is None
    assert parsed_modalities("ct+PET") == parsed_modalities(["ct", "pet"]) == ("ct", "pet")
    for wrong in ("xray", "ct+", ["ct", None], 5, True, []):
        with pytest.raises(ValueError, match=r"is no modality; allowed are ct, mr, pet, us, unknown, or one a channel"):
            parsed_modalities(wrong)


def test_stated_modalities_are_those_of_the_channels_that_were_read():
    assert by_channel("ct", 3) == ("ct",) * 3
    assert by_channel("ct+pet", 2) == by_channel(("ct", "pet"), 2) == ("ct", "pet")
    assert by_channel(("ct", "pet"), 1, chosen=1) == ("pet",)
    assert by_channel(None, 2) == (None, None)
    with pytest.raises(ValueError, match="2 modalities are stated, the image has 3 channels"):
        by_channel("ct+pet", 3)


def test_the_setting_is_believed_before_the_source_the_header_and_the_values():
    volume, _ = draw_phantom(0, size_voxel=(24, 24, 24), spacing_mm=16.0)
    tagged = Volume(volume.array, volume.affine, "", stated_modality="ct")
    for given, expected in (
        ({"setting": "us", "source": "mr"}, ("us", "setting")),
        ({"source": "mr"}, ("mr", "source")),
        ({}, ("ct", "header")),
    ):
        measured = measure(tagged, **given)
        assert (*measured.modality, measured.modality_from) == expected
    assert measure(volume).modality_from == "voxels"
    assert measure(volume, source="mr").doubts == ("stated as MR, but its values look like CT",)
    shifted = Volume(volume.array.clip(-1024) + 1024, volume.affine, "")
    assert "stated as CT, but values of" in measure(shifted, source="ct").doubts[0]


def test_each_channel_is_normalised_by_its_own_rule(tmp_path):
    generator = np.random.default_rng(0)
    body, field = body_of((20, 20, 20), generator)
    ct = np.where(body, 40 + 100 * field, -1000) + generator.normal(0, 9, body.shape)
    pet = np.where(body, 1 + field, 0) * 5 + np.abs(generator.normal(0, 0.05, body.shape))
    pair = np.stack([ct, pet], axis=-1).astype(np.float32)
    image(tmp_path / "imagesTr" / "a.nii.gz", pair)
    listed = {"modality": {"0": "CT", "1": "PET"}, "training": [{"image": "imagesTr/a.nii.gz"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    prepare_store(Decathlon(root=tmp_path), tmp_path / "s", channels="all", num_workers=0, progress=False)
    record = VolumeStore(tmp_path / "s").record(0)
    assert (record.modality, record.modality_from, record.doubts) == (("ct", "pet"), "source", ())
    limits = [ByModality(window_hu=[-160, 240]).limits(record, channel)[:2] for channel in (0, 1)]
    assert limits[0] == (-160, 240)
    assert limits[1] == pytest.approx(np.percentile(pet, [0.5, 99.5]), rel=1e-3)
    prepare_store(Decathlon(root=tmp_path), tmp_path / "t", channels=1, num_workers=0, progress=False)
    assert VolumeStore(tmp_path / "t").record(0).modality == ("pet",)


def test_every_source_takes_a_stated_modality_and_lists_state_it_too(tmp_path):
    for channel in range(2):
        image(tmp_path / "n" / "imagesTr" / f"a_000{channel}.nii.gz", shape=(10, 10, 10), seed=channel)
    (tmp_path / "n" / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT", "1": "noNorm"}, "labels": {}})
    )
    (tmp_path / "t.csv").write_text("image,modality\nn/imagesTr/a_0000.nii.gz,us\n")
    options = {"num_workers": 0, "progress": False}
    for number, (source, keys, expected) in enumerate(
        (
            (NnUnet(root=tmp_path / "n"), {"channels": "all"}, ("ct", "mr")),
            (NnUnet(root=tmp_path / "n"), {"channels": "all", "modality": ["mr", "pet"]}, ("mr", "pet")),
            (Csv(root=tmp_path / "t.csv"), {}, ("us",)),
            (Csv(root=tmp_path / "t.csv"), {"modality": "mr"}, ("mr",)),
            (Folder(root=tmp_path / "n" / "imagesTr"), {"modality": "unknown"}, ("unknown",)),
        )
    ):
        prepare_store(source, tmp_path / str(number), **keys, **options)
        assert VolumeStore(tmp_path / str(number)).record(0).modality == expected
    with pytest.raises(ValueError, match="modality was None, is now \\['mr'\\]"):
        prepare_store(Csv(root=tmp_path / "t.csv"), tmp_path / "2", modality="mr", **options)
    with pytest.raises(ValueError, match="2 modalities are stated, the image has 1 channel"):
        prepare_store(Csv(root=tmp_path / "t.csv"), tmp_path / "x", modality="ct+pet", **options)


def pet(number):
    """A PET of a torso: muscle, a liver, a brain or heart, a bladder, lesions, noise; and its body."""
    generator = np.random.default_rng(number)
    shape = tuple(int(n) for n in generator.integers(36, 48, 3))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    centre, radii = (
        generator.uniform(-0.1, 0.1, 3),
        np.array([*generator.uniform(0.5, 0.85, 2), generator.uniform(0.7, 1.4)]),
    )

    def ellipsoid(middle, size):
        return (((grid - middle[:, None, None, None]) / np.reshape(size, (-1, 1, 1, 1))) ** 2).sum(0) < 1

    body = ellipsoid(centre, radii)
    suv = np.where(body, generator.uniform(0.3, 1.0), 0.0)
    organs = [(0.3, (1.5, 3)), (0.18, (3, 9)), (0.12, (8, 40)), *[(0.08, (4, 25))] * int(generator.integers(0, 4))]
    for size, levels in organs:
        suv[ellipsoid(centre + radii * generator.uniform(-0.5, 0.5, 3), size) & body] = generator.uniform(*levels)
    suv = gaussian_filter(suv, 1.2) * (1 + generator.uniform(0.02, 0.15) * generator.standard_normal(shape))
    suv += np.abs(generator.normal(0, generator.uniform(0.002, 0.03), shape))
    return (suv * (1.0, 5000.0)[number % 2]).astype(np.float32), body


@pytest.mark.parametrize("number", range(50))
def test_the_body_of_a_pet_is_more_than_its_bladder(number):
    array, body = pet(number)
    volume = Volume(array[None], np.diag([4.0, 4.0, 4.0, 1.0]), "synthetic")
    _, mask, factor = find_body(volume, modality="pet")
    assert factor.tolist() == [1, 1, 1]
    assert 2 * (mask & body).sum() / (mask.sum() + body.sum()) > 0.85


def test_a_body_under_a_hundredth_of_the_volume_is_doubtful(tmp_path):
    array = np.random.default_rng(0).normal(0, 5, (40, 40, 40)).clip(0)
    array[18:22, 18:22, 18:22] += 3000
    image(tmp_path / "in" / "a.nii.gz", array.astype(np.int16), affine=np.diag([4.0, 4.0, 4.0, 1.0]))
    prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", num_workers=0, progress=False)
    assert VolumeStore(tmp_path / "s").record(0).doubts == ("the body is 0.1 % of the volume",)


def test_the_header_of_each_file_states_the_modality_of_its_channel():
    array = np.random.default_rng(0).normal(0, 5, (1, 8, 8, 8)).astype(np.float32)
    ct = Volume(array, np.eye(4), "ct", stated_modality="ct", left_out=(("scout.dcm", "a scout"),))
    pet = Volume(array + 90, np.eye(4), "pet", stated_modality="pet", left_out=(("other.dcm", "a plan"),))
    both = stacked(ct, [pet])
    assert both.left_out == (("scout.dcm", "a scout"), ("other.dcm", "a plan"))
    assert measure(both).modality == ("ct", "pet")


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 3)])
def test_a_ct_that_is_stated_and_not_in_hounsfield_units_is_doubtful(low, high):
    raw = np.random.default_rng(0).uniform(low, high, (1, 12, 12, 12)).astype(np.float32)
    measured = measure(Volume(raw, np.eye(4), ""), setting="ct")
    assert measured.modality == ("ct",)
    assert measured.doubts[0].startswith("stated as CT, but a range of")


@pytest.mark.parametrize("number", range(50))
def test_a_ct_that_was_cut_to_a_window_is_unknown_and_doubtful_as_ct_where_it_was_mapped_to_bytes(number):
    volume, _ = draw_phantom(number, size_voxel=(40, 36, 32), spacing_mm=(8.0, 10.0, 12.0)[number % 3])
    low, high = ((-160, 240), (-200, 300), (-500, 500))[number % 3]
    array = volume.array[0].astype(np.float32 if number % 2 else np.int16).clip(low, high)
    modality, doubt, _ = guess_modality(array)
    assert modality == "unknown"
    assert "cut off at the ends" in doubt or "fit a piece of a CT" in doubt
    mapped = np.rint(255.0 * (array - low) / (high - low)).astype(np.uint8)
    assert doubt_about("ct", guess_modality(mapped)) == "stated as CT, but no value lies below 0 HU"
    assert doubt_about("mr", guess_modality(mapped)) == ""


@pytest.mark.parametrize("number", range(50))
def test_an_mr_image_whose_mean_was_taken_off_or_whose_ends_were_cut_is_no_ct(number):
    generator = np.random.default_rng(number)
    body, field = body_of((28, 26, 24), generator)
    values = np.where(body, 400 * (1 + 0.3 * field), 0) + generator.normal(0, 8, body.shape)
    assert guess_modality(values - values.mean()).modality != "ct"
    assert guess_modality(100 * (values - values.mean()) / values.std()).modality != "ct"
    low, high = np.percentile(values.clip(min=0), [number % 3, 100 - number % 3])
    assert guess_modality(values.clip(max(low, 0), high))[:2] == ("mr", "")


@pytest.mark.parametrize("number", range(50))
def test_a_ct_without_its_intercept_is_named_whole_cut_or_interpolated(number):
    volume, _ = draw_phantom(number, size_voxel=(48, 44, 40), spacing_mm=8.0)
    water = (1024, 1000, 32768)[number % 3]
    array = volume.array[0].astype(np.float32) + water
    if number % 2:
        array = zoom(array, 0.8, order=1)
    generator = np.random.default_rng(number)
    sides = [int(generator.integers(9 * n // 10, n + 1)) for n in array.shape]
    begins = [int(generator.integers(0, n - side + 1)) for n, side in zip(array.shape, sides, strict=True)]
    cut = array[tuple(slice(begin, begin + side) for begin, side in zip(begins, sides, strict=True))]
    guess = guess_modality(cut)
    assert guess.modality == "unknown"
    assert "stored without its intercept" in guess.doubt
    assert "stored without its intercept" in doubt_about("ct", guess)


def test_an_mr_image_with_a_saturated_vessel_stays_mr():
    array = mr(3).clip(min=0)
    array.reshape(-1)[:: array.size // 20] = array.max()
    assert guess_modality(array)[:2] == ("mr", "")
