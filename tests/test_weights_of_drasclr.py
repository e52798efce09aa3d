"""Files of DrasCLR: none is at hand, so they are made up from the names and shapes that its code gives."""

from itertools import pairwise

import pytest
import torch
from omegaconf import OmegaConf
from oracles.conditioned import BLOCKS, LAYERS, network

from medssl.config import compose
from medssl.methods.build import method_along
from medssl.models.conditioned import ConditionedEncoder
from medssl.models.heads import MLPHead
from medssl.models.reoriented import Reoriented
from medssl.models.segmenter import build_segmenter
from medssl.training.parent import Parent
from medssl.weights import card_of, encoder_recipe, load_encoder, load_parts, save_weights

WIDTHS, REP_DIM, EXPERTS = (2, 3, 4, 5, 6, 7), 8, 3


def published_shapes(widths=WIDTHS, rep_dim=REP_DIM, experts=EXPERTS):
    """Names and shapes of one network: 13 convolutions with routers, 13 norms, an MLP."""
    first, second, *blocks, last = widths
    outputs = [first, second, *(width for width in blocks for _ in range(3)), last, rep_dim]
    shapes = {}
    for (conv, norm, _), (before, width) in zip(LAYERS, pairwise([1, *outputs]), strict=True):
        shapes |= {f"{conv}.weight": (experts, width, before, 3, 3, 3), f"{conv}.bias": (width,)}
        shapes |= {f"{conv}._routing_fn.fc.weight": (experts, 3), f"{conv}._routing_fn.fc.bias": (experts,)}
        shapes |= {f"{norm}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    for layer in ("fc.0", "fc.2"):
        shapes |= {f"{layer}.weight": (rep_dim, rep_dim), f"{layer}.bias": (rep_dim,)}
    return shapes


def network_state(prefix="", *, seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in published_shapes(**sizes).items():
        state[prefix + name] = torch.rand(shape, generator=generator) - 0.5
        if name.endswith(("running_var", "bn1.weight")):
            state[prefix + name] += 1
        if name.endswith("num_batches_tracked"):
            state[prefix + name] = torch.tensor(7)
    return state


def training_state(**sizes):
    state = {"module.queue": torch.rand(REP_DIM, 4, 5), "module.queue_ptr": torch.zeros(5, dtype=torch.int64)}
    state |= network_state("module.encoder_q.", **sizes)
    return state | network_state("module.encoder_k.", seed=1, **sizes)


@pytest.fixture
def training_file(tmp_path):
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}
    checkpoint = {"epoch": 20, "arch": "custom", "state_dict": training_state(), "optimizer": optimizer}
    torch.save(checkpoint, path := tmp_path / "checkpoint_DrasCLR_COPDGene.pth.tar")
    return path


def ours(state):
    return {key.replace("._routing_fn.fc.", ".router."): tensor for key, tensor in state.items()}


@pytest.mark.parity
def test_the_published_network_has_244_tensors_of_the_known_shapes():
    shapes = published_shapes((8, 8, 16, 32, 64, 128), 128, 8)
    assert 2 * len(shapes) + 2 == 244
    assert shapes["conv4.weight"] == (8, 128, 128, 3, 3, 3)
    assert shapes["downsample2.conv1.weight"] == (8, 32, 16, 3, 3, 3)
    with torch.device("meta"):
        parts = {**ConditionedEncoder().state_dict(), **MLPHead().state_dict()}
    assert {name: tuple(tensor.shape) for name, tensor in parts.items()} == ours(shapes)
    assert BLOCKS == ("downsample1", "downsample2", "downsample3")


@pytest.mark.parity
@pytest.mark.parametrize(("branch", "seed"), [("student", 0), ("teacher", 1)])
def test_a_training_file_loads_whole_and_sees_superior_anterior_left(training_file, branch, seed):
    encoder = load_encoder(training_file, layout="drasclr", branch=branch)
    assert isinstance(encoder, Reoriented)
    assert encoder.axes == "SAL", "arrays (z, y, x) whose indices grow to the left, the front and upwards"
    assert encoder.takes_coordinate
    assert not encoder.training
    image, place = torch.randn(2, 1, 16, 16, 32), torch.rand(2, 3) * 2 - 1
    state = {key: tensor.double() for key, tensor in ours(network_state(seed=seed)).items()}
    own = image.flip(2).permute(0, 1, 4, 3, 2).double()
    left = torch.tensor([-1.0, 1, 1])  # where our coordinate grows to the right
    expected = network(state, own, (place * left).double(), training=False)[-1][:, :, 0, 0, 0]
    features = encoder.represent(image, place)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parity
def test_a_run_that_starts_from_a_training_file_reads_superior_anterior_left_too(training_file):
    sizes = [f"method.encoder.widths={list(WIDTHS)}", f"method.encoder.num_experts={EXPERTS}"]
    sizes += [f"method.encoder.rep_dim={REP_DIM}", f"method.head.out_dim={REP_DIM}"]
    config = compose("pretrain", ["~data", "method=drasclr_tiny", *sizes])
    config.facts = {**config.facts, "num_cases": 20, "num_channels": 1, "num_locations": 27, "steps_per_round": 4.0}
    settings = OmegaConf.to_container(config, resolve=True)["method"]
    weights = {"path": str(training_file), "layout": "drasclr", "branch": "student", "parts": ["encoder"]}
    parent = Parent.of(weights)
    method, _ = method_along(settings, parent.axes, seed=0)
    parent.load(method)
    image, place = torch.randn(2, 1, 16, 16, 32), torch.rand(2, 3) * 2 - 1
    expected = load_encoder(training_file, layout="drasclr").represent(image, place)
    torch.testing.assert_close(method.encoder.eval().represent(image, place), expected)


@pytest.mark.parity
def test_features_of_all_locations_in_chunks_are_those_of_one_call(training_file):
    encoder = load_encoder(training_file, layout="drasclr")
    patches, places = torch.randn(37, 1, 16, 16, 16), torch.rand(37, 3) * 2 - 1
    with torch.no_grad():
        chunks = [encoder.represent(patches[n : n + 8], places[n : n + 8]) for n in range(0, 37, 8)]
        whole = encoder.represent(patches, places)
    assert whole.shape == (37, REP_DIM)
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-5, atol=1e-6)


