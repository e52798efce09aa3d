from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import macl

from medssl.data.views import View
from medssl.methods.positions import PositionRule, Positions, height_score, near_positions, overlapping_boxes

NO_GROUPS = torch.zeros(4, dtype=torch.int64)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def crops(centers, *, sides=(8, 8, 8), shape=(40, 40, 80), to_mm=None):
    """A view of crops about these voxels."""
    return View.of(
        torch.zeros(len(centers), 1, *sides),
        corner_voxel=torch.tensor(centers, dtype=torch.float64) - (torch.tensor(sides) - 1) / 2,
        volume_shape=shape,
        volume_to_mm=to_mm,
        location_body=0.5,
    )


def test_positives_are_strictly_nearer_than_the_threshold_in_double_precision():
    rule = PositionRule(axes=["z"], threshold=0.1)
    positive, compared = rule.masks(column(0.1, 0.2, 0.5, 0.6), NO_GROUPS)
    assert not positive[0, 1]  # 0.1
    assert positive[2, 3]  # 0.1 less a bit of rounding; float32 would say no
    assert positive.diagonal().all()
    assert compared.all()
    assert not (column(0.5, 0.6).float().diff(dim=0) < torch.tensor(0.1)).any()


@pytest.mark.parametrize("threshold", [0.2, (0.1, 0.2, 0.5)])
def test_all_axes_must_be_near(threshold):
    position = torch.rand(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = PositionRule(threshold=threshold)
    scaled = (position / torch.tensor(threshold)).tolist()
    assert rule.masks(position, torch.zeros(9, dtype=torch.int64))[0].tolist() == macl.near(scaled, 1.0)
    assert rule.positions(
        Positions(position, torch.ones(9, 3, dtype=torch.int64), torch.eye(4).double().expand(9, 4, 4), position)
    ).equal(position)


def test_positions_are_near_strictly_below_the_threshold():
    position = torch.tensor([[0.0, 0, 0], [0.5, 0, 0.05], [0, 0, 0.1]], dtype=torch.float64)
    axial = near_positions(position[:, 2:], threshold=0.1)
    assert axial.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    cubic = near_positions(position, threshold=0.11)
    assert cubic.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    with pytest.raises(ValueError, match="norm is 'l1', allowed are linf, l2"):
        near_positions.__wrapped__(position, norm="l1", threshold=1.0)


def test_a_plain_vector_of_positions_is_refused():
    """Differences of three heights are a table of 3 x 3, which must not pass for rows along three axes."""
    heights = torch.tensor([0.1, 0.15, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shape \(3,\), wanted are rows of coordinates, \(row, axis\); give position"):
        near_positions.__wrapped__(heights, threshold=0.1)
    assert near_positions(heights[:, None], threshold=0.1).tolist() == [[True, True, False]] * 2 + [
        [False, False, True]
    ]


def test_boxes_overlap_by_their_share_of_the_union():
    lower = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [2, 0, 0]], dtype=torch.float64)
    upper = lower + 1
    assert overlapping_boxes(lower, upper, threshold=0.3).tolist()[0] == [True, True, False]  # 0.5 of 1.5
    assert overlapping_boxes(lower, upper, threshold=0.34).tolist()[0] == [True, False, False]


def test_crops_may_be_compared_by_the_places_they_can_reach_or_by_what_they_share():
    """Crops half as large as the body, whose lower faces lie at 0, 0.1 and 0.5 of it."""
    view = crops([(10, 10, 10)] * 3)
    lower = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.5, 0, 0]], dtype=torch.float64)
    view.crop_body = torch.stack([lower, lower + 0.5], dim=1)[:, None]
    positions = Positions.of_view(view)
    assert positions.along("reachable").tolist() == [[0, 0, 0], [0.2, 0, 0], [1, 0, 0]]
    assert PositionRule(frame="reachable", threshold=0.21)(view)[0][0].tolist() == [True, True, False]
    shared = PositionRule(norm="overlap", threshold=0.6)  # 0.4 of 0.6, and nothing
    assert shared(view)[0][0].tolist() == [True, True, False]
    assert PositionRule(norm="overlap", threshold=0.7)(view)[0][0].tolist() == [True, False, False]
    assert PositionRule(axes=["y", "z"], norm="overlap", threshold=0.7)(view)[0].all()
    with pytest.raises(ValueError, match="norm overlap does not have; state a number"):
        shared.distance(shared.positions(positions)[:1], shared.positions(positions)[1:2])
    for rule in (PositionRule(frame="reachable"), shared):
        with pytest.raises(ValueError, match="views do not know theirs; make them with crop_body"):
            rule(replace(view, crop_body=None))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_views_between_both_thresholds_are_not_compared(norm):
    """Of one cohort but the last."""
    group = torch.tensor([0, 0, 0, 1])
    position = column(0.1, 0.15, 0.25, 0.1)
    rule = PositionRule(axes=["z"], threshold=0.1, negative_threshold=0.15, norm=norm)
    positive, compared = rule.masks(position, group)
    assert positive.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, False], [False] * 3 + [True]]
    assert compared[:3, :3].tolist() == [[True, True, True], [True, True, False], [True, False, True]]
    assert not compared[:3, 3].any()
    other = PositionRule(axes=["z"], threshold=0.1, negative_threshold=0.15, norm=norm, cross_group="negative")
    assert other.masks(position, group)[1][:, 3].tolist() == [False, False, True, True], "the near ones are left out"


