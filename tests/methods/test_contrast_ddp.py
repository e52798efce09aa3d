from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_contrast.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process with four samples, and two with two of them each."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SCRIPT, folder, world=1)[0], *run_ranks(SCRIPT, folder)


@pytest.mark.ddp
@pytest.mark.parametrize("name", ["simclr", "voco", "voco of nnssl", "voco with a teacher"])
def test_two_processes_have_loss_and_gradients_of_one_with_the_joint_batch(runs, name):
    together, first, second = (run[name] for run in runs)
    assert ((first["loss"] + second["loss"]) / 2).item() == pytest.approx(together["loss"].item(), rel=1e-12)
    assert first["gradients"].keys() == together["gradients"].keys()
    for key, gradient in together["gradients"].items():
        torch.testing.assert_close(first["gradients"][key], gradient, rtol=1e-9, atol=1e-14)
        assert torch.equal(first["gradients"][key], second["gradients"][key])


@pytest.mark.ddp
def test_simclr_contrasts_the_crops_of_all_processes_or_those_of_each(runs):
    together, first, second = (run["simclr"]["logs"] for run in runs)
    for term in together:
        assert first[term] == second[term]
        assert first[term].item() == pytest.approx(together[term].item(), rel=1e-9)
    assert first["contrast_at_collapse"].exp().item() == pytest.approx(15)
    together, first, second = (run["simclr alone"]["logs"] for run in runs)
    assert first["contrast"] != second["contrast"]
    assert first["contrast_at_collapse"].exp().item() == pytest.approx(7)


@pytest.mark.ddp
@pytest.mark.parametrize("name", ["voco", "voco of nnssl"])
def test_the_pictures_of_voco_show_the_volumes_of_their_own_process(runs, name):
    together, first, second = (run[name]["extras"] for run in runs)
    for key in ("overlap", "predicted"):
        torch.testing.assert_close(torch.cat([first[key], second[key]]), together[key])
