import pytest

from medssl.inference.reading import with_defaults
from medssl.segmentation.reading_differences import other_reading

OURS = "medssl.data.augment.ByModality"


def card_of(*steps):
    """A card of pre-training on one group of views."""
    group = {"spacing_mm": "native", "augment": [{"_target_": "medssl.data.augment.Flip"}, *steps]}
    return {"reading": {"views": {"groups": {"crop": group}}, "normalisations": [step["_target_"] for step in steps]}}


def reading_by(*steps, modality=None):
    return {"spacing_mm": "native", "outside": "minimum", "normalise": list(steps), "modality": modality}


WHOLE = {"_target_": OURS, "window_hu": [-1000, 1000], "percentiles": [0.5, 99.5], "out": [0, 1]}


@pytest.mark.parametrize("modality", [None, "ct", "mr"])
@pytest.mark.parametrize("stated", [{}, {"window_hu": [-1000, 1000]}, {"out": (0.0, 1.0)}, {"share": "view"}])
def test_a_default_that_is_left_out_makes_no_difference(stated, modality):
    short = {"_target_": OURS, **stated}
    assert other_reading(card_of(short), reading_by(WHOLE, modality=modality)) == []
    assert other_reading(card_of(WHOLE), reading_by(short, modality=modality)) == []


def test_a_default_that_differs_is_shown_where_it_is_left_out():
    (line,) = other_reading(card_of({"_target_": OURS}), reading_by({"_target_": OURS, "percentiles": [1, 99]}))
    assert line == (
        "normalise: ByModality percentiles=[0.5, 99.5] in pre-training, ByModality percentiles=[1, 99] here"
    )
    (line,) = other_reading(card_of({"_target_": "medssl.data.augment.ZScore"}), reading_by({"_target_": OURS}))
    assert line == "normalise: ZScore in pre-training, ByModality here"
    (line,) = other_reading(card_of({"_target_": OURS}), reading_by())
    assert line == "normalise: ByModality in pre-training, [] here"


def test_a_normalisation_of_one_s_own_is_compared_as_it_is_stated():
    """Its class is not imported for that."""
    own = {"_target_": "nowhere.Scaled", "by": 2}
    assert with_defaults(own) == own
    assert other_reading(card_of(own), reading_by(own)) == []
    (line,) = other_reading(card_of(own), reading_by({**own, "by": 3}))
    assert line == "normalise: Scaled by=2 in pre-training, Scaled by=3 here"
