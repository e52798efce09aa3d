import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles.transport import matching, plan, positive_contrast
from pairs_of_views import figures_of

from medssl.data.views import View
from medssl.methods.base import Progress
from medssl.methods.kaf import KAF
from medssl.methods.kaf_points import PointRule
from medssl.methods.positions import Positions
from medssl.models.kaf_heads import KAFHeads
from medssl.models.kaf_unet import KAFEncoder
from medssl.models.keypoint_matcher import KeypointMatcher
from medssl.ops.panels import MatchedPoints, matched_points

SIDE = 16


def make(*, points=None, local=False, mode="use", norm="batch", **options):
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_heads": 2, "position_widths": [4]}
    encoder = KAFEncoder(base_channels=2, num_layers=1, hidden=4, levels=(1, 1), mode=mode, norm=norm, **sizes)
    widths = {"bottleneck_channels": encoder.bottleneck_channels, "token_channels": encoder.token_channels}
    heads = KAFHeads(**widths, dim=8, embed_dim=6, local=local)
    matcher = KeypointMatcher(layers=("self", "cross"), **sizes)
    rule = PointRule(**{"max_points": 12, "min_points": 2, **(points or {})})
    return KAF(encoder=encoder, heads=heads, matcher=matcher, points=rule, transport_iterations=20, **options).train()


def view(image, offset, points, *, location):
    """Views (b 1) cut from one grid at an offset; points (b k 3) in voxels of that grid."""
    return View.of(
        image,
        corner_voxel=offset,
        volume_shape=[24, 24, 24],
        location_body=location,
        crop_body=location[:, None] + torch.tensor([[-0.25], [0.25]], dtype=torch.float64),  # crops of half the body
        points=points,
    )


def batch(*, b=3, k=20, seed=0, offset=(3.0, 0.0, 2.0)):
    generator = torch.Generator().manual_seed(seed)
    volume = F.interpolate(torch.rand(b, 1, 12, 12, 12, generator=generator), size=(24, 24, 24), mode="trilinear")
    points = 23 * torch.rand(b, k, 3, generator=generator, dtype=torch.float64)
    points[:, -2:] = torch.nan  # tables are padded
    location = torch.rand(b, 3, generator=generator, dtype=torch.float64)
    x, y, z = map(int, offset)
    first = view(volume[..., :SIDE, :SIDE, :SIDE], (0, 0, 0), points, location=location)
    second = view(volume[..., x : x + SIDE, y : y + SIDE, z : z + SIDE], offset, points, location=location + 0.05)
    return {"first": first, "second": second}


def place_of(view):
    return Positions.of_view(view).along("reachable")


def at(step=0):
    return Progress(step, 10, float(step), 10.0, 0)


def test_the_terms_equal_loops_over_views_points_and_pairs():
    method, views = make(points={"min_points": 0}), batch()
    found = method(views, at()).logs
    method = make(points={"min_points": 0})
    points = method.points(views["first"], views["second"], at(), is_random=True)
    embedded = [
        method.heads(method.encoder.encode(views[name].image[:, 0], where, known))
        for name, where, known in (
            ("first", points.first, points.first_valid),
            ("second", points.second, points.second_valid),
        )
    ]
    place = torch.cat([place_of(views[name]) for name in ("first", "second")]).tolist()
    near = [[max(abs(a - b) for a, b in zip(p, q, strict=True)) < 0.35 for q in place] for p in place]
    temperatures = {"temperature": 0.1, "base_temperature": 0.07}
    for term, vectors in (("image", [e.image for e in embedded]), ("keypoints", [e.keypoints for e in embedded])):
        expected = positive_contrast(torch.cat(vectors).double().tolist(), near, **temperatures)
        assert found[term].item() == pytest.approx(expected, rel=1e-4)
    scores = method.matcher(
        embedded[0].tokens,
        embedded[1].tokens,
        points=(points.first, points.second),
        valid=(points.first_valid, points.second_valid),
        size_voxel=(SIDE,) * 3,
    )
    plans = []
    for sample in range(3):
        mine = scores[sample][points.first_valid[sample]][:, points.second_valid[sample]]
        plans.append(plan(mine.double().tolist(), 1.0, num_iterations=20))
        assert points.first_valid[sample].tolist() == sorted(points.first_valid[sample].tolist(), reverse=True)
    expected = matching(plans, points.pairs.tolist(), is_sum=False)
    assert found["matching"].item() == pytest.approx(expected, rel=1e-4)
    total = method(views, at())
    parts = total.logs["image"] + total.logs["keypoints"] + 0.01 * total.logs["matching"]
    assert total.loss.item() == pytest.approx(parts.item(), rel=1e-6)