def test_sizes_are_read_off_the_tensors(training_file):
    recipe = encoder_recipe(training_file, layout="drasclr")
    assert recipe == {
        "_target_": "medssl.models.reoriented.Reoriented",
        "net": {
            "_target_": "medssl.models.conditioned.ConditionedEncoder",
            **{"in_channels": 1, "widths": list(WIDTHS), "rep_dim": REP_DIM, "num_experts": EXPERTS},
        },
        "axes": "SAL",
    }
    card = card_of(training_file, layout="drasclr")
    assert (card["method"], card["transfers"]) == ("drasclr", ["encoder"])


def test_the_head_is_a_part_of_its_own(training_file):
    head = MLPHead(in_dim=REP_DIM, hidden_dim=REP_DIM, out_dim=REP_DIM)
    (report,) = load_parts(training_file, {"head": head}, layout="drasclr")
    assert len(report.matched) == 4
    assert torch.equal(head.fc[2].weight, network_state()["fc.2.weight"])


@pytest.mark.parametrize("place", [None, "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_extracted_network_loads_without_head(tmp_path, place, prefix):
    state = {key: tensor for key, tensor in network_state(prefix).items() if not key.startswith(f"{prefix}fc.")}
    torch.save({place: state} if place else state, path := tmp_path / "encoder.pth")
    (report,) = load_parts(
        path,
        {"encoder": ConditionedEncoder(widths=WIDTHS, rep_dim=REP_DIM, num_experts=EXPERTS)},
        layout="drasclr",
    )
    assert len(report.matched) == 117
    with pytest.raises(ValueError, match="holds no momentum encoder"):
        load_encoder(path, layout="drasclr", branch="teacher")


def test_a_segmenter_starts_from_it_without_the_last_convolution(training_file):
    segmenter, _ = build_segmenter(encoder_recipe(training_file, layout="drasclr"), None, num_classes=2, in_channels=1)
    (report,) = load_parts(training_file, {"encoder": segmenter.encoder}, layout="drasclr")
    assert len(report.matched) == 117 - 9
    assert len(report.left_out) == 9
    place = torch.rand(1, 3, 16, 16, 32) * 2 - 1
    assert segmenter.eval()(torch.randn(1, 1, 16, 16, 32), place).isfinite().all()


def test_a_file_with_more_or_less_does_not_load(tmp_path):
    state = training_state()
    torch.save({"state_dict": {**state, "module.decoder.weight": torch.zeros(2)}}, more := tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"nothing was loaded. encoder: .*1 unexpected \(decoder.weight"):
        load_encoder(more, layout="drasclr")
    del state["module.encoder_q.downsample1.bn2.running_var"]
    torch.save({"state_dict": state}, less := tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"1 missing \(downsample1.bn2.running_var"):
        load_encoder(less, layout="drasclr")


def test_a_file_without_a_kernel_or_with_other_routers_is_refused(tmp_path):
    state = training_state()
    del state["module.encoder_q.downsample3.conv1.weight"]
    torch.save({"state_dict": state}, path := tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"lacks kernels of downsample3\.conv1"):
        load_encoder(path, layout="drasclr")
    state = training_state()
    state["module.encoder_q.conv1._routing_fn.fc.weight"] = torch.zeros(EXPERTS, 6)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="read 6 numbers instead of one coordinate"):
        load_encoder(path, layout="drasclr")


@pytest.mark.parametrize(
    ("content", "branch", "message"),
    [
        ({"state_dict": {"fc.0.weight": torch.zeros(2)}}, "student", "no encoder of the layout `drasclr`; its first"),
        ({"conv1.weight": torch.zeros(8, 1, 3, 3, 3)}, "student", "it may be a file of Context-Aware SSL"),
        ([1, 2], "student", "no encoder of the layout `drasclr`; its first entries are list"),
        ({}, "momentum", "branch is 'momentum', allowed are student, teacher"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, branch, message):
    torch.save(content, path := tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_encoder(path, layout="drasclr", branch=branch)


def test_an_encoder_of_ours_comes_back_as_it_was(tmp_path):
    sizes = {"widths": list(WIDTHS), "rep_dim": REP_DIM, "num_experts": EXPERTS}
    encoder = ConditionedEncoder(**sizes)
    card = {"encoder": {"_target_": "medssl.models.conditioned.ConditionedEncoder", **sizes}}
    save_weights(path := tmp_path / "encoder.safetensors", {"encoder": encoder}, card)
    image, place = torch.randn(2, 1, 16, 16, 16), torch.rand(2, 3)
    assert torch.equal(load_encoder(path).represent(image, place), encoder.eval().represent(image, place))
