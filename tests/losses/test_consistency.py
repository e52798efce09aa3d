import json
import math
from pathlib import Path

import pytest
import torch
from oracles import self_distillation as oracle

from medssl.losses.consistency import (
    centred_softmax,
    cosine_distance_of_views,
    cross_entropy_of_views,
    direction_spread,
    mean_entropy,
    sinkhorn,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())["consistency"]


def card_rows():
    """Student rows (2 global, 3 local views of 2 samples) and teacher rows, view-major."""
    k = torch.arange(16, dtype=torch.float64)
    student = torch.sin(0.7 * torch.arange(10, dtype=torch.float64)[:, None] + 0.3 * k)
    teacher = torch.cos(0.5 * torch.arange(4, dtype=torch.float64)[:, None] + 0.2 * k)
    return student.unflatten(0, (5, 2)), teacher.unflatten(0, (2, 2))


def card_losses(centre):
    student, teacher = card_rows()
    probabilities = centred_softmax(teacher, centre, temperature=0.04)
    by_pairs = {
        pairs: cross_entropy_of_views(student[:2], probabilities, temperature=0.1, pairs=pairs).item()
        for pairs in ("all", "same", "cross")
    }
    return by_pairs, cross_entropy_of_views(student[2:], probabilities, temperature=0.1).item()


@pytest.mark.parity
def test_the_card_s_rows_give_the_card_s_losses():
    by_pairs, local = card_losses(torch.zeros(1, 16, dtype=torch.float64))
    assert by_pairs == pytest.approx(GOLDEN["global"], rel=1e-14)
    assert local == pytest.approx(GOLDEN["local"], rel=1e-14)
    assert (2 * by_pairs["cross"] + 6 * local) / 8 == pytest.approx(GOLDEN["dino_total"], rel=1e-14)


@pytest.mark.parity
def test_the_second_call_uses_the_centre_of_the_first():
    centre = 0.1 * card_rows()[1].flatten(0, 1).mean(0, keepdim=True)
    assert centre[0, :4].tolist() == pytest.approx(GOLDEN["centre_start"], abs=1e-10)
    assert centre.sum().item() == pytest.approx(GOLDEN["centre_sum"], abs=1e-10)
    by_pairs, local = card_losses(centre)
    assert (2 * by_pairs["cross"] + 6 * local) / 8 == pytest.approx(GOLDEN["dino_total_second_call"], rel=1e-13)


@pytest.mark.parametrize("pairs", ["all", "same", "cross"])
@pytest.mark.parametrize("num_student", [1, 2, 4])
def test_cross_entropy_matches_a_loop_over_views_and_samples(pairs, num_student):
    student, teacher = torch.randn(num_student, 3, 6), torch.randn(2, 3, 6).softmax(-1)
    expected = oracle.cross_entropy(student, teacher, temperature=0.3, pairs=pairs)
    loss = cross_entropy_of_views(student, teacher, temperature=0.3, pairs=pairs)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pairs", ["all", "same", "cross"])
def test_cosine_distance_matches_a_loop_over_views_and_samples(pairs):
    student, teacher = torch.randn(3, 2, 6), torch.randn(2, 2, 6)
    terms = [
        2 - 2 * torch.cosine_similarity(student[j, n], teacher[i, n], dim=0).item()
        for i in range(2)
        for j in range(3)
        for n in range(2)
        if pairs == "all" or (i == j) == (pairs == "same")
    ]
    loss = cosine_distance_of_views(student, teacher, pairs=pairs)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert cosine_distance_of_views(teacher, teacher, pairs="same").item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [cross_entropy_of_views, cosine_distance_of_views])
def test_only_the_student_gets_a_gradient_and_it_is_right(loss):
    options = {"temperature": 0.5} if loss is cross_entropy_of_views else {}
    student = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.rand(2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, pairs="cross", **options), student)
    loss(student, teacher, **options).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", [cross_entropy_of_views, cosine_distance_of_views])
def test_an_empty_set_of_pairs_gives_zero_with_a_gradient_of_zero(loss):
    options = {"temperature": 0.1} if loss is cross_entropy_of_views else {}
    student = torch.randn(1, 2, 4, requires_grad=True)
    value = loss(student, torch.randn(1, 2, 4).softmax(-1), pairs="cross", **options)
    value.backward()
    assert value.item() == 0
    assert student.grad.abs().max() == 0


def test_sinkhorn_matches_the_plain_form_and_uses_prototypes_equally():
    logits = torch.randn(12, 5, dtype=torch.float64)
    found = sinkhorn(logits, temperature=0.5)
    assert torch.allclose(found, oracle.sinkhorn(logits, temperature=0.5, rounds=3), atol=1e-12)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 12)
    assert sinkhorn(logits, temperature=0.5, num_iterations=100).sum(0).tolist() == pytest.approx([12 / 5] * 5)


def test_sinkhorn_of_two_ranks_equals_sinkhorn_of_one():
    # Each rank asks for the totals in the same order, so one recorded run of the whole batch answers both halves.
    logits = torch.randn(8, 5, dtype=torch.float64)
    whole = oracle.sinkhorn(logits, temperature=0.3, rounds=3)
    column_sums = []
    weights = (logits / 0.3).exp()
    for _ in range(3):
        column_sums.append(weights.sum(0))
        weights = weights / column_sums[-1] / 5
        weights = weights / weights.sum(1, keepdim=True) / 8
    answers = [torch.zeros(()), torch.ones(()), torch.tensor(8.0), *column_sums]
    for rows in (slice(0, 4), slice(4, 8)):
        script = iter(answers)
        found = sinkhorn(logits[rows], temperature=0.3, total=lambda _, script=script: next(script).double())
        assert torch.allclose(found, whole[rows], atol=1e-12)


def test_entropies_of_certain_and_uniform_rows():
    assert mean_entropy(torch.eye(4)).item() == 0
    assert mean_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_half_precision_logits_are_widened_before_the_softmax():
    student, teacher = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = centred_softmax(teacher, torch.zeros(1, 64), temperature=0.04)
        loss = cross_entropy_of_views(student, probabilities, temperature=0.1)
    expected = oracle.cross_entropy(student.float(), (teacher.float() / 0.04).softmax(-1), temperature=0.1, pairs="all")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_unknown_set_of_pairs_is_refused():
    with pytest.raises(ValueError, match="pairs is 'some', allowed are all, same, cross"):
        cross_entropy_of_views(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), temperature=1.0, pairs="some")


def test_spread_of_directions_is_one_over_a_sphere_and_zero_for_one_direction():
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert direction_spread(rows).item() == pytest.approx(1, abs=0.01)
    assert direction_spread(rows * rows.norm(dim=1, keepdim=True)).item() == pytest.approx(1, abs=0.01)
    assert direction_spread(rows[:1] * torch.arange(1, 5)[:, None]).item() == pytest.approx(0, abs=1e-6)
