import json

import numpy as np
import pytest

from medssl.data.checksums import sealed
from medssl.data.matching import BodyCoordinateMatcher, Matched, Matcher, SelfMatcher, TableMatcher
from medssl.data.placements import ViewSpec
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.views import ViewPlan


@pytest.fixture
def store(make_store):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(-900, 900, (1, 20, 22, 24)).astype(np.int16) for _ in range(3)]
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = [-20.0, 5.0, 7.0]
    return make_store(*arrays, affine=affine)


@pytest.fixture
def tables(store):
    """Tables of pairs as `derive what=pairs` writes them: case 0 has pairs with case 1 alone."""
    folder = store.root / "derived" / "pairs-0"
    folder.mkdir(parents=True)
    (folder.parent / "pairs.json").write_text(json.dumps(sealed({"folder": folder.name})))
    query = np.array([[0.0, 16.0, 40.0], [-4.0, 15.0, 37.0], [1.0, 1.0, 1.0]])
    for case in range(3):
        partner = np.array(["case_002", "case_001"] if case == 0 else [], dtype=np.str_)
        first = np.array([0, 1, 3] if case == 0 else [0])
        rows = {"query_mm": query, "key_mm": query + 1, "score": np.array([0.5, 0.7, 0.9], np.float32)}
        np.savez(folder / f"case_{case:03d}.npz", partner=partner, first=first, **rows)
    return query


def propose(matcher, store, cases, *, seed=0):
    return matcher.propose(Scene(store, Request(cases, 0)), np.random.default_rng(seed))


def test_every_matcher_is_one():
    assert all(isinstance(m, Matcher) for m in (BodyCoordinateMatcher(), SelfMatcher(), TableMatcher()))
    assert issubclass(Matched, ViewSpec)


def test_a_table_gives_the_pairs_of_the_two_cases_and_of_no_others(store, tables):
    drawn = [propose(TableMatcher(), store, (0, 1), seed=seed) for seed in range(20)]
    scores = {round(score, 3) for _, _, score in drawn}
    assert scores == {0.7, 0.9}
    for query, key, score in drawn:
        row = 1 if score < 0.8 else 2
        np.testing.assert_array_equal(query, tables[row])
        np.testing.assert_array_equal(key, tables[row] + 1)
    assert propose(TableMatcher(), store, (0, 2))[2] == 0.5
    query, key, score = propose(TableMatcher(), store, (1, 1))
    np.testing.assert_array_equal(query, key)
    assert score == 1


def test_partners_that_a_table_does_not_know_are_named_with_what_to_do(store, tables):
    with pytest.raises(ValueError, match=r"'pairs' of case_001 knows no pairs with case_000; use sampler Pairs"):
        propose(TableMatcher(), store, (1, 0))
    with pytest.raises(ValueError, match=r"no derived data 'other'; run `python -m medssl.derive what=other"):
        propose(TableMatcher(table="other"), store, (0, 1))
    with pytest.raises(ValueError, match="derive what=embeddings weights=FILE store="):
        propose(TableMatcher(table="embeddings"), store, (0, 1))


def test_a_case_matched_with_itself_gives_a_body_point_twice(store):
    query, key, score = propose(SelfMatcher(), store, (2, 2))
    np.testing.assert_array_equal(query, key)
    assert score == 1
    record = store.record(2)
    voxel = record.mm_to_volume[:3, :3] @ query + record.mm_to_volume[:3, 3]
    assert np.any(np.all(np.abs(store.points(2)[:, :3] - voxel) < 1e-6, axis=1))
    with pytest.raises(ValueError, match="use sampler Pairs with partner=self"):
        propose(SelfMatcher(), store, (0, 2))


class Pointing:
    """Proposes a voxel of case 0 and the same one of case 1, whose affine is the same."""

    def __init__(self, record, voxel):
        self.point_mm = record.volume_to_mm[:3, :3] @ np.array(voxel, float) + record.volume_to_mm[:3, 3]

    def propose(self, scene, rng):
        return self.point_mm, self.point_mm, 1.0


