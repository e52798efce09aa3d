import pytest
import torch
import torch.nn.functional as F
from oracles.macl_network import fill, golden_images, published_shapes

from medssl.layouts import macl as layout
from medssl.models.macl_unet import MACLUNetDecoder, MACLUNetEncoder
from medssl.models.segmenter import Segmenter, build_segmenter


def num_weights(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def decoder_for(encoder, **options):
    return MACLUNetDecoder(
        in_channels=encoder.in_channels,
        encoder_channels=encoder.channels,
        encoder_strides=encoder.strides,
        **options,
    )


def tiny(**options):
    """A narrow encoder and its decoder, norms with weights of their own."""
    torch.manual_seed(0)
    encoder = MACLUNetEncoder(**{"base_channels": 4, "num_levels": 2, **options})
    decoder = decoder_for(
        encoder, norm=options.get("norm", "batch"), checkpoint_activations=encoder.checkpoint_activations
    )
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return encoder, decoder


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "encoders", "decoders", "first_two"),
    [
        ({"spatial_dims": 2}, 4_713_568, 3_049_760, 94.1),
        ({"spatial_dims": 2, "in_channels": 4}, 4_714_432, 3_049_760, 94.1),
        ({}, 14_132_896, 8_446_240, 94.1),
        ({"base_channels": 16}, 3_534_416, 2_112_400, 94.1),
        ({"num_levels": 3}, 3_514_016, 2_087_456, 95.2),
        ({"num_levels": 3, "base_channels": 8}, 220_136, 130_760, 95.2),
    ],
)
def test_networks_have_the_known_number_of_weights(options, encoders, decoders, first_two):
    with torch.device("meta"):
        encoder = MACLUNetEncoder(**options)
        decoder = decoder_for(encoder)
    assert (num_weights(encoder), num_weights(decoder)) == (encoders, decoders)
    trained = num_weights(decoder.ups[-2:], decoder.stages[-2:])
    assert round(100 * trained / decoders, 1) == first_two
    if options == {"spatial_dims": 2}:
        assert (trained, decoders - trained) == (2_869_888, 179_872)
        assert num_weights(encoder.center) == 3_539_968
        assert [num_weights(up) for up in reversed(decoder.ups)][:2] == [524_544, 131_200]
        assert [num_weights(stage) for stage in reversed(decoder.stages)][:2] == [1_771_008, 443_136]


@pytest.mark.parity
@pytest.mark.parametrize(("num_levels", "share"), [(4, 75.3), (3, 76.2)])
def test_the_first_block_holds_most_of_the_decoder(num_levels, share):
    with torch.device("meta"):
        decoder = decoder_for(MACLUNetEncoder(num_levels=num_levels))
    assert round(100 * num_weights(decoder.ups[-1:], decoder.stages[-1:]) / num_weights(decoder), 1) == share


@pytest.mark.parity
def test_maps_of_slices_are_those_of_the_published_network():
    parts = layout.macl({"net": fill(published_shapes(base=4, proj_dim=4))}, source="made up", branch="student")
    encoder = MACLUNetEncoder(spatial_dims=2, base_channels=4).double()
    decoder = decoder_for(encoder).double()
    for name, network in (("encoder", encoder), ("decoder", decoder)):
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in parts.items() if key.startswith(f"{name}.")}
        network.load_state_dict(own)  # strict
    auxiliary, dominant, *_ = golden_images()
    small = F.interpolate(dominant, scale_factor=0.25, mode="bilinear", align_corners=True)
    features = encoder(small)
    decoded, coarsest = decoder(small, features, num_blocks=2)
    recorded = [
        (encoder(auxiliary)[-1], (4, 64, 8, 8), 0.107365, 0.151868),
        (features[-1], (4, 64, 2, 2), 0.033108, 0.056777),
        (decoded, (4, 16, 8, 8), 0.394556, 0.586683),
    ]
    for ours, shape, mean, std in recorded:
        assert ours.shape == shape
        assert ours.mean().item() == pytest.approx(mean, abs=1e-6)
        assert ours.std().item() == pytest.approx(std, abs=1e-6)
    assert coarsest.shape == (4, 32, 4, 4)
    assert [stage[0].norm.num_batches_tracked.item() for stage in encoder.stages] == [2] * 4
    assert [stage[0].norm.num_batches_tracked.item() for stage in decoder.stages] == [0, 0, 1, 1]


