"""Small stores of synthetic volumes for the tests of the data layer."""

from collections.abc import Callable

import numpy as np
import pytest

from medssl.data.draw import box_of, cut_regions
from medssl.data.loading import RawView
from medssl.data.module import view_of
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.data.views import View, ViewPlan

StoreMaker = Callable[..., VolumeStore]


@pytest.fixture
def draw() -> Callable[..., dict[str, View]]:
    """Place, read and draw a view plan for some requests, without a loader."""

    def drawn(
        store: VolumeStore, plan: ViewPlan, requests: list, *, seed: int = 0, step: int = 0, device: str = "cpu"
    ) -> dict[str, View]:
        groups: dict[str, list[RawView]] = {name: [] for name in plan.groups}
        for request in requests:
            for name, views in plan.place(Scene(store, request), seed=seed, step=step).items():
                spec = plan.groups[name]
                for view in views:
                    box = box_of(view, spec)
                    raw = RawView(view, box, store.read(view.case, box.level, box.lower, box.upper))
                    raw.voxels = _tensor(raw.voxels, device)
                    if spec.label:
                        raw.label_box = box_of(view, spec, finest=True)
                        raw.label = _tensor(
                            store.read_label(view.case, raw.label_box.lower, raw.label_box.upper), device
                        )
                    if spec.regions is not None:
                        raw.region_box, raw.regions = cut_regions(store, view, spec.regions)
                    groups[name].append(raw)
        numbers = {name: n for n, name in enumerate(sorted({r.group for r in store.records()}))}
        return {
            name: view_of(plan.groups[name], raws, num_samples=len(requests), store=store, group_numbers=numbers)
            for name, raws in groups.items()
        }

    return drawn


def _tensor(future, device: str):
    import torch

    return torch.from_numpy(future.result()).to(device)


def noise(shape: tuple[int, ...] = (1, 40, 36, 32), seed: int = 0) -> np.ndarray:
    """Integer noise in the range of CT."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


@pytest.fixture
def noise_store(make_store: StoreMaker) -> VolumeStore:
    """Four cases of noise, with a label of three values."""
    arrays = [noise(seed=n) for n in range(4)]
    return make_store(*arrays, labels=[(a[0] > 500) + (a[0] > 700).astype(int) + (a[0] > 990) for a in arrays])
