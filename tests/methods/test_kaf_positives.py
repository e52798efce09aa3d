import math

import pytest
import torch
from oracles.transport import positive_contrast
from test_kaf import at, batch, make, place_of

from medssl.methods.positions import reachable
from medssl.methods.watch import WATCHED_STEPS


@pytest.mark.parametrize("positives", ["views", "partition"])
def test_positives_may_be_views_or_partitions_of_the_height(positives):
    views = batch()
    found = make(positives=positives)(views, at()).logs
    height = torch.cat([place_of(views[name])[:, 2] for name in ("first", "second")])
    label = (4 * height).long().clamp(0, 3) if positives == "partition" else torch.arange(3).repeat(2)
    number = (label[:, None] == label).sum(1) - 1
    assert found["num_positives"].item() == pytest.approx(number.float().mean().item())


def test_places_run_from_0_to_1_over_what_a_crop_can_have():
    views = batch(b=2)
    middle = torch.tensor([[0.25, 0.5, 0.75], [0.3, 0.9, 0.0]]).double()
    assert reachable(middle - 0.25, middle + 0.25).tolist() == [[0.0, 0.5, 1.0], [pytest.approx(0.1), 1.0, 0.0]]
    assert reachable(middle - 0.5, middle + 0.5).tolist() == [[0.5] * 3] * 2, "crops as large as the body"
    for name, y in (("first", 0.25), ("second", 0.5)):  # places that differ by 0.5 or more
        middle = torch.tensor([[0.25, y, 0.25], [0.75, y, 0.25]]).double()
        views[name].crop_body = torch.stack([middle - 0.25, middle + 0.25], dim=1)[:, None]
    assert make(position_per_view=True)(views, at()).logs["num_positives"] == 0
    assert make(position_per_view=False)(views, at()).logs["num_positives"] == 1


def test_positives_may_be_crops_that_share_enough_of_the_body():
    views = batch()
    found = make(metric="overlap", threshold=0.4)(views, at()).logs["num_positives"]
    middle = torch.cat([views[name].crop_body[:, 0].mean(1) for name in ("first", "second")]).tolist()
    number = 0
    for i, first in enumerate(middle):
        for j, second in enumerate(middle):
            inner = math.prod(max(0.0, 0.5 - abs(a - b)) for a, b in zip(first, second, strict=True))
            number += i != j and inner / (2 * 0.125 - inner) > 0.4
    assert found.item() == pytest.approx(number / 6)
    assert 1 <= number / 6 < 5


@pytest.mark.parametrize(
    ("metric", "threshold", "negative"), [("linf", 0.35, 0.6), ("axial", 0.1, 0.5), ("overlap", 0.4, 0.05)]
)
def test_views_between_both_thresholds_are_neither_positives_nor_negatives(metric, threshold, negative):
    options = {"points": {"min_points": 0}, "metric": metric, "threshold": threshold, "negative_threshold": negative}
    views = batch()
    views["second"].inside[2] = False  # a view without keypoints
    found = make(**options)(views, at())
    method = make(**options)
    points = method.points(views["first"], views["second"], at(), is_random=True)
    by_view = ((points.first, points.first_valid), (points.second, points.second_valid))
    embedded = [
        method.heads(method.encoder.encode(views[name].image[:, 0], *chosen))
        for name, chosen in zip(("first", "second"), by_view, strict=True)
    ]
    place = torch.cat([place_of(views[name]) for name in ("first", "second")]).tolist()
    middle = torch.cat([views[name].crop_body[:, 0].mean(1) for name in ("first", "second")]).tolist()

    def relation(i, j):
        if metric == "overlap":
            inner = math.prod(max(0.0, 0.5 - abs(a - b)) for a, b in zip(middle[i], middle[j], strict=True))
            apart, bounds = -inner / (0.25 - inner), (-threshold, -negative)
        else:
            apart = max(abs(a - b) for a, b in list(zip(place[i], place[j], strict=True))[2 * (metric == "axial") :])
            bounds = threshold, negative
        return "positive" if apart < bounds[0] else "ignored" if apart < bounds[1] else "negative"

    near, ignored, far = (
        [[relation(i, j) == kind for j in range(6)] for i in range(6)] for kind in ("positive", "ignored", "negative")
    )
    assert all(any(map(any, mask)) for mask in (near, ignored, far))
    for term, vectors in (  # the last view has no keypoints
        ("image", torch.cat([e.image for e in embedded])),
        ("keypoints", torch.cat([e.keypoints for e in embedded])[:5]),
    ):
        options = {"temperature": 0.1, "base_temperature": 0.07, "ignored": ignored}
        expected = positive_contrast(vectors.double().tolist(), near, **options)
        assert found.logs[term].item() == pytest.approx(expected, rel=1e-4)


def test_few_crops_for_a_batch_norm_are_said_once(capsys):
    method = make()
    for step in range(3):
        method(batch(), at(step))
    said = capsys.readouterr().err
    assert said.count("warning: 3 crops of a device share a batch norm, which needs 4") == 1
    make()(batch(b=4), at())
    make().eval()(batch(), at())
    instance = make(norm="instance")
    instance(batch(), at())
    assert capsys.readouterr().err == ""


def test_steps_without_positives_are_said_once(capsys):
    method, far = make(norm="instance", threshold=1e-3), batch()
    output = method(far, at())
    assert output.logs["num_positives"] == 0
    assert output.logs["image"] == output.logs["keypoints"] == 0
    for step in range(1, 3 * WATCHED_STEPS):
        method.watch([torch.tensor(float(step < 15))], at(step))
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "in 6 of 20 steps no view had a positive" in said
    assert "method.threshold=0.001" in said
    method = make()
    for step in range(WATCHED_STEPS):
        method.watch([torch.tensor(0.1)], at(step))
    assert method.watch.rows == []
    assert capsys.readouterr().err == ""