def test_maps_are_finest_first_and_described():
    encoder, decoder = tiny(num_levels=3, strides=[1, [2, 2, 1], 2, 2])
    assert encoder.channels == (4, 8, 16, 32)
    assert encoder.strides == ((1, 1, 1), (2, 2, 1), (4, 4, 2), (8, 8, 4))
    maps = encoder(torch.randn(2, 1, 16, 8, 8))
    assert [tuple(level.shape[1:]) for level in maps] == [(4, 16, 8, 8), (8, 8, 4, 8), (16, 4, 2, 4), (32, 2, 1, 2)]
    assert (maps[-1] >= 0).all()
    assert (decoder.channels, decoder.strides) == (encoder.channels[:-1], encoder.strides[:-1])
    decoded = decoder(torch.randn(2, 1, 16, 8, 8), maps)
    assert [level.shape for level in decoded] == [level.shape for level in maps[:-1]]


def test_weights_are_drawn_as_for_leaky_rectifiers_and_biases_are_zero():
    torch.manual_seed(0)
    encoder = MACLUNetEncoder(base_channels=16, num_levels=2)
    decoder = decoder_for(encoder)
    gain = (2 / (1 + 0.01**2)) ** 0.5
    for layer, fan in (
        (encoder.stages[1][0].conv, 16 * 27),
        (encoder.center[2], 64 * 27),
        (decoder.stages[0][0].conv, 32 * 27),
        (decoder.ups[1], 32 * 8),  # output channels and taps
    ):
        assert layer.weight.std().item() == pytest.approx(gain / fan**0.5, rel=0.03)
        assert layer.bias.abs().sum() == 0


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
@pytest.mark.parametrize("dims", [2, 3])
def test_all_norms_run_and_learn(norm, dims):
    encoder, decoder = tiny(spatial_dims=dims, norm=norm)
    image = torch.randn(2, 1, *[8] * dims)
    decoded = decoder(image, encoder(image))
    decoded[0].square().mean().backward()
    assert decoded[0].shape == (2, 4, *[8] * dims)
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert encoder.stages[0][0].conv.weight.grad.abs().sum() > 0


