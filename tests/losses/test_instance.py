import math

import pytest
import torch
import torch.nn.functional as F
from oracles.instance import cross_entropies, summed

from medssl.losses.instance import Negatives, discriminate, queue_logits


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def negatives(queries, *, length=6, rings=(0, 1, 1, 0), own=()):
    excluded = torch.zeros(len(rings), length, dtype=torch.bool)
    for row, entry in own:
        excluded[row, entry] = True
    return Negatives(unit(2, length, queries.shape[1], seed=9), torch.tensor(rings), excluded)


def test_losses_equal_loops_over_queries_and_keys():
    query, key, near = unit(4, 5), unit(4, 5, seed=1), unit(4, 3, 5, seed=2)
    rest = negatives(query, own=[(1, 2), (3, 0), (3, 5)])
    subjects = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
    queues = [list(zip(ring.tolist(), who, strict=True)) for ring, who in zip(rest.keys, subjects, strict=True)]
    for vectors in (query.tolist(), summed(near.tolist())):
        for number, subject in ((1, 22), (3, 10)):
            own = [-1, -1, -1, -1]
            own[number] = subject
            only = negatives(query, own=[(1, 2)] if number == 1 else [(3, 0)])
            logits = queue_logits(torch.tensor(vectors, dtype=torch.float64), key, only, temperature=0.2)
            expected = cross_entropies(vectors, key.tolist(), queues, rings=(0, 1, 1, 0), own=own, temperature=0.2)
            assert discriminate(logits).loss.item() == pytest.approx(sum(expected) / 4, rel=1e-12)
            some = torch.tensor([True, False, False, True])
            half = (expected[0] + expected[3]) / 2
            assert discriminate(logits, counted=some).loss.item() == pytest.approx(half, rel=1e-12)


def test_twice_a_neighbour_gives_twice_its_logits():
    near, key = unit(4, 5), unit(4, 5, seed=1)
    once = queue_logits(near, key, negatives(near), temperature=0.2)
    assert torch.allclose(queue_logits(near + near, key, negatives(near), temperature=0.2), 2 * once)


def test_gradient_flows_to_queries_alone():
    query, key = unit(4, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    rest = negatives(query)
    rest.keys.requires_grad_()
    discriminate(queue_logits(query, key, rest, temperature=0.2)).loss.backward()
    assert query.grad.abs().min() > 0
    assert key.grad is None
    assert rest.keys.grad is None


def test_excluded_keys_change_nothing_whatever_they_are():
    query, key = unit(4, 5), unit(4, 5, seed=1)
    rest = negatives(query, own=[(0, 3)])
    before = discriminate(queue_logits(query[:1], key[:1], _row(rest, 0), temperature=0.2)).loss
    rest.keys[0, 3] = query[0]
    assert torch.equal(discriminate(queue_logits(query[:1], key[:1], _row(rest, 0), temperature=0.2)).loss, before)
    rest.keys[0, 2] = query[0]
    assert discriminate(queue_logits(query[:1], key[:1], _row(rest, 0), temperature=0.2)).loss > before


def _row(rest, number):
    return Negatives(rest.keys, rest.queue[number : number + 1], rest.excluded[number : number + 1])


def test_no_query_at_all_gives_zero_and_a_gradient_of_zero():
    query = unit(4, 5).requires_grad_()
    logits = queue_logits(query, unit(4, 5, seed=1), negatives(query), temperature=0.2)
    found = discriminate(logits, counted=torch.zeros(4, dtype=torch.bool))
    found.loss.backward()
    assert found.loss == 0
    assert found.top1 == 0
    assert query.grad.abs().max() == 0


@pytest.mark.parity
@pytest.mark.parametrize(("length", "expected"), [(4096, 3.448), (64, 0.389)])
def test_equal_views_and_random_queues_start_at_the_card_s_loss(length, expected):
    """log(1 + K exp(1 / (2 C t^2)) / exp(1 / t)) with 128 channels; the card measured 3.459 and 0.379."""
    query = unit(64, 128)
    rest = Negatives(unit(1, length, 128, seed=4), torch.zeros(64, dtype=torch.long), torch.zeros(64, length).bool())
    found = discriminate(queue_logits(query, query, rest, temperature=0.2))
    formula = math.log(1 + length * math.exp(1 / (2 * 128 * 0.04)) / math.exp(5))
    assert formula == pytest.approx(expected, abs=5e-4)
    assert found.loss.item() == pytest.approx(expected, abs=0.03)
    assert found.top1 == 1
