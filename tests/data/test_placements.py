import numpy as np
import pytest

from medssl.data.augment import Flip
from medssl.data.matching import BodyCoordinateMatcher, Matched
from medssl.data.placements import Containing, Fixed, GridCrop, Nearby, RandomCrop, Same
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.views import ViewPlan


def _placed(store, spec, request=None, *, sample=0, **groups):
    plan = ViewPlan(groups={**groups, "x": spec})
    placed = plan.place(Scene(store, request or Request((0,), sample)), seed=0, step=0)
    return [view.placement for view in placed["x"]]


def _frames(store, spec, *, samples=60, request=None):
    return [p.frame for n in range(samples) for p in _placed(store, spec, request, sample=n)]


def _faces(frame):
    return frame.to_volume(np.full(3, -0.5)), frame.to_volume(np.array(frame.shape) - 0.5)


def test_random_crops_stay_in_their_region_and_reach_its_ends(noise_store):
    for within, low, high in (("volume", -0.5, [39.5, 35.5, 31.5]), ("body", 1.5, [37.5, 33.5, 29.5])):
        faces = [_faces(frame) for frame in _frames(noise_store, RandomCrop(size=[10] * 3, within=within), samples=400)]
        lowest, highest = np.min([f[0] for f in faces], 0), np.max([f[1] for f in faces], 0)
        np.testing.assert_allclose(lowest, low)
        np.testing.assert_allclose(highest, high)


def test_fractions_are_shares_of_the_body_box_along_each_axis(noise_store):
    frames = _frames(noise_store, RandomCrop(size=[16] * 3, fraction=[0.5, 1.0], within="body"), samples=300)
    sides = np.array([frame.matrix.diagonal()[:3] * 16 for frame in frames])
    share = sides / [36, 32, 28]
    assert share.min() > 0.5
    assert share.max() < 1.0
    np.testing.assert_allclose(share.mean(0), 0.75, atol=0.03)
    assert abs(np.corrcoef(share[:, 0], share[:, 1])[0, 1]) < 0.2
    for frame in frames:
        low, high = _faces(frame)
        assert np.all(low >= 1.5 - 1e-9)
        assert np.all(high <= np.array([37.5, 33.5, 29.5]) + 1e-9)


def test_a_crop_larger_than_the_volume_is_centred_on_it(noise_store):
    (frame,) = _frames(noise_store, RandomCrop(size=[60, 10, 64], within="volume"), samples=1)
    np.testing.assert_allclose(frame.center[[0, 2]], [19.5, 15.5])
    assert frame.is_aligned


def test_a_spacing_sets_the_step_in_millimetres(make_store):
    array = np.random.default_rng(0).integers(0, 99, (1, 40, 40, 20)).astype(np.int16)
    store = make_store(array, affine=np.diag([1.0, 2.0, 4.0, 1.0]))
    (frame,) = _frames(store, RandomCrop(size=[8] * 3, spacing_mm=2.0), samples=1)
    np.testing.assert_allclose(frame.matrix.diagonal()[:3], [2, 1, 0.5])


def test_a_spacing_that_is_the_files_but_for_rounding_cuts_whole_voxels(make_store):
    array = np.random.default_rng(0).integers(0, 99, (1, 40, 40, 20)).astype(np.int16)
    store = make_store(array, affine=np.diag([0.78125, 0.78125, 3.0, 1.0]))
    (frame,) = _frames(store, RandomCrop(size=[8] * 3, spacing_mm=[0.7812, 0.78126, 3.0002]), samples=1)
    assert frame.is_aligned
    (frame,) = _frames(store, RandomCrop(size=[8] * 3, spacing_mm=[0.78, 0.78125, 3.0]), samples=1)
    assert frame.matrix[0, 0] == pytest.approx(0.9984)
    assert np.all(frame.matrix.diagonal()[1:3] == 1)


def test_label_shares_can_be_kept_to_some_labels(noise_store):
    points = noise_store.points(0)
    found = [
        frame.center
        for frame in _frames(noise_store, RandomCrop(size=[1] * 3, label_share=1, labels=[2, 9]), samples=50)
    ]
    for center in found:
        assert 2 in points[np.all(points[:, :3] == center, axis=1), 3]
    bare = _frames(noise_store, RandomCrop(size=[1] * 3, label_share=1, labels=[9]), samples=20)  # the body stands in
    assert all(-1 in points[np.all(points[:, :3] == frame.center, axis=1), 3] for frame in bare)
    for labels in ([], [0, 1]):
        with pytest.raises(ValueError, match=r"labels must be label values from 1 on, or null, got"):
            RandomCrop(size=[4] * 3, labels=labels)


