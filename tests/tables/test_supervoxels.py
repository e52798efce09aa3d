"""Supervoxels follow edges, and their map is drawn with views."""

import numpy as np
import pytest
import torch

from medssl.config import main
from medssl.data.augment import Affine, Flip
from medssl.data.placements import Fixed
from medssl.data.sampling import Request
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.derive import run as run_derive
from medssl.tables.derived import derive, table_of
from medssl.tables.supervoxels import Supervoxels

pytest.importorskip("skimage")
SETTINGS = Supervoxels(side_voxel=8, window_hu=[0, 200])


@pytest.fixture
def store(make_store):
    """A bright ball in the dark, its edge off any grid of cubes."""
    x, y, z = np.mgrid[:40, :36, :32]
    ball = ((x - 17) ** 2 + (y - 16) ** 2 + (z - 15) ** 2 < 11**2).astype(np.int16)
    return make_store(200 * ball[None])


def purity(regions, array):
    """The share of voxels, but for those on the edge, whose region has their side of it as its majority."""
    sure = (array == 0) | (array == 200)
    flat, bright = regions[sure], array[sure] > 100
    counts = np.stack([np.bincount(flat[bright == side], minlength=flat.max() + 1) for side in (False, True)])
    return counts.max(axis=0).sum() / flat.size


def test_supervoxels_follow_edges_where_compact_ones_are_cubes(store):
    derive(store.root, SETTINGS, num_workers=0, progress=False)
    table = table_of(store, SETTINGS, 0)
    halved = store.read(0, 0, [0] * 3, [40, 36, 32]).result()[0].reshape(20, 2, 18, 2, 16, 2).mean((1, 3, 5))
    assert table["regions"].shape == (20, 18, 16)
    np.testing.assert_allclose(table["to_volume"] @ [0, 0, 0, 1], [0.5, 0.5, 0.5, 1], atol=1e-9)
    np.testing.assert_allclose(table["to_volume"] @ [19, 17, 15, 1], [38.5, 34.5, 30.5, 1], atol=1e-9)
    assert table["regions"].min() == 1
    assert 40 <= SETTINGS.quality(table)["regions"] <= 120  # 90 are asked for
    cubes = Supervoxels(side_voxel=8, window_hu=[0, 200], compactness=100.0)
    derive(store.root, cubes, num_workers=0, progress=False)
    assert purity(table["regions"], halved) > 0.99 > 0.98 > purity(table_of(store, cubes, 0)["regions"], halved)


@pytest.mark.parametrize(
    "augment", [[], [Flip(axes=[0], probability=1.0)], [Affine(rotation_deg=[[0, 0], [0, 0], [30, 30]])]]
)
def test_a_view_shows_the_region_of_each_of_its_voxels(store, draw, augment):
    derive(store.root, SETTINGS, num_workers=0, progress=False)
    opened = VolumeStore(store.root)
    spec = Fixed(size=[16, 14, 40], center=[0.4, 0.5, 0.5], regions="supervoxels", augment=augment)
    view = draw(opened, ViewPlan(groups={"still": spec}), [Request(cases=(0,), sample=0)])["still"]
    assert view.regions.shape == (1, 1, 1, 16, 14, 40)
    table = opened.derived("supervoxels", 0)
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in (16, 14, 40)], indexing="ij"), dim=-1)
    volume_voxel = view.to_volume(index.reshape(1, 1, -1, 3).double())[0, 0].numpy()
    place = (volume_voxel - table["to_volume"][:3, 3]) / 2
    inside = ((place > -0.5) & (place < np.array(table["regions"].shape) - 0.5)).all(axis=1)
    near = np.rint(place).astype(int).clip(0, np.array(table["regions"].shape) - 1)
    expected = np.where(inside, table["regions"][tuple(near.T)], 0)
    sure = (np.abs(np.abs(place - np.rint(place)) - 0.5) > 1e-3).all(axis=1)  # not midway between two
    found = view.regions[0, 0, 0].flatten().numpy()
    assert sure.mean() > 0.9
    assert np.array_equal(found[sure], expected[sure])
    assert 0.1 < (found == 0).mean() < 0.5  # above and below the volume


def test_a_group_without_regions_has_none(store, draw):
    spec = Fixed(size=[8, 8, 8])
    assert draw(store, ViewPlan(groups={"still": spec}), [Request(cases=(0,), sample=0)])["still"].regions is None
    spec = Fixed(size=[8, 8, 8], regions="supervoxels")
    with pytest.raises(
        ValueError, match=r"has no derived data 'supervoxels'; run `python -m medssl.derive what=superv"
    ):
        draw(store, ViewPlan(groups={"still": spec}), [Request(cases=(0,), sample=0)])


def test_the_command_tells_mistakes_in_one_line(store, capsys):
    main("derive", run_derive, arguments=["what=supervoxels", f"store={store.root}", "num_workers=0"])
    assert "mean quality: regions " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main("derive", run_derive, arguments=["what=supervoxels", f"store={store.root}", "what.compactness=0"])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "what.compactness=0 positive" in error
