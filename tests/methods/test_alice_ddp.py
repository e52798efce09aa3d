import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.ddp
def test_two_ranks_end_with_equal_weights_and_the_centre_of_all_rows(tmp_path):
    """Every trained weight takes part in each step, also while prototypes are frozen, or DDP would wait."""
    script = Path(__file__).with_name("two_ranks_alice.py")
    commands = [
        [sys.executable, str(script), str(rank), str(tmp_path / "meet"), str(tmp_path / f"{rank}.pt")]
        for rank in range(2)
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    rows = torch.stack([first["rows"], second["rows"]])  # (rank, step x micro-batch x view x sample, prototype)
    assert not torch.allclose(rows[0], rows[1])
    centre = torch.zeros(12)
    for step in rows.unflatten(1, (2, -1)).unbind(1):
        centre = 0.9 * centre + 0.1 * step.mean((0, 1))
    assert torch.allclose(first["state"]["centre"][0], centre, atol=1e-7)
    assert first["state"]["token_centre"].abs().max() > 0
