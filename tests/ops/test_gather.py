import torch

from medssl.ops.gather import gather_ranks, sum_over_ranks


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