def test_several_views_give_rows_one_view_after_another():
    first, second = crops([(10, 10, 10), (10, 10, 20)]), crops([(10, 10, 21), (10, 10, 60)])
    positive, _ = PositionRule(frame="volume", threshold=0.1)(first, second)
    assert positive.equal(torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool))


def test_the_euclidean_rule_is_a_ball():
    position = torch.tensor([[0.0, 0, 0], [0.08, 0.08, 0], [0.06, 0.06, 0], [0, 0, 0.1]], dtype=torch.float64)
    ball = PositionRule(threshold=0.1, norm="l2").masks(position, NO_GROUPS)[0]
    cube = PositionRule(threshold=0.1).masks(position, NO_GROUPS)[0]
    assert ball[0].tolist() == [True, False, True, False]
    assert cube[0].tolist() == [True, True, True, False]


def test_a_slice_has_the_position_of_its_number():
    """(i + 1) / N of slice i."""
    view = crops([(19.5, 19.5, i) for i in range(4)], sides=(40, 40, 1), shape=(40, 40, 5))
    positions = Positions.of_view(view).along("volume")
    assert positions[:, 2].tolist() == [1 / 5, 2 / 5, 3 / 5, 4 / 5]


def test_a_body_position_is_the_view_s_location():
    view = crops([(10, 10, 10), (20, 20, 20)])
    view.location_body = torch.tensor([[[0.1, 0.2, 0.3]], [[0.4, 0.5, 0.6]]], dtype=torch.float64)
    rule = PositionRule(axes=["z", "x"], frame="body", threshold=0.35)
    assert rule.positions(Positions.of_view(view)).tolist() == [[0.3, 0.1], [0.6, 0.4]]
    positive, compared = rule(view)
    assert positive.all()
    assert compared.all()
    assert rule(view, gather=True)[0].equal(positive)


def test_millimetres_follow_the_affine():
    to_mm = [[2.0, 0, 0, -5], [0, 2, 0, 0], [0, 0, 3, 100], [0, 0, 0, 1]]
    view = crops([(10, 10, 10), (10, 10, 20)], to_mm=to_mm)
    assert Positions.of_view(view).along("mm").tolist() == [[15, 20, 130], [15, 20, 160]]
    assert PositionRule(axes=["z"], frame="mm", threshold=30).masks(column(130, 160), NO_GROUPS[:2])[0].sum() == 2
    assert PositionRule(axes=["z"], frame="mm", threshold=30.5)(view)[0].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_are_named(value):
    view = crops([(10, 10, 10), (20, 20, 20), (30, 30, 30)])
    view.location_body[1, 0, 2] = value
    with pytest.raises(ValueError, match=r"positions in the frame body are not finite for samples \[1\] of the batch"):
        PositionRule()(view)
    assert PositionRule(frame="volume")(view)[0].shape == (3, 3)
    assert PositionRule(axes=["x", "y"])(view)[0].all()


