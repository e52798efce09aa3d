from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from medssl.data.sampling import Anchored, Pairs, SameLocation, Shuffled, linked_cases

SAMPLERS = [
    Shuffled(),
    Pairs(),
    Pairs(partner="previous"),
    Pairs(partner="linked"),
    SameLocation(num_locations=5),
    SameLocation(num_locations=5, locations_per_batch=2),
    Anchored(),
]


def _global(sampler, step, *, world=1, index=range(10), batch_size=4, seed=1):
    parts = [
        sampler.batch(step, index=index, batch_size=batch_size, seed=seed, rank=r, world=world) for r in range(world)
    ]
    assert len({len(part) for part in parts}) == 1, "every rank gets equally many"
    return sorted((request for part in parts for request in part), key=lambda request: request.sample)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_ranks_share_one_batch_without_overlap_and_the_step_alone_decides(sampler):
    for step in (0, 3, 17):
        batch = _global(sampler, step)
        assert [request.sample for request in batch] == list(range(4 * step, 4 * step + 4))
        assert _global(sampler, step, world=2) == batch
        assert _global(sampler, step, world=4) == batch
    assert _global(sampler, 3, seed=2) != _global(sampler, 3)


@pytest.mark.parametrize("sampler", [Shuffled(), Pairs()], ids=lambda s: type(s).__name__)
def test_an_epoch_shows_every_case_once_and_the_next_in_another_order(sampler):
    index = [3, 5, 8, 13, 21]
    cases = [r.cases[0] for step in range(10) for r in _global(sampler, step, index=index, batch_size=2)]
    epochs = [cases[n : n + 5] for n in range(0, 20, 5)]
    assert all(sorted(epoch) == index for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_data_set_smaller_than_a_batch_is_reshuffled_and_concatenated():
    cases = [r.cases[0] for r in _global(Shuffled(), 0, index=[7, 9], batch_size=6)]
    assert Counter(cases) == {7: 3, 9: 3}


def test_pairs_are_of_two_cases_and_a_single_case_pairs_with_itself():
    pairs = [r.cases for step in range(50) for r in _global(Pairs(), step)]
    assert all(a != b for a, b in pairs)
    assert len({b for _, b in pairs}) == 10
    assert _global(Pairs(), 0, index=[4])[0].cases == (4, 4)
    previous = [r.cases for step in range(5) for r in _global(Pairs(partner="previous"), step)]
    assert all(later[1] == earlier[0] for earlier, later in pairwise(previous))


def test_linked_partners_are_powers_of_two_apart_and_never_held_out():
    assert linked_cases(5, 4) == [1, 3, 4, 6, 7, 9, 13]
    assert linked_cases(0, 2) == [1, 2]
    for first in range(40):
        assert all(first in linked_cases(second) for second in linked_cases(first)), "who has a partner is one"
    index = [n for n in range(30) if n not in (4, 11, 20)]
    pairs = [r.cases for step in range(300) for r in _global(Pairs(partner="linked"), step, index=index)]
    assert all(b in linked_cases(a) and b in index for a, b in pairs)
    assert {b for a, b in pairs if a == 12} == {8, 10, 13, 14, 16, 28}
    few = [r.cases for step in range(30) for r in _global(Pairs(partner="linked", num_links=1), step, index=index)]
    assert {abs(a - b) for a, b in few} == {1}
    alone = _global(Pairs(partner="linked", num_links=1), 0, index=[0, 7])
    assert all(a == b for a, b in (r.cases for r in alone)), "without a partner a case is paired with itself"
    assert all(a == b for a, b in (r.cases for r in _global(Pairs(partner="self"), 3)))


def test_a_batch_has_one_location_and_a_round_has_all():
    sampler = SameLocation(num_locations=5)  # 10 cases, batches of 4: two batches a visit
    batches = [_global(sampler, step) for step in range(10)]
    locations = [{request.location for request in batch} for batch in batches]
    assert all(len(found) == 1 for found in locations)
    visits = [next(iter(locations[step])) for step in range(0, 10, 2)]
    assert visits == [next(iter(locations[step])) for step in range(1, 10, 2)]
    assert sorted(visits) == [0, 1, 2, 3, 4]
    assert len({r.cases for batch in batches[:2] for r in batch}) == 8, "no case twice in a visit"
    ordered = SameLocation(num_locations=5, order="sequential", batches_per_visit=1)
    assert [_global(ordered, step)[0].location for step in range(6)] == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("options", "num_cases", "batch_size"),
    [({}, 29, 8), ({}, 5, 8), ({"batches_per_visit": 2}, 29, 8), ({"locations_per_batch": 2}, 29, 8)],
)
def test_a_round_takes_the_steps_that_it_says(options, num_cases, batch_size):
    sampler = SameLocation(num_locations=6, **options)
    steps = sampler.steps_per_round(num_cases, batch_size)
    assert steps == int(steps)
    for start in (0, int(steps)):
        batches = [
            sampler.batch(start + n, index=range(num_cases), batch_size=batch_size, seed=0) for n in range(int(steps))
        ]
        visits = Counter(location for batch in batches for location in {request.location for request in batch})
        assert visits == dict.fromkeys(range(6), sampler.steps_per_visit(num_cases, batch_size))


