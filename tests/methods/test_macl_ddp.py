from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_macl.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with four samples, and two with two of them each."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SCRIPT, folder, world=1)[0], *run_ranks(SCRIPT, folder)


@pytest.mark.ddp
@pytest.mark.parametrize("gather", ["always", "small"])
def test_two_processes_have_loss_and_gradients_of_one_with_the_joint_batch(runs, gather):
    """The equivariance is a mean of the processes' own."""
    together, first, second = (run[gather] for run in runs)
    for term in ("global", "dense", "num_positives", "num_compared"):
        assert first["logs"][term] == second["logs"][term]
        assert first["logs"][term].item() == pytest.approx(together["logs"][term].item(), rel=1e-12)
    assert first["logs"]["num_positives"] == 0.5  # two of four samples are neighbours, each on a process of its own
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(together["loss"].item(), rel=1e-12)
    assert first["gradients"].keys() == together["gradients"].keys()
    for name, gradient in together["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-9, atol=1e-14)
        assert torch.equal(first["gradients"][name], second["gradients"][name])


@pytest.mark.ddp
def test_without_gathering_each_process_contrasts_its_own_samples(runs):
    together, first, second = (run["never"]["logs"] for run in runs)
    assert first["global"] != second["global"]
    assert (first["num_compared"], first["num_positives"]) == (1, 0)
    assert first["global"].item() != pytest.approx(together["global"].item(), rel=1e-3)
