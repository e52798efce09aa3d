"""Tables of keypoints as they come out of `medssl.derive`, carried through drawn views."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medssl.data.augment import Affine, ByModality, Elastic, Flip, Percentiles, Window
from medssl.data.placements import Nearby, RandomCrop
from medssl.data.scene import Request
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.models.keypoints import DifferenceOfGaussians
from medssl.tables.derived import derive
from medssl.tables.keypoints import KeypointTables

NUM_POINTS = 4000


def texture(shape, *, seed):
    """Smooth noise in the range of CT."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.2)
    return (150 * field / field.std()).astype(np.int16)[None]


@pytest.fixture
def store(make_store):
    made = make_store(texture((40, 36, 32), seed=0), texture((34, 33, 38), seed=1))
    detector = DifferenceOfGaussians(value_range=(0, 1))
    derive(made.root, KeypointTables(detector=detector, num_points=NUM_POINTS), num_workers=0, progress=False)
    return VolumeStore(made.root)


@pytest.mark.parametrize("is_bent", [False, True])
def test_rows_without_a_keypoint_lie_in_no_view(store, draw, is_bent):
    augment = [Flip(axes=[0, 1])]
    if is_bent:
        augment += [Elastic(sigma_voxel=[8, 10], rms_voxel=[0.5, 1.0]), Affine(rotation_deg=[[0, 0], [0, 0], [0, 90]])]
    plan = ViewPlan(groups={"crop": RandomCrop(size=[20, 20, 20], count=2, points="keypoints", augment=augment)})
    view = draw(store, plan, [Request(cases=(0,), sample=0), Request(cases=(1,), sample=1)])["crop"]
    assert (view.displacement is not None) == is_bent
    known = view.points.isfinite().all(-1)
    assert view.points.shape == (2, 2, NUM_POINTS, 3)
    assert (known.sum(-1) < NUM_POINTS).all()
    assert not view.inside[~known].any()
    assert (view.inside.sum(-1) > 5).all()
    assert view.point_features[view.inside].isfinite().all()
    place = view.to_view(view.points)[view.inside]
    assert ((place >= 0) & (place <= 19)).all()
    back = view.to_volume(view.to_view(view.points).nan_to_num())
    assert (back - view.points)[view.inside].norm(dim=-1).max() <= 0.25
    inside_box = torch.tensor(np.array(store.record(0).shape) - 1)
    assert (view.points[0][view.inside[0]] <= inside_box).all()


@pytest.mark.parametrize(
    ("normalise", "shown"),
    [
        (ByModality(window_hu=[-160, 240]), None),
        (Window(low_hu=-160, high_hu=240), None),
        (Percentiles(), None),
        (ByModality(), "[-1000,1000]"),
        (Window(low_hu=-160, high_hu=300), "[-160,300]"),
    ],
)
def test_views_in_another_window_than_their_points_are_told_once(store, normalise, shown):
    first = RandomCrop(size=[16, 16, 16], points="keypoints", augment=[Flip(axes=[0]), normalise])
    second = Nearby(of="first", size=[16, 16, 16], points="keypoints", augment=first.augment)
    plan = ViewPlan(groups={"first": first, "second": second})
    notes = plan.notes(store)
    assert len(notes) == (shown is not None)
    if shown is not None:
        assert f"views show CT in the window {shown} HU" in notes[0]
        assert "points of the table 'keypoints' were found in [-160,240]" in notes[0]
        assert f"what.window_hu={shown}" in notes[0]
    pointless = ViewPlan(groups={"first": replace(first, points=None)})
    assert pointless.notes(store) == []


def test_the_window_of_points_does_not_matter_without_ct(make_store):
    made = make_store(texture((40, 36, 32), seed=0), modality="mr")
    derive(made.root, KeypointTables(detector=DifferenceOfGaussians()), num_workers=0, progress=False)
    plan = ViewPlan(groups={"first": RandomCrop(size=[16] * 3, points="keypoints", augment=[ByModality()])})
    assert plan.notes(VolumeStore(made.root)) == []
