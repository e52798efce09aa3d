from dataclasses import replace

import pytest
import torch
from oracles.macl import contrast
from test_macl import NOW, batch, make

from medssl.methods.macl_places import PlaceRule, place_centers, rows_of, segments_of
from medssl.methods.positions import PositionRule

GRID = (2, 2, 2)


def still(*, b=2):
    """Crops of 8 voxels that start at voxel 4 n along z of volumes of 16, whose body is the whole volume."""
    view = batch()["still"]
    view.matrix = view.matrix.clone()
    view.matrix[:, 0, 2, 3] = torch.arange(4) * 4.0
    view.body_faces = torch.tensor([[-0.5] * 3, [15.5] * 3], dtype=torch.float64).expand(4, 1, 2, 3)
    return view


def by_hand(view, threshold):
    """Which cells of which crops have middles closer than the threshold along each axis, cell after cell."""
    rows = []
    for sample in range(len(view.image)):
        start = float(view.matrix[sample, 0, 2, 3])
        for x in (1.5, 5.5):
            for y in (1.5, 5.5):
                rows += [[(x + 0.5) / 16, (y + 0.5) / 16, (start + z + 0.5) / 16] for z in (1.5, 5.5)]
    return [[all(abs(a - b) < threshold for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]


def test_cells_of_a_map_are_where_the_voxels_are_that_they_cover():
    centers = place_centers(still(), GRID)
    assert centers[0, 0].tolist() == [1.5, 1.5, 1.5]
    assert centers[0, -1].tolist() == [5.5, 5.5, 5.5]
    assert centers[3, 1].tolist() == [1.5, 1.5, 12 + 5.5]


@pytest.mark.parametrize("threshold", [0.02, 0.27])
def test_places_are_positives_where_they_lie_near_each_other_in_the_body(threshold):
    view, rule = still(), PlaceRule(threshold=threshold)
    chosen = rule.choose(8, NOW, torch.device("cpu"))
    assert chosen.tolist() == list(range(8))
    near, compared = rule.masks(PositionRule(threshold=0.9), view, GRID, chosen)
    assert near.tolist() == by_hand(view, threshold)
    assert near.sum() > len(near)  # the second crop's lower cells are the first one's upper ones
    assert compared.all()
    groups = torch.tensor([0, 1, 0, 1])[:, None]
    near, compared = rule.masks(PositionRule(), replace(view, group=groups), GRID, chosen)
    assert not compared[0, 8]
    assert not near[4, 11]


def test_a_part_of_the_places_is_drawn_alike_on_all_ranks_and_anew_each_step():
    rule = PlaceRule(num_places=5)
    draws = [
        rule.choose(64, replace(NOW, step=step, rank=rank), torch.device("cpu"))
        for step, rank in ((0, 0), (0, 1), (1, 0))
    ]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()
    assert len(set(draws[0].tolist())) == 5


def test_the_dense_term_by_positions_of_places_is_that_of_a_plain_loop():
    method = make(places=PlaceRule(threshold=0.02), positions=PositionRule()).double().eval()
    view = still()
    views = {**batch(), "still": view}
    views = {name: replace(group, image=group.image.double()) for name, group in views.items()}
    found = method(views, NOW).logs["dense"].item()
    image = views["still"].image[:, 0]
    auxiliary, _, decoded = method._branches(image, method._small(image))
    maps = method.heads.places(auxiliary, decoded)
    near = by_hand(view, 0.02)
    rows = [row.tolist() for part in maps for row in rows_of(part.detach(), torch.arange(8))]
    assert maps[0].shape[2:] == GRID
    assert found == pytest.approx(contrast(rows, [row * 2 for row in near] * 2), rel=1e-6)


def test_supervoxels_are_a_term_of_their_own_where_weighed():
    views = batch()
    with pytest.raises(ValueError, match="what=supervoxels"):
        make(weight_supervoxel=1.0)(views, NOW)
    regions = torch.arange(8).expand(4, 1, 1, 8, 8, 8) // 4 + 7  # two slabs
    views["still"] = replace(views["still"], regions=regions)
    assert segments_of(views["still"], 3)[0, 0, 0].tolist() == [7] * 4 + [8] * 4
    method = make(weight_supervoxel=0.5, supervoxel_every=1)
    output = method(views, NOW)
    weighed = {"global": 1.0, "dense": 0.5, "equivariance": 1.0, "supervoxel": 0.5}
    assert output.loss.item() == pytest.approx(
        sum(w * output.logs[term].item() for term, w in weighed.items()), rel=1e-5
    )
    assert output.logs["supervoxel"] > 0
    assert "supervoxel" not in make()(views, NOW).logs


def test_wrong_numbers_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        PlaceRule(threshold=0.0)
    views = batch()
    views["still"].body_faces = None
    with pytest.raises(ValueError, match="body box"):
        make(places=PlaceRule())(views, NOW)
