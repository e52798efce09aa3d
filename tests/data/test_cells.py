"""Placements that follow boxes: cells of a field, crops inside it, crops beside those of another group."""

import numpy as np
import pytest
import torch

from medssl.data import augment as A
from medssl.data.cells import Cells, Inside, Shifted, drawn
from medssl.data.placements import Fixed, RandomCrop
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.views import ViewPlan
from medssl.data.volume import Box

WHOLE = np.array([[-0.5] * 3, [39.5, 35.5, 31.5]])
BODY = np.array([[1.5] * 3, [37.5, 33.5, 29.5]])


def placed(store, *, sample=0, **groups):
    plan = ViewPlan(groups=groups)
    views = plan.place(Scene(store, Request((0,), sample)), seed=0, step=0)
    return {name: np.stack([view.placement.frame.faces for view in found]) for name, found in views.items()}


def volumes(faces):
    return np.prod(faces[:, 1] - faces[:, 0], axis=1)


@pytest.mark.parametrize(("within", "field"), [("volume", WHOLE), ("body", BODY)])
def test_cells_fill_their_region_in_the_order_of_a_grid(noise_store, within, field):
    cells = Cells(grid=[2, 3, 1], size=[8, 8, 8], within=within)
    assert cells.count == 6
    faces = placed(noise_store, base=cells)["base"]
    side = (field[1] - field[0]) / [2, 3, 1]
    for number, (i, j) in enumerate([(i, j) for i in range(2) for j in range(3)]):
        np.testing.assert_allclose(faces[number, 0], field[0] + side * [i, j, 0], atol=1e-9)
    np.testing.assert_allclose(volumes(faces).sum(), np.prod(field[1] - field[0]))


def test_a_field_of_stated_extent_lies_at_uniform_places_on_whole_voxels(noise_store, draw):
    cells = Cells(grid=[2, 2, 1], size=[8, 8, 16], extent_voxel=[16, 16, 16])
    lowest = np.stack([placed(noise_store, sample=n, base=cells)["base"].min((0, 1)) for n in range(300)])
    np.testing.assert_array_equal(lowest % 1, 0.5)
    np.testing.assert_array_equal(lowest.min(0), -0.5)
    np.testing.assert_array_equal(lowest.max(0), [23.5, 19.5, 15.5])
    shown = draw(noise_store, ViewPlan(groups={"base": cells}), [Request((0,), 0)])["base"]
    x, y, z = (int(c) for c in shown.matrix[0, 0, :3, 3])
    stored = noise_store.read(0, 0, (x, y, z), (x + 16, y + 16, z + 16)).result()
    for number in range(4):
        i, j = divmod(number, 2)
        np.testing.assert_array_equal(shown.image[0, number, 0], stored[0, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8])


def test_a_field_larger_than_its_region_is_centred_on_it(noise_store):
    faces = placed(noise_store, base=Cells(grid=[2, 1, 1], size=[32, 8, 8], extent_voxel=[64, 8, 8]))["base"]
    assert (faces[0, 0, 0] + faces[1, 1, 0]) / 2 == pytest.approx(19.5, abs=0.5)


def test_the_view_of_another_group_can_be_the_field(noise_store):
    field = RandomCrop(size=[16, 16, 16], fraction=[0.4, 0.6])
    found = placed(noise_store, field=field, base=Cells(grid=[2, 2, 2], size=[8, 8, 8], of="field"))
    np.testing.assert_allclose(found["base"].min((0, 1)), found["field"][0, 0])
    np.testing.assert_allclose(found["base"].max((0, 1)), found["field"][0, 1])
    two = RandomCrop(size=[16, 16, 16], count=2)
    with pytest.raises(ValueError, match="has 2 views; the field is a group of one view"):
        placed(noise_store, field=two, base=Cells(grid=[2, 2, 2], size=[8, 8, 8], of="field"))


