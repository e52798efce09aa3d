import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl.ops.gather import gather_ranks, gather_with_gradient, sum_over_ranks


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


@pytest.mark.ddp
def test_a_loss_over_the_rows_of_two_ranks_has_the_gradient_of_one_process(tmp_path):
    script = Path(__file__).with_name("two_ranks_gather.py")
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meet"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).double()
    rows = gather_with_gradient(layer(torch.arange(12.0, dtype=torch.float64).reshape(4, 3).sin()))
    (rows @ rows.T).sin().sum().backward()
    for out in outs:
        found = torch.load(out, weights_only=True)
        assert torch.allclose(found["rows"], rows)
        assert torch.allclose(found["gradient"], layer.weight.grad, atol=1e-12)
