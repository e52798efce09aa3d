from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_mae.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with four samples, and two with two of them each."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SCRIPT, folder, world=1)[0], *run_ranks(SCRIPT, folder)


@pytest.mark.ddp
@pytest.mark.parametrize("case", ["cnn", "vit", "simmim", "valid"])
def test_two_processes_have_loss_and_gradients_of_one_with_the_joint_batch(runs, case):
    together, first, second = (run[case] for run in runs)
    assert first["loss"] != second["loss"]
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(together["loss"].item(), rel=1e-12)
    for name, gradient in together["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-9, atol=1e-14)
        assert torch.equal(first["gradients"][name], second["gradients"][name])
