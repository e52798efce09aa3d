"""The data module: it plans requests, reads chunks ahead, and draws views on the device after the transfer."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from medssl.data.augment.base import IntensityAugmentation
from medssl.data.draw import displacement_field, draw_image, draw_label, draw_valid
from medssl.data.loading import MicroBatches, PrefetchingLoader, RawBatch, RawView, Timers
from medssl.data.placements import ViewSpec
from medssl.data.sampling import CaseSampler
from medssl.data.store import VolumeStore
from medssl.data.views import View, ViewPlan

VALIDATION_SEED = 20_240_001
"""Seed of the validation views: the crops are the same at every validation of every run."""


@dataclass
class Batch:
    """The input of a training step: drawn views by group, the names of their cases, and the place in the run."""

    views: dict[str, View]
    cases: list[str]
    step: int
    micro: int


class VolumeDataModule(lightning.LightningDataModule):
    """Feed a trainer from a store: training batches from the trainer's step on, validation batches of held-out cases.

    Args:
        store: The prepared volumes.
        views: The views that the method asks for.
        sampler: Chooses the cases of a batch.
        batch_size: Number of samples of an optimiser step, over all processes and micro-batches.
        seed: Seed of the run.
        accumulate: Micro-batches per optimiser step.
        training_cases: Numbers of the cases to train on (`medssl.data.splits` chooses them).
        validation_cases: Numbers of the held-out cases; none turns validation off.
        prefetch: Number of batches read ahead.
    """

    def __init__(
        self,
        *,
        store: VolumeStore,
        views: ViewPlan,
        sampler: CaseSampler,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        training_cases: Sequence[int],
        validation_cases: Sequence[int] = (),
        prefetch: int = 3,
    ) -> None:
        super().__init__()
        self.store, self.plan, self.sampler = store, views, sampler
        self.batch_size, self.seed, self.accumulate, self.prefetch = batch_size, seed, accumulate, prefetch
        self.timers = Timers()
        self.training_cases, self.validation_cases = list(training_cases), list(validation_cases)
        self.group_numbers = {name: n for n, name in enumerate(sorted({group for group, _ in store.cohorts}))}

    def facts(self) -> dict[str, int | float | list[int]]:
        """Return the plain numbers that schedules, queue sizes and networks depend on.

        An epoch need not be a whole number of steps. `crop_voxel` is the size of the first group of views.
        `steps_per_round` is the number of steps in which a sampler of locations visits all of them; for other samplers
        it is an epoch.
        """
        num_cases, per_epoch = len(self.training_cases), len(self.training_cases) / self.batch_size
        of_round = getattr(self.sampler, "steps_per_round", lambda num_cases, batch_size: per_epoch)
        return {
            "num_cases": num_cases,
            "num_channels": self.store.record(self.training_cases[0]).channels,
            "num_locations": self.plan.locations_in(self.store),
            "crop_voxel": self.plan.first_size,
            "steps_per_epoch": per_epoch,
            "steps_per_round": of_round(num_cases, self.batch_size),
        }

    def train_dataloader(self) -> PrefetchingLoader:
        """Return the batches from the trainer's present step to its last."""
        trainer = self.trainer
        assert trainer is not None
        steps = range(trainer.global_step, trainer.max_steps)
        return self.loader(self.sampler, self.training_cases, steps=steps, seed=self.seed, accumulate=self.accumulate)

    def val_dataloader(self) -> PrefetchingLoader | list[Any]:
        """Return batches with each held-out case about once; pairs are of held-out cases, crops are always the same."""
        world = self.trainer.world_size if self.trainer else 1
        size = max(world, self.batch_size // self.accumulate // world * world)
        if not self.validation_cases:
            return []
        steps = range(-(-len(self.validation_cases) // size))
        return self.loader(self.sampler, self.validation_cases, steps=steps, seed=VALIDATION_SEED, batch_size=size)

    def loader(
        self,
        sampler: CaseSampler,
        cases: Sequence[int],
        *,
        steps: range,
        seed: int,
        batch_size: int | None = None,
        accumulate: int = 1,
    ) -> PrefetchingLoader:
        """Return a loader for this process."""
        trainer = self.trainer
        batches = MicroBatches(
            sampler,
            cases,
            steps=steps,
            batch_size=batch_size or self.batch_size,
            accumulate=accumulate,
            seed=seed,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        on_gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return PrefetchingLoader(
            self.store,
            self.plan,
            micro_batches=batches,
            seed=seed,
            prefetch=self.prefetch,
            timers=self.timers,
            pin_memory=on_gpu,
        )

    def on_after_batch_transfer(self, batch: RawBatch, dataloader_idx: int) -> Batch:
        """Draw the views on the device where the voxels arrived."""
        first = next(iter(batch.groups.values()))[0].voxels
        events = None
        if first.is_cuda:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
        start = time.perf_counter()
        drawn = self.draw(batch)
        if events:
            events[1].record()
            self.timers.events.append(events)
        else:
            self.timers.draw_s += time.perf_counter() - start
        return drawn

    @torch.no_grad()
    def draw(self, batch: RawBatch) -> Batch:
        """Return the drawn batch; autocast is off because grey values and coordinates need float32."""
        device = next(iter(batch.groups.values()))[0].voxels.device
        with torch.autocast(device.type, enabled=False):
            views = {
                name: self._view(self.plan.groups[name], raws, len(batch.requests))
                for name, raws in batch.groups.items()
            }
        return Batch(views, batch.cases, batch.step, batch.micro)

    def _view(self, spec: ViewSpec, raws: list[RawView], num_samples: int) -> View:
        return view_of(spec, raws, num_samples=num_samples, store=self.store, group_numbers=self.group_numbers)


def view_of(
    spec: ViewSpec, raws: Sequence[RawView], *, num_samples: int, store: VolumeStore, group_numbers: dict[str, int]
) -> View:
    """Draw one group of a batch: geometry crop by crop into one tensor, then intensity augmentations at once."""
    device, placed = raws[0].voxels.device, [raw.placed for raw in raws]
    channels = {view.record.channels for view in placed}
    if len(channels) > 1:
        raise ValueError(f"cases of {sorted(channels)} channels cannot share a batch; pick one with data.channels=N")

    def grouped(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (num_samples, -1))

    def table(rows: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return grouped(torch.as_tensor(np.array(rows), dtype=dtype).to(device, non_blocking=True))

    shape = placed[0].pose.frame.shape
    image = torch.empty((len(raws), channels.pop(), *shape), device=device)
    label = torch.empty((len(raws), 1, *shape), dtype=torch.int64, device=device) if spec.label else None
    regions = torch.empty((len(raws), 1, *shape), dtype=torch.int64, device=device) if spec.regions else None
    for number, raw in enumerate(raws):
        draw_image(raw.voxels, raw.box, raw.placed.record, raw.placed.pose, outside=spec.outside, out=image[number])
        if label is not None:
            draw_label(raw.label, raw.label_box or raw.box, raw.placed.pose, out=label[number])
        if regions is not None and raw.regions is not None:
            draw_label(raw.regions, raw.region_box or raw.box, raw.placed.pose, out=regions[number])
    image = grouped(image)
    intensity = [augmentation for augmentation in spec.augment if isinstance(augmentation, IntensityAugmentation)]
    for order, augmentation in enumerate(intensity):
        parameters = np.stack([view.parameters[order] for view in placed]).reshape(
            num_samples, len(raws) // num_samples, -1
        )
        keys = np.array([view.keys[order] for view in placed]).reshape(parameters.shape[:2])
        image = augmentation.apply(image, parameters, keys)
    locations = [view.record.body.to_body(view.placement.frame.center) for view in placed]
    indices = [-1 if view.placement.location_index is None else view.placement.location_index for view in placed]
    view = View(
        image=image,
        matrix=table([view.pose.frame.matrix for view in placed], torch.float64),
        volume_to_mm=table([view.record.volume_to_mm for view in placed], torch.float64),
        volume_shape=table([view.record.shape for view in placed], torch.int64),
        case=table([view.case for view in placed], torch.int64),
        group=table([group_numbers[view.record.group] for view in placed], torch.int64),
        location_body=table(locations, torch.float64),
        crop_body=table([view.record.body.to_body(view.placement.frame.faces) for view in placed], torch.float64),
        body_faces=table([(view.record.body.lower, view.record.body.upper) for view in placed], torch.float64),
        location_index=table(indices, torch.int64) if max(indices) >= 0 else None,
    )
    if view.location_index is not None:
        view.coordinate = table([view.placement.coordinate for view in placed], torch.float32)
        view.location_valid = table([view.placement.is_valid for view in placed], torch.bool)
    if any(view.pose.displacement is not None for view in placed):
        view.displacement = grouped(torch.stack([displacement_field(p.pose, device) for p in placed]))
    if spec.valid:
        view.valid = grouped(torch.stack([draw_valid(p.record, p.pose, device) for p in placed]))
    if label is not None:
        view.label = grouped(label)
    if regions is not None:
        view.regions = grouped(regions)
    if spec.points is not None:
        tables = [store.derived(spec.points, p.case) for p in placed]
        view.points = table([t["points_voxel"] for t in tables], torch.float64)
        if "features" in tables[0]:
            view.point_features = table([t["features"] for t in tables], torch.float32)
        view.inside = view.contains(view.points)
    return view
