import pytest
import torch
import torch.nn.functional as F
from oracles.golden_fill import fill, wave

from medssl.models.sam_resnet import SamResNet


@pytest.mark.parity
@pytest.mark.parametrize(
    ("base_channels", "emb_dim", "count"),
    [
        (64, 128, 32_832_960),
        (32, 128, 8_907_872),
        (16, 64, 2_229_552),
        (8, 128, 1_400_216),
        (8, 64, 728_600),
        (8, 32, 558_680),
    ],
)
def test_every_size_has_the_parameters_of_the_card(base_channels, emb_dim, count):
    with torch.device("meta"):
        network = SamResNet(base_channels=base_channels, emb_dim=emb_dim)
    assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parity
def test_the_published_parts_have_the_parameters_of_the_card():
    with torch.device("meta"):
        network = SamResNet()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    assert counts == {"backbone": 31_824_576, "neck": 500_224, "read_out_head": 508_160}


@pytest.mark.parity
def test_the_features_are_those_of_the_published_network():
    network = fill(SamResNet(base_channels=8, emb_dim=32)).eval()
    fine, coarse = network(100 * wave((1, 1, 16, 32, 32), 0.001))
    assert fine.shape == (1, 32, 8, 16, 16)
    assert coarse.shape == (1, 32, 4, 2, 2)
    for found, expected in ((fine, (974.05123, 10053.61696, -0.252616)), (coarse, (-3.35180, 81.27415, 0.214041))):
        assert found.sum().item() == pytest.approx(expected[0], rel=1e-4)
        assert found.abs().sum().item() == pytest.approx(expected[1], rel=1e-4)
        assert found.flatten()[0].item() == pytest.approx(expected[2], rel=1e-4)


@pytest.mark.parity
def test_a_patch_and_an_odd_size_give_the_grids_of_the_card():
    with torch.device("meta"):
        network = SamResNet()
        for size, fine, coarse in (
            ((32, 96, 96), (16, 48, 48), (8, 6, 6)),
            ((33, 97, 101), (16, 49, 51), (8, 7, 7)),
        ):
            maps = network(torch.empty(1, 1, *size))
            assert [level.shape for level in maps] == [(1, 128, *fine), (1, 128, *coarse)]


def expected_keys():
    """Names and shapes of the published file, written out from its table."""
    shapes = {}

    def norm(name, width):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{kind}"] = (width,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def conv(name, out, into, *kernel):
        shapes[f"backbone.{name}.conv.weight"] = (out, into, *kernel)
        norm(f"backbone.{name}", out)

    conv("conv1", 64, 1, 3, 7, 7)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        depth = 1 if stage < 3 else 3
        conv(f"layer{stage}.0.conv1", width, before, depth, 3, 3)
        conv(f"layer{stage}.0.conv2", width, width, depth, 3, 3)
        conv(f"layer{stage}.0.downsample", width, before, 1, 1, 1)
        conv(f"layer{stage}.1.conv1", width, width, depth, 3, 3)
        conv(f"layer{stage}.1.conv2", width, width, depth, 3, 3)
        before = width
    laterals = {"neck": (64, 128, 256), "read_out_head": (512,)}
    for neck, widths in laterals.items():
        for number, width in enumerate(widths):
            shapes[f"{neck}.lateral_convs.{number}.conv.weight"] = (128, width, 1, 1, 1)
            shapes[f"{neck}.lateral_convs.{number}.conv.bias"] = (128,)
        shapes[f"{neck}.fpn_convs.0.conv.weight"] = (128, 128, 3, 3, 3)
        shapes[f"{neck}.fpn_convs.0.conv.bias"] = (128,)
    return shapes


@pytest.mark.parity
def test_names_and_shapes_are_those_of_the_published_file():
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in SamResNet().state_dict().items()}
    assert found == expected_keys()


def test_every_vector_has_length_one_also_in_bfloat16():
    network = SamResNet(base_channels=4, emb_dim=8).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = network(torch.randn(2, 1, 8, 32, 32))
    for level in maps:
        assert level.dtype == torch.float32
        assert torch.allclose(level.norm(dim=1), torch.ones(()), atol=1e-5)


def test_the_coarse_map_does_not_reach_the_fine_one():
    network = SamResNet(base_channels=4, emb_dim=8).eval()
    image = torch.randn(1, 1, 4, 32, 32)
    fine, coarse = network(image)
    with torch.no_grad():
        for parameter in network.backbone.layer4.parameters():
            parameter += torch.randn(parameter.shape)
    changed, other = network(image)
    assert torch.equal(fine, changed)
    assert not torch.allclose(coarse, other)


def test_the_fine_neck_adds_the_coarser_laterals_repeated():
    network = SamResNet(base_channels=4, emb_dim=8).eval()
    maps = [torch.randn(1, 4 * 2**level, 2, 7 // 2**level + 1, 8 // 2**level) for level in range(3)]
    total = 0
    for level, lateral in zip(maps, network.neck.lateral_convs, strict=True):
        values = torch.einsum("oc,nczyx->nozyx", lateral.conv.weight[..., 0, 0, 0], level)
        values = values + lateral.conv.bias[:, None, None, None]
        rows, columns = ([int(k * values.shape[a] / maps[0].shape[a]) for k in range(maps[0].shape[a])] for a in (3, 4))
        total = total + values[:, :, :, rows][..., columns]
    last = network.neck.fpn_convs[0].conv
    assert torch.allclose(network.neck(maps), F.conv3d(total, last.weight, last.bias, padding=1), atol=1e-5)


def test_every_weight_learns():
    network = SamResNet(base_channels=4, emb_dim=8)
    fine, coarse = network(torch.randn(2, 1, 4, 32, 32))
    (fine[:, 0].sum() + coarse[:, 1].sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_single_slice_is_refused():
    with pytest.raises(ValueError, match="needs two slices or more, got 1"):
        SamResNet(base_channels=4, emb_dim=8)(torch.randn(1, 1, 1, 32, 32))


def test_a_stem_of_another_number_of_channels_is_fitted():
    one, two = (SamResNet(base_channels=4, emb_dim=8, in_channels=n).eval() for n in (1, 2))
    two.load_state_dict(two.adapt(one.state_dict()))
    image = torch.randn(1, 1, 4, 16, 16)
    assert torch.allclose(two(image.expand(-1, 2, -1, -1, -1))[0], one(image)[0], atol=1e-5)
