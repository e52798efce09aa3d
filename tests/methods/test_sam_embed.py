import copy

import pytest
import torch
import torch.nn.functional as F
from pairs_of_views import figures_of, pair_of, volume
from torch import nn

from medssl.losses.anatomy import CoarseMining, FineDraws, FineMining, coarse_contrast, fine_contrast, mine_fine
from medssl.methods.sam_embed import SamEmbed, as_voxels
from medssl.models.reoriented import Reoriented
from medssl.models.sam_resnet import SamResNet

NEAR = [[(10, 12, 8), (14, 20, 10)], [(20, 8, 4), (12, 14, 2)]]
APART = [[(0, 0, 0), (36, 40, 20)], [(40, 0, 20), (0, 38, 0)]]


@pytest.fixture
def sam():
    """Makes a small SamEmbed; keywords go to it."""

    def make(*, fine=None, coarse=None, seed=0):
        torch.manual_seed(seed)
        encoder = Reoriented(SamResNet(base_channels=4, emb_dim=16), axes="SPL")
        small = {"num_candidates": 100, "num_queries": 20, "num_hard": 200, "num_negatives": 50, "ignore_mm": 8.0}
        fine = FineMining(**{**small, **(fine or {})})
        return SamEmbed(
            encoder=encoder, fine=fine, coarse=CoarseMining(**{"num_hard": 12, "num_negatives": 8} | (coarse or {}))
        )

    return make


@pytest.fixture
def near():
    return pair_of([volume(0), volume(1)], NEAR)


@pytest.fixture
def apart():
    return pair_of([volume(0), volume(1)], APART)


def test_the_loss_is_the_mean_over_volumes_of_the_fine_and_the_coarse_one(sam, near, at):
    method = sam().eval()
    output = method(near, at())
    voxels = as_voxels(method.encoder(near["pair"].image.flatten(0, 1)), near["pair"])
    terms = []
    for number in range(2):
        rows = method._mine(voxels, number, at())
        terms.append(fine_contrast(voxels.fine[number], rows, temperature=0.5).loss.item())
    draws = method._coarse_draws(voxels, at())
    coarse = coarse_contrast(voxels.coarse, voxels.coarse_mm, mining=method.coarse, draws=draws).loss.item()
    assert output.logs["fine"].item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    assert output.logs["coarse"].item() == pytest.approx(coarse, rel=1e-5)
    assert output.loss.item() == pytest.approx(sum(terms) / 2 + coarse, rel=1e-5)
    assert not any(value.requires_grad for value in output.logs.values())


def test_voxels_of_a_map_lie_in_the_middle_of_the_image_voxels_that_they_cover(sam):
    to_mm = torch.tensor([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3.0, 11], [0, 0, 0, 1]], dtype=torch.float64)
    view = pair_of([volume()], [[(3, 4, 5), (0, 0, 0)]], to_mm=to_mm)["pair"]
    voxels = as_voxels(sam().encoder(view.image.flatten(0, 1)), view)
    assert voxels.grid == (16, 16, 8)
    for number in (0, 17, 16 * 16 * 8 - 1):
        i, j, k = (int(n) for n in torch.unravel_index(torch.tensor(number), voxels.grid))
        middle = torch.tensor([2 * i + 0.5 + 3, 2 * j + 0.5 + 4, 2 * k + 0.5 + 5, 1], dtype=torch.float64)
        assert torch.allclose(voxels.fine_mm[0, 0, number], (to_mm @ middle)[:3].float(), atol=1e-4)
    corner = torch.tensor([7.5 + 3, 7.5 + 4, 1.5 + 5, 1], dtype=torch.float64)
    assert torch.allclose(voxels.coarse_mm[0, 0, 0], (to_mm @ corner)[:3].float(), atol=1e-4)
    assert voxels.coarse.shape[2] == 2 * 2 * 4


def test_vectors_are_listed_like_their_positions(sam):
    view = pair_of([volume()], [[(3, 4, 5), (0, 0, 0)]])["pair"]
    fine, coarse = sam().eval().encoder(view.image.flatten(0, 1))
    voxels = as_voxels([fine, coarse], view)
    index = (5 * 16 + 3) * 8 + 2
    assert torch.equal(voxels.fine[0, 1, index], fine[1, :, 5, 3, 2])
    assert torch.allclose(voxels.context.norm(dim=-1), torch.ones(()), atol=1e-5)
    assert not voxels.context.requires_grad
    assert torch.equal(voxels.coarse[0, 0, 5], coarse[0, :, 0, 1, 1])


def test_voxels_outside_the_volume_are_no_queries(sam):
    view = pair_of([volume()], [[(-16, 0, 0), (-8, 0, 0)]])["pair"]  # half of the first view is padding
    method = sam()
    voxels = as_voxels(method.encoder(view.image.flatten(0, 1)), view)
    assert voxels.valid[0].float().mean(1).tolist() == [0.5, 0.75]
    draws = FineDraws(torch.rand(2, 2048), torch.rand(2, 2048), torch.rand(40, 200))
    fields = (voxels.fine[0], voxels.context[0], voxels.fine_mm[0], voxels.valid[0])
    rows = mine_fine(*fields, mining=method.fine, draws=draws)
    assert (voxels.fine_mm[0].flatten(0, 1)[rows.query, 0] > 0).all()


class PlaceCode(nn.Module):
    """Vectors that say where a voxel lies, read off an image whose channels are millimetres along x, y and z."""

    channels, strides, in_channels = (12, 12), ((2, 2, 2), (4, 16, 16)), 3

    def forward(self, image, coordinate=None):
        maps = []
        for steps, scale_mm in zip(self.strides, (20.0, 60.0), strict=True):
            place = F.avg_pool3d(image, steps) / scale_mm
            codes = [f(k * place) for f in (torch.sin, torch.cos) for k in (1, 2)]
            maps.append(F.normalize(torch.cat(codes, dim=1), dim=1))
        return maps


