"""Every method on every network, as docs/networks.md has it: what runs is run, what is refused is refused early."""

import csv
import math
from functools import cache

import pytest
import torch
import yaml
from network_table import (
    CHANNELS,
    METHODS,
    NETWORKS,
    REASONS,
    network_settings,
    settings_of,
    size_of,
    table,
    views,
    words,
)
from omegaconf import OmegaConf

import medssl
from medssl.building import build
from medssl.config import compose, config_dir, main, with_values
from medssl.methods.base import Method, Progress
from medssl.methods.build import build_method
from medssl.pretrain import run

VARIANTS = ("_tiny", "_small")
TABLE = table()
CELLS = {cell: word for cell, word in TABLE.items() if cell[1] in NETWORKS}
RUNS = [cell for cell, word in CELLS.items() if word == "yes"]
REFUSED = [cell for cell, word in CELLS.items() if word != "yes"]
OWN = [method for method, row in METHODS.items() if row.own]
SAMPLE = [("mae", "unetr"), ("alice", "swinunetr"), ("voco", "nnformer"), ("macl_2d", "macl_unet"), ("kaf_2d", "kaf")]
FACTS = {"num_cases": 32, "num_channels": CHANNELS, "num_locations": 27, "steps_per_epoch": 4.0}
SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
BUDGET = ("trainer.max_steps=2", "batch_size=2", "accumulate=1", "validate_every=null", "figures_every=null")

PLAIN = """
from torch import nn

class Plain(nn.Module):
    channels, strides = (4, 8), (1, 2)

    def __init__(self, *, in_channels):
        super().__init__()
        self.in_channels = in_channels
        self.fine, self.coarse = nn.Conv3d(in_channels, 4, 3, padding=1), nn.Conv3d(4, 8, 2, stride=2)

    def forward(self, image):
        return [fine := self.fine(image), self.coarse(fine)]
"""


@cache
def of_method(method):
    """The configuration of a row, composed once."""
    return compose("pretrain", [f"method={METHODS[method].config}"])


@cache
def of_network(network):
    """The settings of a small network, composed once."""
    return compose("pretrain", ["method=simclr_tiny", f"model={network}", *words(network_settings(network))]).model


@cache
def sources(method):
    """The file of a method and those that it builds on, the last one first."""
    values = yaml.safe_load((config_dir() / "method" / f"{method}.yaml").read_text())
    names = [one for one in values.get("defaults", ()) if isinstance(one, str) and one != "_self_"]
    return [values, *(file for name in names for file in sources(name))]


def composed(method, network):
    """The configuration of a cell."""
    settings = [*words(network_settings(network)), *words(settings_of(method, network))]
    return compose("pretrain", [f"method={METHODS[method].config}", f"model={network}", *settings])


def joined(method, network):
    """The same in a tenth of the time, put together from row and column; None is the network of the row."""
    settings = settings_of(method, network)
    if network is not None:
        files = [{"model": file["model"]} for file in sources(METHODS[method].config)[::-1] if "model" in file]
        chosen = OmegaConf.merge({"model": OmegaConf.to_container(of_network(network))}, *files)
        settings |= {"model": chosen["model"], **network_settings(network)}
    return with_values(of_method(method), settings)


def built(config, size):
    """The method of a configuration."""
    facts = {**FACTS, "crop_voxel": list(size)}
    values = OmegaConf.to_container(with_values(config, {"facts": {**config.facts, **facts}}).method, resolve=True)
    torch.manual_seed(0)
    return build(values, base=Method)


def test_every_method_and_every_network_stands_in_the_table():
    methods = {path.stem for path in (config_dir() / "method").glob("*.yaml") if not path.stem.endswith(VARIANTS)}
    networks = {path.stem for path in (config_dir() / "model").glob("*.yaml") if not path.stem.endswith(VARIANTS)}
    assert {method for method, _ in TABLE} == methods == METHODS.keys()
    assert {name for _, name in CELLS} == networks - {"auto"} == NETWORKS.keys()
    assert set(CELLS.values()) == {"yes", *REASONS}