def test_a_point_a_little_outside_is_moved_into_the_volume_and_one_far_away_is_refused(store):
    record = store.record(0)
    scene, rng = Scene(store, Request((0, 1), 0)), np.random.default_rng(0)
    for voxel, expected in (((-3, 5, 5), (0, 5, 5)), ((24, 23, 8), (19, 21, 8)), ((4, 5, 6), (4, 5, 6))):
        placed = Matched(size=[11, 11, 11], matcher=Pointing(record, voxel)).place(scene, {}, rng)
        assert [placement.frame.center.tolist() for placement in placed] == [list(expected)] * 2
    for voxel in ((-6, 5, 5), (5, 28, 5), (float("nan"), 5, 5)):
        far = Matched(size=[11, 11, 11], matcher=Pointing(record, voxel))
        with pytest.raises(
            ValueError, match=r"Pointing proposes \[.*\] for case_000, which covers x .* RAS millimetres"
        ):
            far.place(scene, {}, rng)
    with pytest.raises(
        ValueError, match=r"\[-32.0, 10.0, 22.0\] for case_000, which covers x -21 to 19, y 4 to 26, z 6"
    ):
        Matched(size=[11, 11, 11], matcher=Pointing(record, (-6, 5, 5))).place(scene, {}, rng)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_fail": "skip"}, "on_fail must be best or last, got 'skip'"),
        ({"score_threshold": "median"}, "score_threshold must be a number, or auto; got 'median'"),
        ({"tries": 0}, "tries must be a whole number of at least 1, got 0"),
        (
            {"score_threshold": "auto"},
            "score_threshold=auto is for OnlineMatcher, BodyCoordinateMatcher knows no scores",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Matched(size=[4, 4, 4], **settings)


class Scoring:
    """Proposes points with the scores 0.1, 0.2, ... and says that 0.25 is the median."""

    def __init__(self):
        self.asked = 0

    def propose(self, scene, rng):
        self.asked += 1
        point_mm = scene.record(0).volume_to_mm[:3] @ np.array([self.asked, 8, 8, 1.0])
        return point_mm, point_mm, self.asked / 10

    def auto_threshold(self, scene):
        return 0.25


@pytest.mark.parametrize(("threshold", "asked"), [("auto", 3), (0.45, 5), (0, 1), (2.0, 7)])
def test_proposals_are_asked_for_until_one_exceeds_the_threshold(store, threshold, asked):
    matcher = Scoring()
    spec = Matched(size=[5, 5, 5], matcher=matcher, score_threshold=threshold, tries=7)
    query, _ = spec.place(Scene(store, Request((0, 1), 0)), {}, np.random.default_rng(0))
    assert matcher.asked == asked
    assert query.frame.center.tolist() == [asked, 8, 8]


@pytest.mark.parity
def test_the_voxel_of_the_point_lies_at_half_the_side_of_a_native_crop(make_store, draw):
    """The crop of a 6 x 7 x 8 ramp at (0, 6, 4), side 4: 52 at (2, 2, 2), and 24 voxels that are not padding."""
    ramp = np.arange(6 * 7 * 8, dtype=np.int16).reshape(1, 6, 7, 8)
    store = make_store(ramp, ramp + 1)
    matcher = Pointing(store.record(0), (0, 6, 4))
    plan = ViewPlan(groups={"pair": Matched(size=[4, 4, 4], matcher=matcher, outside=0.0)})
    image = draw(store, plan, [Request((0, 1), 0)])["pair"].image[0, :, 0].numpy()
    assert image[0, 2, 2, 2] == 52
    assert np.count_nonzero(image[0]) == 24
    np.testing.assert_array_equal(image[1][image[1] > 0] - 1, image[0][image[0] > 0])
    odd = ViewPlan(groups={"pair": Matched(size=[5, 3, 3], matcher=matcher, outside=0.0)})
    assert draw(store, odd, [Request((0, 1), 0)])["pair"].image[0, 0, 0, 2, 1, 1] == 52
