"""The configurations of Models Genesis: their values, and runs by the commands."""

import csv
import math

import pytest
import torch
from hydra.utils import instantiate
from killed_run import copied_at
from omegaconf import OmegaConf
from pairs_of_views import global_and_local
from recorded_steps import TenSteps, assert_recorded

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.augment import ByModality, Flip
from medssl.data.placements import RandomCrop
from medssl.data.views import View
from medssl.finetune import run as finetune
from medssl.methods.base import Method, Progress
from medssl.methods.models_genesis import ModelsGenesis
from medssl.pretrain import run
from medssl.weights import read_card

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
NARROW = ("model.encoder.widths=[4,8]", "model.encoder.strides=[1,2]", "model.encoder.blocks=[1,1]")
BUDGET = ("batch_size=2", "validate_every=null", "views.groups.crop.size=[16,16,16]", "method.num_windows=100")


def resolved(*overrides):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {"num_cases": 32, "num_channels": 1, "num_locations": 0, "steps_per_epoch": 4.0}
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parity
def test_the_values_of_the_card_are_the_default():
    values = resolved("method=models_genesis")
    method, optimizer = values["method"], values["optimizer"]
    chances = [method[f"probability_{step}"] for step in ("shuffle", "intensity", "paint")]
    assert (*chances, method["inpaint_share"]) == (0.5, 0.9, 0.9, 0.2)
    assert (method["num_windows"], method["window_divisor"]) == (10_000, 10)
    assert (values["batch_size"], values["trainer"]["max_steps"], optimizer["clip_norm"]) == (8, 250_000, 12)
    crop = instantiate(values["views"], _convert_="all").groups["crop"]
    assert isinstance(crop, RandomCrop)
    assert (crop.size, crop.spacing_mm, crop.within, crop.outside) == ([160, 160, 160], 1.0, "body", "border")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("settings", "count"),
    [(["method=models_genesis"], 90_284_320 + 12_050_784 + 33), (["method=models_genesis_tiny"], 78_969)],
)
def test_a_configuration_builds_a_network_of_the_known_size(settings, count):
    with torch.device("meta"):
        method = build(resolved(*settings)["method"], base=Method)
    assert isinstance(method, ModelsGenesis)
    assert sum(p.numel() for p in method.parameters()) == count


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    """Section 3: what is deformed how, the network, the output, the loss, the views."""
    values = resolved("method=models_genesis_tiny")
    method = values["method"]
    chances = {name: method[name] for name in method if name.startswith("probability_")}
    assert chances.keys() == {"probability_shuffle", "probability_intensity", "probability_paint"}
    assert all(0 < chance < 1 for chance in (*chances.values(), method["inpaint_share"])), "each step, in and out"
    assert method["num_windows"] == 10_000
    assert method["network"]["output"] == "sigmoid"
    assert method["network"]["encoder"] == {**values["model"]["encoder"]}
    assert method["network"]["decoder"]["_target_"] == "medssl.models.unet.UNetDecoder", "with skips"
    assert (values["model"]["encoder"]["widths"], values["model"]["encoder"]["strides"]) == ([8, 16, 32], [1, 2, 2])
    crop = instantiate(values["views"], _convert_="all").groups["crop"]
    reading, flip = crop.augment
    assert (type(reading), type(flip)) == (ByModality, Flip)
    assert (reading.window_hu, reading.percentiles, reading.out) == ([-1000, 1000], [0.5, 99.5], [0, 1])
    assert (flip.axes, flip.probability) == ([0, 1, 2], 0.5)
    assert (crop.within, crop.count, crop.size) == ("body", 1, [48, 48, 48])
    draws = build(method, base=ModelsGenesis).draw(torch.zeros(60, 1, 48, 16, 16), Progress())
    shuffled, painted = ((windows.volume() > 0).any(1) for windows in (draws.shuffled, draws.painted))
    for drawn in (shuffled, draws.mapped, draws.increasing, painted, draws.inside & painted, ~draws.inside):
        assert drawn.any()
        assert not drawn.all()


def crops(step):
    """Smooth pictures, others at each of four steps."""
    views = global_and_local(p=1, q=0, seed=step % 4, sides=(24, 0))["global"]
    return {"crop": View.of(views.image)}


TEN_STEPS = TenSteps(
    name="models_genesis_tiny",
    values=lambda: resolved("method=models_genesis_tiny"),
    batch=crops,
    clip_norm=12.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The folder of a store that the first run makes."""
    return f"store={tmp_path_factory.mktemp('genesis') / 'store'}"


def pretrained(store, folder, *settings):
    """A finished run, by the command."""
    arguments = ["method=models_genesis_tiny", *SMALL, store, *NARROW, *BUDGET, *settings, f"output_dir={folder}"]
    main("pretrain", run, arguments=arguments)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def last(folder):
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_that_broke_off_resumes_bit_for_bit_and_its_networks_are_fine_tuned(store, tmp_path):
    settings = ("trainer.max_steps=4", "checkpoint_every=2", "figures_every=4")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with copied_at(ModelsGenesis, 3, straight, broken):
        pretrained(store, straight, *settings)
    assert last(broken)["global_step"] == 2
    pretrained(store, broken, *settings, "figures_every=null", f"resume={broken}")
    first, second = last(straight), last(broken)
    assert first["global_step"] == second["global_step"] == 4
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    terms = ("reconstruction", "error_of_input", "error_of_mean")
    losses = [[float(row[term]) for row in rows(straight) for term in terms], []]
    losses[1] = [float(row[term]) for row in rows(broken) for term in terms]
    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses[0])
    assert [file.name for file in (straight / "figures").iterdir()] == ["reconstruction-0000004.png"]
    means = {term: sum(float(row[term]) for row in rows(straight)) / 4 for term in terms}
    assert means["error_of_input"] > 1.5 * means["error_of_mean"]  # 0.17 and 0.055 on phantoms of the card

    card = read_card(straight / "encoder.safetensors")
    assert card["transfers"] == ["encoder", "decoder"]
    encoder = medssl.load_encoder(straight / "encoder.safetensors")
    assert [level.shape[1:] for level in encoder(torch.zeros(1, 1, 16, 16, 16))] == [(4, 16, 16, 16), (8, 8, 8, 8)]
    tuning = ["trainer.max_steps=2", "batch_size=1", "crop_voxel=[16,16,16]", "validate_every=null"]
    tuning += [f"weights={straight / 'encoder.safetensors'}", "allow_leakage=true", *SMALL, store]
    main("finetune", finetune, arguments=[*tuning, f"output_dir={tmp_path / 'tuned'}"])
    assert len(rows(tmp_path / "tuned")) == 2
    assert read_card(tmp_path / "tuned" / "segmenter.safetensors")["encoder"]["widths"] == [4, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["views.groups.crop.size=[48,50,48]"], "which is [4, 4, 4]; what fits: views.groups.crop.size=[48,52,48]"),
        (["views.groups.crop.size=[48,48,8]"], "painted windows need sides of at least 16 voxels"),
        (["model=macl_unet", "model.encoder.spatial_dims=2"], "networks that fit: model=unet | resenc"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_volume_is_prepared(settings, message, tmp_path, capsys):
    arguments = ["method=models_genesis_tiny", *settings, f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=[*arguments, f"store={tmp_path / 'store'}"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
