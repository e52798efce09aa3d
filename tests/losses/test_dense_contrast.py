import math

import pytest
import torch
from oracles import macl

from medssl.losses.dense_contrast import dense_contrast, equivariance_loss, segment_contrast
from medssl.losses.position_contrast import contrast_of_positives
from medssl.methods.positions import PositionRule

POSITION = torch.tensor([[0.1], [0.15], [0.5], [0.95]], dtype=torch.float64)


def near(threshold, position=POSITION):
    """The mask of the card: 2b x 2b, both views of a sample at its position."""
    group = torch.zeros(len(position), dtype=torch.int64)
    return PositionRule(axes=["z"], threshold=threshold).masks(position, group)[0].repeat(2, 2)


def embeddings(dtype=torch.float32):
    """(8, 8): the first views of four samples, then their second ones."""
    view, i, c = torch.meshgrid(torch.arange(2.0), torch.arange(4.0), torch.arange(8.0), indexing="ij")
    return torch.sin(1 + 0.37 * i + 1.3 * view + 0.11 * c * (i + 1)).to(dtype).flatten(0, 1)


def maps():
    """Two maps (4, 8, 2, 3)."""
    g = torch.arange(192, dtype=torch.float64)
    first, second = torch.cos(0.9 * g + 0.003 * g**1.5), torch.sin(0.7 * g + 0.002 * g**1.5 + 0.4)
    return first.reshape(4, 8, 2, 3).float(), second.reshape(4, 8, 2, 3).float()


def bottlenecks():
    """Maps (2, 3, 8, 8) and (2, 3, 2, 2)."""
    k = torch.arange(384, dtype=torch.float64)
    return torch.sin(0.01 * k).reshape(2, 3, 8, 8), torch.cos(0.02 * k[:24]).reshape(2, 3, 2, 2)


def random_maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parity
def test_the_contrast_of_positions_has_the_card_s_values():
    rows = embeddings()
    assert contrast_of_positives(rows, near(0.1), missing="raise").item() == pytest.approx(9.6900625, rel=1e-5)
    assert contrast_of_positives(rows, near(0.5), missing="raise").item() == pytest.approx(9.5987396, rel=1e-5)
    views = torch.eye(4, dtype=torch.bool).repeat(2, 2)
    assert contrast_of_positives(rows, views).item() == pytest.approx(9.6829844, rel=1e-5)
    i, v, c = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (4, 2, 8)], indexing="ij")
    exact = torch.sin(1 + 0.37 * i + 1.3 * v + 0.11 * c * (i + 1)).transpose(0, 1).flatten(0, 1)
    assert contrast_of_positives(exact, near(0.1)).item() == pytest.approx(9.6900614, abs=1e-6)
    assert contrast_of_positives(exact, views).item() == pytest.approx(9.6829835, abs=1e-6)


def test_a_row_without_positives_is_refused_where_asked():
    alone = torch.zeros(4, 4, dtype=torch.bool)
    alone[0, 1] = alone[1, 0] = True
    assert contrast_of_positives(torch.eye(4), alone) > 0
    with pytest.raises(ValueError, match=r"rows \[2, 3\] have no positive"):
        contrast_of_positives(torch.eye(4), alone, missing="raise")


@pytest.mark.parity
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_the_dense_contrast_has_the_card_s_value(chunk):
    found = dense_contrast(*maps(), near(0.1), chunk=chunk)
    assert found.item() == pytest.approx(8.929489, rel=1e-6)
    deep = [part[..., None, :, :] for part in maps()]
    assert dense_contrast(*deep, near(0.1), chunk=chunk).item() == pytest.approx(8.929489, rel=1e-6)


@pytest.mark.parity
def test_the_equivariance_has_the_card_s_value():
    large, small = bottlenecks()
    assert equivariance_loss(large, small).item() == pytest.approx(0.5142393, abs=3e-7)
    assert equivariance_loss(large, small, how="area").item() == pytest.approx(0.5043264, abs=3e-7)
    assert equivariance_loss(large[..., None, :, :], small[..., None, :, :]).item() == pytest.approx(
        0.5142393, abs=3e-7
    )
    assert macl.equivariance(large.tolist(), small.tolist()) == pytest.approx(0.5142393, abs=3e-7)


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_dense_contrast_equals_loops_over_places_rows_and_positives(chunk):
    first, second = random_maps(3, 5, 2, 2, 1)
    position = torch.tensor([[0.1, 0.2], [0.3, 0.25], [0.6, 0.3]], dtype=torch.float64)
    positive = macl.near(position.tolist() * 2, 0.25)
    compared = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool).repeat(2, 2)
    expected = macl.dense(
        first.flatten(2).tolist(), second.flatten(2).tolist(), positive, compared=compared.tolist(), temperature=0.2
    )
    found = dense_contrast(
        first, second, torch.tensor(positive), temperature=0.2, compared=compared, missing="raise", chunk=chunk
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_chunk_changes_no_gradient():
    gradients = []
    for chunk in (None, 2):
        first, second = (part.requires_grad_() for part in random_maps(4, 3, 5))
        dense_contrast(first, second, near(0.1), chunk=chunk).backward()
        gradients.append(torch.stack([first.grad, second.grad]))
    torch.testing.assert_close(*gradients)
    first, second = (part.requires_grad_() for part in random_maps(2, 3, 2))
    mask = near(0.2, POSITION[:2])
    assert torch.autograd.gradcheck(lambda a, b: dense_contrast(a, b, mask, chunk=1), (first, second))


def test_neither_the_order_of_samples_nor_of_views_matters():
    first, second = random_maps(4, 6, 3)
    order = [2, 0, 3, 1]
    base = dense_contrast(first, second, near(0.1))
    moved = dense_contrast(first[order], second[order], near(0.1, POSITION[order]))
    assert moved.item() == pytest.approx(base.item(), rel=1e-12)
    assert dense_contrast(second, first, near(0.1)).item() == pytest.approx(base.item(), rel=1e-12)


def test_a_batch_of_one_has_nothing_to_tell_apart():
    first, second = random_maps(1, 6, 3)
    assert dense_contrast(first, second, near(0.1, POSITION[:1])).item() == pytest.approx(0, abs=1e-12)


def test_equal_embeddings_have_the_collapse_value():
    same = torch.ones(16, 4, 2, dtype=torch.float64)
    mask = near(0.1, torch.linspace(0, 1, 16, dtype=torch.float64)[:, None])
    assert dense_contrast(same, same, mask).item() == pytest.approx(math.log(31) / 0.7, rel=1e-12)  # 4.906


def test_positions_far_apart_give_the_contrast_of_views():
    first, second = random_maps(4, 6, 1)
    far = near(0.01)
    rows = torch.cat([first[..., 0], second[..., 0]])
    logits = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1) / 0.1
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(8).roll(4)
    expected = torch.nn.functional.cross_entropy(logits, partner) / 0.07
    assert dense_contrast(first, second, far).item() == pytest.approx(expected.item() * 0.1, rel=1e-12)