def test_a_batch_may_mix_a_few_locations_each_with_its_own_cases():
    sampler = SameLocation(num_locations=4, locations_per_batch=2)  # 10 cases, 2 x 3 a batch: three batches a visit
    batches = [_global(sampler, step, batch_size=6) for step in range(6)]
    for batch in batches:
        assert Counter(request.location for request in batch) == {batch[0].location: 3, batch[3].location: 3}
    for location in range(4):
        cases = [r.cases[0] for batch in batches for r in batch if r.location == location]
        assert len(cases) == len(set(cases)) == 9, "no case twice in a visit"
    with pytest.raises(ValueError, match="batch_size 5 is not divisible by locations_per_batch 2"):
        sampler.batch(0, index=range(10), batch_size=5, seed=0)


def test_anchors_are_shared_by_neighbours_in_the_batch_and_far_from_each_other():
    batch = _global(Anchored(volumes_per_anchor=2, min_distance_body=0.3, margin_body=0.1), 5, batch_size=8)
    anchors = np.array([request.anchor_body for request in batch])
    np.testing.assert_array_equal(anchors[::2], anchors[1::2])
    distance = np.abs(anchors[::2, None] - anchors[None, ::2]).max(-1) + np.eye(4)
    assert distance.min() >= 0.3
    assert anchors.min() >= 0.1
    assert anchors.max() <= 0.9
    assert all(a.cases != b.cases for a, b in zip(batch[::2], batch[1::2], strict=True))


def test_an_anchor_shows_different_cases_and_stays_on_one_rank():
    sampler = Anchored(volumes_per_anchor=2)
    for step in range(60):
        for rank in range(2):
            part = sampler.batch(step, index=range(5), batch_size=8, seed=0, rank=rank, world=2)
            for first, second in zip(part[::2], part[1::2], strict=True):
                assert first.anchor_body == second.anchor_body
                assert first.cases != second.cases
    assert [r.cases for r in sampler.batch(0, index=[3], batch_size=2, seed=0)] == [(3,), (3,)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pairs(num_links=0), "num_links must be at least 1, got 0"),
        (lambda: Pairs(partner="best"), "partner must be random, previous, linked or self, got 'best'"),
        (lambda: SameLocation(num_locations=0), "num_locations must be at least 1"),
        (lambda: SameLocation(num_locations=2, order="odd"), "order must be shuffled or sequential"),
        (lambda: SameLocation(num_locations=2, locations_per_batch=3), "between 1 and num_locations=2, got 3"),
        (lambda: Anchored(margin_body=0.6), "margin_body=0.6"),
        (lambda: Shuffled().batch(0, index=[1], batch_size=3, seed=0, world=2), "3 is not divisible by 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
