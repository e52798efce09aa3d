from pathlib import Path

import pytest
import torch
from ranks import run_ranks


@pytest.mark.ddp
@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_two_ranks_end_with_equal_weights_and_the_centre_of_all_rows(tmp_path, centering):
    first, second = run_ranks(Path(__file__).with_name("ranks_glmae.py"), tmp_path, centering)
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    rows = torch.stack([first["anchors"], second["anchors"]])  # (rank, step x micro-batch x view x sample, prototype)
    assert not torch.allclose(rows[0], rows[1])
    centre = torch.zeros(6)
    for step in rows.unflatten(1, (2, -1)).unbind(1):
        centre = 0.9 * centre + 0.1 * step.mean((0, 1))
    assert torch.allclose(first["state"]["centre"][0], centre, atol=1e-7)
