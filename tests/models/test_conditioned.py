"""The location-conditioned encoder against plain loops (tests/oracles/conditioned.py) and the published counts."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from oracles.conditioned import LAYERS, network
from torch import nn

from medssl.models.conditioned import ConditionalConv, ConditionedEncoder
from medssl.models.heads import MLPHead
from medssl.models.reoriented import Reoriented
from medssl.models.segmenter import build_segmenter
from medssl.models.unet import UNetDecoder

NARROW = {"widths": (2, 3, 4, 5, 6, 7), "rep_dim": 8, "num_experts": 3}
MAP_AFTER = ("conv1", "conv2", "downsample1.conv3", "downsample2.conv3", "conv3", "conv4")


def narrow(**more):
    """A narrow encoder in double precision whose gates and norms are all different."""
    torch.manual_seed(0)
    encoder = ConditionedEncoder(**{**NARROW, **more}).double()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.01)
            module.running_var.uniform_(0.001, 0.01)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return encoder


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parity
@pytest.mark.parametrize(("experts", "with_one_layer"), [(8, 8_245_760), (4, 4_132_048), (1, 1_046_764)])
def test_parameters_are_those_of_the_published_network(experts, with_one_layer):
    with torch.device("meta"):
        encoder = ConditionedEncoder(num_experts=experts)
        one_layer, head = nn.Linear(128, 128), MLPHead()
    assert count(encoder) + count(one_layer) == with_one_layer
    assert count(encoder) + count(head) == with_one_layer + 16_512
    routers = sum(count(module.router) for module in encoder.modules() if isinstance(module, ConditionalConv))
    assert routers == 52 * experts, "416 with eight"
    assert len(encoder.state_dict()) == 117, "and four of the head are the published 121"


@pytest.mark.parity
def test_one_place_has_about_a_million_numbers_of_kernels():
    with torch.device("meta"):
        encoder = ConditionedEncoder()
    convs = [module for module in encoder.modules() if isinstance(module, ConditionalConv)]
    assert len(convs) == 13
    assert sum(conv.weight[0].numel() for conv in convs) == 1_028_376


@pytest.mark.parity
def test_the_official_start_takes_the_experts_for_output_channels():
    torch.manual_seed(0)
    encoder = ConditionedEncoder()
    for conv in (module for module in encoder.modules() if isinstance(module, ConditionalConv)):
        width, channels = conv.weight.shape[1:3]
        bound = (27 * channels * width) ** -0.5
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.bias.abs().max() <= bound
        assert max(conv.router.weight.abs().max(), conv.router.bias.abs().max()) <= 3**-0.5
    assert encoder.downsample2.conv1.weight.abs().max().item() == pytest.approx(0.008505, abs=1e-5)
    proper = ConditionedEncoder(init="per_expert")
    assert proper.downsample2.conv1.weight.abs().max().item() == pytest.approx((27 * 16) ** -0.5, rel=0.01)


@pytest.mark.parity
def test_kernels_of_opposite_corners_begin_alike():
    torch.manual_seed(0)
    conv = ConditionedEncoder().downsample2.conv2
    gates = conv.router(torch.tensor([[-1.0, -1, -1], [1, 1, 1]])).sigmoid()
    assert gates.min() > 0.1
    assert gates.max() < 0.9
    kernels = (gates @ conv.weight.flatten(1)).flatten(1)
    assert F.cosine_similarity(*kernels, dim=0).item() > 0.8


@pytest.mark.parity
@pytest.mark.parametrize("impl", ["auto", "grouped"])
@pytest.mark.parametrize("training", [True, False])
def test_every_map_equals_that_of_the_plain_loops(training, impl):
    encoder = narrow(impl=impl).train(training)
    state = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    torch.manual_seed(1)
    image, coordinate = (
        torch.randn(3, 1, 32, 16, 16, dtype=torch.float64),
        torch.rand(3, 3, dtype=torch.float64) * 2 - 1,
    )
    expected = dict(
        zip([conv for conv, _, _ in LAYERS], network(state, image, coordinate, training=training), strict=True)
    )
    with torch.no_grad():
        maps = encoder(image, coordinate)
    for name, level in zip(MAP_AFTER, maps, strict=True):
        torch.testing.assert_close(level, expected[name], rtol=1e-9, atol=1e-11)
    assert [tuple(level.shape[2:]) for level in maps][-2:] == [(2, 1, 1), (1, 1, 1)]


@pytest.mark.parity
def test_the_published_size_gives_the_loops_numbers_in_single_precision():
    torch.manual_seed(0)
    encoder = ConditionedEncoder()
    state = {key: tensor.double() for key, tensor in encoder.state_dict().items()}
    image, coordinate = torch.randn(2, 1, 16, 16, 16), torch.rand(2, 3) * 2 - 1
    expected = network(state, image.double(), coordinate.double(), training=True)
    maps = encoder(image, coordinate)
    # conv4 has two values a channel here: their norm is a step function
    for level, wanted in zip(maps[:-1], [expected[n] for n in (0, 1, 4, 7, 11)], strict=True):
        assert (level - wanted).abs().max() < 1e-4
    features = encoder.eval().represent(image, coordinate)
    state = {key: tensor.double() for key, tensor in encoder.state_dict().items()}
    wanted = network(state, image.double(), coordinate.double(), training=False)[-1]
    assert features.shape == (2, 128)
    assert (features - wanted[:, :, 0, 0, 0]).abs().max() < 1e-4


@pytest.mark.parametrize("impl", ["auto", "plain", "grouped", "mixture"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_the_whole_network_is_the_same_with_every_implementation(impl, dtype, tolerance):
    torch.manual_seed(1)
    image, coordinate = torch.randn(9, 1, 16, 16, 16, dtype=dtype), torch.rand(4, 3, dtype=dtype) * 2 - 1
    index, found = torch.tensor([3, 0, 0, 1, 3, 0, 1, 1, 0]), []
    for name in ("loop", impl):
        encoder = narrow(impl=name).to(dtype)
        features = encoder.represent(image, coordinate, index)
        (features**2).sum().backward()
        found.append([features, *(parameter.grad for parameter in encoder.parameters())])
    largest = max(gradient.abs().max() for gradient in found[0][1:])
    assert (found[1][0] - found[0][0]).abs().max() <= tolerance
    for ours, loops in zip(found[1][1:], found[0][1:], strict=True):
        assert (ours - loops).abs().max() <= tolerance * largest


def test_statistics_of_large_batches_stay_exact_in_single_precision():
    encoder = ConditionedEncoder(**NARROW)
    image, coordinate = torch.randn(16, 1, 32, 32, 32), torch.rand(1, 3)
    with torch.no_grad():
        maps, exact = (net(image.to(net.conv1.bias.dtype), coordinate) for net in (encoder, deepcopy(encoder).double()))
    for level, wanted in zip(maps, exact, strict=True):  # norms of channels-last maps were off by 1e-3 (torch 2.13)
        assert (level - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_samples_keep_their_order_and_their_place():
    encoder = narrow().eval()
    image, coordinate = torch.randn(6, 1, 8, 8, 8).double(), torch.rand(5, 3).double() * 2 - 1
    index = torch.tensor([4, 0, 4, 2, 0, 1])
    together, maps = encoder.represent(image, coordinate, index), encoder(image, coordinate, index)
    for n, place in enumerate(index):
        alone = encoder(image[n : n + 1], coordinate[place][None])
        torch.testing.assert_close(together[n], alone[-1][0].mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
        for level, own in zip(maps, alone, strict=True):
            torch.testing.assert_close(level[n], own[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(encoder.represent(image, coordinate[index]), together, rtol=1e-9, atol=1e-12)


def test_chunks_of_samples_give_what_all_of_them_give():
    encoder = narrow().eval()
    image, coordinate = torch.randn(11, 1, 8, 8, 8).double(), torch.rand(11, 3).double() * 2 - 1
    parts = [encoder.represent(image[n : n + 4], coordinate[n : n + 4]) for n in range(0, 11, 4)]
    torch.testing.assert_close(torch.cat(parts), encoder.represent(image, coordinate), rtol=1e-9, atol=1e-12)


def test_another_place_gives_another_representation():
    encoder = narrow().eval()
    image = torch.randn(1, 1, 8, 8, 8).double()
    here, there, middle, unsaid = (
        encoder.represent(image, place)
        for place in (*(torch.tensor([[x, 0.2, -0.3]]) for x in (-1.0, 1.0)), torch.zeros(1, 3), None)
    )
    assert (here - there).abs().max() > 1e-3
    assert torch.equal(middle, unsaid)


@pytest.mark.parity
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_one_coordinate_at_every_voxel_is_one_coordinate_for_the_crop(dtype, tolerance):
    torch.manual_seed(0)
    encoder = ConditionedEncoder(**NARROW).to(dtype)  # its batch norm is that of the batch
    image, place = torch.randn(2, 1, 33, 24, 17, dtype=dtype), torch.rand(2, 3, dtype=dtype) * 2 - 1
    spread = place[:, :, None, None, None].expand(-1, -1, *image.shape[2:])
    for by_voxel, by_crop in zip(encoder(image, spread), encoder(image, place), strict=True):
        assert (by_voxel - by_crop).abs().max() <= tolerance * by_crop.abs().max()
    assert (encoder.represent(image, spread) - encoder.represent(image, place)).abs().max() <= tolerance


def test_a_voxel_is_filtered_for_the_place_it_is_centred_on():
    encoder = narrow().eval()
    image = torch.randn(1, 1, 16, 16, 16).double()
    place = torch.rand(1, 3, 16, 16, 16).double() * 2 - 1
    with torch.no_grad():
        maps = encoder(image, place)
        halves = encoder.conv2(maps[0], encoder._places(image, place, None), gates=None, impl="auto")
        for at in ((0, 0, 0), (3, 5, 7)):
            there = place[0, :, 2 * at[0], 2 * at[1], 2 * at[2]]
            gates = encoder.conv2.router(there).sigmoid()
            kernel = torch.einsum("e,eocijk->ocijk", gates, encoder.conv2.weight)
            expected = F.conv3d(maps[0], kernel, encoder.conv2.bias, 2, 1)
            torch.testing.assert_close(halves[0, :, *at], expected[0, :, *at], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [False, True])
def test_gradient_reaches_every_router_and_expert(spread):
    encoder = narrow()
    coordinate = torch.rand(2, 3).double() * 2 - 1
    if spread:
        coordinate = coordinate[:, :, None, None, None] * torch.linspace(0.2, 1, 16)[:, None, None].expand(16, 16, 16)
    # three voxels a channel at the end: batch norm turns two values into signs, which have no gradient
    features = encoder(torch.randn(2, 1, 16, 16, 16).double(), coordinate)
    sum((level**2 * torch.randn_like(level)).sum() for level in features[:-1]).backward()
    for name, module in encoder.named_modules():
        if isinstance(module, ConditionalConv) and name != "conv4":
            assert module.weight.grad.flatten(1).abs().amax(1).min() > 0, name
            assert module.router.weight.grad.abs().amax(1).min() > 0, name
            assert module.router.bias.grad.abs().min() > 0, name
    encoder.zero_grad()
    torch.manual_seed(0)
    encoder.eval().represent(torch.randn(2, 1, 16, 16, 16).double(), coordinate).square().sum().backward()
    assert encoder.conv4.weight.grad.flatten(1).abs().amax(1).min() > 0
    assert encoder.conv4.router.weight.grad.abs().amax(1).min() > 0


def test_one_expert_with_open_gates_is_a_plain_network():
    encoder = narrow(num_experts=1).eval()
    for module in encoder.modules():
        if isinstance(module, ConditionalConv):
            nn.init.constant_(module.router.bias, 1e4)
    image = torch.randn(2, 1, 16, 16, 16).double()
    x = image
    for conv, norm, stride in LAYERS:
        conv, norm = encoder.get_submodule(conv), encoder.get_submodule(norm)
        x = F.elu(norm(F.conv3d(x, conv.weight[0], conv.bias, stride, 1)))
    torch.testing.assert_close(encoder.represent(image, torch.rand(2, 3).double()), x[:, :, 0, 0, 0])


@pytest.mark.parity
@pytest.mark.parametrize("side", [1, 8, 16, 24, 31, 32])
def test_sides_up_to_32_end_in_one_voxel(side):
    encoder = narrow().eval()
    maps = encoder(torch.randn(1, 1, side, side, side).double(), torch.zeros(1, 3))
    assert maps[-1].shape == (1, 8, 1, 1, 1)
    assert [level.shape[2] for level in maps] == [-(-side // step) for step in (1, 2, 4, 8, 16, 32)]
    image = torch.randn(1, 1, side, side, side).double()
    assert torch.equal(encoder.represent(image), encoder(image)[-1][:, :, 0, 0, 0])


def test_larger_crops_are_averaged():
    encoder = narrow().eval()
    image = torch.randn(1, 1, 48, 48, 48).double()
    last = encoder(image)[-1]
    assert last.shape == (1, 8, 2, 2, 2)
    torch.testing.assert_close(encoder.represent(image), last.mean((2, 3, 4)))


def test_maps_say_their_width_and_stride():
    encoder = ConditionedEncoder(**NARROW)
    maps = encoder(torch.randn(2, 1, 64, 32, 32))
    assert tuple(level.shape[1] for level in maps) == encoder.channels == (2, 3, 4, 5, 7, 8)
    for level, stride in zip(maps, encoder.strides, strict=True):
        assert tuple(level.shape[2:]) == tuple(side // step for side, step in zip((64, 32, 32), stride, strict=True))
    assert encoder.takes_coordinate


@pytest.mark.parametrize(("options", "num_maps"), [({}, 5), ({"num_maps": 6}, 6)])
def test_a_segmenter_builds_on_it(options, num_maps):
    recipe = {"_target_": "medssl.models.conditioned.ConditionedEncoder", **NARROW, **options}
    segmenter, recipes = build_segmenter(recipe, None, num_classes=3, in_channels=1, deep_supervision=2)
    assert isinstance(segmenter.decoder, UNetDecoder)
    assert segmenter.decoder.channels == (2, 3, 4, 5, 7)[: num_maps - 1]
    assert segmenter.multiple_voxel == ((16,) * 3 if num_maps == 5 else (32,) * 3)
    assert recipes["encoder"] == {**recipe, "in_channels": 1, "num_maps": num_maps}
    image, place = torch.randn(2, 1, 32, 32, 32), torch.rand(2, 3, 32, 32, 32) * 2 - 1
    segmenter.outputs(image, place)[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in segmenter.encoder.parameters()), "DDP waits for all"
    assert segmenter.eval()(image, place).shape == (2, 3, 32, 32, 32)
    assert not torch.equal(segmenter(image, place), segmenter(image, -place))


def test_a_network_without_conv4_takes_the_weights_of_one_with_it():
    whole, dense = narrow(), narrow(num_maps=5)
    adapted = dense.adapt(whole.state_dict())
    assert set(whole.state_dict()) - set(adapted) == {
        key for key in whole.state_dict() if key[:6] in ("conv4.", "bn4.we", "bn4.bi", "bn4.ru", "bn4.nu")
    }
    dense.load_state_dict(adapted)
    image = torch.randn(1, 1, 16, 16, 16).double()
    for a, b in zip(dense.eval()(image), whole.eval()(image)[:-1], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"without conv4 \(num_maps=5\)"):
        dense.represent(image)


def test_equal_channels_give_what_one_channel_gave():
    one, two = narrow().eval(), narrow(in_channels=2).eval()
    two.load_state_dict(two.adapt(one.state_dict()))
    image = torch.randn(1, 1, 16, 16, 16).double()
    torch.testing.assert_close(two.represent(image.expand(-1, 2, -1, -1, -1)), one.represent(image))
    again = narrow().eval()
    again.load_state_dict(again.adapt(two.state_dict()))
    torch.testing.assert_close(again.represent(image), one.represent(image))


def test_autocast_leaves_finite_gradients():
    torch.manual_seed(0)
    encoder = ConditionedEncoder(**NARROW)
    image, place = torch.randn(4, 1, 16, 16, 16), torch.rand(4, 3) * 2 - 1
    expected = encoder(image, place)[0]
    for where in (place, place[:, :, None, None, None].expand(-1, -1, 16, 16, 16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = encoder(image, where)
        assert (maps[0].float() - expected).abs().max() < 0.1
        sum(level.float().square().sum() for level in maps).backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("coordinate", "index", "message"),
    [
        (torch.full((1, 3), 1.6), None, r"coordinates must lie in \[-1, 1\].*got 1.6 to 1.6. Voxel indices"),
        (torch.tensor([[0.0, float("nan"), 0.0]]), None, "coordinates must lie"),
        (torch.zeros(3, 3), None, r"locations of 2 samples are .*got \(3, 3\) without an index"),
        (torch.zeros(2, 4), None, r"got \(2, 4\) without"),
        (torch.zeros(3, 3), torch.tensor([0, 3]), r"one of 3 locations for each of 2 samples; got \[0, 3\]"),
        (torch.zeros(3, 3), torch.tensor([0, -1]), r"one of 3 locations"),
        (torch.zeros(2, 3, 4, 4, 4), None, r"needs the shape \(2, 3, 8, 8, 8\) and no index"),
        (torch.zeros(2, 3, 8, 8, 8), torch.tensor([0, 1]), "and an index"),
    ],
)
def test_places_that_do_not_fit_are_refused(coordinate, index, message):
    with pytest.raises(ValueError, match=message):
        ConditionedEncoder(**NARROW)(torch.randn(2, 1, 8, 8, 8), coordinate, index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8)}, r"six positive numbers, got \[8, 8\]"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"init": "torch"}, "init is 'torch', allowed are official, per_expert"),
        ({"impl": "fast"}, "impl is 'fast', allowed are auto, plain, grouped, mixture, loop"),
        ({"num_maps": 4}, "num_maps is 4; it is 6, or 5"),
    ],
)
def test_settings_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConditionedEncoder(**options)


def test_an_image_of_other_channels_is_refused():
    with pytest.raises(ValueError, match="reads 1 channels, the image has 2"):
        ConditionedEncoder(**NARROW)(torch.randn(1, 2, 8, 8, 8))


def test_a_reoriented_encoder_sees_image_and_places_along_its_own_axes():
    encoder = narrow().eval()
    wrapped = Reoriented(encoder, axes="SAL")
    assert wrapped.takes_coordinate
    image, place = torch.randn(2, 1, 16, 8, 12).double(), torch.rand(2, 3, 16, 8, 12).double() * 2 - 1
    left = torch.tensor([-1.0, 1.0, 1.0]).double()  # the encoder's x grows to the left
    turned = place * left.view(3, 1, 1, 1)
    own, own_place = (volume.flip(2).permute(0, 1, 4, 3, 2) for volume in (image, turned))
    for level, expected in zip(wrapped(image, place), encoder(own, own_place), strict=True):
        torch.testing.assert_close(level, expected.permute(0, 1, 4, 3, 2).flip(2))
    torch.testing.assert_close(wrapped.represent(image, place), encoder.represent(own, own_place))
    rows, index = torch.rand(3, 3).double(), torch.tensor([2, 0])
    torch.testing.assert_close(wrapped.represent(image, rows, index), encoder.represent(own, rows * left, index))
    assert torch.equal(wrapped(image, rows, index)[-1][:, :, 0, 0, 0], wrapped.represent(image, rows, index))
