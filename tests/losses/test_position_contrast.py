import pytest
import torch
from oracles.transport import positive_contrast

from medssl.losses.position_contrast import contrast_of_positives, equal_labels
from medssl.methods.positions import near_positions


def card():
    """Two views of four images: all first views, then all second ones."""
    features = torch.sin(0.37 * torch.arange(64.0, dtype=torch.float64)).reshape(4, 2, 8)
    position = torch.tensor([0.1, 0.15, 0.5, 0.9], dtype=torch.float64).repeat(2)
    return torch.cat([features[:, 0], features[:, 1]]), torch.stack([0 * position, 0 * position, position], dim=1)


@pytest.mark.parity
def test_the_card_s_values():
    vectors, position = card()
    by_position = near_positions(position[:, 2:], threshold=0.1)
    assert contrast_of_positives(vectors, by_position).item() == pytest.approx(23.30359, abs=5e-6)
    by_image = equal_labels(torch.arange(4).repeat(2))
    assert contrast_of_positives(vectors, by_image).item() == pytest.approx(28.02613, abs=5e-6)
    two = torch.zeros(8, 8, dtype=torch.bool)
    for first in (0, 1):
        two[first, first + 4] = two[first + 4, first] = True
    assert contrast_of_positives(vectors, two).item() == pytest.approx(28.09705, abs=5e-6)


@pytest.mark.parametrize("base_temperature", [0.07, 0.1])
def test_the_loss_equals_loops_over_rows_and_positives(base_temperature):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    positive = torch.rand(9, 9, generator=generator) > 0.7
    positive[3] = False
    found = contrast_of_positives(vectors, positive, temperature=0.1, base_temperature=base_temperature)
    expected = positive_contrast(
        vectors.tolist(), positive.tolist(), temperature=0.1, base_temperature=base_temperature
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)
    scaled = contrast_of_positives(3 * vectors, positive, temperature=0.1, base_temperature=base_temperature)
    assert scaled.item() == pytest.approx(found.item(), rel=1e-12)


def test_without_any_positive_the_loss_and_its_gradient_are_zero():
    vectors = torch.randn(4, 3).requires_grad_()
    loss = contrast_of_positives(vectors, torch.eye(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert vectors.grad.abs().max() == 0
