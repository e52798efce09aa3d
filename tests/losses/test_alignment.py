import json
from pathlib import Path

import pytest
import torch
from oracles import alignment as oracle

from medssl.losses.alignment import halved_mse, inter_volume_loss, intra_volume_loss
from medssl.ops.schedules import teacher_temperature

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "alice.json").read_text())["losses"]
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def wave(shape, step, function=torch.sin):
    return function(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).reshape(shape)


@pytest.mark.parity
def test_three_calls_with_centres_in_between_give_the_card_s_values():
    """The teacher's temperature goes from 0.04 to 0.07 within the first three epochs; calls in epochs 0, 1 and 5."""
    crops, anchors = (0.2 * wave((2, 1, 16), 0.3, function) for function in (torch.sin, torch.cos))
    tokens, targets = (0.2 * wave((2, 5, 16), 0.1, function) for function in (torch.sin, torch.cos))
    images = torch.cat([wave((1, 1, 4, 4, 4), 0.05), wave((1, 1, 4, 4, 4), 0.07)])
    reconstruction = wave((2, 1, 4, 4, 4), 0.02)
    centre, token_centre = torch.zeros(1, 16, dtype=torch.float64), torch.zeros(1, 16, dtype=torch.float64)
    for call, epoch in enumerate((0, 1, 5)):
        temperature = teacher_temperature(epoch, 3, start=0.04, end=0.07)
        options = {"student_temperature": 0.1, "teacher_temperature": temperature}
        found = inter_volume_loss(crops, anchors, centre, **options)
        assert found.item() == pytest.approx(GOLDEN["inter_volume"][call], abs=2e-6)
        found = intra_volume_loss(tokens, targets, token_centre, **options)
        assert found.item() == pytest.approx(GOLDEN["intra_volume"][call], abs=2e-6)
        found = 10 * halved_mse(reconstruction, images)
        assert found.item() == pytest.approx(GOLDEN["weighted_reconstruction"][call], abs=2e-6)
        centre = 0.9 * centre + 0.1 * anchors.mean((0, 1))
        token_centre = 0.9 * token_centre + 0.1 * targets.mean((0, 1))
        assert centre.sum().item() == pytest.approx(GOLDEN["centre_sum"][call], abs=1e-6)
        assert token_centre.sum().item() == pytest.approx(GOLDEN["token_centre_sum"][call], abs=1e-6)


@pytest.mark.parity
def test_the_teacher_s_temperature_is_the_released_table_at_whole_epochs():
    table = torch.linspace(0.008, 0.01, 30, dtype=torch.float64).tolist()
    found = [teacher_temperature(epoch, 30, start=0.008, end=0.01) for epoch in range(32)]
    assert found == pytest.approx([*table, 0.01, 0.01], abs=1e-12)
    assert teacher_temperature(0.5, 2, start=0.1, end=0.3) == pytest.approx(0.2)
    assert [teacher_temperature(0, n, start=0.1, end=0.3) for n in (0, 1)] == [0.3, 0.3], "nothing to rise in"


def test_the_losses_equal_loops_over_crops_tokens_and_voxels():
    torch.manual_seed(0)
    crops, anchors, centre = torch.randn(2, 3, 6) / 5, torch.randn(2, 3, 6) / 5, torch.randn(1, 6) / 5
    found = inter_volume_loss(crops, anchors, centre, **TEMPERATURES).item()
    assert found == pytest.approx(oracle.inter_volume(crops, anchors, centre[0], **TEMPERATURES), rel=1e-5)
    tokens, targets = torch.randn(6, 4, 6) / 5, torch.randn(6, 4, 6) / 5
    found = intra_volume_loss(tokens, targets, centre, **TEMPERATURES).item()
    assert found == pytest.approx(oracle.intra_volume(tokens, targets, centre[0], **TEMPERATURES), rel=1e-5)
    first, second = torch.randn(2, 1, 3, 4, 5), torch.randn(2, 1, 3, 4, 5)
    assert halved_mse(first, second).item() == pytest.approx(oracle.halved_mse(first, second), rel=1e-5)


def test_crops_meet_the_other_volume_s_teacher_only_and_tokens_their_own():
    torch.manual_seed(0)
    centre = torch.zeros(1, 6)
    logits = torch.randn(2, 3, 6)
    sharp = {"student_temperature": 0.05, "teacher_temperature": 0.05}
    own = inter_volume_loss(logits, logits, centre, **sharp)
    other = inter_volume_loss(logits, logits.flip(0), centre, **sharp)  # student(K) is teacher(Q) and the reverse
    assert other < own / 4
    assert intra_volume_loss(logits, logits, centre, **sharp) < intra_volume_loss(
        logits, logits.flip(0), centre, **sharp
    )


def test_swapping_the_views_leaves_every_loss_as_it_is():
    torch.manual_seed(0)
    crops, anchors, centre = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(1, 6)
    pairs = [(inter_volume_loss, crops, anchors), (intra_volume_loss, crops, anchors)]
    for loss, student, teacher in pairs:
        straight, swapped = loss(student, teacher, centre, **TEMPERATURES), None
        swapped = loss(student.flip(0), teacher.flip(0), centre, **TEMPERATURES)
        assert swapped.item() == pytest.approx(straight.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [inter_volume_loss, intra_volume_loss])
def test_gradient_flows_to_the_student_only_and_vanishes_where_both_agree(loss):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    loss(student, teacher, torch.zeros(1, 6), **TEMPERATURES).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    same = student.detach().clone().requires_grad_()
    equal = {"student_temperature": 0.1, "teacher_temperature": 0.1}
    partner = same.detach().flip(0) if loss is inter_volume_loss else same.detach()
    loss(same, partner, torch.zeros(1, 6), **equal).backward()
    assert same.grad.abs().max() < 1e-6


def test_half_precision_is_computed_in_float32():
    image, logits = torch.randn(2, 1, 4, 4, 4).half(), torch.randn(2, 3, 6).bfloat16()
    assert halved_mse(image, image + 1).dtype == torch.float32
    assert halved_mse(image, image + 1).item() == pytest.approx(0.5, rel=1e-3)
    assert inter_volume_loss(logits, logits, torch.zeros(1, 6), **TEMPERATURES).dtype == torch.float32