def test_recomputed_activations_change_neither_gradients_nor_statistics():
    results = []
    for checkpointed in (False, True):
        encoder, decoder = tiny(checkpoint_activations=checkpointed)
        image = torch.linspace(-1, 1, 1024).view(2, 1, 8, 8, 8).sin()
        decoder(image, encoder(image))[0].square().mean().backward()
        gradients = [p.grad for network in (encoder, decoder) for p in network.parameters()]
        results.append([*gradients, *encoder.buffers(), *decoder.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert encoder.stages[0][0].norm.num_batches_tracked.item() == 1
    assert encoder.stages[0][0].norm.momentum == 0.1


def inflated_pair(**options):
    """Networks of slices, and of volumes with their weights, in evaluation mode with statistics of their own."""
    flat, deep = tiny(spatial_dims=2), tiny(**options)
    for _ in range(3):
        image = torch.randn(4, 1, 16, 16)
        flat[1](image, flat[0](image))
    for source, target in zip(flat, deep, strict=True):
        target.load_state_dict(target.adapt(source.state_dict()))
    return *(network.eval() for network in flat), *(network.eval() for network in deep)


def test_inflated_networks_see_equal_planes_as_that_slice():
    encoder, decoder, deep_encoder, deep_decoder = inflated_pair()
    image = torch.randn(2, 1, 16, 16)
    volume = image[..., None].expand(-1, -1, -1, -1, 8)
    maps, deep_maps = encoder(image), deep_encoder(volume)
    wanted = [*maps, *decoder(image, maps)]
    ours = [*deep_maps, *deep_decoder(volume, deep_maps)]
    for deep, flat in zip(ours, wanted, strict=True):
        assert torch.allclose(deep, flat[..., None].expand_as(deep), atol=1e-5)
    kernel = deep_encoder.stages[0][0].conv.weight
    assert torch.equal(kernel[..., 1], encoder.stages[0][0].conv.weight)
    assert kernel[..., [0, 2]].abs().sum() == 0
    for plane in deep_decoder.ups[1].weight.unbind(-1):
        assert torch.equal(plane, decoder.ups[1].weight)


def test_inflated_networks_that_never_step_along_the_last_axis_see_each_plane_as_a_slice():
    encoder, decoder, deep_encoder, deep_decoder = inflated_pair(strides=[1, [2, 2, 1], [2, 2, 1]])
    volume = torch.randn(2, 1, 16, 16, 3)
    ours = deep_decoder(volume, deep_encoder(volume))[0]
    for plane in range(3):
        image = volume[..., plane]
        assert torch.allclose(ours[..., plane], decoder(image, encoder(image))[0], atol=1e-5)


def test_a_network_of_slices_takes_other_channels_as_they_are_and_kernels_of_volumes_not_at_all():
    encoder, _ = tiny(spatial_dims=2)
    wide, _ = tiny(spatial_dims=2, in_channels=4)
    wide.load_state_dict(wide.adapt(encoder.state_dict()))
    image = torch.randn(1, 1, 8, 8)
    assert torch.allclose(wide.eval()(image.expand(-1, 4, -1, -1))[-1], encoder.eval()(image)[-1], atol=1e-5)
    narrow, _ = tiny(spatial_dims=2)
    narrow.load_state_dict(narrow.adapt(wide.state_dict()))  # weights of four channels are summed
    assert torch.allclose(narrow.eval()(image)[-1], encoder(image)[-1], atol=1e-5)
    deep, _ = tiny()
    assert encoder.adapt(deep.state_dict())["center.0.weight"].ndim == 5  # left to the comparison of shapes


@pytest.mark.parity
def test_a_segmenter_of_slices_takes_all_tensors_but_those_of_its_head():
    recipe = {"_target_": "medssl.models.macl_unet.MACLUNetEncoder", "spatial_dims": 2, "base_channels": 4}
    network, recipes = build_segmenter(recipe, None, num_classes=4, in_channels=1, deep_supervision=1)
    assert recipes["decoder"]["_target_"] == "medssl.models.macl_unet.MACLUNetDecoder"
    names = list(network.state_dict())
    assert sum(not name.startswith("head.") for name in names) == 124
    assert network.multiple_voxel == (16, 16)
    logits = network.outputs(torch.randn(2, 1, 32, 48))
    assert [tuple(level.shape) for level in logits] == [(2, 4, 32, 48), (2, 4, 16, 24)]
    with torch.device("meta"):
        encoder = MACLUNetEncoder(spatial_dims=2)
        whole = Segmenter(encoder, decoder_for(encoder), 4)
    assert num_weights(whole) - 4 == 7_763_456  # ours has a bias for each class


def test_what_does_not_fit_is_named():
    encoder, _ = tiny()
    with pytest.raises(ValueError, match=r"image of \(8, 8, 6\) voxels does not fit; sides must be multiples of \(4,"):
        encoder(torch.zeros(1, 1, 8, 8, 6))
    with pytest.raises(ValueError, match="does not fit"):
        encoder(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="spatial_dims is 1, allowed are 2, 3"):
        MACLUNetEncoder(spatial_dims=1)
    with pytest.raises(ValueError, match="num_levels is 0"):
        MACLUNetEncoder(num_levels=0)
    with pytest.raises(ValueError, match="norm is 'layer', allowed are batch, instance, group"):
        MACLUNetEncoder(norm="layer")
    with pytest.raises(ValueError, match="an entry for each of 3 maps"):
        tiny(strides=[1, 2])
