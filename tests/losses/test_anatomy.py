import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracles import anatomy as oracle

from medssl.losses.anatomy import (
    CoarseDraws,
    CoarseMining,
    FineDraws,
    FineMining,
    coarse_contrast,
    common_voxels,
    contrast,
    fine_contrast,
    mine_fine,
)

SIDE = 4


def grid(origin_mm, step_mm=3.0, side=SIDE):
    axes = [start + step_mm * torch.arange(side) for start in origin_mm]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def pair(shift_mm=(3.5, 0.5, 0.5), seed=0, origin_mm=(0, 0, 0)):
    """Fine and coarse vectors, positions and validity of two views, the second of a coarser step."""
    n = SIDE**3
    second = [a + b for a, b in zip(origin_mm, shift_mm, strict=True)]
    place = torch.stack([grid(origin_mm), grid(second, step_mm=3.4)])
    valid = torch.rand(2, n, generator=torch.Generator().manual_seed(seed + 9)) > 0.2
    return vectors(2, n, 6, seed=seed), vectors(2, n, 6, seed=seed + 1), place, valid


def fine_draws(mining, n=SIDE**3, seed=0):
    g = torch.Generator().manual_seed(seed)
    noise = torch.rand(2 * mining.num_queries, mining.num_hard, generator=g)
    return FineDraws(torch.rand(2, n, generator=g), torch.rand(2, n, generator=g), noise)


def fine_loss(case, mining, draws):
    fine, context, place, valid = case
    rows = mine_fine(fine, context, place, valid, mining=mining, draws=draws)
    return fine_contrast(fine, rows, temperature=mining.temperature), rows


def lists(values):
    return type(values)(*map(lists, values)) if isinstance(values, tuple) else values.tolist()


SMALL = {"num_candidates": 30, "num_queries": 7, "num_hard": 25, "num_negatives": 10, "ignore_mm": 4.0}


@pytest.mark.parity
@pytest.mark.parametrize("mask_value", ["neginf", "zero"])
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (pair(), {}),
        (pair(seed=3), {"ignore_mm": 6.5, "temperature": 0.2}),
        (pair(), {"num_candidates": 5, "num_queries": 50, "num_hard": 1000, "num_negatives": 800}),  # all there are
        (pair(), {"positive_mm": 0.3}),  # none so near: relaxed
        (pair(shift_mm=(40.0, 0, 0)), {}),  # no overlap
    ],
)
def test_the_fine_loss_equals_a_loop_over_voxels(case, changes, mask_value):
    mining = FineMining(**{**SMALL, **changes, "mask_value": mask_value})
    draws = fine_draws(mining)
    found, rows = fine_loss(case, mining, draws)
    assert found.loss.item() == pytest.approx(oracle.fine_loss(*map(lists, case), mining, lists(draws)), rel=1e-5)
    expected = oracle.fine_rows(*map(lists, case), mining, lists(draws))
    n = SIDE**3
    assert rows.query.tolist() == [v * n + u for v, u, _, _, _ in expected]
    assert rows.positive.tolist() == [v * n + u for _, _, v, u, _ in expected]


def coarse_case(p=3, seed=0, side=3, shift_mm=(4.0, 3.0, 2.0)):
    place = torch.stack([grid((0, 0, 0), 11.0, side), grid(shift_mm, 12.0, side)])
    place = torch.stack([place + 7 * i for i in range(p)])
    return vectors(p, 2, side**3, 6, seed=seed), place


def coarse_draws(mining, case, seed=0):
    p, _, m, _ = case[0].shape
    g = torch.Generator().manual_seed(seed)
    return CoarseDraws(
        torch.rand(p, 2 * m, mining.num_hard, generator=g), torch.rand(p, 2, (p - 1) * 2 * m, generator=g)
    )


COARSE = {"num_hard": 20, "num_negatives": 8, "num_global": 30}