@pytest.mark.parametrize("method", METHODS)
def test_what_trains_without_a_choice_is_what_the_table_says(method):
    chosen = [one for file in sources(method) for one in file.get("defaults", ()) if "override /model" in one]
    name = chosen[0]["override /model"] if chosen else None
    places = ("method.encoder.net", "method.encoder")
    own = next(filter(None, (OmegaConf.select(of_method(method), f"{place}._target_") for place in places)), "")
    assert TABLE[method, "without model="] == (own.rpartition(".")[2] if METHODS[method].own else name)


@pytest.mark.parametrize(("method", "network"), SAMPLE)
def test_cells_put_together_are_those_of_the_command_line(method, network):
    found, expected = (OmegaConf.to_container(make(method, network)) for make in (joined, composed))
    assert found == expected


@pytest.mark.parametrize(("method", "network"), [*RUNS, *((method, None) for method in OWN)])
def test_what_the_table_says_runs_runs_and_gives_every_weight_a_gradient(method, network):
    size = size_of(method, network)
    trained = built(joined(method, network), size)
    assert network is None or network in trained.networks
    output = trained(METHODS[method].batch(size), Progress(step=1, total_steps=10, epoch=1.0, total_epochs=5.0))
    output.loss.backward()
    assert output.loss.isfinite()
    weights = {name: weight for name, weight in trained.named_parameters() if weight.requires_grad}
    grads = {name: weight.grad for name, weight in weights.items() if weight.ndim > 1}  # norms of maps may be unread
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
    assert sum(grad.abs().sum() for grad in grads.values()) > 0


@pytest.mark.parametrize(("method", "network"), REFUSED)
def test_what_the_table_says_is_refused_is_refused_before_data_are_prepared_with_what_fits(
    method, network, tmp_path, capsys, monkeypatch
):
    folders = {"store": str(tmp_path / "store"), "output_dir": str(tmp_path / "run")}
    config = with_values(joined(method, network), folders)
    monkeypatch.setattr("medssl.config.compose", lambda *arguments, **options: config)
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=[])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert REASONS[CELLS[method, network]] in said
    fitting = [name for name in NETWORKS if CELLS[method, name] == "yes"]
    assert ("networks that fit: model=" + " | ".join(fitting) if fitting else "the one that method.encoder") in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("choice", ["model=auto", "~model"])
def test_a_method_without_a_network_is_refused_with_those_that_fit(choice, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(
            "pretrain",
            run,
            arguments=["method=mae", choice, f"store={tmp_path / 'store'}", f"output_dir={tmp_path / 'run'}"],
        )
    assert stop.value.code == 2
    assert "needs a network, and model.encoder names none; networks that fit: model=unet | " in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_network_of_ones_own_that_describes_its_maps_is_trained(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "own_of_networks.py").write_text(PLAIN)
    encoder = "{_target_: own_of_networks.Plain, in_channels: '${facts.num_channels}'}"
    (tmp_path / "model" / "plain.yaml").write_text(f"# @package model\nencoder: {encoder}\ndecoder: null\n")
    for name, batch in (("mae_tiny", {"crop": 1}), ("simclr_tiny", {"first": 1, "second": 1})):
        sizes = [f"views.groups.{next(iter(batch))}.size=[16,16,16]"]
        method = build_method(name, in_channels=CHANNELS, extra_dir=tmp_path, overrides=["model=plain", *sizes])
        assert type(method.encoder).__name__ == "Plain"
        assert method(views(**batch)((16, 16, 16)), Progress()).loss.isfinite()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Where the phantoms lie that all runs share."""
    return tmp_path_factory.mktemp("networks") / "store"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "network"), RUNS)
def test_two_steps_by_the_command(method, network, store, tmp_path):
    settings = [*words(network_settings(network)), *words(settings_of(method, network))]
    places = [f"store={store}", f"output_dir={tmp_path / 'run'}"]
    chosen = [f"method={METHODS[method].config}", f"model={network}"]
    main("pretrain", run, arguments=[*chosen, *settings, *SMALL, *BUDGET, *places])
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert medssl.load_encoder(tmp_path / "run" / "encoder.safetensors").channels
