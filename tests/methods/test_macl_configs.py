import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import instantiate
from killed_run import copied_at
from omegaconf import OmegaConf
from recorded_steps import TenSteps, assert_recorded
from test_macl import batch

import medssl
from medssl.building import build
from medssl.config import compose, main
from medssl.features import run as features
from medssl.losses.dense_contrast import segment_contrast
from medssl.methods.base import Method
from medssl.methods.macl import MACL
from medssl.models.segmenter import build_segmenter
from medssl.prepare import run as prepare
from medssl.pretrain import run
from medssl.segmentation.initial_weights import find_initial, load_initial
from medssl.segmentation.reading_differences import other_reading
from medssl.training.fit import check_trainer
from medssl.training.optim import build_optimizer
from medssl.weights import read_card

SMALL = ("data=phantoms", "data.num_cases=5", "data.size_voxel=32", "data.phantom_spacing_mm=12.0")
BUDGET = ("trainer.max_steps=2", "batch_size=4", "validate_every=null", "figures_every=null")
NARROW = ("model.encoder.base_channels=2", "model.encoder.num_levels=2", "views.groups.still.size=[16,16,16]")
CONVOLUTIONS = ("model.encoder.widths=[4,8,8]", "model.encoder.strides=[1,2,2]", "views.groups.still.size=[16,16,16]")
SWIN = ("model.encoder.feature_size=12", "model.encoder.window_voxel=4", "views.groups.still.size=[64,64,64]")
BACKBONES = {
    "macl_unet_tiny": NARROW,
    "attention_unet": NARROW,
    "unet": CONVOLUTIONS,
    "resenc": (*CONVOLUTIONS, "model.encoder.blocks=[1,1,1]"),
    "swinunetr": (*SWIN, "model.encoder.depths=[1,1,1,1]", "batch_size=2", "trainer.max_steps=1"),
}
ONE_THRESHOLD = Mock(return_value=0.123)
TERMS = ("global", "dense", "equivariance")


def resolved(*overrides):
    """The configuration of a run on 32 volumes; no data source is needed."""
    config = compose("pretrain", ["~data", *overrides])
    config.facts = {"num_cases": 32, "num_channels": 1, "num_locations": 0, "steps_per_epoch": 4.0}
    return OmegaConf.to_container(config, resolve=True)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Phantoms, prepared."""
    root = tmp_path_factory.mktemp("macl")
    settings = [*SMALL, f"store={root / 'store'}"]
    main("prepare", prepare, arguments=settings)
    return settings


def pretrained(where, folder, *settings, method="macl_tiny"):
    """A finished run, by the command."""
    main("pretrain", run, arguments=[f"method={method}", *where, *BUDGET, *settings, f"output_dir={folder}"])
    return folder


def rows(folder):
    names, *lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(names, map(lambda cell: float(cell or "nan"), line), strict=True)) for line in lines]


@pytest.fixture(scope="module")
def finished(where, tmp_path_factory):
    """A run whose automatic threshold is 0.123."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medssl.training.positive_rate.automatic_threshold", ONE_THRESHOLD)
        folder = tmp_path_factory.mktemp("finished") / "run"
        positions = ("method.positions.threshold=auto", "method.positions.norm=l2")
        return pretrained(where, folder, *NARROW, *positions, "figures_every=2")


