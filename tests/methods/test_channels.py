"""Every method on volumes of four channels, as four MR sequences of a case: built, run forward and backward once."""

import json
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pages import DOCS, steps

from medssl.building import build
from medssl.config import compose, main
from medssl.data.store import VolumeStore
from medssl.data.views import View
from medssl.methods.base import Method, Progress
from medssl.pretrain import run
from medssl.weights import read_card

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
CHANNELS = 4
SIDES = {
    "glmae_tiny": {"global": [32, 32, 32], "local": [16, 16, 16]},
    "sam_embed_tiny": {"pair": [32, 32, 16]},
    "models_genesis_tiny": {"crop": [32, 32, 32]},
    "kaf_tiny": {"first": [32, 32, 32]},
    "kaf_2d": {"first": [32, 32, 1]},
    "macl_2d": {"still": [32, 32, 1]},
}
"""Smaller views than those of the configurations, for speed."""
SETTINGS = {
    "kaf_tiny": ["method.points.match=geometric", "views.groups.first.points=null"],
    "kaf_2d": [
        *("model.encoder.base_channels=2", "model.encoder.num_layers=1", "model.encoder.dim=8"),
        *("model.encoder.max_points=16", "method.transport_iterations=5"),
    ],
    "macl_2d": ["model.encoder.base_channels=2", "model.encoder.num_levels=2"],
}
"""Points that no table is needed for, and narrow networks."""
NAMES = sorted([*(file.stem for file in CONFIGS.glob("*_tiny.yaml")), "kaf_2d", "macl_2d"])


def overrides_of(name):
    sizes = [f"views.groups.{group}.size={sides}".replace(" ", "") for group, sides in SIDES.get(name, {}).items()]
    return [*sizes, *SETTINGS.get(name, [])]


def resolved(name):
    """The configuration of a run on 32 volumes of four channels; no data source is needed."""
    config = compose("pretrain", ["~data", f"method={name}", *overrides_of(name)])
    steps = {"steps_per_epoch": 4.0, "steps_per_round": 4.0}
    config.facts = {"num_cases": 32, "num_channels": CHANNELS, "num_locations": 27, "crop_voxel": [16] * 3, **steps}
    return OmegaConf.to_container(config, resolve=True)


def views_of(plan, *, num_samples=2):
    """A view of smooth random pictures for each group of a plan, wherever they lie in their volumes."""
    generator = torch.Generator().manual_seed(0)
    views, size = {}, ()
    for number, (group, spec) in enumerate(plan.groups.items()):
        size = tuple(spec.size) or size  # that of the group whose place it shows
        thin = [1 if side == 1 else 8 for side in size]
        coarse = torch.rand(num_samples * spec.count, CHANNELS, *thin, generator=generator)
        image = F.interpolate(coarse, size=size, mode="trilinear").unflatten(0, (num_samples, -1))
        located = {"corner_voxel": [3 + number, 2, 4], "volume_shape": [56] * 3}
        if getattr(spec, "num_locations", 0):
            cells = torch.arange(spec.count)[None] + 1 if number else 0  # neighbours, or one place for all
            located |= {"location_index": cells, "coordinate": [0.0, 0.0, -0.5 * number]}
        views[group] = View.of(image, **located)
    return views


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_on_four_channels(name):
    values = resolved(name)
    torch.manual_seed(0)
    method = build(values["method"], base=Method)
    views = views_of(instantiate(values["views"], _convert_="all"))
    output = method(views, Progress(0, 10, 0.5, 10.0))
    assert output.loss.isfinite()
    output.loss.backward()
    axis, weights = -1 - getattr(method.encoder, "spatial_dims", 3), method.encoder.parameters()
    kernel = next(p for p in weights if p.ndim >= 4 and p.shape[axis] == CHANNELS)  # of the layer that reads the image
    of_channels = kernel.grad.abs().movedim(axis, 0).flatten(1).amax(1)
    assert (of_channels > 0).all(), "it learns from every channel"
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


RECIPE = (DOCS / "data.md").read_text().split("### Several channels")[1].split("\n### ")[0]
DESCRIPTIONS = {step.file: json.loads(step.text) for step in steps("data.md") if step.file.endswith("dataset.json")}
COMMANDS = [shlex.split(line)[3:] for line in RECIPE.splitlines() if line.startswith("python -m medssl.pretrain")]
SMALL = ("model.encoder.widths=[2,4]", "model.encoder.strides=[1,2]", "model.encoder.blocks=[1,1]", "batch_size=2")
SMALL += ("views.groups.crop.size=[16,16,16]", "trainer.max_steps=1", "validate_every=null", "figures_every=null")


@pytest.mark.parametrize(
    ("command", "modality"), [*zip(COMMANDS, (("mr",) * 4, ("ct", "pet")), strict=True)], ids=["mr", "petct"]
)
def test_the_recipes_for_several_channels_pre_train(command, modality, tmp_path, monkeypatch):
    """Those of docs/data.md, on small random images."""
    monkeypatch.chdir(tmp_path)
    folder = next(word for word in command if word.startswith("data.root=")).removeprefix("data.root=")
    images = Path(folder) / "imagesTr"
    images.mkdir(parents=True)
    (Path(folder) / "dataset.json").write_text(json.dumps(DESCRIPTIONS[f"{folder}/dataset.json"]))
    rng = np.random.default_rng(0)
    for case in range(3):
        for number, kind in enumerate(modality):
            values = rng.gamma(2.0, 200.0, (20, 20, 20)) - (1000 if kind == "ct" else 0)
            values[:6] = -1000 if kind == "ct" else 0
            image = nibabel.Nifti1Image(values.astype(np.int16), np.diag([2.0, 2.0, 2.0, 1.0]))
            nibabel.save(image, images / f"case{case}_{number:04d}.nii.gz")
    tiny = [word.replace("models_genesis", "models_genesis_tiny") for word in command]
    main("pretrain", run, arguments=[*tiny, *SMALL, "store=store"])
    store = VolumeStore(tmp_path / "store")
    assert tuple(store.record(0).modality) == modality
    (output,) = (word.removeprefix("output_dir=") for word in command if word.startswith("output_dir="))
    assert read_card(tmp_path / output / "encoder.safetensors")["encoder"]["in_channels"] == len(modality)
