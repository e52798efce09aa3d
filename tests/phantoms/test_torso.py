import numpy as np
import pytest

from medssl.data.modality import guess_modality
from medssl.data.volume import find_body
from medssl.phantoms.torso import LABELS, draw_phantom

VOXEL_ML = 0.064
HU = {
    "lungs": (-900, -700),
    "fat": (-120, -60),
    "muscle": (30, 80),
    "liver": (20, 150),
    "spleen": (30, 150),
    "kidneys": (20, 220),
    "heart": (30, 200),
    "aorta": (30, 200),
    "spine": (150, 600),
    "ribs": (150, 600),
}
VOLUME_ML = {
    "lungs": (1500, 6000),
    "liver": (600, 2500),
    "spleen": (30, 500),
    "kidneys": (100, 500),
    "heart": (300, 1100),
    "aorta": (80, 350),
    "spine": (300, 900),
    "ribs": (300, 900),
}


@pytest.fixture(scope="module")
def subjects():
    return [draw_phantom(seed) for seed in range(4)]


def centre_mm(volume, label, name):
    return (volume.affine @ [*np.argwhere(label == LABELS[name]).mean(0), 1])[:3]


def test_the_same_seed_gives_the_same_torso_and_another_seed_another(subjects):
    (first, label), (second, _) = subjects[:2]
    again, again_label = draw_phantom(0)
    assert np.array_equal(first.array, again.array)
    assert np.array_equal(label, again_label)
    assert np.abs(first.array.astype(int) - second.array).mean() > 30


def test_organs_have_the_density_and_the_size_of_their_kind(subjects):
    for volume, label in subjects:
        assert set(np.unique(label)) == {0, *LABELS.values()}
        for name, (low, high) in HU.items():
            assert low < np.median(volume.array[0][label == LABELS[name]]) < high, name
        for name, (low, high) in VOLUME_ML.items():
            assert low < (label == LABELS[name]).sum() * VOXEL_ML < high, name
        assert volume.array[0][label == 0].mean() < -900


def test_organs_lie_where_they_belong(subjects):
    for volume, label in subjects:
        at = {name: centre_mm(volume, label, name) for name in LABELS}
        assert at["liver"][0] > at["spine"][0] + 25  # x runs to the patient's right
        assert at["spleen"][0] < at["spine"][0] - 40
        assert at["spleen"][1] < at["liver"][1]
        assert at["heart"][0] < at["spine"][0]
        assert at["heart"][1] > at["spine"][1] + 40
        assert at["lungs"][2] > at["liver"][2] > at["kidneys"][2]
        kidneys = np.argwhere(label == LABELS["kidneys"])[:, 0] * 4 - 190
        assert (kidneys > at["spine"][0] + 10).any()
        assert (kidneys < at["spine"][0] - 10).any()


def test_subjects_differ_in_size_fat_and_contrast(subjects):
    fat = [(label == LABELS["fat"]).sum() for _, label in subjects]
    blood = [np.median(volume.array[0][label == LABELS["aorta"]]) for volume, label in subjects]
    assert max(fat) > 1.2 * min(fat)
    assert max(blood) > min(blood) + 15


def test_a_phantom_is_a_ct_whose_body_box_is_smaller_than_the_field_of_view(subjects):
    for volume, label in subjects:
        assert guess_modality(volume.array[0])[:2] == ("ct", "")
        box, _, _ = find_body(volume, modality="ct")
        inside = np.argwhere(label > 0)
        assert (inside.min(0) >= box.lower - 1).all()
        assert (inside.max(0) <= box.upper + 1).all()
        assert (box.size[:2] < 96).all()
        assert box.size[1] < 90


def test_another_spacing_of_the_same_field_shows_the_same_subject():
    fine, fine_label = draw_phantom(3, size_voxel=(48, 48, 48), spacing_mm=8.0)
    coarse, coarse_label = draw_phantom(3, size_voxel=(24, 24, 24), spacing_mm=16.0)
    for name in ("lungs", "liver", "heart"):
        assert centre_mm(fine, fine_label, name) == pytest.approx(centre_mm(coarse, coarse_label, name), abs=8)


def test_sides_may_differ(subjects):
    volume, label = draw_phantom(0, size_voxel=(40, 32, 24), spacing_mm=10.0)
    assert volume.shape == label.shape == (40, 32, 24)
    assert volume.array.dtype == np.int16