@pytest.mark.parity
@pytest.mark.parametrize("mask_value", ["neginf", "zero"])
@pytest.mark.parametrize(
    ("case", "changes"),
    [
        (coarse_case(), {}),
        (coarse_case(seed=5), {"ignore_mm": 14.0, "positive_mm": 6.0, "height_mm": [3.0, 2.5]}),
        (coarse_case(p=1), {}),
        (coarse_case(p=2), {"num_hard": 90, "num_negatives": 70, "num_global": 500}),  # all there are
        (coarse_case(shift_mm=(0, 0, 200.0)), {}),  # no positive
        (coarse_case(), {"num_global": 0}),
    ],
)
def test_the_coarse_loss_equals_a_loop_over_voxels(case, changes, mask_value):
    mining = CoarseMining(**{**COARSE, **changes, "mask_value": mask_value})
    draws = coarse_draws(mining, case)
    found = coarse_contrast(*case, mining=mining, draws=draws)
    assert found.loss.item() == pytest.approx(oracle.coarse_loss(*map(lists, case), mining, lists(draws)), rel=1e-5)


def test_vectors_drawn_at_random_give_nearly_the_logarithm_of_one_and_the_negatives():
    mining, n = FineMining(num_queries=100, num_hard=400, num_negatives=100, ignore_mm=5.0), 8**3
    place = torch.stack([grid((0, 0, 0), side=8), grid((1, 1, 1), side=8)])
    fine, context = vectors(2, n, 256), vectors(2, n, 256, seed=1)
    found, _ = fine_loss((fine, context, place, torch.ones(2, n, dtype=torch.bool)), mining, fine_draws(mining, n))
    assert found.loss.item() == pytest.approx(math.log(101), abs=0.1)


def test_the_hardest_negatives_are_outside_the_ignored_ball_and_no_ignored_voxel_counts():
    mining = FineMining(**{**SMALL, "num_hard": 1000, "num_negatives": 1000, "ignore_mm": 7.0})
    case = pair()
    _, rows = fine_loss(case, mining, fine_draws(mining))
    place = case[2].flatten(0, 1)
    for query, negatives, counted in zip(rows.query, rows.negative, rows.counted, strict=True):
        distance = (place[negatives] - place[query]).norm(dim=1)
        assert (distance[counted] >= 7).all()
        assert (distance[~counted] < 7).all()
        assert counted.sum() == ((place - place[query]).norm(dim=1) >= 7).sum()


def test_masking_by_zero_lets_ignored_voxels_in_where_similarities_are_negative():
    counted = {}
    for mask_value in ("zero", "neginf"):
        sizes = {"num_hard": 100, "num_negatives": 100, "ignore_mm": 6.0}  # of 128 voxels half are alike
        mining = FineMining(**{**SMALL, **sizes, "mask_value": mask_value})
        _, rows = fine_loss(pair(), mining, fine_draws(mining))
        place = pair()[2]
        flat = place.flatten(0, 1)
        near = (flat[rows.negative] - flat[rows.query][:, None]).norm(dim=-1) < 6
        counted[mask_value] = (near & rows.counted).sum().item()
    assert counted["zero"] > counted["neginf"] == 0


def test_a_ball_that_holds_every_voxel_leaves_a_loss_of_zero_with_a_finite_gradient():
    fine, *rest = pair()
    mining = FineMining(**{**SMALL, "ignore_mm": 500.0})
    fine.requires_grad_()
    found, rows = fine_loss((fine, *rest), mining, fine_draws(mining))
    found.loss.backward()
    assert found.loss.item() == 0
    assert not rows.counted.any()
    assert fine.grad.abs().max() == 0
    assert found.hardest.item() == -1


@pytest.mark.parametrize("nothing_valid_in", [0, 1])
def test_a_view_outside_the_volume_counts_as_no_overlap(nothing_valid_in):
    fine, context, place, valid = pair()
    valid[nothing_valid_in] = False
    mining = FineMining(**SMALL)
    found, rows = fine_loss((fine, context, place, valid), mining, fine_draws(mining))
    assert torch.equal(rows.query, rows.positive)
    assert rows.query.max() < SIDE**3
    assert rows.matched is None
    assert found.positive.item() == pytest.approx(1)


def test_a_common_box_between_two_voxels_counts_as_no_overlap():
    fine, context, _, valid = pair()
    place = torch.stack([grid((0, 0, 0)), grid((8.5, 0, 0))])  # the box from 8.5 to 9 mm holds planes of both ...
    assert common_voxels(place, torch.ones_like(valid)).sum(1).tolist() == [16, 16]
    sparse = place.clone()
    sparse[0, :, 0] = torch.where(place[0, :, 0] > 8, torch.tensor(30.0), place[0, :, 0])  # ... and here none of view 1
    sparse[1, :, 0] = place[1, :, 0].clamp(max=9)
    assert (common_voxels(sparse, torch.ones_like(valid)).sum(1) == 0).tolist() == [True, False]
    _, rows = fine_loss(
        (fine, context, sparse, torch.ones_like(valid)), FineMining(**SMALL), fine_draws(FineMining(**SMALL))
    )
    assert rows.matched is None


