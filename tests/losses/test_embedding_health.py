"""Signs of a collapse: spread and rank of embeddings, and how often a positive is the nearest."""

import math

import numpy as np
import pytest
import torch

from medssl.losses.consistency import effective_rank
from medssl.losses.position_contrast import equal_labels, nearest_is_positive


def test_the_effective_rank_is_that_of_the_singular_values_of_directions():
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for vectors in (rows, rows.T.contiguous()):
        values = np.linalg.svd((vectors / vectors.norm(dim=1, keepdim=True)).numpy().astype(float), compute_uv=False)
        share = values / values.sum()
        assert effective_rank(vectors).item() == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert effective_rank(torch.eye(5) * 3).item() == pytest.approx(5)
    assert effective_rank(rows[:1].repeat(4, 1) * torch.tensor([[1.0], [2], [5], [9]])).item() == pytest.approx(
        1, abs=1e-3
    )


def test_a_row_counts_if_the_nearest_other_row_is_its_positive():
    rows = torch.tensor([[1.0, 0], [5, 1], [0, 2], [-1, 0], [-3, 0.1]])
    positive = equal_labels(torch.tensor([0, 0, 1, 1, 2]))
    assert nearest_is_positive(rows, positive).item() == pytest.approx(2 / 5)  # rows 0 and 1
