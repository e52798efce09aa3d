"""Samplers, which choose the cases of a batch: pure functions of the step, so that a run resumes at its step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from medssl.data.randomness import counter_generator

PARTNERS = ("random", "previous", "linked", "self")
NUM_LINKS = 8
"""Links of a case in tables of pairs: up to 16 partners. A store of 30 cases has about 7 of them."""


@dataclass(frozen=True)
class Request:
    """One sample to be made.

    Args:
        cases: Numbers of the cases in the store.
        sample: Number of the sample in the run. With the seed it determines everything drawn for the sample.
        location: Grid location, where the sampler assigns one.
        anchor_body: Body coordinate, where the sampler assigns one.
    """

    cases: tuple[int, ...]
    sample: int
    location: int | None = None
    anchor_body: tuple[float, float, float] | None = None


@runtime_checkable
class CaseSampler(Protocol):
    """A sampler, which gives every rank its part of each step's batch."""

    def batch(
        self, step: int, *, index: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> list[Request]:
        """Return the requests of one rank at one step.

        Ranks get disjoint requests, equally many each. All together are the same for any number of ranks.

        Args:
            step: Optimiser step, counted from 0.
            index: Case numbers to choose from.
            batch_size: Number of requests of all ranks together, divisible by `world`.
            seed: Seed of the run.
            rank: Number of this process.
            world: Number of processes.
        """


@lru_cache(maxsize=16)
def _permutation(num: int, *key: int | str) -> np.ndarray:
    return counter_generator("permutation", *key).permutation(num)


def _nth(index: Sequence[int], position: int, *key: int | str) -> int:
    """Return entry `position` of the endless sequence of reshuffled copies of `index`."""
    epoch, place = divmod(position, len(index))
    return int(index[_permutation(len(index), *key, epoch)[place]])


def _of_rank(requests: list[Request], rank: int, world: int) -> list[Request]:
    if len(requests) % world:
        raise ValueError(
            f"batch_size {len(requests)} is not divisible by {world} processes; choose a multiple of {world}"
        )
    each = len(requests) // world
    return requests[
        rank * each : (rank + 1) * each
    ]  # neighbours in the batch, such as those of an anchor, stay together


class Shuffled:
    """A sampler that takes every case once per epoch, in a new order each time; a batch may span two epochs."""

    def batch(
        self, step: int, *, index: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> list[Request]:
        """Return the requests of one rank at one step."""
        samples = range(step * batch_size, (step + 1) * batch_size)
        return _of_rank([Request((_nth(index, n, seed),), n) for n in samples], rank, world)


class Pairs:
    """A sampler that takes every case once per epoch, each with a partner case.

    A case without a partner is paired with itself.

    Args:
        partner: "random" draws any other case, uniformly. "previous" is the case one sample before. "linked" draws one
            of the cases that a table of pairs knows (`linked_cases`), uniformly. "self" is the case itself.
        num_links: Links per case of the table, for "linked".
    """

    def __init__(self, *, partner: str = "random", num_links: int = NUM_LINKS) -> None:
        if partner not in PARTNERS:
            raise ValueError(f"Pairs: partner must be {', '.join(PARTNERS[:-1])} or {PARTNERS[-1]}, got {partner!r}")
        if num_links < 1:
            raise ValueError(f"Pairs: num_links must be at least 1, got {num_links}")
        self.partner, self.num_links = partner, num_links

    def batch(
        self, step: int, *, index: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> list[Request]:
        """Return the requests of one rank at one step."""
        requests = []
        known = frozenset(index) if self.partner == "linked" else frozenset()
        for n in range(step * batch_size, (step + 1) * batch_size):
            first = _nth(index, n, seed)
            if self.partner == "self":
                second = first
            elif self.partner == "previous":
                second = _nth(index, max(n - 1, 0), seed)
            elif self.partner == "linked":
                linked = [case for case in linked_cases(first, self.num_links) if case in known] or [first]
                second = linked[int(counter_generator("partner", seed, n).integers(len(linked)))]
            else:
                others = [case for case in index if case != first] if len(index) < 64 else index
                generator = counter_generator("partner", seed, n)
                second = first
                while len(index) > 1 and second == first:
                    second = int(others[int(generator.integers(len(others)))])
            requests.append(Request((first, second), n))
        return _of_rank(requests, rank, world)


def linked_cases(case: int, num_links: int = NUM_LINKS) -> list[int]:
    """Return the partners of a case in tables of pairs: cases 1, 2, 4, ... 2^(num_links - 1) places before or after.

    Places are numbers in the store; the numbers returned may exceed its last one. The relation is symmetric. It depends
    neither on the size of the store nor on the held-out cases, so a sampler and a table agree on any part of a store.
    """
    steps = [2**link for link in range(num_links)]
    return [other for other in [case - step for step in reversed(steps)] if other >= 0] + [case + s for s in steps]


class SameLocation:
    """A sampler of one grid location per batch, or a few, for all ranks.

    Every round visits all locations once, in a new order each time.

    Args:
        num_locations: Number of grid locations.
        batches_per_visit: Batches at a location before the next one. None means as many as the cases fill, at least
            one.
        order: "shuffled" or "sequential".
        locations_per_batch: Number of locations in a batch, each with an equal share of it.
    """

    def __init__(
        self,
        *,
        num_locations: int,
        batches_per_visit: int | None = None,
        order: str = "shuffled",
        locations_per_batch: int = 1,
    ) -> None:
        if num_locations < 1:
            raise ValueError(f"SameLocation: num_locations must be at least 1, got {num_locations}")
        if order not in ("shuffled", "sequential"):
            raise ValueError(f"SameLocation: order must be shuffled or sequential, got {order!r}")
        if not 1 <= locations_per_batch <= num_locations:
            raise ValueError(
                f"SameLocation: locations_per_batch must lie between 1 and num_locations={num_locations}, "
                f"got {locations_per_batch}"
            )
        self.num_locations = num_locations
        self.batches_per_visit = batches_per_visit
        self.order = order
        self.locations_per_batch = locations_per_batch

    def steps_per_visit(self, num_cases: int, batch_size: int) -> int:
        """Return the number of batches at one location before the next."""
        return self.batches_per_visit or max(1, num_cases * self.locations_per_batch // batch_size)

    def steps_per_round(self, num_cases: int, batch_size: int) -> float:
        """Return the number of batches in which every location is visited once."""
        return self.steps_per_visit(num_cases, batch_size) * self.num_locations / self.locations_per_batch

    def batch(
        self, step: int, *, index: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> list[Request]:
        """Return the requests of one rank at one step."""
        each, rest = divmod(batch_size, self.locations_per_batch)
        if rest:
            raise ValueError(
                f"batch_size {batch_size} is not divisible by locations_per_batch {self.locations_per_batch}"
            )
        number, turn = divmod(step, self.steps_per_visit(len(index), batch_size))
        requests: list[Request] = []
        for visit in range(number * self.locations_per_batch, (number + 1) * self.locations_per_batch):
            location = visit % self.num_locations
            if self.order == "shuffled":
                location = _nth(range(self.num_locations), visit, "location", seed)
            cases = [_nth(index, turn * each + j, "visit", seed, visit) for j in range(each)]
            start = step * batch_size + len(requests)
            requests += [Request((case,), start + j, location) for j, case in enumerate(cases)]
        return _of_rank(requests, rank, world)


class Anchored:
    """A sampler of a few places of the body: a batch has nearby centres from different volumes.

    Each place is seen in several cases.

    Args:
        volumes_per_anchor: Number of cases for each anchor.
        min_distance_body: Least distance (largest axis) between the anchors of a batch. Where 100 draws reach none, the
            farthest one is taken.
        margin_body: Least distance of anchors from the faces of the body box.
    """

    def __init__(
        self, *, volumes_per_anchor: int = 2, min_distance_body: float = 0.2, margin_body: float = 0.0
    ) -> None:
        if volumes_per_anchor < 1 or not 0 <= margin_body < 0.5:
            raise ValueError(
                f"Anchored: volumes_per_anchor={volumes_per_anchor} must be >= 1, margin_body={margin_body} in [0, 0.5)"
            )
        self.volumes_per_anchor = volumes_per_anchor
        self.min_distance_body = min_distance_body
        self.margin_body = margin_body

    def batch(
        self, step: int, *, index: Sequence[int], batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> list[Request]:
        """Return the requests of one rank at one step; the cases of an anchor are neighbours in the global batch."""
        anchors: list[np.ndarray] = []
        generator = counter_generator("anchors", seed, step)
        while len(anchors) * self.volumes_per_anchor < batch_size:
            draws = generator.uniform(self.margin_body, 1 - self.margin_body, (100, 3))
            if anchors:
                distance = np.abs(draws[:, None] - np.array(anchors)).max(axis=2).min(axis=1)
                far = np.flatnonzero(distance >= self.min_distance_body)
                anchors.append(draws[far[0] if len(far) else distance.argmax()])
            else:
                anchors.append(draws[0])
        requests: list[Request] = []
        for j in range(batch_size):
            x, y, z = map(float, anchors[j // self.volumes_per_anchor])
            n = step * batch_size + j
            first = j - j % self.volumes_per_anchor
            case, taken = _nth(index, n, seed), {request.cases[0] for request in requests[first:]}
            while case in taken and len(taken) < len(index):  # an epoch ended within the anchor
                case = int(index[int(generator.integers(len(index)))])
            requests.append(Request((case,), n, anchor_body=(x, y, z)))
        return _of_rank(requests, rank, world)
