import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from medssl.models.unet import InstanceNorm, UNetDecoder, UNetEncoder, halvings


def num_weights(network):
    return sum(p.numel() for p in network.parameters())


def decoder_for(encoder, **options):
    return UNetDecoder(
        in_channels=encoder.in_channels,
        encoder_channels=encoder.channels,
        encoder_strides=encoder.strides,
        **options,
    )


def test_the_default_network_has_the_counts_of_its_layers_written_out():
    with torch.device("meta"):
        encoder = UNetEncoder()
        decoder = decoder_for(encoder)
    widths = (32, 64, 128, 256, 320)

    def stage(before, width):
        return 27 * before * width + 27 * width * width + 4 * width  # two convolutions, two norms

    assert encoder.channels == widths
    assert encoder.strides == tuple((2**level,) * 3 for level in range(5))
    down = sum(stage(before, width) for before, width in itertools.pairwise((1, *widths)))
    up = sum(8 * coarse * fine + fine + stage(2 * fine, fine) for fine, coarse in itertools.pairwise(widths))
    assert (num_weights(encoder), num_weights(decoder)) == (down, up)


def test_an_encoder_is_its_layers_written_out():
    torch.manual_seed(0)
    encoder = UNetEncoder(in_channels=2, widths=[3, 4], strides=[[1, 1, 1], [2, 2, 1]], kernels=[[3, 3, 1], 3])
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    image = torch.randn(2, 2, 8, 8, 4)
    x, expected = image, []
    for level, (stride, padding) in enumerate([((1, 1, 1), (1, 1, 0)), ((2, 2, 1), (1, 1, 1))]):
        for index, step in enumerate((stride, (1, 1, 1))):
            block = encoder.stages[level][index]
            x = F.conv3d(x, block.conv.weight, stride=step, padding=padding)
            x = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
            x = x * block.norm.weight[:, None, None, None] + block.norm.bias[:, None, None, None]
            x = torch.where(x > 0, x, 0.01 * x)
        expected.append(x)
    maps = encoder(image)
    assert encoder.strides == ((1, 1, 1), (2, 2, 1))
    assert [tuple(level.shape) for level in maps] == [(2, 3, 8, 8, 4), (2, 4, 4, 4, 4)]
    for level, wanted in zip(maps, expected, strict=True):
        assert torch.allclose(level, wanted, atol=1e-5)


def test_a_decoder_joins_what_it_upsampled_with_the_skip_of_that_level():
    torch.manual_seed(0)
    decoder = UNetDecoder(in_channels=1, encoder_channels=[3, 4, 5], encoder_strides=[(1, 1, 1), (2, 2, 1), (4, 4, 2)])
    maps = [torch.randn(1, 3, 8, 8, 4), torch.randn(1, 4, 4, 4, 4), torch.randn(1, 5, 2, 2, 2)]
    middle = decoder.stages[1](torch.cat([decoder.ups[1](maps[2]), maps[1]], dim=1))
    full = decoder.stages[0](torch.cat([decoder.ups[0](middle), maps[0]], dim=1))
    decoded = decoder(torch.randn(1, 1, 8, 8, 4), maps)
    assert [torch.equal(*pair) for pair in zip(decoded, [full, middle], strict=True)] == [True, True]
    assert (decoder.channels, decoder.strides) == ((3, 4), ((1, 1, 1), (2, 2, 1)))
    assert decoder.ups[1].stride == (2, 2, 2)
    assert decoder.ups[0].stride == (2, 2, 1)