@pytest.mark.parametrize("model", BACKBONES)
def test_every_backbone_is_pre_trained_and_starts_a_segmenter(where, tmp_path, model):
    folder = pretrained(where, tmp_path / "run", f"model={model}", *BACKBONES[model])
    for row in rows(folder):
        assert all(math.isfinite(row[term]) and row[term] > 0 for term in TERMS)
        assert row["num_compared"] == (1 if model == "swinunetr" else 3)
    card = read_card(folder / "encoder.safetensors")
    assert card["transfers"] == ["encoder", "decoder"]
    network, said = segmenter(folder)
    whole = len(network.encoder.state_dict()), len(network.decoder.state_dict())
    assert f"encoder: {whole[0]} tensors matched" in said
    assert f"decoder: {whole[1]} tensors matched" in said
    assert said.endswith("from scratch: head")
    assert network(torch.rand(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


def segmenter(folder, *settings):
    """The network of a fine-tuning run that starts from a run, and what it says."""
    config = compose("finetune", [f"weights.path={folder / 'encoder.safetensors'}", *settings])
    initial = find_initial(config)
    model = initial.completed(config).model
    torch.manual_seed(1)
    network, _ = build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)
    return network, "\n".join(load_initial(initial, network))


def fresh(folder):
    config = compose("finetune", [f"model.like={folder / 'encoder.safetensors'}"])
    initial = find_initial(config)
    model = initial.completed(config).model
    torch.manual_seed(1)
    return build_segmenter(model.encoder, model.decoder, num_classes=3, in_channels=1)[0]


def equal_names(a, b):
    """Names of tensors that two modules have in common, value by value."""
    return {name for name, tensor in a.state_dict().items() if torch.equal(tensor, b.state_dict()[name])}


def test_a_run_logs_its_terms_and_positives_and_shows_what_it_sees(finished):
    for row in rows(finished):
        assert all(math.isfinite(row[term]) for term in TERMS)
        assert row["num_compared"] == 3
        assert 0 <= row["num_positives"] <= 3
        assert 0 < row["feature_std"] < 1.5
    assert (finished / "figures" / "branches-0000002.png").stat().st_size > 0
    maps = medssl.load_encoder(finished / "encoder.safetensors")(torch.rand(1, 1, 16, 16, 16))
    assert [level.shape[1] for level in maps] == [2, 4, 8]


def test_a_run_gives_features_by_the_size_that_its_crops_have(finished, where, tmp_path):
    settings = [f"weights={finished / 'encoder.safetensors'}", "grid=[1,1,2]", f"output_dir={tmp_path}"]
    main("features", features, arguments=[*settings, *where])
    found = np.load(tmp_path / "features.npz")["feature"]
    assert found.shape == (5, 2, 8)
    assert np.isfinite(found).all()
    assert found.std() > 0


def test_an_automatic_threshold_is_a_number_in_the_settings_of_the_run(finished):
    assert yaml.safe_load((finished / "config.yaml").read_text())["method"]["positions"]["threshold"] == 0.123
    (_, plan, sampler), asked = ONE_THRESHOLD.call_args
    assert (list(plan.groups), type(sampler).__name__) == (["still", "moved"], "Anchored")
    assert (asked["rule"].norm, asked["batch_size"], asked["seed"]) == ("l2", 4, 0)
    assert (asked["world"], asked["accumulate"], asked["gather"]) == (1, 1, None)
    assert len(asked["cases"]) == 4
    assert check_trainer(compose("pretrain", ["trainer.devices=2"])).world_size == 2


def test_a_run_finds_a_threshold_that_makes_some_pairs_positives(where, tmp_path):
    settings = ("method.positions.threshold=auto", "batch_size=16", "trainer.max_steps=1")
    folder = pretrained(where, tmp_path / "run", *NARROW, *settings)
    assert 0 < yaml.safe_load((folder / "config.yaml").read_text())["method"]["positions"]["threshold"] < 1
    (row,) = rows(folder)
    assert row["num_compared"] == 15
    assert 0.1 * 15 < row["num_positives"] < 0.3 * 15  # about 0.19


def test_a_run_that_broke_off_goes_on_bit_for_bit(where, tmp_path):
    settings = (*NARROW, "method.coupling=ema", "checkpoint_every=2", "trainer.max_steps=4")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    with copied_at(MACL, 3, straight, broken):
        pretrained(where, straight, *settings)
    assert len(rows(broken)) == 3
    assert last(broken)["global_step"] == 2
    pretrained(where, broken, *settings, f"resume={broken}")
    first, second = last(straight), last(broken)
    assert first["global_step"] == second["global_step"] == 4
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert any(".auxiliary_encoder." in name for name in first["state_dict"])
    assert all(torch.equal(tensor, second["state_dict"][name]) for name, tensor in first["state_dict"].items())
    moments = [run["optimizer_states"][0]["state"] for run in (first, second)]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])
    assert [[row[term] for term in TERMS] for row in rows(straight)] == [
        [row[term] for term in TERMS] for row in rows(broken)
    ]