def test_crops_inside_a_field_have_the_size_of_a_cell_and_reach_its_ends(noise_store):
    groups = {"base": Cells(grid=[3, 3, 1], size=[8, 8, 8], within="body"), "target": Inside(of="base", count=2)}
    samples = [placed(noise_store, sample=n, **groups) for n in range(200)]
    target = np.concatenate([found["target"] for found in samples])
    cell = (BODY[1] - BODY[0]) / [3, 3, 1]
    np.testing.assert_allclose(target[:, 1] - target[:, 0], np.broadcast_to(cell, (400, 3)))
    assert (target[:, 0] >= BODY[0] - 1e-9).all()
    assert (target[:, 1] <= BODY[1] + 1e-9).all()
    np.testing.assert_allclose(target[:, 0].min(0), BODY[0], atol=0.3)
    np.testing.assert_allclose(target[:, 1].max(0), BODY[1], atol=0.3)
    assert np.abs(np.corrcoef(target[:, 0, 0], target[:, 0, 1])[0, 1]) < 0.15


def test_crops_inside_a_native_field_lie_on_whole_voxels_and_may_be_drawn_at_another_size(noise_store):
    cells = Cells(grid=[2, 2, 1], size=[8, 8, 8], extent_voxel=[16, 16, 8])
    for n in range(20):
        found = placed(noise_store, sample=n, base=cells, target=Inside(of="base", count=3))
        np.testing.assert_array_equal(found["target"] % 1, 0.5)
    resized = placed(noise_store, base=cells, target=Inside(of="base", size=[4, 4, 4]))["target"]
    np.testing.assert_allclose(resized[0, 1] - resized[0, 0], 8)


@pytest.mark.parametrize(
    ("lower", "side", "expected"),
    [
        ([-0.5] * 3, [6, 4, 8], ([-0.5, 0.5, 1.5], [-0.5, 0.5, 1.5, 2.5, 3.5], [-0.5])),
        ([-0.2, 1.0, -0.7], [6, 4, 8.5], ([0.5, 1.5], [1.5, 2.5, 3.5, 4.5], [-0.5])),  # a region between voxels
        ([-0.5] * 3, [9, 10, 7], ([-0.5], [-1.5], [-0.5, 0.5])),  # larger than the region
    ],
)
def test_each_offset_of_whole_voxels_is_equally_likely(lower, side, expected):
    region, rng = Box(np.array(lower), np.array(lower) + 8), np.random.default_rng(0)
    boxes = [drawn(region, np.array(side, dtype=float), np.ones(3), rng) for _ in range(20_000)]
    found = np.stack([box.lower for box in boxes])
    for axis, offsets in enumerate(expected):
        values, counts = np.unique(found[:, axis], return_counts=True)
        np.testing.assert_array_equal(values, offsets)
        assert np.abs(counts / len(boxes) - 1 / len(offsets)).max() < 0.015  # more than four standard deviations


def test_a_place_between_voxels_is_uniform_where_the_step_is_not_one_voxel():
    region, rng = Box(np.zeros(3), np.full(3, 8.0)), np.random.default_rng(0)
    found = np.stack([drawn(region, np.full(3, 6.0), np.full(3, 2.0), rng).lower for _ in range(4000)])
    np.testing.assert_allclose(found.mean(0), 1, atol=0.05)
    np.testing.assert_allclose(found.std(0), 2 / 12**0.5, atol=0.03)


