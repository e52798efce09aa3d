from collections import Counter

import pytest
import torch

from medssl.ops.correspondence import choose_shared, mutual_nearest, patch_descriptors


def random_views(*, b=3, k=40, share=0.6):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(b, k, generator=generator) < share for _ in range(2))
    return first, second, torch.rand(b, k, generator=generator)


@pytest.mark.parametrize("max_points", [8, 30, 100])
def test_shared_points_come_first_in_one_order_and_every_point_is_in_one_row(max_points):
    first, second, noise = random_views()
    found = choose_shared(first, second, noise, max_points=max_points, max_matched_fraction=0.75)
    for sample in range(3):
        mine = found.first[sample][found.first_valid[sample]].tolist()
        theirs = found.second[sample][found.second_valid[sample]].tolist()
        assert len(set(mine)) == len(mine) <= max_points
        assert all(first[sample, n] for n in mine)
        assert all(second[sample, n] for n in theirs)
        rows = found.pairs[found.pairs[:, 0] == sample][:, 1:].tolist()
        matched = [row for row in rows if min(row) >= 0]
        assert len(matched) == min(int((first & second)[sample].sum()), int(0.75 * max_points))
        assert all(mine[i] == theirs[j] for i, j in matched)
        assert Counter(i for i, _ in rows if i >= 0) == dict.fromkeys(range(len(mine)), 1)
        assert Counter(j for _, j in rows if j >= 0) == dict.fromkeys(range(len(theirs)), 1)
        alone = [mine[i] for i, j in rows if j == -1]
        assert not any(second[sample, n] for n in alone), "who has no partner is not in the other view"


def test_views_without_points_give_no_rows():
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    found = choose_shared(nothing, nothing, torch.rand(2, 5), max_points=4)
    assert not found.first_valid.any()
    assert found.pairs.shape == (0, 3)


def test_mutual_nearest_equals_a_loop():
    generator = torch.Generator().manual_seed(1)
    cost, allowed = torch.rand(2, 6, 7, generator=generator), torch.rand(2, 6, 7, generator=generator) > 0.4
    first, second = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    first[0, 2] = second[1, 3] = False
    rows = mutual_nearest(cost, allowed, first_valid=first, second_valid=second).tolist()
    expected = []
    for s in range(2):

        def price(i, j, s=s):
            usable = allowed[s, i, j] and first[s, i] and second[s, j]
            return cost[s, i, j].item() if usable else float("inf")

        taken = ([], [])
        for i in range(6):
            j = min(range(7), key=lambda j: price(i, j))
            if price(i, j) < 2 and min(range(6), key=lambda other: price(other, j)) == i:
                expected.append([s, i, j])
                taken[0].append(i), taken[1].append(j)
        expected += [[s, i, -1] for i in range(6) if first[s, i] and i not in taken[0]]
        expected += [[s, -1, j] for j in range(7) if second[s, j] and j not in taken[1]]
    assert sorted(rows) == sorted(expected)
    empty = mutual_nearest(cost[:, :0], allowed[:, :0], first_valid=first[:, :0], second_valid=second)
    assert len(empty) == int(second.sum())


@pytest.mark.parametrize("spatial", [(9, 8), (9, 8, 7)])
def test_descriptors_are_the_voxels_about_a_point_whatever_brightness_and_contrast(spatial):
    image = torch.rand(2, 1, *spatial, generator=torch.Generator().manual_seed(2))
    point = torch.tensor([[4.4, 3.6, 3.0][: len(spatial)], [0.0] * len(spatial)]).expand(2, 2, -1)
    found = patch_descriptors(image, point, side=3)
    around = tuple(slice(c - 1, c + 2) for c in (4, 4, 3)[: len(spatial)])
    patch = image[0, 0][around].flatten()
    centred = patch - patch.mean()
    assert torch.allclose(found[0, 0], centred / centred.norm(), atol=1e-6)
    assert torch.allclose(patch_descriptors(3 * image + 1, point, side=3), found, atol=1e-5)
    assert found.isfinite().all()
    assert patch_descriptors(torch.ones_like(image), point, side=3).abs().max() == 0


def test_all_shared_points_are_taken_where_there_is_room():
    first = torch.ones(2, 20, dtype=torch.bool)
    second = first.clone()
    second[1, 12:] = False
    noise = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    roomy = choose_shared(first, second, noise, max_points=20)
    assert [(roomy.pairs[:, 0] == b).sum().item() for b in (0, 1)] == [20, 12 + 8]
    crowded = choose_shared(first, second, noise, max_points=10)
    assert ((crowded.pairs[:, 1:] >= 0).all(1) & (crowded.pairs[:, 0] == 0)).sum() == 9
