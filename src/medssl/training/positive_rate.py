"""The threshold of positions that makes a given share of a run's pairs positives, found before the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64

from medssl.data.module import VolumeDataModule
from medssl.data.placements import Placement, ViewSpec
from medssl.data.randomness import counter_generator
from medssl.data.sampling import CaseSampler, Request
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.methods.positions import PositionRule, Positions, is_gathered

TARGET_RATE = 0.19
"""The rate of one axis with the threshold 0.1 if positions are uniform: 2 t - t^2."""
NUM_PAIRS = 10_000


@dataclass(frozen=True, kw_only=True)
class PositiveRate:
    """The computation of the threshold for a run with `threshold: auto`; for `facts_from` of a method's YAML.

    Args:
        axes: `axes` of the run's `PositionRule`.
        frame: `frame` of the run's `PositionRule`.
        norm: `norm` of the run's `PositionRule`.
        cross_group: `cross_group` of the run's `PositionRule`.
        gather: Whether the samples of all processes are compared, see `is_gathered`.
        rate: Share of positives among the compared pairs.
    """

    axes: Sequence[str]
    frame: str
    norm: str
    cross_group: str
    gather: bool | None = None
    rate: float = TARGET_RATE

    stand_in: ClassVar[float] = 0.01
    """A threshold to try the method with before the data are known."""

    def __call__(self, data: VolumeDataModule, *, world: int) -> float:
        """Return the threshold for `world` processes that train on `data`.

        Raises:
            ValueError: There is no such threshold.
        """
        rule = PositionRule(axes=self.axes, frame=self.frame, norm=self.norm, cross_group=self.cross_group)
        return automatic_threshold(
            data.store,
            data.plan,
            data.sampler,
            rule=rule,
            cases=data.training_cases,
            batch_size=data.batch_size,
            world=world,
            accumulate=data.accumulate,
            gather=self.gather,
            rate=self.rate,
            seed=data.seed,
        )


def automatic_threshold(
    store: VolumeStore,
    plan: ViewPlan,
    sampler: CaseSampler,
    *,
    rule: PositionRule,
    cases: Sequence[int],
    batch_size: int,
    world: int = 1,
    accumulate: int = 1,
    gather: bool | None = None,
    rate: float = TARGET_RATE,
    num_pairs: int = NUM_PAIRS,
    seed: int = 0,
) -> float:
    """Return the threshold, to three digits, with which a share of `rate` of the compared pairs would be positives.

    The batches are those that a run with this seed starts with; their crops are placed and not read. A pair is two
    samples of one batch that the rule compares. The result depends on the arguments alone.

    Args:
        store: The store of the cases.
        plan: The view plan; its first group is placed.
        sampler: The sampler of the cases.
        rule: The rule that compares positions; its own thresholds are ignored.
        cases: Numbers of the cases to choose from.
        batch_size: Samples of a step, over all processes and micro-batches.
        world: Number of processes.
        accumulate: Micro-batches per step.
        gather: Whether the samples of all processes are compared, see `is_gathered`.
        rate: Share of positives among the compared pairs.
        num_pairs: Number of pairs that are looked at, about.
        seed: Seed of the run.

    Raises:
        ValueError: No pair is compared, or no threshold above 0 has the rate.
    """
    each = batch_size // (world * accumulate)
    size = each * world if is_gathered(gather, each) else each
    if size < 2 or batch_size % (world * accumulate):
        raise ValueError(
            f"threshold: auto compares samples of a batch, of which there are {each} for each of {world} processes x "
            f"{accumulate} micro-batches; raise batch_size={batch_size}, a multiple of both, or state a number"
        )
    together = np.arange(batch_size).reshape(world, accumulate, each).swapaxes(0, 1).ravel()  # micro-batches in turn
    name, spec = next(iter(plan.groups.items()))
    places: list[tuple[int, Placement]] = []
    for step in range(math.ceil(num_pairs / (batch_size * (size - 1) / 2))):
        requests = sampler.batch(step, index=cases, batch_size=batch_size, seed=seed)
        for request in (requests[number] for number in together):
            places.append(_place(store, spec, request, key=(seed, step, request.sample, name)))
    return threshold_at(pair_distances(store, spec, places, rule=rule, compared_size=size), rate=rate)


def threshold_at(distances: Float64[np.ndarray, " pair"], *, rate: float) -> float:
    """Return the number, to three digits, below which about a share of `rate` of the distances lies.

    It is the middle between two distances that occur, since crops on whole voxels have few different distances.

    Raises:
        ValueError: There is no such number.
    """
    if not 0 < rate < 1:
        raise ValueError(f"the rate of positives must lie between 0 and 1, got {rate}")
    if not len(distances):
        raise ValueError("threshold: auto found no pair that is compared; state a threshold, or cross_group: negative")
    finite = distances[np.isfinite(distances)].round(9)
    known, counts = np.unique(finite, return_counts=True)
    share = counts.cumsum() / len(distances)
    if len(known) < 2 or share[-1] < rate:
        why = "too few pairs are of one cohort" if len(finite) < rate * len(distances) else "all crops lie in one place"
        raise ValueError(f"threshold: auto finds none for a rate of {rate:g}, since {why}; state a number")
    at = int(np.abs(share[:-1] - rate).argmin())
    return float(f"{(known[at] + known[at + 1]) / 2:.3g}")


def pair_distances(
    store: VolumeStore,
    spec: ViewSpec,
    places: Sequence[tuple[int, Placement]],
    *,
    rule: PositionRule,
    compared_size: int,
) -> Float64[np.ndarray, " pair"]:
    """Return the distances of compared pairs of each `compared_size` places; infinity if they cannot be positives."""
    records = [store.record(case) for case, _ in places]

    def table(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.array(rows, dtype=np.float64))

    heights = None
    if spec.points is not None and rule.frame == "external":
        tables = [store.derived(spec.points, case) for case, _ in places]
        heights = table([np.hstack([t["points_voxel"], t["features"][:, :1]]) for t in tables])
    centers = [placement.frame.center for _, placement in places]
    position = rule.positions(
        Positions(
            table(centers),
            torch.tensor([record.shape for record in records]),
            table([record.volume_to_mm for record in records]),
            table([record.body.to_body(center) for record, center in zip(records, centers, strict=True)]),
            heights,
            table([r.body.to_body(place.frame.faces) for r, (_, place) in zip(records, places, strict=True)]),
        )
    )
    names = {name: number for number, name in enumerate(sorted({record.group for record in records}))}
    group = torch.tensor([names[record.group] for record in records]).unflatten(0, (-1, compared_size))
    first, second = torch.triu_indices(compared_size, compared_size, offset=1)
    position = position.unflatten(0, (-1, compared_size))
    eligible, compared = rule.allowed(group[:, first] == group[:, second])
    distance = rule.distance(position[:, first], position[:, second])
    return torch.where(eligible, distance, torch.inf)[compared].numpy()


def _place(
    store: VolumeStore, spec: ViewSpec, request: Request, *, key: tuple[int, int, int, str]
) -> tuple[int, Placement]:
    """Return the case of a request's first view, and where it lies."""
    placement = spec.place(Scene(store, request), {}, counter_generator("place", *key))[0]
    return request.cases[placement.slot], placement