def test_crops_beside_those_of_a_group_follow_them_one_by_one_by_whole_voxels(noise_store):
    groups = {
        "first": RandomCrop(size=[12] * 3, count=2),
        "second": Shifted(of="first", count=2, shift_voxel=[6, 6, 0]),
    }
    shifts, free = [], []
    for n in range(300):
        found = placed(noise_store, sample=n, **groups)
        shift = found["second"][:, 0] - found["first"][:, 0]
        common = np.minimum(*[found[name][:, 1] for name in groups]) - np.maximum(
            *[found[name][:, 0] for name in groups]
        )
        assert (common >= 6).all()  # half along each axis
        assert (found["second"][:, 0] >= WHOLE[0]).all()
        assert (found["second"][:, 1] <= WHOLE[1]).all()
        inner = ((found["first"][:, 0] >= WHOLE[0] + 6) & (found["first"][:, 1] <= WHOLE[1] - 6)).all(1)
        free.append(shift[inner])
        shifts.append(shift)
    shifts, free = np.concatenate(shifts), np.concatenate(free)
    np.testing.assert_array_equal(shifts, np.rint(shifts))
    assert (shifts.min(0) == [-6, -6, 0]).all()
    assert (shifts.max(0) == [6, 6, 0]).all()
    counts = np.unique(free[:, 0], return_counts=True)
    np.testing.assert_array_equal(counts[0], np.arange(-6, 7))


def test_a_crop_as_long_as_the_volume_is_not_shifted(noise_store):
    first = RandomCrop(size=[12, 12, 32])
    for n in range(20):
        found = placed(noise_store, sample=n, first=first, second=Shifted(of="first", shift_voxel=8))
        np.testing.assert_array_equal(found["first"][:, :, 2], found["second"][:, :, 2])


def test_shifts_are_voxels_of_the_view_where_these_are_not_those_of_the_volume(make_store):
    array = np.zeros((1, 40, 40, 20), dtype=np.int16)
    store = make_store(array, affine=np.diag([1.0, 2.0, 4.0, 1.0]))
    first = RandomCrop(size=[8] * 3, spacing_mm=2.0)
    shifts = [
        np.diff([found[name][0, 0] for name in ("first", "second")], axis=0)[0]
        for found in (
            placed(store, sample=n, first=first, second=Shifted(of="first", shift_voxel=2)) for n in range(80)
        )
    ]
    np.testing.assert_allclose(np.abs(shifts).max(0), [4, 2, 1])


def test_the_faces_of_a_crop_are_those_before_augmentation(noise_store, draw):
    groups = {
        "base": Cells(
            grid=[2, 2, 2], size=[8] * 3, within="body", augment=[A.Flip(probability=1), A.Rotate90(probability=1)]
        )
    }
    shown = draw(noise_store, ViewPlan(groups=groups), [Request((0,), 0)])["base"]
    assert (shown.crop_body[0].diff(dim=1) > 0).all()
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5], dtype=torch.float64)] * 3)
    torch.testing.assert_close(shown.crop_body[0, :, 0], corners)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cells(grid=[2, 0, 1], size=[8] * 3), "grid must be three positive numbers of cells"),
        (lambda: Cells(grid=[2, 2, 1], size=[8] * 3, count=3), "has 4 cells, count is 3; leave count out"),
        (lambda: Cells(grid=[2, 2, 1]), "size must be three positive voxel counts"),
        (lambda: Cells(size=[8] * 3, of="x", extent_voxel=[8] * 3), "leave extent_voxel out"),
        (lambda: Cells(size=[8] * 3, extent_voxel=[8, 8]), "extent_voxel must be three positive voxel counts"),
        (lambda: Shifted(of="x", shift_voxel=-1), "shift_voxel must be one number or three"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": Inside(of="base")}, "Inside: no group 'base' is stated before this one"),
        (
            {"base": Fixed(size=[8] * 3, count=2), "x": Inside(of="base")},
            "do not fill a box without overlap; use Cells",
        ),
        (
            {"base": Fixed(size=[8] * 3, count=2), "x": Shifted(of="base")},
            "has 2 views, this one 1; give both the same",
        ),
        ({"x": Shifted(of="base")}, "Shifted: no group 'base'"),
        ({"x": Cells(size=[8] * 3, of="base")}, "Cells: no group 'base'"),
    ],
)
def test_groups_that_do_not_fit_are_named(noise_store, groups, message):
    with pytest.raises(ValueError, match=message):
        placed(noise_store, **groups)
