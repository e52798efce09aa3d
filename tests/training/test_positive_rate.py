"""The positive rate of uniform positions, and thresholds that have a wanted one."""

import numpy as np
import pytest
import torch

from medssl.data.geometry import Frame
from medssl.data.placements import Nearby, Placement, RandomCrop
from medssl.data.sampling import Anchored, Shuffled
from medssl.data.views import ViewPlan
from medssl.methods.positions import PositionRule
from medssl.training.positive_rate import automatic_threshold, threshold_at


def rate(threshold, width):
    """The share of pairs of uniform numbers from a range of this width that differ by less than the threshold."""
    return 2 * threshold / width - (threshold / width) ** 2


@pytest.mark.parity
@pytest.mark.parametrize(("width", "one", "three"), [(1, 0.190, 0.0068), (0.68, 0.272, 0.020), (0.5, 0.360, 0.046)])
def test_uniform_positions_have_the_card_s_rates(width, one, three):
    assert rate(0.1, width) == pytest.approx(one, abs=7e-4)
    assert rate(0.1, width) ** 3 == pytest.approx(three, abs=7e-4)
    position = width * torch.rand(1200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group = torch.zeros(1200, dtype=torch.int64)
    for axes, expected in ((["z"], one), (["x", "y", "z"], three)):
        rule = PositionRule(axes=axes, threshold=0.1)
        positive, _ = rule.masks(position[:, : len(axes)], group)
        share = (positive.sum().item() - 1200) / (1200 * 1199)
        assert share == pytest.approx(expected, rel=0.06)


@pytest.mark.parity
@pytest.mark.parametrize(("num_axes", "expected"), [(1, 0.1), (3, 0.348)])
def test_the_quantile_of_distances_is_the_inverse_of_the_rate(num_axes, expected):
    points = np.random.default_rng(0).uniform(size=(2, 200_000, num_axes))
    found = threshold_at(np.abs(points[0] - points[1]).max(axis=1), rate=0.19)
    assert found == pytest.approx(expected, rel=0.01)  # about 0.35 for three axes
    assert rate(found, 1) ** num_axes == pytest.approx(0.19, rel=0.02)


def noise(*shapes):
    return [
        np.random.default_rng(n).integers(-500, 500, (1, *shape)).astype(np.int16) for n, shape in enumerate(shapes)
    ]


def test_the_threshold_of_a_run_follows_from_its_sampler_and_places(make_store):
    """Crops of 10 in 40 voxels: their centres leave a width of 30 / 40 of the volume."""
    store = make_store(*noise(*[(40, 40, 40)] * 4))
    plan = ViewPlan(groups={"still": RandomCrop(size=[10, 10, 10], within="volume")})
    rule = PositionRule(axes=["z"], frame="volume")
    settings = {"rule": rule, "cases": [0, 1, 2, 3], "batch_size": 16, "num_pairs": 3000}
    found = automatic_threshold(store, plan, Shuffled(), **settings)
    assert found == automatic_threshold(store, plan, Shuffled(), **settings)
    width = 30 / 40
    assert rate(found, width) == pytest.approx(0.19, abs=0.04)
    wider = automatic_threshold(store, plan, Shuffled(), **settings, rate=0.5)
    assert rate(wider, width) == pytest.approx(0.5, abs=0.06)
    cube = automatic_threshold(store, plan, Shuffled(), **settings | {"rule": PositionRule(frame="volume")})
    assert rate(cube, width) ** 3 == pytest.approx(0.19, abs=0.05)


def test_anchored_batches_need_a_smaller_threshold(make_store):
    """Pairs of one anchor, one in three of a batch of 4, lie within its jitter."""
    store = make_store(*noise(*[(40, 40, 40)] * 4))
    rule = PositionRule(frame="body")
    settings = {"rule": rule, "cases": [0, 1, 2, 3], "batch_size": 4, "num_pairs": 400}
    crop = {"size": [8, 8, 8], "within": "body"}
    free = automatic_threshold(store, ViewPlan(groups={"still": RandomCrop(**crop)}), Shuffled(), **settings)
    plan = ViewPlan(groups={"still": Nearby(**crop, of="anchor", shift=0.05)})
    tied = automatic_threshold(store, plan, Anchored(volumes_per_anchor=2), **settings)
    assert tied < 0.15 < free
    alone = {"world": 2, "gather": False}  # both samples of an anchor on one rank
    assert automatic_threshold(store, plan, Anchored(volumes_per_anchor=2), **settings, **alone) < tied


@pytest.mark.parametrize(
    ("options", "compared"),
    [
        ({}, [{0, 1, 2, 3, 4, 5, 6, 7}]),
        ({"world": 2}, [{0, 1, 2, 3, 4, 5, 6, 7}]),
        ({"world": 2, "gather": False}, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ({"accumulate": 2}, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ({"world": 2, "accumulate": 2}, [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        ({"world": 2, "accumulate": 2, "gather": False}, [{0, 1}, {4, 5}, {2, 3}, {6, 7}]),
    ],
)
def test_the_samples_that_a_run_compares_are_compared(options, compared, make_store, monkeypatch):
    """As micro-batches of the ranks hold them."""
    store, seen = make_store(*noise((12, 12, 12))), []

    def distances(store, spec, places, *, rule, compared_size):
        numbers = [round(placement.frame.center[2]) for _, placement in places]
        seen.extend(set(numbers[at : at + compared_size]) for at in range(0, len(numbers), compared_size))
        return np.arange(10.0)

    class Marked(RandomCrop):
        def place(self, scene, placed, rng):
            return [Placement(0, Frame.at([0, 0, scene.request.sample], (4, 4, 4), step_voxel=[1, 1, 1]))]

    monkeypatch.setattr("medssl.training.positive_rate.pair_distances", distances)
    plan, rule = ViewPlan(groups={"still": Marked(size=[4, 4, 4])}), PositionRule()
    automatic_threshold(store, plan, Shuffled(), rule=rule, cases=[0], batch_size=8, num_pairs=1, **options)
    assert seen == compared


def test_processes_of_sixteen_samples_compare_their_own(make_store):
    store = make_store(*noise(*[(40, 40, 40)] * 4))
    plan = ViewPlan(groups={"still": Nearby(size=[8, 8, 8], within="body", of="anchor", shift=0.05)})
    settings = {"rule": PositionRule(frame="body"), "cases": [0, 1, 2, 3], "batch_size": 32, "num_pairs": 2000}
    sampler = Anchored(volumes_per_anchor=16)  # an anchor a process
    together = automatic_threshold(store, plan, sampler, **settings, world=2, gather=True)
    own = automatic_threshold(store, plan, sampler, **settings, world=2)
    assert own == automatic_threshold(store, plan, sampler, **settings, world=2, gather=False)
    assert own < 0.9 * together


def test_cohorts_count_as_the_rule_says(make_store):
    store = make_store(*noise(*[(40, 40, 40)] * 4), groups=("a", "a", "b", "b"))
    plan = ViewPlan(groups={"still": RandomCrop(size=[10, 10, 10], within="volume")})

    def found(cross_group, **more):
        rule = PositionRule(axes=["z"], frame="volume", cross_group=cross_group)
        settings = {"rule": rule, "cases": [0, 1, 2, 3], "batch_size": 4, "num_pairs": 600} | more
        return automatic_threshold(store, plan, Shuffled(), **settings)

    assert found("ignore") == pytest.approx(found("compare"), abs=0.03)
    assert found("negative", rate=0.1) > 1.8 * found("compare", rate=0.1)  # two of three pairs are of other cohorts
    with pytest.raises(ValueError, match="too few pairs are of one cohort"):
        found("negative", rate=0.5)
    with pytest.raises(ValueError, match="found no pair that is compared"):
        found("ignore", cases=[0, 2], batch_size=2)


def test_places_that_do_not_differ_have_no_threshold(make_store):
    store = make_store(*noise((12, 12, 12), (12, 12, 12)))
    plan = ViewPlan(groups={"still": RandomCrop(size=[12, 12, 12], within="volume")})
    rule = PositionRule(frame="volume")
    settings = {"rule": rule, "cases": [0, 1], "batch_size": 2, "num_pairs": 20}
    with pytest.raises(ValueError, match="all crops lie in one place; state a number"):
        automatic_threshold(store, plan, Shuffled(), **settings)
    with pytest.raises(ValueError, match="1 for each of 2 processes x 1 micro-batches; raise batch_size=2"):
        automatic_threshold(store, plan, Shuffled(), **settings, world=2, gather=False)
    with pytest.raises(ValueError, match="0 for each of 3 processes x 1"):
        automatic_threshold(store, plan, Shuffled(), **settings, world=3)
    with pytest.raises(ValueError, match=r"must lie between 0 and 1, got 1\.5"):
        automatic_threshold(store, plan, Shuffled(), **settings, rate=1.5)