def test_the_contrast_of_single_keypoints_equals_loops_over_samples():
    points = {"min_points": 4}
    method, views = make(points=points, local=True, weight_local=0.5), batch()
    views["first"].inside[0, 0, 3:] = False  # fewer keypoints than rows
    found = method(views, at())
    method = make(points=points, local=True, weight_local=0.5)
    pair = method.points(views["first"], views["second"], at(), is_random=True)
    valid = (pair.first_valid, pair.second_valid)
    assert not all(v.all() for v in valid)
    embedded = [
        method.heads(method.encoder.encode(views[name].image[:, 0], where, known)).points
        for name, where, known in zip(("first", "second"), (pair.first, pair.second), valid, strict=True)
    ]
    total = 0.0
    for sample in range(3):
        names = [(view, n) for view in (0, 1) for n in valid[view][sample].nonzero().flatten().tolist()]
        partners = {(i, j) for s, i, j in pair.pairs.tolist() if s == sample and min(i, j) >= 0}
        near = [[v != w and ((a, b) if v == 0 else (b, a)) in partners for w, b in names] for v, a in names]
        vectors = [embedded[view][sample, n].double().tolist() for view, n in names]
        total += positive_contrast(vectors, near, temperature=0.1, base_temperature=0.07) / 3
    assert found.logs["local"].item() == pytest.approx(total, rel=1e-4)
    logs = found.logs
    parts = logs["image"] + logs["keypoints"] + 0.01 * logs["matching"] + 0.5 * logs["local"]
    assert found.loss.item() == pytest.approx(parts.item(), rel=1e-6)
    found.loss.backward()
    assert method.heads.local is not None


def test_matched_points_show_the_same_place_and_every_point_has_one_row():
    method, views = make(), batch()
    points = method.points(views["first"], views["second"], at(), is_random=True)
    shift = torch.tensor([3.0, 0, 2])
    matched = points.pairs[(points.pairs >= 0).all(1)]
    assert len(matched) > 5
    for sample, i, j in matched.tolist():
        assert torch.allclose(points.first[sample, i], points.second[sample, j] + shift, atol=1e-4)
    for column, valid in ((1, points.first_valid), (2, points.second_valid)):
        rows = Counter((s, n) for s, n in points.pairs[:, [0, column]].tolist() if n >= 0)
        assert rows == Counter({(s, n): 1 for s, n in valid.nonzero().tolist()})
    assert points.first.isfinite().all()
    assert 0 < points.matched_share() < 1


