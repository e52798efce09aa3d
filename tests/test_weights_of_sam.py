"""Published SAM files: the layout is known, no file is at hand, so one is made up from its table of names."""

import pytest
import torch

from medssl.models.reoriented import Reoriented
from medssl.models.sam_resnet import Pyramid, SamResNet
from medssl.weights import load_encoder, load_parts, save_weights


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = SamResNet(base_channels=4, emb_dim=8).eval()
    network(torch.randn(1, 1, 4, 16, 16))
    return network


def write(path, network, *, place="state_dict", prefix="", **more):
    """A file as the training framework of the authors writes it."""
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    state |= {f"{prefix}{name}": tensor for name, tensor in more.items()}
    meta = {"epoch": 3, "iter": 20000, "config": "model = dict(type='Sam')"}
    torch.save({place: state, "meta": meta} if place else state, path)
    return path


@pytest.mark.parity
@pytest.mark.parametrize("place", ["state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_file_loads_whole_and_sees_left_posterior_superior(network, tmp_path, place, prefix):
    encoder = load_encoder(write(tmp_path / "SAM.pth", network, place=place, prefix=prefix), layout="sam")
    assert isinstance(encoder, Reoriented)
    assert encoder.axes == "SPL"
    assert encoder.channels == (8, 8)
    assert encoder.strides == ((2, 2, 2), (16, 16, 4))
    image = torch.randn(1, 1, 32, 48, 8)  # x, y, z to right, front, top
    own = image.flip(2, 3).permute(0, 1, 4, 3, 2)
    for level, expected in zip(encoder(image), network(own), strict=True):
        assert torch.equal(level, expected.permute(0, 1, 4, 3, 2).flip(2, 3))


@pytest.mark.parity
def test_the_organ_branch_of_later_files_is_left_out(network, tmp_path):
    branch = {f"semantic_head.{name}": tensor for name, tensor in Pyramid((4, 8, 16), 8).state_dict().items()}
    (report,) = load_parts(
        write(tmp_path / "SAMv2.pth", network, **branch),
        {"encoder": SamResNet(base_channels=4, emb_dim=8)},
        layout="sam",
    )
    assert len(report.matched) == len(network.state_dict())
    assert not report.left_out


def test_a_file_with_more_or_less_does_not_load(network, tmp_path):
    more = write(tmp_path / "more.pth", network, **{"decode_head.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"does not fit; nothing was loaded. encoder: .*1 unexpected \(decode_head"):
        load_encoder(more, layout="sam")
    state = network.state_dict()
    del state["backbone.layer2.0.conv1.bn.running_var"]
    torch.save({"state_dict": state}, less := tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"1 missing \(backbone.layer2.0.conv1.bn.running_var"):
        load_encoder(less, layout="sam")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"state_dict": {"fc.weight": torch.zeros(2)}}, {}, "no encoder of the layout `sam`; .* are fc.weight"),
        ([1, 2], {}, "no encoder of the layout `sam`; its first entries are list"),
        ({"backbone.conv1.conv.weight": torch.zeros(4, 1, 3, 7, 7)}, {}, "without the fine neck"),
        ({}, {"branch": "teacher"}, "files of the layout `sam` hold one network only"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, options, message):
    torch.save(content, path := tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_encoder(path, layout="sam", **options)


def test_an_embedding_network_of_ours_comes_back_with_its_wrapper(network, tmp_path):
    path = tmp_path / "encoder.safetensors"
    recipe = {"_target_": "medssl.models.sam_resnet.SamResNet", "base_channels": 4, "emb_dim": 8}
    card = {"encoder": {"_target_": "medssl.models.reoriented.Reoriented", "net": recipe, "axes": "SPL"}}
    save_weights(path, {"encoder": Reoriented(network, axes="SPL")}, card)
    image = torch.randn(1, 1, 32, 32, 8)
    expected = Reoriented(network, axes="SPL")(image)
    assert all(torch.equal(a, b) for a, b in zip(load_encoder(path)(image), expected, strict=True))