def test_label_shares_centre_crops_on_every_label_equally(noise_store):
    points = noise_store.points(0)
    spec = RandomCrop(size=[1] * 3, label_share=0.6, foreground_share=0.5)
    found = {-1: 0, 1: 0, 2: 0, 3: 0, None: 0}
    for frame in _frames(noise_store, spec, samples=600):
        hits = points[np.all(points[:, :3] == frame.center, axis=1), 3]
        found[max(hits) if len(hits) else None] += 1
    for value in (1, 2, 3):
        assert found[value] / 600 == pytest.approx(0.2, abs=0.07)


def test_containing_crops_hold_one_point_at_their_own_scales(noise_store):
    spec = Containing(size=[12] * 3, count=2, scale=[0.8, 1.2], spacing_mm=1.5)
    together = 0
    for n in range(100):
        first, second = (p.frame for p in _placed(noise_store, spec, sample=n))
        assert first.matrix[0, 0] != second.matrix[0, 0]
        (low_a, high_a), (low_b, high_b) = _faces(first), _faces(second)
        together += np.all(np.maximum(low_a, low_b) <= np.minimum(high_a, high_b))
    assert together == 100
    apart = Containing(size=[8] * 3, count=2, independent=1.0)
    overlaps = [a.overlap(b) for a, b in (tuple(_frames(noise_store, apart, samples=1)) for _ in range(1))]
    assert len(overlaps) == 1
    free = [_placed(noise_store, apart, sample=n) for n in range(60)]
    assert any(a.frame.overlap(b.frame) == 0 for a, b in free)


def test_nearby_shifts_by_shares_and_stays_inside(noise_store):
    spec = Nearby(of="first", size=[10] * 3, shift=0.1, within="body")
    moved = []
    for n in range(200):
        plan = ViewPlan(groups={"first": Fixed(size=[10] * 3, within="body"), "x": spec})
        placed = plan.place(Scene(noise_store, Request((0,), n)), seed=0, step=0)
        moved.append(placed["x"][0].placement.frame.center - placed["first"][0].placement.frame.center)
    assert np.abs(moved).max(0) == pytest.approx(0.1 * np.array([36, 32, 28]), abs=0.7)
    request = Request((0,), 0, anchor_body=(0.0, 0.5, 1.0))
    (anchored,) = _placed(noise_store, Nearby(size=[10] * 3, within="body"), request)
    np.testing.assert_allclose(anchored.frame.center, [6.5, 17.5, 24.5], atol=0.51)


def test_grid_crops_sit_at_their_location_and_neighbours_are_the_nearest(noise_store):
    request = Request((0,), 0, location=13)  # the middle of 3 x 3 x 3
    (own,) = _placed(noise_store, GridCrop(size=[8] * 3, grid=[3, 3, 3]), request)
    np.testing.assert_allclose(own.frame.center, [19.5, 17.5, 15.5], atol=0.51)
    assert own.location_index == 13
    around = _placed(noise_store, GridCrop(size=[8] * 3, grid=[3, 3, 3], neighbours=True, count=6), request)
    assert {p.location_index for p in around} == {4, 10, 12, 14, 16, 22}
    corner = _placed(noise_store, GridCrop(size=[8] * 3, grid=[3, 3, 3]), Request((0,), 0, location=1))[0]
    np.testing.assert_allclose(corner.frame.center[:2], [1.5 + 36 / 6, 1.5 + 32 / 6], atol=0.51)
    np.testing.assert_allclose(corner.frame.center[2], 15.5, atol=0.51)


