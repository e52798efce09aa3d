import csv
import math

import pytest
import torch
from hydra.utils import instantiate
from killed_run import copied_at
from omegaconf import OmegaConf
from recorded_steps import TenSteps, assert_recorded
from small_mae import crops

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.data.placements import RandomCrop
from medssl.finetune import run as finetune
from medssl.methods.base import Method
from medssl.methods.mae import MAE
from medssl.models.reconstructor import Reconstructor
from medssl.models.segmenter import build_segmenter
from medssl.models.unet import UNetDecoder
from medssl.pretrain import run
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.training.optim import build_optimizer
from medssl.weights import read_card

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
BUDGET = ("trainer.max_steps=4", "batch_size=2", "checkpoint_every=2", "validate_every=4", "figures_every=4")
CROP = "views.groups.crop.size=[16,16,16]"


def resolved(*overrides, channels=1):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {
        "num_cases": 32,
        "num_channels": channels,
        "num_locations": None,
        "crop_voxel": list(config.views.groups.crop.size),
        "steps_per_epoch": 4.0,
    }
    return OmegaConf.to_container(config, resolve=True)


TEN_STEPS = TenSteps(
    name="mae_tiny",
    values=lambda: resolved("method=mae_tiny"),
    batch=lambda step: crops(b=2, side=24, seed=step % 4),
    clip_norm=12.0,
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.parity
def test_the_published_network_views_and_recipe_are_those_of_the_card():
    values = resolved("method=mae")
    with torch.device("meta"):
        method = build(values["method"], base=Method)
    assert isinstance(method.network, Reconstructor)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}
    assert sizes == {"encoder": 90_284_320, "decoder": 12_050_784, "head": 33}
    assert (method.ratios, method.block_voxel) == ((0.75, 0.75), (16, 16, 16))
    assert (method.fill, method.loss_on, method.error, method.norm_pix) == ("zero", "hidden", "mse", False)
    spec = instantiate(values["views"], _convert_="all").groups["crop"]
    assert isinstance(spec, RandomCrop)
    assert (list(spec.size), spec.count, spec.spacing_mm) == ([160] * 3, 1, 1.0)
    assert (spec.within, spec.outside) == ("volume", "border")
    score, turn, zoom, flip = spec.augment
    assert (type(score).__name__, score.limit) == ("ZScore", None)
    assert (turn.rotation_deg, turn.probability, tuple(turn.scale)) == (30, 0.2, (1, 1))
    assert (tuple(zoom.scale), zoom.balanced, zoom.per_axis, zoom.probability) == ((0.7, 1.4), True, False, 0.2)
    assert (tuple(flip.axes), flip.probability) == ((0, 1, 2), 0.5)
    assert (values["batch_size"], values["trainer"]["max_steps"]) == (8, 250_000)


@pytest.mark.parity
def test_the_published_optimiser_is_that_of_the_card_on_all_parameters():
    values = resolved("method=mae")
    with torch.device("meta"):
        groups = build(values["method"], base=Method).param_groups()
    assert len(groups) == 1
    optimizer, schedule = build_optimizer(values["optimizer"], groups, total_steps=250_000)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)
    assert values["optimizer"]["clip_norm"] == 12
    for step, epoch in ((0, 0), (249, 0), (250, 1), (125_000, 500), (249_999, 999)):
        assert 0.01 * schedule.lr_lambdas[0](step) == pytest.approx(0.01 * (1 - epoch / 1000) ** 0.9)