def test_voxels_that_know_their_place_match_there_whatever_the_directions_of_the_axes(at):
    affine = torch.tensor([[0, -2.0, 0, 90], [-1.8, 0, 0, -60], [0, 0, 2.2, 30], [0, 0, 0, 1]], dtype=torch.float64)
    batch = pair_of([volume()], [[(3, 0, 2), (12, 17, 6)]], size=(48, 48, 24), to_mm=affine)
    view = batch["pair"]
    view.image = view.grid_mm()
    method = SamEmbed(encoder=Reoriented(PlaceCode(), axes="SPL"), fine=FineMining(num_queries=50, ignore_mm=8.0))
    logs = method(batch, at()).logs
    assert logs["match_error_mm"].item() < 4  # a voxel of the fine map
    assert logs["positive_similarity"].item() > 0.99
    view.image = view.image.flip(1)  # the pictures, said to lie where the other view does
    assert method(batch, at()).logs["match_error_mm"].item() > 25


def test_draws_come_again_with_the_step_and_differ_between_steps_ranks_and_volumes(sam, near, at):
    method = sam().eval()
    loss = method(near, at()).loss
    assert torch.equal(loss, method(near, at()).loss)
    for other in (at(1), at(rank=1), at(micro=1), at(seed=1)):
        assert not torch.equal(loss, method(near, other).loss)


@pytest.mark.parametrize("mask_value", ["neginf", "zero"])
def test_views_that_do_not_overlap_give_a_finite_loss_and_gradient_for_every_weight(sam, apart, at, mask_value):
    method = sam(fine={"mask_value": mask_value}, coarse={"mask_value": mask_value})
    output = method(apart, at())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert output.logs["positive_similarity"].item() == pytest.approx(1, abs=1e-5)


def test_the_match_error_of_the_last_overlapping_batch_stays_while_none_overlaps(sam, near, apart, at):
    method = sam()
    first = method(near, at()).logs["match_error_mm"]
    assert first > 0
    assert torch.equal(method(apart, at(1)).logs["match_error_mm"], first)
    method.eval()
    method(pair_of([volume(3), volume(4)], NEAR), at(2))
    assert torch.equal(method.match_error_mm, first)  # held-out batches leave no trace


def test_a_single_volume_has_no_global_negatives_and_trains(sam, at):
    method = sam()
    method(pair_of([volume()], NEAR[:1]), at()).loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def train(method, at, steps, *, first=0, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(method.param_groups(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(first, first + steps):
        starts = [[(10 + step % 5, 12, 8), (14, 20 - step % 3, 10)], [(20, 8, 4 + step % 4), (12, 14 - step % 2, 2)]]
        output = method(pair_of([volume(0), volume(1)], starts, size=(32, 32, 8)), at(step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses, optimizer


def test_the_loss_falls(sam, at):
    losses, _ = train(sam(), at, 12)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_going_on_from_a_checkpoint_equals_the_straight_run(sam, at):
    straight, half = sam(), sam()
    train(straight, at, 4)
    _, optimizer = train(half, at, 2)
    resumed = sam(seed=5)
    resumed.load_state_dict(half.state_dict())
    again = torch.optim.SGD(resumed.param_groups(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    again.load_state_dict(optimizer.state_dict())
    train(resumed, at, 2, first=2, optimizer=again)
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_all_parameters_decay_alike(sam):
    (group,) = sam().param_groups()
    assert len(group["params"]) == len(list(sam().parameters()))


def test_the_picture_shows_points_their_matches_and_the_truth(sam, near, apart, at):
    method = sam()
    before = copy.deepcopy(method.state_dict())
    figure = figures_of(method, near, at())["matches"]
    assert len(figure.axes) == 12
    assert [panel.get_title() for panel in figure.axes[:3]] == ["point", "match (x), truth (o)", "similarity"]
    assert all(panel.get_xlabel().endswith("mm off") for panel in figure.axes[1::3])
    assert method.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), method.state_dict().values(), strict=True))
    assert figures_of(method, apart, at()) == {}


def test_the_truth_of_a_picture_is_where_the_point_lies(sam, at):
    batch = pair_of([volume()], [[(0, 0, 0), (16, 0, 0)]], size=(48, 48, 16))
    figure = figures_of(sam(), batch, at())["matches"]
    for row in range(4):
        point, match = figure.axes[3 * row].lines[0], figure.axes[3 * row + 1].lines[1]
        assert point.get_xdata()[0] - match.get_xdata()[0] == pytest.approx(16)
        assert point.get_ydata()[0] - match.get_ydata()[0] == pytest.approx(0)


@pytest.mark.parametrize("fault", ["group", "count", "mask"])
def test_views_of_another_kind_are_refused(sam, near, at, fault):
    view = copy.copy(near["pair"])
    if fault == "mask":
        view.valid = None
    if fault == "count":
        view.image = view.image[:, :1]
    message = {
        "group": "needs a view group called `pair`; the batch has ..views",
        "count": "`pair` has 1 views",
        "mask": "`pair` has 2 views and no mask",
    }[fault]
    with pytest.raises(ValueError, match=message):
        sam()({"views" if fault == "group" else "pair": view}, at())


def test_an_encoder_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="needs an encoder that gives two maps"):
        SamEmbed(encoder=torch.nn.Conv3d(1, 1, 1))
