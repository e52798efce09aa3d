import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from medssl.data import augment as A
from medssl.data import draw as draw_module
from medssl.data.augment import Affine, Elastic, Flip, Rotate90, Window
from medssl.data.placements import Fixed, RandomCrop, Same
from medssl.data.sampling import Request
from medssl.data.views import ViewPlan


def _noise(shape=(1, 40, 36, 32), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def _coordinates(view):
    """Volume voxels of every view voxel, by the view's own mapping."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(n) for n in view.image.shape[3:]], indexing="ij"), -1)
    return view.to_volume(grid.reshape(1, 1, -1, 3).double().expand(*view.case.shape, -1, 3))


def test_an_aligned_view_returns_the_stored_voxels_exactly(noise_store, draw):
    plan = ViewPlan(groups={"x": RandomCrop(size=[16, 12, 8], count=3)})
    view = draw(noise_store, plan, [Request((n,), n) for n in range(4)])["x"]
    for b in range(4):
        for v in range(3):
            corner = view.matrix[b, v, :3, 3].numpy()
            assert np.all(corner == np.rint(corner))
            x, y, z = corner.astype(int)
            np.testing.assert_array_equal(
                view.image[b, v].numpy(), _noise(seed=b)[:, x : x + 16, y : y + 12, z : z + 8]
            )


def test_flips_and_quarter_turns_are_exact(noise_store, draw):
    augment = [Flip(), Rotate90(probability=1.0)]
    plan = ViewPlan(groups={"a": RandomCrop(size=[12] * 3), "b": Same(of="a", count=8, augment=augment)})
    seen = set()
    views = draw(noise_store, plan, [Request((0,), n) for n in range(4)])
    for b in range(4):
        for v in range(8):
            points = _coordinates(views["b"])[b, v]
            x, y, z = points.round().long().T
            assert torch.equal(points, points.round())
            expected = torch.from_numpy(_noise())[0, x, y, z].reshape(12, 12, 12)
            assert torch.equal(views["b"].image[b, v, 0], expected.float())
            seen.add(tuple(views["b"].matrix[b, v, :3, :3].flatten().tolist()))
    assert len(seen) > 10, "many of the 48 orientations occur"


@pytest.mark.parametrize("outside", ["minimum", "border", -77.0])
def test_a_turned_view_equals_trilinear_interpolation_at_its_points(make_store, draw, outside):
    store = make_store(_noise(), affine=np.diag([1.0, 1.3, 2.0, 1.0]))
    augment = [Affine(rotation_deg=30, scale=[0.7, 1.1], translation=15.0)]
    plan = ViewPlan(groups={"x": RandomCrop(size=[20, 16, 18], count=4, augment=augment, outside=outside)})
    view = draw(store, plan, [Request((0,), 0)])["x"]
    array = _noise()[0].astype(float)
    fill = array.min() if outside == "minimum" else outside
    for v in range(4):
        points = _coordinates(view)[0, v].numpy().T
        mode = {"mode": "nearest"} if outside == "border" else {"mode": "grid-constant", "cval": fill}
        expected = map_coordinates(array, points, order=1, **mode).reshape(20, 16, 18)
        np.testing.assert_allclose(view.image[0, v, 0].numpy(), expected, atol=0.3)


def test_a_view_beyond_the_volume_is_padded_where_it_leaves_it(make_store, draw):
    store = make_store(_noise((1, 10, 12, 40)))
    groups = {
        "fill": Fixed(size=[16, 16, 16], valid=True),
        "edge": Fixed(size=[16, 16, 16], outside="border"),
        "away": Fixed(size=[4, 4, 4], center=[3.0, 0.5, 0.5], valid=True),
    }
    views = draw(store, ViewPlan(groups=groups), [Request((0,), 0)])
    array = _noise((1, 10, 12, 40))[0]
    padded = np.pad(array[:, :, 12:28], ((3, 3), (2, 2), (0, 0)), constant_values=array.min())
    np.testing.assert_array_equal(views["fill"].image[0, 0, 0].numpy(), padded)
    assert views["fill"].valid.sum() == 10 * 12 * 16
    np.testing.assert_array_equal(
        views["edge"].image[0, 0, 0].numpy(), np.pad(array[:, :, 12:28], ((3, 3), (2, 2), (0, 0)), "edge")
    )
    assert torch.all(views["away"].image == int(array.min()))
    assert not views["away"].valid.any()


def test_a_crop_context_repeats_the_crops_own_border(noise_store, draw):
    shift = [Affine(translation=[6.0, 0, 0], probability=1.0)]
    groups = {
        "free": RandomCrop(size=[10] * 3),
        "cut": Same(of="free", context="crop", outside="border", augment=shift),
    }
    views = draw(noise_store, ViewPlan(groups=groups), [Request((0,), 3)])
    free, cut = views["free"].image[0, 0, 0], views["cut"].image[0, 0, 0]
    moved = (views["cut"].matrix - views["free"].matrix)[0, 0, 0, 3].item()
    points = (torch.arange(10) + moved).clamp(0, 9).numpy()
    for y, z in ((0, 0), (4, 7)):
        np.testing.assert_allclose(
            cut[:, y, z].numpy(), np.interp(points, np.arange(10), free[:, y, z].numpy()), atol=0.2
        )


def test_labels_follow_the_image_by_nearest_neighbour(make_store, draw):
    label = (np.random.default_rng(1).uniform(size=(40, 36, 32)) > 0.5) * 7
    store = make_store((label[None] * 100).astype(np.int16), labels=[label])
    groups = {
        "plain": RandomCrop(size=[12] * 3, label=True),
        "turned": RandomCrop(size=[12] * 3, label=True, augment=[Flip(), Affine(rotation_deg=40, scale=[0.3, 0.5])]),
    }
    views = draw(store, ViewPlan(groups=groups), [Request((0,), n) for n in range(3)])
    assert torch.equal(views["plain"].label.float() * 100, views["plain"].image)
    assert set(views["turned"].label.unique().tolist()) == {0, 7}
    for b in range(3):
        points = _coordinates(views["turned"])[b, 0].numpy().T
        expected = map_coordinates(label, points, order=0, mode="grid-constant").reshape(12, 12, 12)
        np.testing.assert_array_equal(views["turned"].label[b, 0, 0].numpy(), expected)


@pytest.mark.parametrize("spacing_mm", [[1.5, 1.5, 2.0], [0.9, 1.1, 4.0], "native"])
@pytest.mark.parametrize(
    "augment",
    [
        [],
        [Flip(probability=1.0), Rotate90(probability=1.0)],
        [Flip(probability=1.0), Affine(rotation_deg=25, scale=[0.8, 1.25])],
        [Elastic(sigma_voxel=[3, 4], rms_voxel=[1, 2]), Flip(probability=0.5)],
    ],
    ids=["plain", "flipped", "turned", "bent"],
)
def test_labels_at_another_spacing_are_those_of_the_nearest_stored_voxel(make_store, draw, spacing_mm, augment):
    """A slow loop over the view's voxels, by the view's own map of points; crops reach beyond the volume."""
    shape = (26, 24, 18)
    blocks = np.random.default_rng(3).integers(0, 5, (13, 12, 9))
    label = blocks.repeat(2, 0).repeat(2, 1).repeat(2, 2) * 30
    store = make_store(_noise((1, *shape)), labels=[label], affine=np.diag([0.8, 1.3, 2.5, 1.0]))
    plan = ViewPlan(
        groups={"x": RandomCrop(size=[14] * 3, count=2, spacing_mm=spacing_mm, label=True, augment=augment)}
    )
    view = draw(store, plan, [Request((0,), 1)])["x"]
    points = _coordinates(view)[0].reshape(2, 14, 14, 14, 3).numpy()
    compared = 0
    for index in np.ndindex(2, 14, 14, 14):
        if np.any(np.abs(points[index] - np.floor(points[index]) - 0.5) < 1e-3):
            continue  # halfway between two voxels either is right
        nearest = np.floor(points[index] + 0.5).astype(int)
        inside = np.all(nearest >= 0) and np.all(nearest < shape)
        expected = label[tuple(nearest)] if inside else 0
        assert view.label[0, index[0], 0][index[1:]] == expected
        compared += 1
    assert compared > 4000
    assert len(view.label.unique()) == 5


@pytest.mark.parametrize("spacing_mm", [[1.5, 1.5, 2.0], "native"])
def test_the_label_of_a_half_space_ends_where_its_image_does(make_store, draw, spacing_mm):
    """Image and label take different ways through drawing; here one follows from the other."""
    ramp = np.stack(np.meshgrid(*[np.arange(n) for n in (30, 28, 24)], indexing="ij"))
    array = (20 * ramp[0] + 12 * ramp[1] - 9 * ramp[2]).astype(np.int16)
    label = (array > 200).astype(int)
    store = make_store(array[None], labels=[label], affine=np.diag([0.8, 1.3, 2.5, 1.0]))
    augment = [Flip(), Affine(rotation_deg=25, scale=[0.8, 1.0])]
    groups = {
        "straight": RandomCrop(size=[12] * 3, count=4, spacing_mm=spacing_mm, label=True, outside="border"),
        "turned": Same(of="straight", size=[12] * 3, count=4, label=True, augment=augment, outside="border"),
    }
    for view in draw(store, ViewPlan(groups=groups), [Request((0,), 2)]).values():
        inside = (_coordinates(view) > 0).all(-1) & (_coordinates(view) < torch.tensor([29, 27, 23])).all(-1)
        sure = inside.reshape(view.image.shape[0], 4, 1, 12, 12, 12) & ((view.image - 200).abs() > 45)
        assert sure.float().mean() > 0.3
        assert torch.equal(view.label[sure], (view.image[sure] > 200).long())


def test_large_label_values_survive_turning(make_store, draw):
    label = np.full((16, 16, 16), 2**24 + 1)
    store = make_store((np.arange(16)[:, None, None] * np.ones((1, 16, 16, 16))).astype(np.int16), labels=[label])
    spec = Fixed(size=[6] * 3, label=True, augment=[Affine(rotation_deg=[[20, 20]] * 3)])
    view = draw(store, ViewPlan(groups={"x": spec}), [Request((0,), 0)])["x"]
    assert view.label.unique().tolist() == [2**24 + 1]


def test_a_view_costs_one_interpolation_and_an_aligned_one_none(noise_store, draw, monkeypatch):
    calls = []
    sampler, filters = draw_module.linear_at, draw_module.apply_axis_matrices
    monkeypatch.setattr(draw_module, "linear_at", lambda *a, **k: calls.append("sample") or sampler(*a, **k))
    monkeypatch.setattr(draw_module, "apply_axis_matrices", lambda *a: calls.append("matrix") or filters(*a))
    spatial = [Flip(), Rotate90(), Affine(rotation_deg=20, scale=[0.8, 1.1])]
    for augment, expected in (([Flip(), Rotate90()], []), (spatial, ["sample"])):
        calls.clear()
        augment = [*augment, Window(low_hu=-1000, high_hu=1000)]
        draw(noise_store, ViewPlan(groups={"x": RandomCrop(size=[10] * 3, augment=augment)}), [Request((0,), 0)])
        assert calls == expected
    calls.clear()
    draw(noise_store, ViewPlan(groups={"x": RandomCrop(size=[10] * 3, fraction=[0.5, 0.9])}), [Request((0,), 0)])
    assert calls == ["matrix"]


def test_a_bent_view_shows_what_its_mapping_says(make_store, draw):
    x, y, z = np.meshgrid(np.arange(64), np.arange(60), np.arange(56), indexing="ij")
    store = make_store((100 * np.stack([x, y, z])).astype(np.int16))
    augment = [Elastic(rms_voxel=[2.0, 2.0]), Affine(rotation_deg=15)]
    view = draw(
        store, ViewPlan(groups={"x": RandomCrop(size=[24] * 3, outside="border", augment=augment)}), [Request((0,), 5)]
    )["x"]
    shown = view.image[0, 0].flatten(1).T / 100
    stated = _coordinates(view)[0, 0]
    limit = torch.tensor([63.0, 59, 55])
    inside = ((stated > 0) & (stated < limit)).all(1)
    assert inside.float().mean() > 0.8
    np.testing.assert_allclose(shown[inside].numpy(), stated[inside].numpy(), atol=2e-3)


def test_the_displacement_has_the_stated_size(make_store, draw):
    store = make_store(_noise())
    plan = ViewPlan(
        groups={"x": Fixed(size=[48] * 3, count=12, augment=[Elastic(sigma_voxel=[4, 4], rms_voxel=[1.5, 1.5])])}
    )
    field = draw(store, plan, [Request((0,), 0)])["x"].displacement
    assert field.square().mean().sqrt().item() == pytest.approx(1.5, rel=0.1)


@pytest.mark.gpu
def test_cpu_and_gpu_draw_the_same(noise_store, draw):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    augment = [
        A.Flip(), A.Affine(rotation_deg=20, scale=[0.8, 1.2]), A.Elastic(), A.Window(low_hu=-1000, high_hu=1000),
        A.Brightness(factor=[0.8, 1.2]), A.Contrast(), A.Gamma(), A.GaussianNoise(), A.GaussianBlur(),
        A.LowResolution(), A.BiasField(), A.Cutout(),
    ]  # fmt: skip
    plan = ViewPlan(
        groups={
            "full": RandomCrop(size=[24] * 3, count=2, augment=augment, valid=True, label=True),
            "resized": RandomCrop(size=[12] * 3, fraction=[0.5, 1], augment=augment[3:]),
        }
    )
    requests = [Request((n,), n) for n in range(4)]
    cpu, gpu = (draw(noise_store, plan, requests, device=d) for d in ("cpu", "cuda"))
    for name in plan.groups:
        np.testing.assert_allclose(gpu[name].image.cpu().numpy(), cpu[name].image.numpy(), atol=1e-4)
        assert torch.equal(gpu[name].matrix.cpu(), cpu[name].matrix)
    assert (gpu["full"].label.cpu() == cpu["full"].label).float().mean() > 0.9999
