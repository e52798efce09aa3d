from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_models_genesis.py")


@pytest.mark.ddp
def test_two_processes_have_loss_and_gradients_of_one_with_the_joint_batch(tmp_path):
    together, first, second = run_ranks(SCRIPT, tmp_path, world=1)[0], *run_ranks(SCRIPT, tmp_path)
    assert first["loss"] != second["loss"]
    for name, value in together["logs"].items():
        assert (first["logs"][name] + second["logs"][name]).item() / 2 == pytest.approx(value.item(), rel=1e-12)
    for name, gradient in together["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-9, atol=1e-14)
        assert torch.equal(first["gradients"][name], second["gradients"][name])
    assert not torch.equal(first["drawn"], second["drawn"]), "each process draws its own"