def test_ignored_cohorts_give_the_mean_over_their_own_losses():
    first, second = random_maps(5, 6, 3)
    position = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)[:, None]
    group = torch.tensor([0, 1, 0, 1, 0])
    masks = PositionRule(axes=["z"], threshold=0.25).masks(position, group)
    positive, compared = (mask.repeat(2, 2) for mask in masks)
    found = dense_contrast(first, second, positive, compared=compared)
    parts = [dense_contrast(first[group == g], second[group == g], near(0.25, position[group == g])) for g in (0, 1)]
    assert found.item() == pytest.approx((3 * parts[0] + 2 * parts[1]).item() / 5, rel=1e-12)


def test_rows_that_are_compared_with_nothing_get_no_gradient():
    rows = torch.randn(4, 3).requires_grad_()
    compared = torch.ones(4, 4, dtype=torch.bool)
    compared[3] = compared[:, 3] = False
    loss = contrast_of_positives(rows, torch.ones(4, 4, dtype=torch.bool), compared=compared)
    loss.backward()
    assert torch.isfinite(rows.grad).all()
    assert rows.grad[3].abs().max() == 0
    assert rows.grad[:3].abs().max() > 0


def test_equivariance_sends_its_gradient_into_both_maps():
    large, small = (part.requires_grad_() for part in bottlenecks())
    equivariance_loss(large, small).backward()
    assert large.grad.abs().sum().item() == pytest.approx(1, rel=1e-6)  # weights of an interpolation sum to one
    assert small.grad.abs().sum().item() == pytest.approx(1, rel=1e-12)
    assert (large.grad != 0).sum() == 24  # the corners alone


def test_half_precision_is_computed_in_full():
    first, second = maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dense_contrast(first.bfloat16(), second.bfloat16(), near(0.1))
    assert found.dtype == torch.float32
    expected = dense_contrast(first.bfloat16().float(), second.bfloat16().float(), near(0.1))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    large, small = bottlenecks()
    assert equivariance_loss(large.half(), small.half()).dtype == torch.float32

    vectors = embeddings(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrast_of_positives(vectors, near(0.1))
    assert found.item() == pytest.approx(contrast_of_positives(vectors.float(), near(0.1)).item(), rel=1e-6)


def test_a_segment_is_a_positive_of_itself_within_one_sample():
    first, second = random_maps(2, 4, 3, 3, 3)
    segment = torch.arange(54).reshape(2, 3, 3, 3) // 5
    for every in (1, 4):
        expected = macl.segments(
            first.flatten(2).tolist(), second.flatten(2).tolist(), segment.flatten(1).tolist(), every=every
        )
        assert segment_contrast(first, second, segment, every=every).item() == pytest.approx(expected, rel=1e-12)
    other = segment_contrast(first, second, 7 * segment + 3, every=1)
    assert other.item() == pytest.approx(segment_contrast(first, second, segment, every=1).item(), rel=1e-12)


def test_segments_of_a_finer_grid_count_where_they_are_nearest():
    first, second = random_maps(2, 4, 2, 3)
    coarse = torch.tensor([[[1, 2, 2], [1, 1, 3]], [[4, 4, 5], [4, 5, 5]]])
    fine = coarse.repeat_interleave(4, dim=1).repeat_interleave(2, dim=2)
    expected = segment_contrast(first, second, coarse, every=1)
    assert segment_contrast(first, second, fine, every=1).item() == pytest.approx(expected.item(), rel=1e-12)


def test_settings_that_cannot_be_are_refused():
    first, second = random_maps(2, 4, 3)
    with pytest.raises(ValueError, match="chunk must be at least 1 or null, got 0"):
        dense_contrast(first, second, near(0.1, POSITION[:2]), chunk=0)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        segment_contrast(first, second, torch.zeros(2, 3, dtype=torch.int64), every=0)
    with pytest.raises(ValueError, match="how is 'cubic', allowed are linear, area"):
        equivariance_loss(first, second, how="cubic")
