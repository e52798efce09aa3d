from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from medssl.ops.gather import gather_objects, gather_ranks, gather_with_gradient, rank_and_world, sum_over_ranks


def test_one_process_gets_a_copy_without_gradient():
    tensor = torch.ones(3, requires_grad=True)
    total = sum_over_ranks(tensor)
    assert total.tolist() == [1, 1, 1]
    assert not total.requires_grad
    total += 1
    assert tensor.tolist() == [1, 1, 1]


def test_the_rows_of_one_process_are_its_own():
    tensor = torch.rand(2, 3, requires_grad=True)
    rows = gather_ranks(tensor)
    assert torch.equal(rows, tensor)
    assert not rows.requires_grad


def test_a_process_on_its_own_is_the_first_of_one():
    assert rank_and_world() == (0, 1)
    assert gather_objects("own") == ["own"]


@pytest.mark.ddp
def test_a_loss_over_the_rows_of_two_ranks_has_the_gradient_of_one_process(tmp_path):
    ranks = run_ranks(Path(__file__).with_name("ranks_gather.py"), tmp_path)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).double()
    rows = gather_with_gradient(layer(torch.arange(12.0, dtype=torch.float64).reshape(4, 3).sin()))
    (rows @ rows.T).sin().sum().backward()
    for found in ranks:
        assert torch.allclose(found["rows"], rows)
        assert torch.allclose(found["gradient"], layer.weight.grad, atol=1e-12)
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
    assert [found["number"] for found in ranks] == [(0, 2), (1, 2)]
