"""What the views of MACL's configurations show: one geometry for both branches, or one for each."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medssl.config import compose
from medssl.data.module import VolumeDataModule
from medssl.data.prepare import prepare_store
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.methods.positions import PositionRule
from medssl.phantoms.source import Phantoms

BRIGHTER = "{_target_: medssl.data.augment.Brightness, probability: 1.0, factor: [0.8, 1.2]}"
READ = "{_target_: medssl.data.augment.ByModality}"
LOOK = (
    f"+views.groups.still_dominant={{_target_: medssl.data.placements.Same, of: still, augment: [{READ}, {BRIGHTER}]}}"
)
DRAWS = 100


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("views") / "store"
    prepare_store(Phantoms(num_cases=2, size_voxel=32, spacing_mm=12.0), root, num_workers=0)
    return VolumeStore(root)


def views_and_sampler(*settings):
    config = compose("pretrain", ["~data", "method=macl_tiny", "views.groups.still.size=[16,16,16]", *settings])
    values = OmegaConf.to_container(OmegaConf.create({k: config[k] for k in ("views", "sampler")}), resolve=True)
    return (instantiate(values[key], _convert_="all") for key in ("views", "sampler"))


@pytest.mark.parametrize("own_look", [False, True])
def test_both_branches_see_one_geometry_of_the_still_place_and_two_of_the_moved(store, own_look):
    """The released code mirrors the still pair by accident: its geometries agreed in a quarter of the draws."""
    plan, sampler = views_and_sampler(*([LOOK] if own_look else []))
    same = 0
    for sample in range(DRAWS):
        request = sampler.batch(sample, index=[0, 1], batch_size=1, seed=0)[0]
        placed = plan.place(Scene(store, request), seed=0, step=0)
        (still,), moved = placed["still"], placed["moved"]
        assert still.pose.displacement is None
        assert all(np.array_equal(view.placement.frame.matrix, still.pose.frame.matrix) for view in moved)
        same += np.array_equal(*(view.pose.frame.matrix for view in moved))
        if own_look:
            (other,) = placed["still_dominant"]
            assert np.array_equal(other.pose.frame.matrix, still.pose.frame.matrix)
            assert other.pose.displacement is None
    assert same < DRAWS / 8  # equal flips of two views that are not turned: 0.33^2 / 4


def test_looks_of_a_still_place_agree_voxel_by_voxel_and_positions_are_those_before_moving(store):
    plan, sampler = views_and_sampler(LOOK)
    data = VolumeDataModule(store=store, views=plan, sampler=sampler, batch_size=4, seed=0, training_cases=[0, 1])
    rule = PositionRule()
    for raw in data.loader(sampler, [0, 1], steps=range(2), seed=0):
        views = data.draw(raw).views
        still, other, moved = (views[name] for name in ("still", "still_dominant", "moved"))
        assert torch.equal(still.matrix, other.matrix)
        for first, second in zip(still.image, other.image, strict=True):  # brighter or darker, nothing else
            ratio = second[first > 0.05] / first[first > 0.05]
            assert ratio.std() < 1e-5
            assert abs(ratio.mean() - 1) > 1e-4
        assert (moved.image[:, 0] != moved.image[:, 1]).any()
        assert torch.equal(still.location_body[:, 0], moved.location_body[:, 1])
        assert torch.equal(rule(still)[0], rule(moved)[0])
