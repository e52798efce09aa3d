"""The losses of VoCo against reference values, plain loops and their gradients."""

import math

import pytest
import torch

from medssl.losses.volume_contrast import base_similarity, box_overlap, overlap_losses, predicted_overlap


def boxes(corners, side):
    """Faces (1, box, 2, 3) of boxes with these lower corners, in a field of 1."""
    lower = torch.tensor(corners, dtype=torch.float64)
    return torch.stack([lower, lower + torch.tensor(side, dtype=torch.float64)], dim=1)[None]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("center", "expected"),
    [
        ((100, 200), {1: 0.190972, 2: 0.267361, 5: 0.225694, 6: 0.315972}),
        ((150, 60), {4: 0.820312, 5: 0.117188, 8: 0.054688, 9: 0.007812}),
    ],
)
def test_overlaps_with_the_cells_of_a_field_are_the_reference_labels(center, expected):
    """References card, section 5: a field of 384, cells of 96, number 4 ix + iy."""
    cells = boxes([(i / 4, j / 4, 0) for i in range(4) for j in range(4)], [1 / 4, 1 / 4, 1])
    target = boxes([((center[0] - 48) / 384, (center[1] - 48) / 384, 0)], [1 / 4, 1 / 4, 1])
    found = box_overlap(target, cells)[0, 0]
    assert {k: round(value, 6) for k, value in enumerate(found.tolist()) if value} == expected
    assert found.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_box_that_equals_a_cell_overlaps_with_it_alone_also_after_rounding():
    cells = boxes([(i / 3, 0, 0) for i in range(3)], [1 / 3, 1, 1])
    moved = boxes([(1 / 3 + 1e-12, 0, 0)], [1 / 3, 1, 1])
    assert box_overlap(moved, cells)[0, 0, [0, 2]].tolist() == [0, 0]
    assert box_overlap(moved, cells)[0, 0, 1].item() == pytest.approx(1)


def test_similarities_are_cosines_without_the_negative_ones():
    target, base = torch.tensor([[[1.0, 0], [0, 3]]]), torch.tensor([[[2.0, 2], [-1, 0], [5, 0]]])
    expected = [[math.sqrt(0.5), 0, 1], [math.sqrt(0.5), 0, 0]]
    torch.testing.assert_close(predicted_overlap(target, base), torch.tensor([expected]))


@pytest.mark.parametrize("form", ["released", "first", "nnssl"])
def test_the_losses_match_a_plain_loop(form):
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    overlap = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    overlap[overlap < 0.5] = 0
    overlap[1, 0] = torch.tensor([0.0, 0.2, 0.3, 0.5])  # the volumes have different numbers of pairs
    batches = [[0], [1]] if form != "nnssl" else [[0, 1]]
    positives, negatives = [], []
    for volumes in batches:
        top = bottom = squares = count = 0.0
        for volume in volumes:
            for y, s in zip(overlap[volume].flatten().tolist(), predicted[volume].flatten().tolist(), strict=True):
                weight = float(y > 0) if form == "first" else y
                top -= weight * math.log(1 - abs(y - s) + 1e-6)
                bottom += weight
                squares += s**2 if y == 0 else 0
                count += y == 0
        positives.append(top / (bottom + 1e-6))
        negatives.append(squares / (count + 1e-6))
    positive, negative = overlap_losses(predicted, overlap, form=form)
    assert positive.item() == pytest.approx(sum(positives) / len(positives), rel=1e-12)
    assert negative.item() == pytest.approx(sum(negatives) / len(negatives), rel=1e-12)


def test_bases_are_compared_in_pairs_of_one_volume_with_gradient_to_both():
    base = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    cosines = [
        max(0.0, torch.cosine_similarity(base[n, k], base[n, j], dim=0).item())
        for n in range(2)
        for j in range(4)
        for k in range(j)
    ]
    assert base_similarity(base, squared=False).item() == pytest.approx(sum(cosines) / 12, rel=1e-12)
    found = base_similarity(base)
    assert found.item() == pytest.approx(sum(c**2 for c in cosines) / 12, rel=1e-12)
    found.backward()
    assert torch.autograd.gradcheck(base_similarity, (base,))
    order = torch.tensor([2, 0, 3, 1])
    (permuted,) = torch.autograd.grad(base_similarity(base[:, order]), base)
    torch.testing.assert_close(permuted, base.grad)  # the order of the bases changes no gradient


def test_a_perfect_prediction_costs_nothing_and_the_worst_stays_finite_in_half_precision():
    overlap = torch.eye(3)[None]
    positive, negative = overlap_losses(overlap, overlap)
    assert positive.item() == pytest.approx(0, abs=2e-6)
    assert negative == 0
    worst, _ = overlap_losses(torch.zeros(1, 3, 3, dtype=torch.bfloat16), overlap)
    assert worst.dtype == torch.float32
    assert worst.item() == pytest.approx(-math.log(1e-6), rel=0.02)
    nothing = overlap_losses(torch.rand(1, 2, 2), torch.zeros(1, 2, 2))[0]
    assert nothing == 0


def test_the_loss_of_overlaps_has_the_gradient_of_its_values():
    overlap = torch.tensor([[[0.3, 0.7, 0], [0, 0.1, 0.9]]], dtype=torch.float64)
    predicted = torch.tensor([[[0.5, 0.2, 0.4], [0.6, 0.3, 0.2]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: sum(overlap_losses(s, overlap)), (predicted,))
    with pytest.raises(ValueError, match="form is 'paper', allowed are released, first, nnssl"):
        overlap_losses(predicted, overlap, form="paper")
