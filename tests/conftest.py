"""What every test shares: one thread, the folder of real volumes, a headless matplotlib, where a run stands."""

import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

if TYPE_CHECKING:
    import numpy as np

    from medssl.data.store import VolumeStore
    from medssl.data.views import View, ViewPlan
    from medssl.methods.base import Progress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run several small processes on two cores
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.append(str(Path(__file__).parent))  # makes the slow oracles importable

import run_time_checks

run_time_checks.install()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deal the tests out by files, for `-n 2 --dist loadgroup`: what a file computes once is computed once.

    Tests that start several processes are one group, so that two of them never share the cores. Tests of whole
    commands, which lie directly in `tests`, begin: they take longest.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            name = "ddp" if item.get_closest_marker("ddp") else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.path.parent != config.rootpath / "tests")


COVERED = ("data", "tables", "phantoms", "losses", "methods", "segmentation", "extraction", "probing", "run")
COVERED += ("test_features.py", "test_match.py", "test_probe.py")
"""Rooms whose coverage counts, and whose own tests count for it; three commands are the tests of two rooms."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Count no lines in the tests of whole commands and of other rooms, which take a third longer where they are."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    counter = getattr(plugin, "cov_controller", None)
    if counter is None or item.path.relative_to(item.config.rootpath / "tests").parts[0] in COVERED:
        return (yield)
    counter.pause()
    try:
        return (yield)
    finally:
        counter.resume()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where pytest-xdist does not see the groups: files would be torn apart, and their fixtures computed twice."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not see the groups of tests; install constraints.txt")


@pytest.fixture(scope="session", autouse=True)
def few_processes() -> Iterator[None]:
    """Lets work case by case stay in this process where a test does not say how many: starting two takes seconds."""
    from medssl.data import prepare, workers
    from medssl.tables import derived

    def run_all(function, items, *, num_workers=None, **options):
        return workers.run_all(function, items, num_workers=num_workers or 0, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "run_all", run_all)
        patch.setattr(derived, "run_all", run_all)
        yield


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Composes each configuration once and reads each of its files once a process; tests get copies of their own.

    Folders that a test adds may change, so what is composed with them is not kept.
    """
    import hydra
    from hydra._internal.core_plugins import file_config_source
    from omegaconf import DictConfig, OmegaConf

    from medssl.config import config_dir

    compose, composed, read = hydra.compose, {}, {}

    def compose_once(name: str, overrides: list[str]) -> DictConfig:
        key = (config_dir(), name, *overrides)
        if any(override.startswith("hydra.searchpath=") for override in overrides):
            return compose(name, overrides)
        if key not in composed:
            composed[key] = compose(name, overrides)
        return deepcopy(composed[key])

    class Files(OmegaConf):
        @staticmethod
        def load(file: TextIO) -> DictConfig:
            path = Path(file.name)
            if config_dir() not in path.parents:
                return OmegaConf.load(file)
            key = (path, path.stat().st_mtime_ns)
            if key not in read:
                read[key] = OmegaConf.load(file)
            return deepcopy(read[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", compose_once)
        patch.setattr(file_config_source, "OmegaConf", Files)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of small real volumes; the test is skipped where MEDSSL_TEST_DATA is unset."""
    folder = os.environ.get("MEDSSL_TEST_DATA")
    if not folder:
        pytest.skip("MEDSSL_TEST_DATA is unset: it names the folder with the small real volumes")
    return Path(folder)


@pytest.fixture
def finished_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the results of a fine-tuning run: `gain` over scores that depend on the case and class alone."""
    import numpy as np

    from medssl.evaluation.results import summarise, write_results
    from medssl.evaluation.scores import CaseScores

    def write(
        name, *, gain=0.0, seed=0, count=4, classes=("liver", "spleen", "aorta"), num_cases=8, setting=None, **more
    ):
        cases = []
        for case in range(num_cases):
            base = np.array([0.6 + 0.02 * case + 0.03 * number for number in range(len(classes))])
            wobble = 0.01 * np.sin(7 * case + 3 * seed + np.arange(len(classes)))
            dice = np.clip(base + gain * (1 + 0.1 * case) + wobble * (seed > 0), 0, 1)
            cases.append((f"case_{case:02d}", CaseScores(dice, 20 * (1 - dice), dice**0.5, 1.0)))
        results = summarise(cases, classes) | {
            "data": {"name": "phantoms", "store": "stores/phantoms-1"},
            "split": {"name": "5fold-0", "hash": "0123456789ab", "evaluated_on": "validation", "num_cases": num_cases},
            "labelled": {"requested": count, "count": count, "seed": 0, "hash": f"subset{count}"},
            "leakage": {"checked": True, "overlap": 0, "allowed": False},
            "report": "last",
            "setting": {"weights": "scratch", "model": "unet", "max_steps": 300} | (setting or {}),
            "seed": seed,
        }
        write_results(tmp_path / name, results | more)
        return tmp_path / name

    return write


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., "VolumeStore"]:
    """Write arrays (c x y z) as the cases of a store; the body box leaves 2 voxels on each side."""
    import numpy as np

    from medssl.data.description import write_description
    from medssl.data.store import VolumeStore
    from medssl.data.store_writer import write_case, write_index
    from medssl.data.volume import Box, Volume, intensity_statistics, voxel_hash

    def make(
        *arrays: "np.ndarray",
        labels: "list[np.ndarray] | None" = None,
        affine: "np.ndarray | None" = None,
        groups: tuple[str, ...] = (),
        modality: str = "ct",
        splits: tuple[str, ...] = (),
    ) -> "VolumeStore":
        root = tmp_path / "store"
        root.mkdir(exist_ok=True)
        records = []
        for number, array in enumerate(arrays):
            volume = Volume(array, np.eye(4) if affine is None else affine, "synthetic")
            generator = np.random.default_rng(number)
            body = Box(np.full(3, 1.5), np.array(volume.shape) - 2.5)
            points = np.full((256, 4), -1, dtype=np.int32)
            points[:, :3] = generator.integers(2, np.array(volume.shape) - 2, (256, 3))
            label = None if labels is None else labels[number]
            if label is not None:
                for value in np.unique(label[label > 0]):
                    found = generator.permutation(np.argwhere(label == value))[:64]
                    points = np.concatenate([points, np.c_[found, np.full(len(found), value)].astype(np.int32)])
            records.append(
                write_case(
                    root,
                    case=f"case_{number:03d}",
                    volume=volume,
                    label=label,
                    modality=modality,
                    group=groups[number] if groups else "synthetic",
                    split=splits[number] if splits else "",
                    statistics=intensity_statistics(array),
                    body=body,
                    points=points,
                    voxel_hash=voxel_hash(array),
                    source="synthetic",
                )
            )
        write_index(root, records)
        write_description(root, {})
        return VolumeStore(root)

    return make


@pytest.fixture
def noise_store(make_store: Callable[..., "VolumeStore"]) -> "VolumeStore":
    """Four cases of noise in the range of CT, with a label of three values."""
    import numpy as np

    arrays = [np.random.default_rng(n).integers(-1000, 1000, (1, 40, 36, 32)).astype(np.int16) for n in range(4)]
    return make_store(*arrays, labels=[(a[0] > 500) + (a[0] > 700).astype(int) + (a[0] > 990) for a in arrays])


@pytest.fixture
def draw() -> Callable[..., "dict[str, View]"]:
    """Place, read and draw a view plan for some requests, without a loader."""
    import torch

    from medssl.data.draw import box_of, cut_regions
    from medssl.data.loading import RawView
    from medssl.data.module import view_of
    from medssl.data.scene import Scene

    def drawn(
        store: "VolumeStore", plan: "ViewPlan", requests: list, *, seed: int = 0, step: int = 0, device: str = "cpu"
    ) -> "dict[str, View]":
        groups: dict[str, list[RawView]] = {name: [] for name in plan.groups}
        for request in requests:
            for name, views in plan.place(Scene(store, request), seed=seed, step=step).items():
                spec = plan.groups[name]
                for view in views:
                    crop = spec.seen(view.placement)
                    box = box_of(view.record, view.pose, crop=crop)
                    raw = RawView(view, box, store.read(view.case, box.level, box.lower, box.upper))
                    raw.voxels = torch.from_numpy(raw.voxels.result()).to(device)
                    if spec.label:
                        raw.label_box = box_of(view.record, view.pose, crop=crop, finest=True)
                        label = store.read_label(view.case, raw.label_box.lower, raw.label_box.upper)
                        raw.label = torch.from_numpy(label.result()).to(device)
                    if spec.regions is not None:
                        raw.region_box, raw.regions = cut_regions(store, view, spec.regions)
                    groups[name].append(raw)
        numbers = {name: n for n, name in enumerate(sorted({r.group for r in store.records()}))}
        return {
            name: view_of(plan.groups[name], raws, num_samples=len(requests), store=store, group_numbers=numbers)
            for name, raws in groups.items()
        }

    return drawn


@pytest.fixture
def at() -> Callable[..., "Progress"]:
    """Makes the `Progress` of a step of a run of 100 steps in 10 epochs."""
    from medssl.methods.base import Progress

    def make(step: int = 0, **options) -> Progress:
        defaults = {"total_steps": 100, "epoch": step / 10, "total_epochs": 10.0, "seed": 0}
        return Progress(step, **{**defaults, **options})

    return make


@pytest.fixture
def embedding_weights(tmp_path: Path) -> Path:
    """A file of an untrained anatomical embedding of minimal width, as a run with method=sam_embed exports it."""
    import torch

    from medssl.building import build_network
    from medssl.weights import save_weights

    torch.manual_seed(0)
    network = {"_target_": "medssl.models.sam_resnet.SamResNet", "base_channels": 2, "emb_dim": 8}
    encoder = {"_target_": "medssl.models.reoriented.Reoriented", "net": network, "axes": "SPL"}
    window = {"_target_": "medssl.data.augment.ByModality", "window_hu": [-1024, 3071], "out": [-50, 205]}
    noise = {"_target_": "medssl.data.augment.GaussianNoise", "std": [0, 0.1]}
    view = {"size": [32, 32, 16], "spacing_mm": 2.0, "outside": -1024, "augment": [window, noise]}
    card = {
        "method": "medssl.methods.sam_embed.SamEmbed",
        "encoder": encoder,
        "reading": {"channels": None, "views": {"groups": {"pair": view}}},
    }
    path = tmp_path / "sam.safetensors"
    save_weights(path, {"encoder": build_network(encoder)}, card)
    return path
