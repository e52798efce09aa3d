"""Methods built from their YAML, with or without data."""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from medssl.building import build, named_class
from medssl.config import compose, user_message, with_values
from medssl.data.randomness import counter_key
from medssl.methods.base import Method
from medssl.models.reoriented import Reoriented, along, directions
from medssl.models.segmenter import levels
from medssl.models.volume_networks import fitting

MANY_CASES = 10_000
READS_MODEL = re.compile(r"\$\{model(?:\.encoder)?\}")


def build_method(
    name: str,
    *,
    in_channels: int = 1,
    crop_voxel: Sequence[int] | None = None,
    num_cases: int = MANY_CASES,
    num_locations: int | None = None,
    steps_per_epoch: float | None = None,
    steps_per_round: float | None = None,
    seed: int = 0,
    overrides: Sequence[str] = (),
    extra_dir: str | Path | None = None,
) -> Method:
    """Return a method with its networks, as `python -m medssl.pretrain method=NAME` builds it.

    Torch's global generator stays as it is.

    Args:
        name: Name of a file in configs/method, such as `alice_tiny`.
        in_channels: Channels of the images.
        crop_voxel: Sides of the views; those in the YAML if not given.
        num_cases: Number of training volumes; the default gives a queue its full length.
        num_locations: Number of places of the body; those of the grid in the YAML if not given.
        steps_per_epoch: Steps in an epoch, for schedules that are stated in epochs.
        steps_per_round: Steps in a round over all locations, for schedules that are stated in rounds.
        seed: Seed that determines the first weights.
        overrides: Further settings as on the command line, such as `method.mask_ratio=0.6`.
        extra_dir: A folder with method/NAME.yaml and the Python files that it names.

    Raises:
        ValueError: There is no such method, it refuses a setting, or a setting follows from a number that is not given.
    """
    if extra_dir is not None and str(Path(extra_dir).resolve()) not in sys.path:
        sys.path.insert(0, str(Path(extra_dir).resolve()))
    given = {
        "num_channels": in_channels,
        "crop_voxel": None if crop_voxel is None else list(crop_voxel),
        "num_cases": num_cases,
        "num_locations": num_locations,
        "steps_per_epoch": steps_per_epoch,
        "steps_per_round": steps_per_round,
    }
    try:
        config = compose(
            "pretrain", [f"method={name}", *overrides], extra_dir=None if extra_dir is None else Path(extra_dir)
        )
        check_model(config)
        settings = _resolved(config, {fact: value for fact, value in given.items() if value is not None})
        with torch.random.fork_rng(devices=[]):
            return method_of(settings, seed=seed)
    except (HydraException, OmegaConfBaseException) as error:
        message = user_message(error)
        if message is None:
            raise
        raise ValueError(message) from error


def check_model(config: DictConfig) -> None:
    """Check the network that `model=` chose, before any setting is resolved with it.

    Raises:
        ValueError: The method does not read `model`, does not train this network, or there is no network to train.
    """
    settings = OmegaConf.to_container(config.method, resolve=False)
    encoder = OmegaConf.select(config, "model.encoder")
    base: type[Method] = Method  # type: ignore[type-abstract]
    kind = named_class(settings, None, base=base, where="method")  # type: ignore[arg-type]
    if not READS_MODEL.search(str(settings)):
        if config.get("model") is not None:
            own = [OmegaConf.select(config, f"method.encoder{place}._target_") for place in (".net", "")]
            name = next((f", a {target.rpartition('.')[2]}" for target in own if target), "")
            raise ValueError(
                f"{kind.__name__} reads no model= here; networks that fit: the one that method.encoder states{name}; "
                "leave model out"
            )
        return
    if encoder is None or "_target_" not in encoder:
        raise ValueError(f"{kind.__name__} needs a network, and model.encoder names none; {fitting(kind.networks)}")
    kind.check_recipe(OmegaConf.to_container(encoder, resolve=False))  # type: ignore[arg-type]


def method_of(settings: Any, *, seed: int) -> Method:
    """Return the method that resolved settings describe, with first weights that follow from the seed."""
    torch.manual_seed(counter_key("weights", seed))
    base: type[Method] = Method  # type: ignore[type-abstract]
    return build(settings, base=base, where="method")


def method_along(settings: dict[str, Any], axes: str | None, *, seed: int) -> tuple[Method, dict[str, Any]]:
    """Return the method of resolved settings with an encoder along some axes, and the settings that build it.

    Where the axes differ, the encoder's recipe in the settings is put inside a `Reoriented`, or taken out of one.

    Args:
        settings: The settings of the method.
        axes: Axes of the encoder whose weights it will get; None leaves the method as it is.
        seed: Seed that determines the first weights.

    Raises:
        ValueError: The method refuses its settings, or an encoder along these axes.
    """
    method = method_of(settings, seed=seed)
    own = axes_of(method.encoder)
    if axes is None or same_axes(own, axes):
        return method, settings
    place = method.transfers().recipes["encoder"].split(".")
    recipe = reduce(lambda node, key: node.get(key) or {}, place, settings)
    bare = recipe.get("net", {}) if isinstance(method.encoder, Reoriented) else recipe
    takes_it = method.takes_reoriented and "_target_" in bare and len(levels(method.encoder)[1][-1]) == 3
    if not takes_it:
        raise ValueError(
            f"weights.path holds an encoder trained along the axes {axes}; {type(method).__name__} trains one along "
            f"{own} and cannot turn it; start a method that takes any network of volumes by model="
        )
    turned = _with_value(settings, place, along(bare, axes))
    return method_of(turned, seed=seed), turned


def axes_of(encoder: nn.Module) -> str:
    """Return the axes along which an encoder reads images."""
    return encoder.axes if isinstance(encoder, Reoriented) else "xyz"


def same_axes(first: str, second: str) -> bool:
    """Return whether both words mean the same axes, such as `xyz` and `RAS`."""
    return directions(first) == directions(second)


def _with_value(settings: Mapping[str, Any], place: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of nested settings with another value at a place."""
    first, *rest = place
    return {**settings, first: _with_value(settings[first], rest, value) if rest else value}


def _resolved(config: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the method.

    Raises:
        ValueError: A setting follows from a number that is neither given nor follows from the views.
    """
    known = {name: "???" if value is None else value for name, value in config.facts.items()} | dict(given)
    views = instantiate(with_values(config, {"facts": known}).views, _convert_="all")
    of_views = {"crop_voxel": views.first_size} | (
        {"num_locations": views.num_locations} if views.num_locations else {}
    )
    facts = known | {name: value for name, value in of_views.items() if known[name] == "???"}
    method = with_values(config, {"facts": facts}).method
    try:
        return OmegaConf.to_container(method, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        missing = re.search(r"Missing mandatory value: facts\.(\w+)", str(error))
        if missing is None:
            raise
        raise ValueError(
            f"{error.full_key} follows from the data; give build_method the number as {missing[1]}=N"
        ) from None