def test_cohorts_are_ignored_or_negative_or_compared():
    group = torch.tensor([0, 0, 1, 1])
    position = column(0.1, 0.9, 0.1, 0.15)
    near = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    same = group[:, None] == group
    for word, positive, compared in (
        ("ignore", near & same, same),
        ("negative", near & same, torch.ones_like(same)),
        ("compare", near, torch.ones_like(same)),
    ):
        found = PositionRule(axes=["z"], cross_group=word).masks(position, group)
        assert found[0].equal(positive), word
        assert found[1].equal(compared), word


def test_an_external_height_is_read_in_the_table_of_each_case():
    """Rows in volume voxels, of two cases whose voxels have 2 and 3 mm."""
    view = crops([(10, 10, 15), (10, 10, 30)])
    view.volume_to_mm = torch.diag_embed(torch.tensor([[[2.0, 2, 2, 1]], [[1, 1, 3, 1]]], dtype=torch.float64))
    view.points = torch.tensor([[[[20.0, 20, 0], [20, 20, 30]]], [[[20, 20, 20], [20, 20, 40]]]], dtype=torch.float64)
    view.point_features = torch.tensor([[[[0.0], [0.4]]], [[[0.5], [1.0]]]])
    view.location_body = torch.full((2, 1, 3), 0.5, dtype=torch.float64)
    found = Positions.of_view(view).along("external")
    torch.testing.assert_close(
        found, torch.tensor([[0.5, 0.5, 0.2], [0.5, 0.5, 0.75]], dtype=torch.float64), rtol=0, atol=1e-7
    )
    with pytest.raises(
        ValueError, match="frame external needs heights: derive what=heights, and state points: heights"
    ):
        PositionRule(frame="external")(crops([(10, 10, 10)]))


def test_heights_between_rows_are_linear_and_beyond_them_go_on():
    rows = np.array([[0.0, 0.0], [10, 0.5], [40, 0.8], [40, 0.8]])
    table = torch.tensor(rows).expand(7, 4, 2)
    z_mm = torch.tensor([0.0, 5, 10, 25, 40, 60, -20], dtype=torch.float64)
    expected = [*np.interp(z_mm[:5], rows[:3, 0], rows[:3, 1]), 0.8 + 20 * 0.02, -20 * 0.02]
    assert height_score(table, z_mm).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame": "atlas"}, "frame is 'atlas', allowed are volume, body, mm, external, reachable"),
        ({"norm": "l1"}, "norm is 'l1', allowed are linf, l2, overlap"),
        ({"norm": "overlap", "frame": "mm"}, "norm overlap compares crops in the frame body, got mm"),
        ({"norm": "overlap", "threshold": [0.1, 0.1, 0.1]}, "threshold must be positive, one number"),
        ({"negative_threshold": 0.1}, "negative_threshold=0.1 must lie above threshold=0.1 for the norm linf"),
        ({"negative_threshold": [0.2, 0.2, 0.2]}, "number by number"),
        ({"cross_group": "keep"}, "cross_group is 'keep', allowed are ignore, negative, compare"),
        ({"axes": []}, r"axes must be some of x, y, z, got \[\]"),
        ({"axes": ["z", "z"]}, "axes must be some of x, y, z"),
        ({"threshold": 0}, "threshold must be positive"),
        ({"threshold": [0.1, 0.1]}, "one number or one for each of the axes"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PositionRule(**settings)