def test_where_the_finest_map_is_coarse_the_image_gives_the_skips_above_it():
    decoder = UNetDecoder(
        in_channels=2, encoder_channels=[20, 24], encoder_strides=[(4, 4, 2), (8, 8, 4)], image_width=6
    )
    assert (decoder.channels, decoder.strides) == ((6, 12, 20), ((1, 1, 1), (2, 2, 1), (4, 4, 2)))
    image = torch.randn(1, 2, 16, 16, 8)
    decoded = decoder(image, [torch.randn(1, 20, 4, 4, 4), torch.randn(1, 24, 2, 2, 2)])
    assert [tuple(level.shape[1:]) for level in decoded] == [(6, 16, 16, 8), (12, 8, 8, 8), (20, 4, 4, 4)]
    wide = UNetDecoder(in_channels=1, encoder_channels=[4, 8], encoder_strides=[(2, 2, 2), (4, 4, 4)])
    assert wide.channels == (4, 4)  # never wider than the encoder's finest map


@pytest.mark.parametrize(
    ("stride", "steps"),
    [
        ((8, 8, 8), [(2, 2, 2)] * 3),
        ((16, 8, 1), [(2, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 1)]),
        ((1, 1, 1), []),
    ],
)
def test_a_stride_is_split_into_halvings_that_shorter_axes_join_late(stride, steps):
    assert halvings(stride) == steps
    assert tuple(math.prod(axis) for axis in zip(*steps, strict=True)) == (stride if steps else ())


def test_group_norm_on_the_cpu_is_instance_norm():
    torch.manual_seed(0)
    norm = InstanceNorm(5)
    norm.weight.data.uniform_()
    norm.bias.data.uniform_()
    x = torch.randn(2, 5, 4, 3, 2) * 3 + 1
    expected = F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    assert torch.allclose(norm(x), expected, atol=1e-6)


def test_activations_keep_their_size_through_a_deep_network():
    torch.manual_seed(0)
    encoder = UNetEncoder(widths=[8, 16, 32])
    decoder = decoder_for(encoder)
    image = torch.randn(2, 1, 16, 16, 16)
    maps = encoder(image)
    up = decoder.ups[1](maps[2])
    assert up.std().item() == pytest.approx(maps[2].square().mean().sqrt().item(), rel=0.3)
    assert decoder(image, maps)[0].std().item() == pytest.approx(0.58, abs=0.1)  # a rectified unit normal


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = UNetEncoder(widths=[4, 6], checkpoint_activations=checkpointed)
        decoder = decoder_for(encoder, checkpoint_activations=checkpointed)
        image = torch.linspace(-1, 1, 512).reshape(1, 1, 8, 8, 8).sin()
        decoder(image, encoder(image))[0].square().mean().backward()
        gradients.append([p.grad for network in (encoder, decoder) for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": [1, 2, 2]}, "there are 2 stages, strides has 3 entries"),
        ({"kernels": [3]}, "there are 2 stages, kernels has 1 entries"),
        ({"kernels": 2}, "kernels must have odd sides"),
        ({"strides": [1, [2, 2]]}, "expected one positive integer or three of them"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UNetEncoder(widths=[4, 8], **options)


def test_an_image_that_leaves_one_voxel_is_refused():
    encoder = UNetEncoder(widths=[4, 8, 8])
    with pytest.raises(ValueError, match=r"an image of \(4, 4, 4\) voxels leaves a single voxel at the coarsest stage"):
        encoder(torch.randn(2, 1, 4, 4, 4))
    assert encoder(torch.randn(2, 1, 4, 4, 8))[-1].shape == (2, 8, 1, 1, 2)


@pytest.mark.parametrize(
    ("strides", "message"),
    [
        ([(1, 1, 1)], "at least two resolutions"),
        ([(4, 4, 4), (4, 4, 4)], r"step from \(4, 4, 4\) to \(4, 4, 4\) voxels"),
        ([(4, 4, 4), (6, 8, 8)], r"step from \(4, 4, 4\) to \(6, 8, 8\) voxels"),
        ([(4, 4, 4), (8, 8, 2)], "coarser than the one before by whole factors"),
        ([(3, 3, 3), (6, 6, 6)], "cannot be undone by doubling"),
    ],
)
def test_maps_that_do_not_get_coarser_are_refused(strides, message):
    with pytest.raises(ValueError, match=message):
        UNetDecoder(in_channels=1, encoder_channels=[4] * len(strides), encoder_strides=strides)