def test_coordinates_of_a_grid_run_from_face_to_face_of_the_region(noise_store):
    found = {}
    for location in range(6):
        spec = GridCrop(size=[8] * 3, grid=[3, 1, 2])
        (placement,) = _placed(noise_store, spec, Request((0,), 0, location=location))
        found[location] = placement.coordinate
        assert placement.is_valid
    expected = {n: (2 / 3 * (n // 2 - 1), 0.0, n % 2 - 0.5) for n in range(6)}
    assert {n: pytest.approx(where) for n, where in found.items()} == expected


def test_a_table_says_where_a_case_has_its_locations_and_which_it_shows(noise_store, monkeypatch):
    table = {
        "centre_mm": np.array([[5.0, 5, 5], [15, 5, 5], [25, 5, 5], [15, 15, 5]]),
        "coordinate": np.array([[-1, -1, 0], [0, -1, 0], [1, -1, 0], [0, 1, 0]], dtype=np.float32),
        "neighbours": np.array([[1, 3, 2], [0, 2, 3], [1, 3, 0], [1, 0, 2]]),
        "valid": np.array([True, False, True, True]),
    }
    monkeypatch.setattr(noise_store, "derived", lambda name, case: {"locations": table}[name])
    spec = GridCrop(size=[4] * 3, table="locations")
    (own,) = _placed(noise_store, spec, Request((0,), 0, location=1))
    record = noise_store.record(0)
    np.testing.assert_allclose(
        record.volume_to_mm[:3, :3] @ own.frame.center + record.volume_to_mm[:3, 3], [15, 5, 5], atol=0.51
    )
    assert (own.location_index, own.coordinate, own.is_valid) == (1, (0.0, -1.0, 0.0), False)
    near = GridCrop(size=[4] * 3, table="locations", neighbours=True, count=2)
    around = _placed(noise_store, near, Request((0,), 0, location=0))
    assert [p.location_index for p in around] == [3, 2], "the nearest, location 1, is not in this case"
    three = GridCrop(size=[4] * 3, table="locations", neighbours=True, count=3)
    around = _placed(noise_store, three, Request((0,), 0, location=0))
    assert [(p.location_index, p.is_valid) for p in around] == [(3, True), (2, True), (1, False)]
    again = _placed(noise_store, Same(of="a"), Request((0,), 0, location=1), a=spec)
    assert (again[0].coordinate, again[0].is_valid) == (own.coordinate, False)
    four = GridCrop(size=[4] * 3, table="locations", neighbours=True, count=4)
    with pytest.raises(ValueError, match="4 neighbours, but the table 'locations' holds 3"):
        _placed(noise_store, four, Request((0,), 0, location=0))
    plan = ViewPlan(groups={"a": spec})
    assert (plan.num_locations, plan.tables, plan.locations_in(noise_store)) == (0, {"locations"}, 4)


def test_drawn_views_say_their_location_and_coordinate(noise_store, draw):
    plan = ViewPlan(groups={"a": GridCrop(size=[4] * 3, grid=[2, 1, 1], count=2), "b": Fixed(size=[4] * 3)})
    views = draw(noise_store, plan, [Request((0,), 0, location=1), Request((2,), 1, location=0)])
    assert views["a"].location_index.tolist() == [[1, 1], [0, 0]]
    assert views["a"].coordinate[:, :, 0].tolist() == [[0.5, 0.5], [-0.5, -0.5]]
    assert views["a"].location_valid.all()
    assert views["b"].coordinate is None


def test_same_places_can_be_drawn_on_another_grid(noise_store):
    groups = {"a": RandomCrop(size=[12, 10, 8], within="body")}
    (same,) = _placed(noise_store, Same(of="a"), **groups)
    (finer,) = _placed(noise_store, Same(of="a", size=[24, 20, 16]), **groups)
    np.testing.assert_allclose(finer.frame.center, same.frame.center)
    np.testing.assert_allclose(_faces(finer.frame)[0], _faces(same.frame)[0])


def test_a_location_beyond_the_grid_is_refused(noise_store):
    with pytest.raises(ValueError, match="location 8 is not one of 8"):
        _placed(noise_store, GridCrop(size=[4] * 3, grid=[2, 2, 2]), Request((0,), 0, location=8))


def test_matched_crops_show_the_same_landmark_in_a_shifted_copy(make_store, draw):
    """An off-centre landmark of a volume and of its shifted copy: points cross cases in millimetres only."""
    generator = np.random.default_rng(0)
    array = generator.integers(-1000, 1000, (1, 40, 40, 40)).astype(np.int16)
    store = make_store(array, np.roll(array, 6, axis=1), affine=np.diag([2.0, 2.0, 2.0, 1.0]))

    class Shifted:
        def propose(self, scene, rng):
            point = np.array([10.0, 25.0, 17.0]) * 2
            return point, point + np.array([12.0, 0, 0]), 1.0

    plan = ViewPlan(groups={"x": Matched(size=[8] * 3, matcher=Shifted())})
    image = draw(store, plan, [Request((0, 1), 0)])["x"].image[0]
    np.testing.assert_array_equal(image[0].numpy(), image[1].numpy())
    assert image.std() > 100


def test_the_body_matcher_maps_body_coordinates_and_scores_the_distance_to_the_body(noise_store):
    scene = Scene(noise_store, Request((0, 1), 0))
    first, second, score = BodyCoordinateMatcher().propose(scene, np.random.default_rng(0))
    np.testing.assert_allclose(first, second)  # equal boxes and affines
    assert 0.5 < score <= 1
    bodies = noise_store.points(0)[:, :3]
    assert np.any(np.all(bodies == first, axis=1))


def test_a_matcher_is_asked_again_until_the_score_or_the_tries_are_reached(noise_store):
    class Counting:
        def __init__(self):
            self.asked = 0

        def propose(self, scene, rng):
            self.asked += 1
            return np.full(3, float(self.asked)), np.full(3, 10.0), [0.1, 0.6, 0.3, 0.9][self.asked - 1]

    request = Request((0, 1), 0)
    for threshold, tries, on_fail, asked, taken in (
        (0.5, 9, "best", 2, 2),
        (0.8, 3, "best", 3, 2),
        (0.8, 3, "last", 3, 3),
    ):
        matcher = Counting()
        spec = Matched(
            size=[4] * 3, matcher=matcher, score_threshold=threshold, tries=tries, on_fail=on_fail, spacing_mm=0.5
        )
        query, _ = _placed(noise_store, spec, request)
        assert matcher.asked == asked
        np.testing.assert_allclose(query.frame.center, taken)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: RandomCrop(size=[4, 4]), "size must be three positive voxel counts"),
        (lambda: RandomCrop(size=[4] * 3, fraction=[0, 1]), "fraction must be"),
        (lambda: RandomCrop(size=[4] * 3, outside="air"), "outside must be minimum, border or a number"),
        (lambda: RandomCrop(size=[4] * 3, context="body"), "context must be volume or crop"),
        (lambda: RandomCrop(size=[4] * 3, spacing_mm="fine"), "spacing_mm must be native"),
        (lambda: RandomCrop(size=[4] * 3, within="lung"), "within must be body or volume"),
        (lambda: RandomCrop(size=[4] * 3, count=0), "count must be at least 1"),
        (lambda: RandomCrop(size=[4] * 3, spacing_mm=[1, 0, 1]), "spacing_mm must be positive"),
        (lambda: RandomCrop(size=[4] * 3, label_share=3.0), r"must lie in \[0, 1\], got 3.0 and 0.0"),
        (lambda: RandomCrop(size=[4] * 3, augment=[Flip(share="veiw")]), "share=veiw is stated by one view only"),
        (lambda: Containing(size=[4] * 3, scale=[1.2, 0.8]), r"scale must be \[low, high\] with 0 < low <= high, got"),
        (lambda: Containing(size=[4] * 3, scale=[1.0]), r"scale must be \[low, high\]"),
        (lambda: Containing(size=[4] * 3, independent=1.5), r"independent must lie in \[0, 1\], got 1.5"),
        (
            lambda: Containing(size=[4] * 3, margin_voxel=[1, 2]),
            r"margin_voxel must be one number or three, .*\[1, 2\]",
        ),
        (
            lambda: Containing(size=[4] * 3, margin_voxel=-1.0),
            "margin_voxel must be one number or three, all at least 0",
        ),
        (lambda: GridCrop(size=[4] * 3), "either grid"),
        (lambda: GridCrop(size=[4] * 3, grid=[2, 1, 1], neighbours=True, count=2), "2 neighbours, but grid"),
        (lambda: GridCrop(size=[4] * 3, grid=[2, 1, 1]), "needs a request with a location; use sampler SameLocation"),
        (lambda: Nearby(size=[4] * 3), "needs a request with an anchor; use sampler Anchored"),
        (lambda: Nearby(size=[4] * 3, of="a"), "no group 'a' is stated before"),
        (lambda: Matched(size=[4] * 3), "use sampler Pairs"),
        (lambda: RandomCrop(size=[4] * 3, slot=1), "takes case 2 of its request, which holds 1"),
    ],
)
def test_what_a_placement_cannot_do_is_said(noise_store, spec, message):
    with pytest.raises(ValueError, match=message):
        _placed(noise_store, spec())