def test_every_mechanism_of_the_card_is_on_in_the_tiny_configuration():
    values = resolved("method=mae_tiny")
    method = build(values["method"], base=Method)
    mechanisms = {
        "blocks of the crop are hidden": math.prod(48 // side for side in method.block_voxel) == 216,
        "three quarters of them": method.ratios == (0.75, 0.75),
        "as zeros": method.fill == "zero",
        "of z-scores": values["views"]["groups"]["crop"]["augment"][0]["_target_"].endswith("ZScore"),
        "a U-Net": isinstance(method.network.decoder, UNetDecoder),
        "with all skips": len(method.network.decoder.stages) == len(method.encoder.channels) - 1 == 2,
        "predicts voxels": method.network.output == "linear",
        "squared error": method.error == "mse",
        "of hidden voxels alone": method.loss_on == "hidden",
        "not normed": not method.norm_pix,
        "crops are moved": values["views"]["groups"]["crop"]["augment"]
        == resolved("method=mae")["views"]["groups"]["crop"]["augment"],
        "every weight decays": method.decays_all and values["optimizer"]["weight_decay"] > 0,
        "gradients are clipped": values["optimizer"]["clip_norm"] == 12,
    }
    assert all(mechanisms.values()), [name for name, is_on in mechanisms.items() if not is_on]
    assert (method.encoder.channels, method.encoder.strides) == ((8, 16, 32), ((1,) * 3, (2,) * 3, (4,) * 3))
    assert values["trainer"]["max_steps"] == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["views.groups.crop.size=[40,40,44]"], "views.groups.crop.size=[40, 40, 44] is no multiple of method.block"),
        (["method.mask_ratio=0"], "method.mask_ratio=0 must lie between 0 and 1"),
        (["method.form=vit"], "method.form=vit trains a VisionTransformer, not ResidualEncoder; take method=mae_vit"),
        (["method=mae", "model=macl_unet", "model.encoder.spatial_dims=2"], "MACLUNetEncoder takes slices"),
    ],
)
def test_what_cannot_train_is_refused_before_any_volume_is_prepared(settings, message, tmp_path, capsys):
    where = [f"output_dir={tmp_path / 'run'}", f"store={tmp_path / 'store'}"]
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=["method=mae_tiny", *settings, *where])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A folder whose runs share one store."""
    return tmp_path_factory.mktemp("mae")


def pretrained(where, name, *settings):
    """A finished run, by the command."""
    places = [f"store={where / 'store'}", f"output_dir={where / name}"]
    main("pretrain", run, arguments=["method=mae_tiny", *SMALL, *BUDGET, CROP, *places, *settings])
    return where / name


@pytest.fixture(scope="module")
def straight(where):
    """A run of four steps; `broken` beside it is that of one that was killed in the last."""
    with copied_at(MAE, 3, where / "straight", where / "broken"):
        return pretrained(where, "straight")


def test_a_run_logs_its_loss_beside_that_of_predicting_zero_and_draws(straight):
    with (straight / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        assert float(row["loss"]) == pytest.approx(float(row["reconstruction"]), rel=1e-6)
        assert float(row["zero_prediction"]) > 0
        assert float(row["mask_ratio"]) == 0.75  # 6 of 8 blocks
    assert float(rows[3]["validation_loss"]) > 0
    assert (straight / "figures" / "crop-0000004.png").stat().st_size > 0


def test_a_run_that_broke_off_continues_bit_for_bit(where, straight):
    pretrained(where, "broken", "figures_every=null", f"resume={where / 'broken'}")
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (straight, where / "broken")
    )
    assert first["global_step"] == second["global_step"] == 4
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    moments = [state["optimizer_states"][0]["state"] for state in (first, second)]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])


def test_the_encoder_loads_and_starts_a_segmentation(where, straight, capsys):
    encoder = medssl.load_encoder(straight / "encoder.safetensors")
    assert [level.shape[1] for level in encoder(torch.zeros(1, 1, 16, 16, 16))] == [8, 16, 32]
    card = read_card(straight / "encoder.safetensors")
    assert (card["transfers"], card["decoder_part"]) == (["encoder", "decoder"], "none")
    budget = ["trainer.max_steps=2", "crop_voxel=[16,16,16]", "validate_every=null", "data.labelled=2"]
    places = [f"store={where / 'store'}", f"output_dir={where / 'tuned'}"]
    main("finetune", finetune, arguments=[f"weights={straight / 'encoder.safetensors'}", *SMALL, *budget, *places])
    said = capsys.readouterr().out
    assert f"encoder: {len(encoder.state_dict())} tensors matched" in said
    assert "from scratch: decoder, head" in said
    assert (where / "tuned" / "segmenter.safetensors").is_file()


@pytest.mark.parametrize(("settings", "part"), [((), "none"), (("weights.decoder=all",), "all")])
def test_fine_tuning_takes_the_decoder_where_the_user_says_so(straight, settings, part):
    config = compose("finetune", [f"weights.path={straight / 'encoder.safetensors'}", *settings])
    initial = find_initial(config)
    model = initial.completed(config).model
    network, _ = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)
    before = network.decoder.state_dict()["ups.0.weight"].clone()
    said = load_initial(initial, network)[-1]
    assert initial.decoder == part
    assert (f"decoder: {len(network.decoder.state_dict())} tensors matched" in said) == (part == "all")
    assert torch.equal(network.decoder.state_dict()["ups.0.weight"], before) == (part == "none")
