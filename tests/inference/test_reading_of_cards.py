"""Which augmentations of a pre-training belong to how images are read."""

import pytest

from medssl.inference.reading import normalising

STEPS = [
    {"_target_": "medssl.data.augment.Window", "low_hu": -1, "high_hu": 1},
    {"_target_": "medssl.data.augment.Flip"},
    {"_target_": "somebody.Fog"},
]


def test_a_card_that_names_its_normalisations_is_read_without_the_other_classes():
    known = {"normalisations": ["medssl.data.augment.Window"]}
    assert normalising(STEPS, known) == STEPS[:1]
    assert normalising(STEPS, {"normalisations": ["somebody.Fog"]}) == STEPS[2:]


def test_without_their_names_classes_are_looked_at_and_must_be_trusted():
    assert normalising(STEPS[:2], {}) == STEPS[:1]
    with pytest.raises(ValueError, match=r"allow_modules=\['somebody'\]"):
        normalising(STEPS, {})
