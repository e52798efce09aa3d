from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = Path(__file__).with_name("ranks_drasclr.py")


@pytest.mark.ddp
def test_two_ranks_do_together_what_one_does_alone(tmp_path):
    """Without batch statistics: the same queue in the same order, the same weights, losses that average to its own."""
    (alone,), (first, second) = (run_ranks(SCRIPT, tmp_path, "plain", world=world) for world in (1, 2))
    for name, value in alone["state"].items():
        assert torch.allclose(first["state"][name], value, atol=1e-6, equal_nan=True), name
        assert torch.equal(first["state"][name].nan_to_num(), second["state"][name].nan_to_num()), name
    assert alone["state"]["queue.position"].tolist() == [0, 0, 8]
    assert alone["state"]["queue.subjects"][1].tolist() == [*range(8), *range(16, 24)]
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.ddp
def test_keys_shuffled_over_ranks_come_back_to_their_subjects(tmp_path):
    first, second = run_ranks(SCRIPT, tmp_path, "shuffle")
    for name, value in first["state"].items():
        if "bn." not in name:  # each rank has batch statistics of its own passes
            assert torch.equal(value.nan_to_num(), second["state"][name].nan_to_num()), name
    assert first["state"]["queue.subjects"][1].tolist() == [*range(8), *range(16, 24)]
    (alone,) = run_ranks(SCRIPT, tmp_path, "shuffle", world=1)
    mine, theirs = (state["state"]["queue.keys"][1, :8] for state in (first, alone))
    assert torch.nn.functional.cosine_similarity(mine, theirs).min() > 0.8, "in order, but for the batch statistics"