def test_equal_views_match_themselves_and_the_match_is_in_the_other_view():
    fine, context, place, valid = pair()
    same = [x[:1].expand(2, *x.shape[1:]).clone() for x in (fine, context, place, valid)]
    mining = FineMining(**SMALL)
    found, rows = fine_loss(same, mining, fine_draws(mining))
    assert torch.equal(rows.matched, rows.positive)
    assert ((rows.matched >= SIDE**3) == (rows.query < SIDE**3)).all()
    assert found.positive.item() == pytest.approx(1)


def test_distances_hold_far_from_the_origin():
    mining = FineMining(**SMALL)
    _, here = fine_loss(pair(), mining, fine_draws(mining))
    _, there = fine_loss(pair(origin_mm=(-900.0, 800.0, 2000.0)), mining, fine_draws(mining))
    assert torch.equal(here.query, there.query)
    assert torch.equal(here.positive, there.positive)


def test_the_fine_gradient_is_that_of_differences():
    fine, context, place, valid = pair()
    mining = FineMining(**SMALL)
    rows = mine_fine(fine, context, place, valid, mining=mining, draws=fine_draws(mining))
    fine = fine.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fine_contrast(x, rows, temperature=0.5).loss, fine)


def test_coarse_gradients_reach_query_positive_and_negatives_of_the_pair_and_of_others():
    coarse, place = coarse_case()
    mining = CoarseMining(**COARSE)
    coarse.requires_grad_()
    coarse_contrast(coarse, place, mining=mining, draws=coarse_draws(mining, (coarse, place))).loss.backward()
    assert (coarse.grad.norm(dim=-1) > 0).float().mean() > 0.9


def test_the_order_of_the_views_only_changes_which_height_limit_holds():
    coarse, place = coarse_case()
    mining = CoarseMining(num_hard=60, num_negatives=60, num_global=500, height_mm=[7.0, 7.0])
    draws = coarse_draws(mining, (coarse, place))
    there = coarse_contrast(coarse, place, mining=mining, draws=draws).loss
    back = coarse_contrast(coarse.flip(1), place.flip(1), mining=mining, draws=draws).loss
    assert there.item() == pytest.approx(back.item(), rel=1e-6)


def test_random_subsets_follow_the_uniform_numbers():
    mining = FineMining(**{**SMALL, "num_queries": 3, "num_candidates": 8})
    seen = Counter()
    for seed in range(30):
        _, rows = fine_loss(pair(), mining, fine_draws(mining, seed=seed))
        assert len(rows.query) <= 6
        seen.update(rows.query.tolist())
    assert len(seen) > 20


def test_a_row_without_negatives_has_no_loss():
    found = contrast(torch.tensor([0.3]), torch.full((1, 4), -torch.inf), temperature=0.5)
    assert (found.loss.item(), found.hardest.item()) == (0, -1)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FineMining, {"mask_value": "none"}, "FineMining: mask_value is 'none', allowed are neginf, zero"),
        (CoarseMining, {"temperature": 0.0}, "CoarseMining: temperature must be positive, got 0.0"),
        (FineMining, {"num_hard": 0}, "FineMining: num_hard must be at least 1, got 0"),
        (CoarseMining, {"height_mm": (8.0,)}, r"CoarseMining: height_mm must be two positive lengths.*got \[8.0\]"),
        (CoarseMining, {"height_mm": (8.0, -6.0)}, r"CoarseMining: height_mm must be two positive .*\[8.0, -6.0\]"),
        (FineMining, {"positive_mm": 0.0}, "FineMining: positive_mm must be positive, got 0.0"),
        (CoarseMining, {"ignore_mm": -1.0}, "CoarseMining: ignore_mm must be at least 0, got -1.0"),
        (CoarseMining, {"num_global": -1}, "CoarseMining: num_global must be at least 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
