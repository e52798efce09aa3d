import pytest
import torch
from oracles.kaf import Oracle, fill, published_shapes
from torch import nn

from medssl.layouts import kaf as layout
from medssl.models.kaf_heads import KAFHeads
from medssl.models.kaf_layer import find_tokens
from medssl.models.kaf_unet import KAFDecoder, KAFEncoder
from medssl.models.keypoint_matcher import KeypointMatcher

SMALL = {"dim": 16, "num_layers": 1, "hidden": 8, "position_widths": (8, 8)}
PUBLISHED_SMALL = {"dim": 16, "pairs": 1, "hidden": 8, "code_widths": (8, 8)}
UNUSED = 4 * (256 * 256 + 256 + 1)  # a projection and a number that no keypoint layer of the released code uses
LOCAL_HEAD = 197_888  # of an optional loss whose published weight is 0


def num_weights(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


def tiny(**options):
    torch.manual_seed(0)
    return KAFEncoder(**{"base_channels": 4, **SMALL, **options})


def points_of(size, *, count, batch=2, seed=0):
    """Distinct voxels at every level: one in a cell of 8."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.cartesian_prod(*(torch.arange(max(1, side // 8)) for side in size)).view(-1, len(size))
    limit = torch.tensor([min(8, side) for side in size])
    rows = [cells[torch.randperm(len(cells), generator=generator)[:count]] for _ in range(batch)]
    return torch.stack([8 * own + (torch.rand(own.shape, generator=generator) * limit).floor() for own in rows])


def from_published(state, **networks):
    """Networks with the weights of a published state dict, in double precision."""
    parts = layout.kaf({"net": state}, source="made up", branch="student")
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in parts.items() if key.startswith(f"{name}.")}
        network.double().load_state_dict(network.adapt(own) if hasattr(network, "adapt") else own)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("base", "pairs", "encoder", "whole", "pretraining"),
    [
        (32, 3, None, 45_403_396, None),
        (32, 6, None, 61_199_620, 53_261_221),
        (32, 8, 59_537_604, 71_730_436, 63_792_037),
        (32, 9, None, 76_995_844, 69_057_445),
        (48, 3, None, 80_482_756, None),
        (48, 6, None, 96_278_980, 73_892_037),
        (48, 8, 79_381_732, 106_809_796, 84_422_853),
        (48, 9, None, 112_075_204, 89_688_261),
    ],
)
def test_networks_of_slices_have_the_published_number_of_weights(base, pairs, encoder, whole, pretraining):
    classes = {32: 8, 48: 4}[base]
    with torch.device("meta"):
        ours = KAFEncoder(spatial_dims=2, base_channels=base, num_layers=pairs)
        decoder = KAFDecoder(in_channels=1, encoder_channels=ours.channels, encoder_strides=ours.strides)
        heads = KAFHeads(bottleneck_channels=ours.channels[-1], token_channels=ours.token_channels)
        matcher = KeypointMatcher(spatial_dims=2)
    output_layer = 2 * base * classes
    assert encoder in (None, num_weights(ours) + UNUSED)
    assert num_weights(ours, decoder) + UNUSED + output_layer == whole
    assert pretraining in (None, num_weights(ours, heads, matcher) + UNUSED + LOCAL_HEAD)
    assert num_weights(matcher) == 2_808_801
    assert num_weights(heads.fusion) == 262_400
    assert num_weights(heads.keypoint) == 197_888
    assert num_weights(ours.kaf["0"].attention[0]) == 658_176
    assert num_weights(ours.kaf["0"].position) == 110_304


@pytest.mark.parity
def test_duplicated_maps_have_the_published_number_of_weights():
    for base, classes, wanted in ((32, 8, 27_911_328), (48, 4, 62_790_768)):
        with torch.device("meta"):
            encoder = KAFEncoder(spatial_dims=2, base_channels=base, mode="duplicate")
            decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
        assert num_weights(encoder, decoder) + 2 * base * classes == wanted


def test_networks_of_volumes_have_the_measured_number_of_weights():
    measured = {}
    for base, options in (
        (32, {}),
        (16, {}),
        (16, {"dim": 128, "hidden": 32}),
        (8, {"dim": 64, "num_layers": 1, "hidden": 16, "position_widths": (16, 32, 64)}),
    ):
        with torch.device("meta"):
            encoder = KAFEncoder(base_channels=base, **options)
            decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
        measured[base, *options] = [round(num_weights(*some) / 1e6, 1) for some in ((encoder,), (encoder, decoder))]
    assert list(measured.values()) == [[81.9, 115.7], [46.1, 54.5], [20.7, 29.2], [3.5, 5.6]]


@pytest.mark.parity
def test_names_and_shapes_are_the_published_ones():
    pretraining = published_shapes(base=32, pairs=8, embed=512)
    assert len(pretraining) == 1449
    assert sum(name.startswith("encoder.") for name in pretraining) == 1324
    with torch.device("meta"):
        encoder = KAFEncoder(spatial_dims=2, base_channels=32, num_layers=8)
        heads = KAFHeads(bottleneck_channels=1024, token_channels=1024, local=True)
        decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
        networks = {"encoder": encoder, "heads": heads, "matcher": KeypointMatcher(spatial_dims=2)}
        for published, parts in (
            (pretraining, networks),
            (
                published_shapes(base=32, pairs=8, classes=8),
                {"encoder": encoder, "decoder": decoder, "head": nn.Sequential(nn.Conv2d(64, 8, 1, bias=False))},
            ),
        ):
            state = {"net": {name: torch.empty(shape) for name, shape in published.items()}}
            mapped = layout.kaf(state, source="made up", branch="student")
            ours = {f"{part}.{key}": t.shape for part, net in parts.items() for key, t in net.state_dict().items()}
            assert {name: tensor.shape for name, tensor in mapped.items()} == ours


@pytest.mark.parity
def test_maps_and_tokens_of_slices_have_the_published_shapes():
    encoder = KAFEncoder(spatial_dims=2, base_channels=8, num_layers=2)
    decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
    image = torch.randn(2, 1, 64, 64)
    output = encoder.encode(image, 64 * torch.rand(2, 10, 2) - 0.5)
    assert output.bottleneck.shape == (2, 256, 4, 4)
    skips = [(2, 16, 64, 64), (2, 32, 32, 32), (2, 64, 16, 16), (2, 128, 8, 8)]
    assert [tuple(level.shape) for level in output.skips] == skips
    assert output.tokens.shape == (2, 1024, 10)
    assert encoder.strides == ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16))
    assert [tuple(level.shape) for level in decoder(image, [*output.skips, output.bottleneck])] == skips


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
def test_the_segmentation_network_gives_what_the_written_out_one_gives(train):
    state = fill(published_shapes(base=4, classes=2, **PUBLISHED_SMALL))
    oracle = Oracle(state, train=train)
    encoder = tiny(spatial_dims=2, scatter="overwrite", bn_momentum=0.19, axis_swap=True).train(train)
    decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
    from_published(state, encoder=encoder, decoder=decoder.train(train))
    image = torch.linspace(0, 40, 2 * 32 * 48, dtype=torch.float64).sin().view(2, 1, 32, 48)
    points = torch.randint(32, (2, 10, 2), generator=torch.Generator().manual_seed(0)).float()  # some share cells
    bottleneck, skips, tokens = oracle.encode(image, list(points))
    output = encoder.encode(image, points)
    for ours, wanted in zip((*output.skips, output.bottleneck), (*skips, bottleneck), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-9, rtol=0)
    assert torch.allclose(output.tokens.mT, torch.stack(tokens), atol=1e-9, rtol=0)
    decoded = decoder(image, [*output.skips, output.bottleneck])[0]
    assert torch.allclose(decoded, oracle.decode(bottleneck, skips), atol=1e-9, rtol=0)
    kept = layout.kaf(oracle.state, source="made up", branch="student")
    for name, tensor in encoder.state_dict().items():
        assert "num_batches" in name or torch.allclose(tensor, kept[f"encoder.{name}"], atol=1e-9), name


@pytest.mark.parity
def test_heads_and_matcher_give_what_the_written_out_ones_give():
    state = fill(published_shapes(base=4, embed=6, **PUBLISHED_SMALL))
    oracle = Oracle(state, train=True)
    encoder = tiny(spatial_dims=2, bn_momentum=0.19, axis_swap=True)
    heads = KAFHeads(bottleneck_channels=128, token_channels=64, dim=16, embed_dim=6)
    matcher = KeypointMatcher(spatial_dims=2, dim=16, position_widths=(8, 8), axis_swap=True)
    from_published(state, encoder=encoder, heads=heads, matcher=matcher)
    images = torch.linspace(0, 90, 2 * 3 * 16 * 32, dtype=torch.float64).sin().view(2, 3, 1, 16, 32)
    points = [points_of((16, 32), count=count, batch=3, seed=count).double() for count in (5, 7)]
    ours, wanted = [], []
    for image, places in zip(images, points, strict=True):
        ours.append(heads(encoder.encode(image, places)))
        bottleneck, _, tokens = oracle.encode(image, list(places))
        wanted.append(oracle.heads(bottleneck, tokens))
        assert torch.allclose(ours[-1].image, wanted[-1][0], atol=1e-9, rtol=0)
        assert torch.allclose(ours[-1].keypoints, wanted[-1][1], atol=1e-9, rtol=0)
        assert torch.allclose(ours[-1].tokens.mT, torch.stack(wanted[-1][2]), atol=1e-9, rtol=0)
    valid = tuple(torch.ones(3, count, dtype=torch.bool) for count in (5, 7))
    scores = matcher(ours[0].tokens, ours[1].tokens, points=tuple(points), valid=valid, size_voxel=(16, 32))
    expected = oracle.match(wanted[0][2], wanted[1][2], [list(own) for own in points], (16, 32))
    assert torch.allclose(scores, torch.stack(expected), atol=1e-9, rtol=0)
    assert matcher.dustbin.item() == state["superglue.bin_score"].item()


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
def test_a_volume_of_one_plane_is_a_slice(train):
    flat = tiny(spatial_dims=2, base_channels=8, num_layers=2, dim=32, bn_momentum=0.19).double()
    deep = tiny(base_channels=8, num_layers=2, dim=32, bn_momentum=0.19, strides=[1, *[[2, 2, 1]] * 4]).double()
    deep.load_state_dict(deep.adapt(flat.state_dict()))
    image, points = torch.randn(2, 1, 64, 64, dtype=torch.float64), points_of((64, 64), count=20)
    below = torch.cat([points, torch.zeros(2, 20, 1)], dim=2)
    if not train:
        flat.encode(image, points)
        deep.encode(image[..., None], below)
        flat.eval()
        deep.eval()
    wanted, ours = flat.encode(image, points), deep.encode(image[..., None], below)
    assert torch.allclose(ours.tokens, wanted.tokens, atol=1e-9, rtol=0)
    for level, slice_level in zip((*ours.skips, ours.bottleneck), (*wanted.skips, wanted.bottleneck), strict=True):
        assert torch.allclose(level[..., 0], slice_level, atol=1e-9, rtol=0)


@pytest.mark.parametrize("gather", ["nearest", "trilinear"])
@pytest.mark.parametrize("token_norm", ["batch", "layer"])
def test_padding_and_order_of_keypoints_do_not_matter(gather, token_norm):
    encoder = tiny(gather=gather, token_norm=token_norm).double()
    image, generator = torch.randn(2, 1, 16, 32, 16, dtype=torch.float64), torch.Generator().manual_seed(3)
    points = 15 * torch.rand(2, 12, 3, generator=generator, dtype=torch.float64)  # many share a voxel at stride 8
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    wanted = encoder.encode(image, points, valid)
    order = torch.randperm(12, generator=generator)
    noisy = torch.where(valid[..., None], points, torch.tensor([torch.nan, 5.0, -torch.inf]))
    ours = encoder.encode(image, noisy[:, order], valid[:, order])
    for a, b in zip((*ours.skips, ours.bottleneck), (*wanted.skips, wanted.bottleneck), strict=True):
        assert torch.allclose(a, b, atol=1e-10, rtol=0)
    assert torch.allclose(ours.tokens, wanted.tokens[:, :, order], atol=1e-10, rtol=0)
    assert torch.equal(ours.valid, valid[:, order])
    assert wanted.tokens[1, :, 7:].abs().sum() == 0
    alone = encoder.eval().encode(image[1:], points[1:, :7])
    assert torch.allclose(alone.tokens, encoder.encode(image, points, valid).tokens[1:, :, :7], atol=1e-10, rtol=0)


def test_keypoints_outside_the_image_do_not_count():
    encoder, image = tiny(), torch.randn(1, 1, 16, 16, 16)
    points = torch.tensor(
        [[[3.0, 4.0, 5.0], [-1.0, 4.0, 5.0], [3.0, 15.6, 5.0], [3.0, 4.0, torch.nan], [15.4, -0.5, 0]]]
    )
    assert encoder.encode(image, points).valid.tolist() == [[True, False, False, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keypoints_that_rounding_moves_beyond_the_upper_face_do_not_count(dtype):
    below = torch.tensor([[[15.4999999999] * 3, [15.4999] * 3, [3.0] * 3]], dtype=dtype)
    output = tiny().encode(torch.randn(1, 1, 16, 16, 16), below)
    assert output.valid.tolist() == [[False, True, True]]
    thin = torch.tensor([[[3.0, 3.0, 0.49999999], [3.0, 3.0, 0.4999]]], dtype=dtype)
    assert find_tokens(thin, thin[..., 0] > 0, size_voxel=(16, 16, 1))[1].tolist() == [[False, True]]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("token_norm", ["batch", "layer"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 1), (1, 0), (0, 3)])
def test_views_with_few_or_no_keypoints_stay_finite_and_learn(mode, token_norm, counts):
    encoder = tiny(token_norm=token_norm).train(mode == "train")
    heads = KAFHeads(bottleneck_channels=128, token_channels=64, dim=16, embed_dim=6).train(mode == "train")
    matcher = KeypointMatcher(dim=16, position_widths=(8, 8), token_norm=token_norm).train(mode == "train")
    image, points = torch.randn(2, 1, 16, 16, 16), points_of((16, 16, 16), count=3)
    valid = torch.arange(3) < torch.tensor(counts)[:, None]
    output = encoder.encode(image, torch.where(valid[..., None], points, torch.nan), valid)
    embedded = heads(output)
    scores = matcher(embedded.tokens, embedded.tokens, points=(points,) * 2, valid=(valid,) * 2, size_voxel=(16,) * 3)
    assert embedded.has_keypoints.tolist() == [count > 0 for count in counts]
    assert embedded.keypoints[0].abs().sum() == 0 or counts[0] > 0
    assert scores[~(valid[:, :, None] & valid[:, None])].abs().sum() == 0
    results = (output.bottleneck, *output.skips, embedded.image, embedded.keypoints, scores)
    assert all(entry.isfinite().all() for entry in results)
    sum(entry.square().sum() for entry in results).backward()
    weights = [*encoder.parameters(), *heads.parameters(), *matcher.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in weights if p is not matcher.dustbin)
    assert all(buffer.isfinite().all() for buffer in encoder.buffers())


def test_without_keypoints_a_level_is_joined_by_the_convolution_of_zeros():
    encoder, image = tiny().eval(), torch.randn(1, 1, 16, 16, 16)
    output = encoder.encode(image, torch.zeros(1, 0, 3))
    layer = encoder.kaf["0"]
    wanted = layer.restore(torch.relu(layer.norm(layer.spread(torch.zeros(1, 16, 16, 16, 16)))))
    assert torch.allclose(output.skips[0][:, 4:], wanted, atol=1e-6)
    assert output.tokens.shape == (1, 64, 0)
    with_keypoints = encoder.encode(image, points_of((16,) * 3, count=4, batch=1))
    assert not torch.allclose(with_keypoints.skips[0], output.skips[0])
    assert not torch.allclose(with_keypoints.bottleneck, output.bottleneck)


def test_tokens_alone_teach_the_first_convolution():
    encoder = tiny()
    output = encoder.encode(torch.randn(2, 1, 16, 16, 16), points_of((16,) * 3, count=4))
    output.tokens.square().sum().backward()
    assert encoder.stages[0][0].conv.weight.grad.abs().sum() > 0
    assert all(layer.embed.weight.grad.abs().sum() > 0 for layer in encoder.kaf.values())


def test_under_autocast_maps_stay_close():
    encoder = tiny().eval()
    image, points = torch.randn(1, 1, 16, 16, 16), points_of((16,) * 3, count=4, batch=1)
    wanted = encoder.encode(image, points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = encoder.encode(image, points)
    assert torch.allclose(ours.tokens.float(), wanted.tokens, atol=0.1)
    assert torch.allclose(ours.skips[0].float(), wanted.skips[0], atol=0.1)
    sum(entry.float().sum() for entry in (ours.bottleneck, ours.tokens)).backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize(
    ("mode", "levels"), [("duplicate", (1, 1, 1, 1)), ("zero", (1, 1, 1, 1)), ("use", (0, 1, 0, 1))]
)
def test_comparisons_keep_the_widths_and_leave_keypoints_out(mode, levels):
    encoder, image = tiny(mode=mode, levels=levels), torch.randn(1, 1, 16, 16, 16)
    output = encoder.encode(image, points_of((16,) * 3, count=4, batch=1))
    assert encoder.channels == tiny().channels
    first, joined = output.skips[0].chunk(2, dim=1)
    assert torch.equal(joined, first if mode == "duplicate" else torch.zeros_like(first))
    levels_on = sum(levels) if mode == "use" else 0
    assert output.tokens.shape == (1, 16 * levels_on, 4)
    assert encoder.token_channels == 16 * levels_on
    whole = tiny().state_dict()
    encoder.load_state_dict(encoder.adapt(whole))  # strict
    if mode != "use":
        assert len(encoder(image)) == 5  # without looking for keypoints


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_both_norms_and_limited_channels_build_encoder_and_decoder(norm):
    for dims, steps in ((2, None), (3, [1, [2, 2, 1], 2, 2, 2])):
        encoder = tiny(spatial_dims=dims, norm=norm, max_channels=40, strides=steps)
        assert encoder.channels == (8, 16, 32, 40, 40)
        decoder = KAFDecoder(
            in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides, norm=norm
        )
        image = torch.randn(2, 1, *((32, 32) if dims == 2 else (16, 16, 16)))
        output = encoder.encode(image, points_of(image.shape[2:], count=3))
        decoded = decoder(image, [*output.skips, output.bottleneck])
        assert [level.shape for level in decoded] == [skip.shape for skip in output.skips]


def test_wrong_options_and_images_are_named():
    with pytest.raises(ValueError, match="mode is 'on', allowed are use, duplicate, zero"):
        KAFEncoder(mode="on")
    with pytest.raises(ValueError, match="spatial_dims is 4, allowed are 2, 3"):
        KAFEncoder(spatial_dims=4)
    with pytest.raises(ValueError, match="norm is 'group', allowed are batch, instance"):
        KAFEncoder(norm="group")
    with pytest.raises(ValueError, match="an entry for each of 5 maps"):
        KAFEncoder(strides=[2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"multiples of \(16, 16, 16\)"):
        tiny().encode(torch.zeros(1, 1, 16, 16, 20), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match=r"take medssl.models.unet.UNetDecoder"):
        KAFDecoder(in_channels=1, encoder_channels=[4, 8], encoder_strides=[[2, 2, 2], [4, 4, 4]])
    with pytest.raises(ValueError, match="matcher layers are self, cross; got across"):
        KeypointMatcher(layers=["self", "across"])


@pytest.mark.parity
def test_convolutions_start_as_the_card_says_and_the_last_bias_of_an_mlp_at_zero():
    torch.manual_seed(0)
    encoder = KAFEncoder(base_channels=8, dim=16, num_heads=2, num_layers=1, hidden=16, position_widths=(8, 16))
    decoder = KAFDecoder(in_channels=1, encoder_channels=encoder.channels, encoder_strides=encoder.strides)
    for network in (encoder, decoder):
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                fan = module.weight.shape[1] * module.weight[0, 0].numel()
                expected = (2 / (1 + 0.01**2) / fan) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.15), name
                assert module.bias.count_nonzero() == 0, name
    for layer in encoder.kaf.values():
        assert layer.position.mlp[-1].bias.count_nonzero() == 0
        assert all(message.mlp[-1].bias.count_nonzero() == 0 for message in layer.attention)
        assert layer.embed.bias.count_nonzero() > 0