def last(folder):
    """The checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("decoder", ["all", "trained", "none"])
def test_fine_tuning_takes_all_of_the_decoder_or_its_trained_blocks_or_none(finished, decoder):
    network, said = segmenter(finished, f"weights.decoder={decoder}")
    scratch, whole = fresh(finished), segmenter(finished)[0]
    names = set(network.decoder.state_dict())
    assert equal_names(network.encoder, whole.encoder) == set(network.encoder.state_dict())
    taken = equal_names(network.decoder, whole.decoder) - equal_names(whole.decoder, scratch.decoder)
    alike = equal_names(whole.decoder, scratch.decoder)  # biases and norms of blocks that nothing has trained
    coarsest = {name for name in names if name.startswith(("ups.1.", "stages.1."))}
    if decoder == "all":
        assert taken | alike == names
    elif decoder == "trained":
        assert taken == coarsest - alike
        assert len(taken) > 10
        assert said.endswith(
            f"of the decoder the first 1 blocks; {len(names - coarsest)} other tensors start from scratch"
        )
    else:
        assert taken == set()
        assert said.endswith("from scratch: decoder, head")


def test_a_file_that_names_no_blocks_cannot_give_the_trained_ones(finished, tmp_path):
    from medssl.weights import save_weights

    card = {key: value for key, value in read_card(finished / "encoder.safetensors").items() if key != "decoder_blocks"}
    save_weights(tmp_path / "encoder.safetensors", fresh(finished).parts(), card)
    with pytest.raises(ValueError, match="give all or none"):
        segmenter(tmp_path, "weights.decoder=trained")
    with pytest.raises(ValueError, match="all, trained, none"):
        segmenter(finished, "weights.decoder=half")


@pytest.mark.parametrize(
    ("strides", "coarsest", "volume"), [("null", (4, 4), (4, 4, 4)), ("[1,2,[2,1]]", (4, 8), (4, 8, 4))]
)
def test_slices_pre_train_a_network_that_segments_volumes(strides, coarsest, volume, where, tmp_path, capsys):
    small = ("model.encoder.base_channels=2", "model.encoder.num_levels=2", "method.backbone.num_blocks=1")
    small += (f"model.encoder.strides={strides}", "views.groups.still.size=[16,16,1]")
    folder = pretrained(where, tmp_path / "run", *small, method="macl_2d")
    assert all(math.isfinite(row[term]) for row in rows(folder) for term in TERMS)
    assert "encoder(torch.zeros(1, 1, 96, 96))" in capsys.readouterr().out
    encoder = medssl.load_encoder(folder / "encoder.safetensors")
    assert [level.shape[2:] for level in encoder(torch.rand(1, 1, 16, 16))] == [(16, 16), (8, 8), coarsest]
    with pytest.raises(SystemExit, match="2"):
        main("features", features, arguments=[f"weights={folder / 'encoder.safetensors'}", *where])
    assert "holds an encoder of slices" in capsys.readouterr().err
    network, said = segmenter(folder)
    kernel = encoder.stages[0][0].conv.weight
    inflated = network.encoder.stages[0][0].conv.weight
    assert torch.equal(inflated[..., 1], kernel)
    assert inflated[..., [0, 2]].abs().max() == 0
    assert "decoder: 32 tensors matched" in said
    assert network(torch.rand(1, 1, 16, 16, 16)).shape == (1, 3, 16, 16, 16)
    assert network.encoder(torch.rand(1, 1, 16, 16, 16))[-1].shape[2:] == volume


@pytest.mark.parametrize(
    ("settings", "norm"), [((), "batch"), (("model.encoder.norm=group",), "group"), (("model=unet",), "batch")]
)
def test_the_convolutions_of_the_heads_have_the_norm_of_the_encoder_where_it_has_a_choice(settings, norm):
    values = resolved("method=macl_tiny", *settings)
    assert values["method"]["heads"]["norm"] == norm
    assert ("norm" in values["model"]["encoder"]) == (settings != ("model=unet",))


TEN_STEPS = TenSteps(
    name="macl_tiny",
    values=lambda: resolved("method=macl_tiny"),
    batch=lambda step: batch(side=32, seed=step % 4),
)


def test_ten_steps_of_the_tiny_configuration_give_the_recorded_losses():
    assert_recorded(TEN_STEPS)


@pytest.mark.parity
def test_the_published_values_are_the_default():
    values = resolved("method=macl")
    method = values["method"]
    assert [method[f"weight_{term}"] for term in TERMS] == [1, 0.5, 1]
    assert (method["temperature"], method["base_temperature"]) == (0.1, 0.07)
    assert (method["positions"]["threshold"], method["backbone"]["num_blocks"], method["coupling"]) == (
        0.1,
        2,
        "shared",
    )
    optimizer = values["optimizer"]
    assert (optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]) == (0.01, 0.9, 1e-5)
    slices = resolved("method=macl_2d")
    assert slices["views"]["groups"]["still"]["size"] == [512, 512, 1]
    assert (slices["method"]["positions"]["frame"], slices["method"]["positions"]["axes"]) == ("volume", ["z"])
    assert slices["batch_size"] == 32


@pytest.mark.parity
@pytest.mark.parametrize(("name", "count"), [("macl", 24_906_944), ("macl_tiny", 445_616), ("macl_2d", 8_616_576)])
def test_a_configuration_builds_a_method_of_the_known_size(name, count):
    method = build(resolved(f"method={name}")["method"], base=Method)
    assert isinstance(method, MACL)
    assert sum(p.numel() for p in method.parameters()) == count


@pytest.mark.parametrize("name", ["macl", "macl_tiny", "macl_2d"])
def test_all_views_read_ct_by_a_window_and_the_rest_by_the_first_and_last_percentile(name):
    for group in instantiate(resolved(f"method={name}")["views"], _convert_="all").groups.values():
        first = group.augment[0]
        read = [list(values) for values in (first.window_hu, first.percentiles, first.out)]
        assert read == [[-1000, 1000], [1, 99], [0, 1]]


@pytest.mark.parametrize("name", ["macl", "macl_tiny", "macl_2d"])
def test_fine_tuning_on_ct_reads_images_as_pre_training_did_and_tells_the_percentiles_of_the_rest(name):
    card = {"reading": {"views": resolved(f"method={name}")["views"]}}
    normalise = OmegaConf.to_container(compose("finetune").normalise, resolve=True)
    reading = {"spacing_mm": "native", "outside": "minimum", "normalise": normalise}
    assert other_reading(card, {**reading, "modality": "ct"}) == []
    (line,) = other_reading(card, {**reading, "modality": "mr"})
    assert line == (
        "normalise: ByModality percentiles=[1, 99] out=[0, 1] in pre-training, "
        "ByModality percentiles=[0.5, 99.5] out=[0, 1] here"
    )
    (line,) = other_reading(card, {**reading, "modality": None})
    assert "window_hu=[-1000, 1000] percentiles=[1, 99]" in line


@pytest.mark.parametrize("name", ["macl", "macl_tiny"])
def test_the_places_of_the_supervoxel_term_spread_over_all_axes(name):
    values = resolved(f"method={name}")
    encoder = values["model"]["encoder"]
    sides = [side >> encoder["num_levels"] for side in values["views"]["groups"]["still"]["size"]]
    first = torch.randn(1, 2, *sides, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segment = torch.zeros(1, *sides, dtype=torch.int64)
    segment_contrast(first, first.detach() + 1, segment, every=values["method"]["supervoxel_every"]).backward()
    taken = first.grad[0].abs().sum(0).nonzero()
    assert [set(axis.tolist()) for axis in taken.T] == [set(range(side)) for side in sides]
    assert len(taken) < 0.25 * math.prod(sides)
    assert resolved("method=macl_2d")["method"]["supervoxel_every"] == 16


@pytest.mark.parity
def test_the_rate_follows_half_a_cosine_to_nothing():
    """100 epochs of 500 steps."""
    weights = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    _, schedule = build_optimizer(resolved("method=macl")["optimizer"], weights, total_steps=50_000)
    share = schedule.lr_lambdas[0]
    rates = [0.01 * share(step) for step in (0, 12_500, 25_000, 50_000)]
    assert rates == pytest.approx([0.01, 0.008535534, 0.005, 0], abs=1e-9)


@pytest.mark.parity
def test_the_rate_of_the_paper_s_fine_tuning_stops_at_a_hundredth():
    """100 epochs of 20 steps."""
    paper = ("_target_=torch.optim.Adam", "lr=5e-4", "warmup_steps=0", "clip_norm=null")
    config = compose("finetune", [*(f"optimizer.{setting}" for setting in paper), "+optimizer.least_fraction=0.01"])
    weights = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    optimizer, schedule = build_optimizer(OmegaConf.to_container(config.optimizer), weights, total_steps=2000)
    rates = [5e-4 * schedule.lr_lambdas[0](20 * epoch) for epoch in (0, 90, 93, 94, 99)]
    assert rates == pytest.approx([5e-4, 1.2236e-5, 6.021e-6, 5e-6, 5e-6], rel=5e-5)
    (group,) = optimizer.param_groups
    assert (type(optimizer), group["weight_decay"]) == (torch.optim.Adam, 1e-5)


def test_a_crop_that_leaves_one_voxel_to_an_instance_norm_is_refused_when_the_method_is_built():
    small = ("model.encoder.widths=[4,8,8]", "model.encoder.strides=[1,2,2]", "views.groups.still.size=[8,8,8]")
    settings = resolved("method=macl_tiny", "model=unet", *small)["method"]
    with pytest.raises(ValueError, match="leaves a single voxel at the coarsest stage"):
        build(settings, base=Method)


@pytest.mark.parametrize(
    "more",
    [("method.positions.threshold=0.1",), ("method.positions.threshold=auto",), ("data=decathlon", "data.root=.")],
)
def test_crops_that_do_not_fit_are_refused_with_what_does_before_any_volume_is_prepared(more, tmp_path, capsys):
    settings = ["method=macl_tiny", "views.groups.still.size=[24,24,24]", *more]
    with pytest.raises(SystemExit) as stop:
        main("pretrain", run, arguments=[*settings, f"output_dir={tmp_path / 'run'}", f"store={tmp_path / 'store'}"])
    assert stop.value.code == 2
    assert not (tmp_path / "store").exists()
    said = capsys.readouterr().err
    assert "views.groups.still.size=[24, 24, 24]" in said
    assert "multiples of [16, 16, 16]" in said
