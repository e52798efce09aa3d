"""Every method on volumes of four channels, as four MR sequences of a case: built, run forward and backward once."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from medssl.building import build
from medssl.config import compose
from medssl.data.views import View
from medssl.methods.base import Method, Progress

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
    for view in views.values():
        view.image.requires_grad_()
    output = method(views, Progress(0, 10, 0.5, 10.0))
    assert output.loss.isfinite()
    output.loss.backward()
    seen = [view.image.grad for view in views.values() if view.image.grad is not None]
    assert all((gradient.abs().amax((0, 1, 3, 4, 5)) > 0).all() for gradient in seen), "it learns from every channel"
    assert seen
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
