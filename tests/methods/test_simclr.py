"""SimCLR as a method: values of the reference, its invariances, its logs and pictures."""

import math

import pytest
import torch
from pairs_of_views import figures_of
from small_contrast import GivenMaps, given_projector, given_views, pairs_of_crops
from torch import nn

from medssl.methods.simclr import SimCLR
from medssl.models.pooled import PooledProjector
from medssl.models.resenc import ResidualEncoder

N, C = torch.arange(4.0, dtype=torch.float64)[:, None], torch.arange(8.0, dtype=torch.float64)
FIRST, SECOND = (0.7 * N + 0.3 * C).sin(), (0.5 * N + 0.2 * C).cos()


def given(first, second, at, *, pairs=1, **options):
    """The output of SimCLR whose embeddings are given; `pairs` of them belong to one volume."""
    method = SimCLR(encoder=GivenMaps(), projector=given_projector(), **options)
    batch = {
        "first": given_views(first.unflatten(0, (-1, pairs))),
        "second": given_views(second.unflatten(0, (-1, pairs))),
    }
    return method(batch, at())


def small(**options):
    torch.manual_seed(0)
    encoder = ResidualEncoder(in_channels=options.pop("in_channels", 1), widths=(4, 8), blocks=(1, 1))
    head = {"hidden_dim": 16, "out_dim": 8, "norm": options.pop("norm", "layer")}
    return SimCLR(encoder=encoder, projector=PooledProjector(encoder.channels, encoder.strides, **head), **options)


@pytest.mark.parity
@pytest.mark.parametrize(("temperature", "expected"), [(0.5, 1.799263265101), (0.1, 3.591274210620)])
@pytest.mark.parametrize("pairs", [1, 2])
def test_the_contrast_of_given_embeddings_is_the_reference_value(at, temperature, expected, pairs):
    """References card, section 4: 4 pairs of 8 channels."""
    output = given(FIRST, SECOND, at, pairs=pairs, temperature=temperature)
    assert output.loss.item() == pytest.approx(expected, abs=1e-11)
    assert output.logs["accuracy"] == 0


@pytest.mark.parity
def test_equal_embeddings_give_the_collapse_value_that_is_logged(at):
    same = FIRST[:1].expand(4, -1)
    output = given(same, 3 * same, at)
    assert output.loss.item() == pytest.approx(1.945910149055, abs=1e-11)
    assert output.logs["contrast_at_collapse"].item() == pytest.approx(math.log(7), abs=1e-12)
    assert output.logs["feature_std"].item() == pytest.approx(0, abs=1e-7)
    assert output.logs["effective_rank"].item() == pytest.approx(1, abs=1e-3)


def test_the_contrast_matches_a_plain_loop(at):
    rows = [*FIRST, *SECOND]
    total = 0.0
    for i, row in enumerate(rows):
        weights = {j: torch.cosine_similarity(row, rows[j], dim=0).item() / 0.3 for j in range(8) if j != i}
        total += math.log(sum(map(math.exp, weights.values()))) - weights[(i + 4) % 8]
    assert given(FIRST, SECOND, at, temperature=0.3).loss.item() == pytest.approx(total / 8, rel=1e-12)


def test_order_of_views_length_of_rows_and_order_of_pairs_change_nothing(at):
    expected = given(FIRST, SECOND, at).loss
    length = torch.linspace(0.5, 4, 4, dtype=torch.float64)[:, None]
    order = torch.tensor([2, 0, 3, 1])
    for first, second in ((SECOND, FIRST), (FIRST * length, SECOND / length), (FIRST[order], SECOND[order])):
        torch.testing.assert_close(given(first, second, at).loss, expected, rtol=1e-12, atol=0)
    assert given(FIRST, SECOND[order], at).loss != expected


def test_a_single_pair_gives_zero_with_a_gradient_of_zero(at):
    first, second = FIRST[:1].clone().requires_grad_(), SECOND[:1].clone().requires_grad_()
    output = given(first, second, at)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(first.grad, torch.zeros_like(first), atol=1e-12, rtol=0)
    torch.testing.assert_close(second.grad, torch.zeros_like(second), atol=1e-12, rtol=0)


def test_embeddings_that_find_their_partner_have_an_accuracy_of_1(at):
    output = given(FIRST, FIRST + 1e-3, at)
    assert output.logs["accuracy"] == 1
    assert output.loss < output.logs["contrast_at_collapse"]


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_every_weight_learns_of_images_of_four_channels_and_the_loss_falls(at, norm):
    method = small(in_channels=4, norm=norm, temperature=0.1)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=3e-3)
    batch, losses = pairs_of_crops(channels=4), []
    for _ in range(12):
        output = method(batch, at())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert all(p.grad is not None and p.grad.any() for name, p in method.named_parameters() if "bias" not in name)
    assert losses[-1] < losses[0] - 0.2
    assert output.logs["effective_rank"] > 1.1


def test_losses_under_autocast_are_float32_and_near_those_of_full_precision(at):
    method, batch = small(), pairs_of_crops()
    full = method(batch, at())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method(batch, at())
    assert half.loss.dtype == torch.float32
    assert all(value.isfinite() for value in half.logs.values())
    assert half.loss.item() == pytest.approx(full.loss.item(), abs=0.02)
    half.loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_pictures_show_the_pairs_of_a_volume_and_the_cosines_of_all(at):
    method, batch = small(), pairs_of_crops()
    assert method(batch, at()).extras == {}
    pictures = figures_of(method, batch, at())
    assert list(pictures) == ["pairs", "similarity"]
    titles = [axes.get_title() for axes in pictures["pairs"].axes if axes.get_title()]
    similarity = method.extras(batch, at())["similarity"]
    cosines = [similarity[k, 6 + k].item() for k in range(2)]
    assert titles == ["pair 1", f"pair 1, cosine {cosines[0]:.2f}", "pair 2", f"pair 2, cosine {cosines[1]:.2f}"]
    shown = pictures["similarity"].axes[0].images[0].get_array()
    torch.testing.assert_close(torch.tensor(shown), similarity[:6, 6:])


def test_batches_and_settings_that_do_not_fit_are_refused(at):
    batch = pairs_of_crops()
    method = small()
    for wrong in ({"first": batch["first"]}, batch | {"second": pairs_of_crops(k=1)["second"]}):
        with pytest.raises(ValueError, match="two view groups `first` and `second` of equally many crops of one size"):
            method(wrong, at())
    for options, message in (
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"gather": "no"}, "gather"),
        ({"crop_voxel": [15, 16, 16]}, r"views.groups.first.size=\[15, 16, 16\] is no multiple of the coarsest stride"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            small(**options)
    with pytest.raises(ValueError, match="does not describe its maps by `channels` and `strides`, which SimCLR needs"):
        SimCLR(encoder=nn.Linear(1, 1), projector=given_projector())
