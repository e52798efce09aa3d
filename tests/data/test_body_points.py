"""Which voxels are accepted as centres of crops."""

import numpy as np
import pytest

from medssl.data.body_points import away_from_faces, draw_body_point, draw_body_points, first_above, voxels_at
from medssl.data.matching import BodyCoordinateMatcher, SelfMatcher
from medssl.data.sampling import Request
from medssl.data.scene import Scene

LOW_HU = -125.0


@pytest.fixture
def store(make_store):
    """A case with tissue in its lower half, one of air alone, and tissue that leaves no margin."""
    half = np.full((1, 48, 44, 40), -800, np.int16)
    half[:, :, :, :20] = 40
    air = np.full((1, 48, 44, 40), -800, np.int16)
    return make_store(half, air, half[:, ::-1].copy())


def test_random_numbers_become_the_points_of_the_released_code():
    """Seed 0 of numpy, a volume of ones: one triple a try, below ten voxels from the upper faces alone."""
    shape, state = (30, 40, 50), np.random.RandomState(0)
    points = []
    for _ in range(3):
        tries = []
        while not tries or not away_from_faces(tries[-1], shape, lower=0, upper=10).all():
            tries.append(voxels_at(state.rand(1, 3), shape))
        asked = first_above(tries[-1], lambda some: np.ones(len(some)), low=0.0, count=1)
        points.append(tuple(asked[0].tolist()))
    assert points == [(16, 28, 30), (16, 16, 32), (3, 25, 7)]


def test_values_are_asked_for_as_far_as_needed_and_nothing_accepted_takes_the_first():
    voxels, asked = np.arange(30).reshape(10, 3), []

    def values(some):
        asked.append(len(some))
        return some[:, 0].astype(float)

    assert first_above(voxels, values, low=10, count=2)[:, 0].tolist() == [12, 15]
    assert asked == [2, 2, 2]
    assert first_above(voxels, values, low=100, count=2)[:, 0].tolist() == [0, 3]
    assert first_above(voxels, values, low=10, count=2, most_tries=4)[:, 0].tolist() == [0, 3]


@pytest.mark.parametrize("matcher", [BodyCoordinateMatcher, SelfMatcher])
def test_a_matcher_keeps_to_tissue_and_away_from_the_faces_where_it_is_told_to(store, matcher):
    found = {}
    for name, options in (("plain", {}), ("strict", {"low_hu": LOW_HU, "margin_voxel": 10})):
        points = []
        for seed in range(40):
            scene = Scene(store, Request((0, 0), 0))
            points.append(matcher(**options).propose(scene, np.random.default_rng(seed))[0])
        found[name] = np.array(points)
    assert (found["plain"][:, 2] >= 20).any()
    assert found["plain"].min() < 10
    assert found["strict"][:, 2].max() < 20, "tissue alone"
    assert found["strict"].min() >= 10
    assert (found["strict"] < np.array([38, 34, 30])).all()
    assert len(np.unique(found["strict"], axis=0)) > 10


def test_without_bounds_the_points_are_those_of_one_random_number(store):
    points = store.points(0)
    body = points[points[:, 3] == -1, :3]
    for seed in range(5):
        drawn = draw_body_point(store, 0, rng=np.random.default_rng(seed), low_hu=None, margin_voxel=0)
        assert drawn.tolist() == body[np.random.default_rng(seed).integers(len(body))].tolist()


def test_a_body_of_air_gives_any_of_its_points_and_a_scan_without_hounsfield_units_all(store, make_store, tmp_path):
    options = {"low_hu": LOW_HU, "margin_voxel": 10}
    point = draw_body_point(store, 1, rng=np.random.default_rng(0), **options)
    assert (point >= 10).all()
    assert len(draw_body_points(store, 1, 30, rng=np.random.default_rng(0), **options)) == 30
    other = make_store(np.full((1, 48, 44, 40), -800, np.int16), modality="mr")
    drawn = draw_body_points(other, 0, 8, rng=np.random.default_rng(0), **options)
    body = other.points(0)[:, :3]
    first = np.random.default_rng(0).permutation(body.astype(np.int64))
    inner = first[np.all((first >= 10) & (first < np.array([38, 34, 30])), axis=1)]
    assert drawn.tolist() == inner[:8].tolist()


@pytest.mark.parametrize("matcher", [BodyCoordinateMatcher, SelfMatcher])
def test_a_negative_margin_is_refused(matcher):
    with pytest.raises(ValueError, match="margin_voxel must be at least 0, got -1"):
        matcher(margin_voxel=-1)
