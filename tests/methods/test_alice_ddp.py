from pathlib import Path

import pytest
import torch
from ranks import run_ranks


@pytest.mark.ddp
def test_two_ranks_end_with_equal_weights_and_the_centre_of_all_rows(tmp_path):
    """Every trained weight takes part in each step, also while prototypes are frozen, or DDP would wait."""
    first, second = run_ranks(Path(__file__).with_name("ranks_alice.py"), tmp_path)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    rows = torch.stack([first["rows"], second["rows"]])  # (rank, step x micro-batch x view x sample, prototype)
    assert not torch.allclose(rows[0], rows[1])
    centre = torch.zeros(12)
    for step in rows.unflatten(1, (2, -1)).unbind(1):
        centre = 0.9 * centre + 0.1 * step.mean((0, 1))
    assert torch.allclose(first["state"]["centre"][0], centre, atol=1e-7)
    assert first["state"]["token_centre"].abs().max() > 0
