"""The prefetching loader: it places requests and reads their boxes a few batches before they are needed."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medssl.data.draw import ReadBox, box_of, cut_regions
from medssl.data.placements import ViewSpec
from medssl.data.sampling import CaseSampler, Request
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.data.views import PlacedView, ViewPlan


@dataclass
class RawView:
    """The voxels that one view is drawn from."""

    placed: PlacedView
    box: ReadBox
    voxels: Any  # a future, then a tensor (channel, box)
    label_box: ReadBox | None = None
    label: Any = None
    region_box: ReadBox | None = None
    regions: Tensor | None = None


@dataclass
class RawBatch:
    """The boxes read for one micro-batch, by group and sample-major; they move between devices together."""

    requests: list[Request]
    groups: dict[str, list[RawView]]
    cases: list[str]
    step: int
    micro: int

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "RawBatch":
        """Return the batch with its voxels on the device."""
        for raw in (raw for views in self.groups.values() for raw in views):
            raw.voxels = raw.voxels.to(device, non_blocking=non_blocking)
            raw.label = None if raw.label is None else raw.label.to(device, non_blocking=non_blocking)
            raw.regions = None if raw.regions is None else raw.regions.to(device, non_blocking=non_blocking)
        return self


@dataclass
class Timers:
    """Seconds since the last `take`, spent on waiting for voxels (placing and stacking included) and on drawing."""

    wait_s: float = 0.0
    draw_s: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def take(self) -> dict[str, float]:
        """Return the seconds and reset them to zero; on a GPU this waits for the drawing kernels."""
        for start, end in self.events:
            end.synchronize()
            self.draw_s += start.elapsed_time(end) / 1000
        seconds = {"wait_s": self.wait_s, "draw_s": self.draw_s}
        self.wait_s, self.draw_s, self.events = 0.0, 0.0, []
        return seconds


class MicroBatches:
    """The requests of one rank from one step to another, in `accumulate` micro-batches per step.

    The sampler is asked for requests during the iteration.

    Args:
        sampler: Chooses the cases.
        index: Case numbers to choose from.
        steps: Range of steps: the first and one past the last.
        batch_size: Number of requests of all ranks and micro-batches together.
        accumulate: Number of micro-batches per step.
        seed: Seed of the run.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(
        self,
        sampler: CaseSampler,
        index: Sequence[int],
        *,
        steps: range,
        batch_size: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        if batch_size % (world * accumulate):
            raise ValueError(
                f"batch_size={batch_size} counts a step's samples over all processes and must be divisible by "
                f"processes x accumulate = {world} x {accumulate}; choose a multiple of {world * accumulate}"
            )
        self.sampler, self.index, self.steps = sampler, index, steps
        self.batch_size, self.accumulate, self.seed, self.rank, self.world = batch_size, accumulate, seed, rank, world

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[tuple[int, int, list[Request]]]:
        """Yield (step, number of the micro-batch in it, requests)."""
        for step in self.steps:
            requests = self.sampler.batch(
                step, index=self.index, batch_size=self.batch_size, seed=self.seed, rank=self.rank, world=self.world
            )
            each = len(requests) // self.accumulate
            for micro in range(self.accumulate):
                yield step, micro, requests[micro * each : (micro + 1) * each]


class PrefetchingLoader:
    """Iterate over raw batches and keep the reads of the next ones in flight: one thread places, no process.

    Args:
        store: Store that voxels are read from.
        plan: Views to place.
        micro_batches: Requests to read, taken as far ahead as reads are started.
        seed: Seed of the run.
        prefetch: Number of batches in flight besides the one in use.
        timers: Timers that count the waiting.
        pin_memory: Whether to put the voxels into page-locked memory, for transfer to a GPU.
    """

    def __init__(
        self,
        store: VolumeStore,
        plan: ViewPlan,
        *,
        micro_batches: MicroBatches,
        seed: int,
        prefetch: int,
        timers: Timers,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.plan, self.micro_batches = store, plan, micro_batches
        self.seed, self.prefetch, self.timers, self.pin_memory = seed, prefetch, timers, pin_memory

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield batches in order; time spent here counts as waiting.

        There is no length: Lightning would compare it with the batches of the whole run, and end a resumed one early.
        """
        waiting: deque[Future[RawBatch]] = deque()
        upcoming = iter(self.micro_batches)
        with ThreadPoolExecutor(1, thread_name_prefix="place") as pool:  # places while the network computes
            try:
                while True:
                    start = time.perf_counter()
                    while len(waiting) <= self.prefetch and (entry := next(upcoming, None)) is not None:
                        waiting.append(pool.submit(self._start, *entry))
                    if not waiting:
                        return
                    batch = self._finish(waiting.popleft().result())
                    self.timers.wait_s += time.perf_counter() - start
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def _start(self, step: int, micro: int, requests: list[Request]) -> RawBatch:
        groups: dict[str, list[RawView]] = {name: [] for name in self.plan.groups}
        for request in requests:
            placed = self.plan.place(Scene(self.store, request), seed=self.seed, step=step)
            for name, views in placed.items():
                groups[name] += [self._read(view, self.plan.groups[name]) for view in views]
        cases = [self.store.record(case).case for request in requests for case in request.cases]
        return RawBatch(requests, groups, cases, step, micro)

    def _read(self, view: PlacedView, spec: ViewSpec) -> RawView:
        crop = spec.seen(view.placement)
        box = box_of(view.record, view.pose, crop=crop)
        raw = RawView(view, box, self.store.read(view.case, box.level, box.lower, box.upper))
        if spec.label:
            raw.label_box = box_of(view.record, view.pose, crop=crop, finest=True)
            raw.label = self.store.read_label(view.case, raw.label_box.lower, raw.label_box.upper)
        if spec.regions is not None:
            raw.region_box, raw.regions = cut_regions(self.store, view, spec.regions)
        return raw

    def _finish(self, batch: RawBatch) -> RawBatch:
        for raw in (raw for views in batch.groups.values() for raw in views):
            raw.voxels = self._tensor(raw, raw.voxels)
            raw.label = None if raw.label is None else self._tensor(raw, raw.label)
            if raw.regions is not None and self.pin_memory:
                raw.regions = raw.regions.pin_memory()
        return batch

    def _tensor(self, raw: RawView, future: Any) -> Tensor:
        try:
            array = future.result()
        except ValueError as error:
            folder = self.store.root / raw.placed.record.folder
            raise ValueError(
                f"cannot read a chunk of {folder}: {error}; delete that folder and prepare again"
            ) from error
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin_memory else tensor
