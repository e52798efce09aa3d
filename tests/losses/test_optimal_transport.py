import pytest
import torch
from oracles.transport import matching, plan

from medssl.losses.optimal_transport import log_transport, matching_accuracy, matching_loss

ROWS = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 2, -1], [0, -1, 2], [0, -1, 3]])


def scores(b, m, n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(b, m, n, generator=generator, dtype=torch.float64)


@pytest.mark.parity
def test_the_card_s_plan_and_loss():
    waves = torch.sin(0.3 * torch.arange(12.0)).reshape(1, 3, 4)
    found = log_transport(waves, torch.tensor(1.0), num_iterations=100)
    first, last = [-2.5721, -2.2777, -2.0056, -1.7792, -0.6583], [-0.4861, -0.4873, -0.4843, -0.4766, 0.4277]
    assert found[0, 0].tolist() == pytest.approx(first, abs=5e-5)
    assert found[0, -1].tolist() == pytest.approx(last, abs=5e-5)
    assert found.exp().sum(2)[0].tolist() == pytest.approx([1, 1, 1, 4], abs=1e-4)
    assert found.exp().sum(1)[0].tolist() == pytest.approx([1, 1, 1, 1, 3], abs=1e-4)
    assert matching_loss(found, ROWS).item() == pytest.approx(1.459868, abs=1e-6)


def test_plans_and_losses_equal_loops_in_the_probability_domain():
    waves, dustbin = scores(2, 3, 4), 0.7
    found = log_transport(waves, torch.tensor(dustbin, dtype=torch.float64), num_iterations=30)
    plans = [plan(sample, dustbin, num_iterations=30) for sample in waves.tolist()]
    assert torch.allclose(found.exp(), torch.tensor(plans, dtype=torch.float64), atol=1e-12)
    pairs = torch.cat([ROWS, torch.tensor([[1, 0, 0], [1, 2, -1]])])
    for reduction in ("weighted_mean", "sum"):
        expected = matching(plans, pairs.tolist(), is_sum=reduction == "sum")
        assert matching_loss(found, pairs, reduction=reduction).item() == pytest.approx(expected, rel=1e-12)


def test_the_score_of_the_dustbin_may_be_a_number():
    waves = scores(2, 3, 4)
    assert torch.equal(log_transport(waves, 0.7), log_transport(waves, torch.tensor(0.7, dtype=torch.float64)))


def test_padding_changes_neither_plan_nor_gradient_whatever_it_holds():
    own = scores(1, 3, 4).requires_grad_()
    dustbin = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    alone = log_transport(own, dustbin)
    weight = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(1, 4, 5)
    expected = torch.autograd.grad((alone * weight).sum(), (own, dustbin))
    padded = torch.full((2, 5, 6), 37.0, dtype=torch.float64)
    padded[0, :3, :4] = own.detach()
    padded.requires_grad_()
    rows, columns = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    rows[0, :3], columns[0, :4], rows[1, :5], columns[1, :2] = True, True, True, True
    found = log_transport(padded, dustbin, row_valid=rows, column_valid=columns)
    kept = found[0][[0, 1, 2, 5]][:, [0, 1, 2, 3, 6]]
    assert torch.allclose(kept, alone[0], atol=5e-7)
    gradients = torch.autograd.grad((kept * weight[0]).sum(), (padded, dustbin))
    assert torch.allclose(gradients[0][0, :3, :4], expected[0][0], atol=1e-7)
    assert torch.allclose(gradients[1], expected[1], atol=1e-7)
    assert gradients[0][1].abs().max() == 0
    assert found.exp()[1, :5].sum(1).tolist() == pytest.approx([1] * 5, abs=1e-6)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (3, 0), (0, 0), (1, 1)])
def test_few_or_no_points_give_finite_plans(m, n):
    rows, columns = torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    rows[0, :m], columns[0, :n] = True, True
    waves = torch.zeros(1, 3, 4).requires_grad_()
    found = log_transport(waves, torch.tensor(1.0), row_valid=rows, column_valid=columns)
    assert found.isfinite().all()
    assert found.exp()[0, :m].sum(1).tolist() == pytest.approx([1.0] * m, abs=1e-4)
    pairs = torch.tensor([[0, i, -1] for i in range(m)]).reshape(-1, 3).long()
    loss = matching_loss(found, pairs)
    loss.backward()
    assert loss.isfinite()
    assert waves.grad.isfinite().all()


def test_likely_partners_have_a_small_loss_and_full_accuracy():
    waves = 40 * torch.eye(4)[None] - 20
    found = log_transport(waves, torch.tensor(-10.0), num_iterations=100)
    pairs = torch.tensor([[0, i, i] for i in range(4)])
    assert matching_loss(found, pairs) < 0.01
    assert matching_accuracy(found, pairs) == 1
    wrong = torch.tensor([[0, i, (i + 1) % 4] for i in range(3)] + [[0, 3, -1]])
    assert matching_accuracy(found, wrong) == 0
    assert matching_loss(found, wrong) > 10
    assert matching_accuracy(found, pairs[:0]) == 0


def test_a_term_is_at_most_100_and_an_unknown_reduction_is_refused():
    waves = torch.zeros(1, 2, 2)
    waves[0, 0, 0] = -1000.0
    found = log_transport(waves, torch.tensor(0.0))
    assert matching_loss(found, torch.tensor([[0, 0, 0]]), reduction="sum") == 100
    with pytest.raises(ValueError, match="reduction is 'mean', allowed are weighted_mean, sum"):
        matching_loss.__wrapped__(found, ROWS, reduction="mean")
