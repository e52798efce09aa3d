from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_kaf.py")


@pytest.mark.ddp
def test_two_ranks_have_the_gradient_of_one_with_the_whole_batch(tmp_path):
    (alone,), (first, second) = (run_ranks(SCRIPT, tmp_path, world=world) for world in (1, 2))
    assert (first["loss"] + second["loss"]).item() / 2 == pytest.approx(alone["loss"].item(), rel=1e-5)
    for term in ("image", "keypoints", "num_positives", "feature_std"):
        expected = pytest.approx(alone["logs"][term].item(), rel=1e-5)
        assert [rank["logs"][term].item() for rank in (first, second)] == [expected] * 2, "both see all views"
    assert first["logs"]["matching"] != second["logs"]["matching"], "each matches its own samples"
    for name, gradient in alone["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name]), name
        assert torch.allclose(first["gradients"][name], gradient, rtol=1e-4, atol=1e-6), name