def test_points_change_with_the_step_in_training_and_are_the_strongest_otherwise():
    method, views = make(points={"max_points": 4, "min_points": 0}), batch(k=60)
    pair = views["first"], views["second"]
    draws = [method.points(*pair, at(step), is_random=True).first for step in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    fixed = method.points(*pair, at(0), is_random=False)
    assert torch.equal(fixed.first, method.points(*pair, at(1), is_random=False).first)
    both = (views["first"].inside & views["second"].inside)[0, 0].nonzero()[:3, 0]
    expected = views["first"].to_view(views["first"].points)[0, 0, both].float()
    assert torch.allclose(fixed.first[0, :3], expected, atol=1e-5), "0.9 of 4 places are for the first shared ones"


@pytest.mark.parametrize("is_random", [True, False])
def test_a_grid_gives_the_strongest_point_of_each_cell_before_the_second_of_any(is_random):
    rule = {"max_points": 27, "min_points": 0, "choice": "grid", "validation_choice": "grid"}
    method, views = make(points=rule), batch(b=2, k=120)
    first, second = views["first"], views["second"]
    first.points[:, 0, :40] /= 3  # the strongest lie in one corner
    first.inside = ((first.to_view(first.points) >= 0) & (first.to_view(first.points) <= SIDE - 1)).all(-1)
    second = replace(second, points=first.points)
    second.inside = ((second.to_view(first.points) >= 0) & (second.to_view(first.points) <= SIDE - 1)).all(-1)
    points = method.points(first, second, at(), is_random=is_random)
    assert torch.equal(points.first, method.points(first, second, at(1), is_random=is_random).first)
    side = SIDE / 3  # 27 cells
    for sample in range(2):
        place = first.to_view(first.points)[sample, 0]
        both, alone = [], []
        for number in range(120):
            one, two = (view.inside[sample, 0, number].item() for view in (first, second))
            if one:
                cell = tuple(((place[number] + 0.5) // side).int().tolist())
                found = both if two else alone
                found.append((sum(cell == other for _, _, other in found), number, cell))
        assert len(both) > 24
        assert len(alone) > 3
        chosen = [number for _, number, _ in sorted(both)[:24] + sorted(alone)[:3]]
        torch.testing.assert_close(points.first[sample], place[chosen].float())
    strongest = make(points={"max_points": 27, "min_points": 0}).points(first, second, at(), is_random=False)

    def num_cells(pair):
        return len({(s, *((pair.first[s, n] + 0.5) // side).int().tolist()) for s in range(2) for n in range(27)})

    assert num_cells(points) > 1.2 * num_cells(strongest)


def test_training_may_take_the_strongest_points():
    views = batch(k=60)
    rule = make(points={"max_points": 4, "choice": "strongest"}).points
    train, held_out = (rule(views["first"], views["second"], at(3), is_random=r) for r in (True, False))
    assert torch.equal(train.first, held_out.first)


def test_a_view_with_few_points_gets_random_ones_that_match_nobody():
    method, views = make(points={"min_points": 5}), batch(k=4)
    points = method.points(views["first"], views["second"], at(), is_random=True)
    assert (points.first_valid.sum(1) >= 5).all()
    extra = points.pairs[points.pairs[:, 1] >= 4]
    assert (extra[:, 2] == -1).all()
    assert (points.first >= 0).all()
    assert (points.first <= SIDE - 1).all()
    assert method(views, at()).loss.isfinite()


def test_dropped_points_leave_their_partners_alone():
    views = batch()
    pair = views["first"], views["second"]
    whole, some = (
        make(points={"dropout": dropout, "max_points": 30}).points(*pair, at(), is_random=True)
        for dropout in (0.0, 0.5)
    )
    assert some.matched_share() < 0.8 * whole.matched_share()
    assert (some.pairs >= 0).any(1).all()


@pytest.mark.parametrize("match", ["geometric", "descriptor"])
def test_points_found_in_each_view_are_matched_by_place_or_by_looks(match):
    views = batch(offset=(2.0, 0.0, 0.0))
    method = make(points={"match": match, "max_points": 30, "gate_share": 0.5, "radius_voxel": 1.5})
    points = method.points(views["first"], views["second"], at(), is_random=True)
    matched = points.pairs[(points.pairs >= 0).all(1)]
    assert len(matched) > 3
    shift = torch.tensor([2.0, 0, 0])
    apart = [(points.first[s, i] - points.second[s, j] - shift).norm().item() for s, i, j in matched.tolist()]
    assert max(apart) < 1.5 if match == "geometric" else sorted(apart)[len(apart) // 2] < 1.0
    assert method(views, at()).loss.isfinite()


@pytest.mark.parametrize("match", ["geometric", "descriptor"])
def test_points_are_not_looked_for_in_the_noise_of_views_that_show_next_to_nothing(match):
    views = {name: replace(view, image=0.5 + 1e-5 * view.image) for name, view in batch().items()}
    points = make(points={"match": match, "min_points": 0}).points(
        views["first"], views["second"], at(), is_random=True
    )
    assert not points.first_valid.any()
    assert len(points.pairs) == 0


def test_gradient_reaches_the_first_convolution_from_the_matching_alone():
    method = make(weight_image=0.0, weight_keypoints=0.0, weight_matching=1.0)
    method(batch(), at()).loss.backward()
    assert method.encoder.stages[0][0].conv.weight.grad.abs().max() > 0
    assert method.matcher.dustbin.grad.abs() > 0
    everything = make()
    everything(batch(), at()).loss.backward()
    assert not [name for name, p in everything.named_parameters() if p.requires_grad and p.grad is None]


def train(method, optimizer, views, steps):
    """The outputs of some steps on one batch."""
    outputs = []
    for step in steps:
        output = method(views, at(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(output)
    return outputs


def test_the_matching_of_one_batch_is_learnt():
    method = make(points={"max_points": 24}, weight_image=0.0, weight_keypoints=0.0, weight_matching=1.0)
    outputs = train(method, torch.optim.Adam(method.parameters(), lr=1e-2), batch(b=1), [0] * 12)
    loss = [output.loss.item() for output in outputs]
    found = [output.logs["partners_found"].item() for output in outputs]
    assert loss[-1] < 0.5 * loss[0], loss
    assert found[0] < 0.3
    assert found[-1] > 0.8, found


def test_a_resumed_run_equals_the_straight_one():
    views, straight = batch(), make()
    optimizer = torch.optim.SGD(straight.parameters(), lr=0.01, momentum=0.9)
    train(straight, optimizer, views, [0])
    half, moments = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    train(straight, optimizer, views, [1])
    resumed = make()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.01, momentum=0.9)
    resumed.load_state_dict(half)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, views, [1])
    state = straight.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


def test_views_without_any_keypoint_are_left_out_of_keypoint_contrast_and_matching():
    views = batch()
    for name in ("first", "second"):
        views[name].inside[:] = False
    output = make(points={"min_points": 0})(views, at())
    assert output.logs["keypoints"] == 0
    assert output.logs["matching"] == 0
    assert output.logs["image"] > 0
    output.loss.backward()
    one = batch()
    one["first"].inside[0] = False
    assert make(points={"min_points": 0})(one, at()).loss.isfinite()


def test_held_out_views_and_pictures_leave_no_trace():
    method, views = make(points={"min_points": 0}).eval(), batch()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    first, again = (method(views, at(step)).loss for step in (0, 1))
    assert torch.equal(first, again), "the strongest points, whatever the step"
    figure = figures_of(method.train(), views, at())["matches"]
    pairs = method.points(views["first"], views["second"], at(), is_random=False).pairs
    number = sum(sample == 0 and min(i, j) >= 0 for sample, i, j in pairs.tolist())
    assert figure.axes[0].get_xlabel().endswith(f"of {number} true pairs found")
    assert number > 0
    assert method.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_picture_joins_right_pairs_wrong_pairs_and_those_that_were_missed():
    points = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]])
    known = torch.tensor([True, True, True, False])
    shown = MatchedPoints(points, points, known, known, found={(0, 0), (1, 2)}, true={(0, 0), (1, 1), (2, 2)})
    axes = matched_points(torch.rand(12, 10, 11), torch.rand(12, 10, 11), shown).axes[0]
    drawn = {}
    for line in axes.lines[2:]:
        drawn.setdefault(line.get_color(), []).append((*line.get_xdata(), *line.get_ydata()))
    assert drawn == {
        "lightgrey": [(4, 18, 6, 6), (7, 21, 9, 9)],
        "tomato": [(4, 21, 6, 9)],
        "limegreen": [(1, 15, 3, 3)],
    }
    assert axes.get_xlabel() == "1 of 2 found pairs are right, 1 of 3 true pairs found"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make(positives="volume"), "positives is 'volume', allowed are position, views, partition"),
        (lambda: make(metric="l1"), "metric is 'l1'"),
        (lambda: make(reduction="mean"), "reduction is 'mean'"),
        (lambda: make(negative_threshold=0.3), "negative_threshold=0.3 must lie above threshold=0.35"),
        (lambda: make(metric="overlap", negative_threshold=0.5), "must lie below threshold"),
        (lambda: make(positives="views", negative_threshold=0.5), "needs positives=position; positives is 'views'"),
        (lambda: make(temperature=0.0), "must be positive"),
        (lambda: make(weight_local=1.0), "weight_local=1.0 and method.heads.local=False do not fit"),
        (
            lambda: make(mode="duplicate"),
            "uses none: set model.keypoints=use, and at least one",
        ),
        (lambda: make(local=True), "single keypoints are embedded just where they are contrasted"),
        (lambda: make(points={"match": "all"}), "match is 'all', allowed are shared, geometric, descriptor"),
        (lambda: make(points={"choice": "best"}), "choice is 'best', allowed are random, strongest, grid"),
        (lambda: make(points={"validation_choice": "random"}), "validation_choice is 'random', allowed are strongest"),
        (lambda: make(points={"min_points": 20}), "0 <= min_points <= max_points is wanted, got 20 and 12"),
        (lambda: make(points={"dropout": 1.0}), r"dropout in \[0, 1\)"),
        (lambda: make()({"first": batch()["first"]}, at()), "view groups `first` and `second`"),
        (
            lambda: make()({name: replace(v, crop_body=None) for name, v in batch().items()}, at()),
            "views do not know theirs",
        ),
        (
            lambda: make()({name: replace(v, points=None) for name, v in batch().items()}, at()),
            "python -m medssl.derive what=keypoints",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
