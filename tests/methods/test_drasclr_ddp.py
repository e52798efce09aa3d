import subprocess
import sys
from pathlib import Path

import pytest
import torch


def train(folder, *, world, key_norm):
    """What each of `world` processes ends with."""
    script, meet = Path(__file__).with_name("two_ranks_drasclr.py"), folder / f"meet-{world}-{key_norm}"
    tests = str(Path(__file__).parents[1])
    outs = [folder / f"{world}-{rank}-{key_norm}.pt" for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(world), str(meet), str(out), key_norm],
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": tests, "OMP_NUM_THREADS": "1"},
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, errors
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.ddp
def test_two_ranks_do_together_what_one_does_alone(tmp_path):
    """Without batch statistics: the same queue in the same order, the same weights, losses that average to its own."""
    (alone,), (first, second) = (train(tmp_path, world=world, key_norm="plain") for world in (1, 2))
    for name, value in alone["state"].items():
        assert torch.allclose(first["state"][name], value, atol=1e-6, equal_nan=True), name
        assert torch.equal(first["state"][name].nan_to_num(), second["state"][name].nan_to_num()), name
    assert alone["state"]["queue.position"].tolist() == [0, 0, 8]
    assert alone["state"]["queue.subjects"][1].tolist() == [*range(8), *range(16, 24)]
    means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.ddp
def test_keys_shuffled_over_ranks_come_back_to_their_subjects(tmp_path):
    first, second = train(tmp_path, world=2, key_norm="shuffle")
    for name, value in first["state"].items():
        if "bn." not in name:  # each rank has batch statistics of its own passes
            assert torch.equal(value.nan_to_num(), second["state"][name].nan_to_num()), name
    assert first["state"]["queue.subjects"][1].tolist() == [*range(8), *range(16, 24)]
    (alone,) = train(tmp_path, world=1, key_norm="shuffle")
    mine, theirs = (state["state"]["queue.keys"][1, :8] for state in (first, alone))
    assert torch.nn.functional.cosine_similarity(mine, theirs).min() > 0.8, "in order, but for the batch statistics"
