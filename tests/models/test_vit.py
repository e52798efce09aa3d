import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from oracles import transformer
from torch import nn

from medssl.models.vit import MaskedDecoder, VisionTransformer, resize_positions, sincos_positions
from medssl.ops.masking import random_mask

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())


def tiny(**options):
    torch.manual_seed(0)
    defaults = {"size_voxel": 12, "patch_voxel": 4, "dim": 24, "depth": 3, "num_heads": 4}
    return VisionTransformer(**{**defaults, **options})


def randomise(network):
    """Weights whose every entry matters: biases, norms and the table included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def num_weights(network, *, trained):
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


@pytest.mark.parity
def test_the_position_table_has_the_card_s_numbers():
    table = sincos_positions((6, 6, 6), 768)
    row = table[(1 * 6 + 2) * 6 + 3]
    for channel, value in GOLDEN["sincos_768_grid_6_token_1_2_3"].items():
        assert row[int(channel)].item() == pytest.approx(value, abs=1e-6)
    assert table.norm(dim=1).tolist() == pytest.approx([GOLDEN["sincos_768_grid_6_norm"]] * 216, abs=1e-6)
    assert table.sum().item() == pytest.approx(GOLDEN["sincos_768_grid_6_sum"], abs=1e-3)


@pytest.mark.parity
@pytest.mark.parametrize(("dim", "side"), [(768, 6), (768, 10), (576, 6)])
def test_the_position_table_matches_a_loop_over_channels(dim, side):
    table = sincos_positions((side,) * 3, dim)
    block = dim // 3
    for token in (0, 1, side, side**2, side**3 - 1, side**2 + 2 * side + 3):
        coordinates = (token // side**2, token // side % side, token % side)
        for channel in range(dim):
            axis, inner = divmod(channel, block)
            kind, i = divmod(inner, block // 2)
            angle = coordinates[axis] * 10000 ** (-i / (block / 2))
            assert table[token, channel].item() == pytest.approx((math.sin, math.cos)[kind](angle), abs=1e-12)
    model = VisionTransformer(size_voxel=side, patch_voxel=1, dim=dim, depth=1, num_heads=1)
    assert model.pos_embed[0, 0].abs().max() == 0
    assert torch.equal(model.pos_embed[0, 1:], table.float())
    assert not model.pos_embed.requires_grad


@pytest.mark.parity
def test_resizing_a_table_of_coordinates_gives_the_coordinates_of_the_new_cell_centres():
    grid = torch.stack(torch.meshgrid(*(torch.arange(10.0),) * 3, indexing="ij"), dim=-1).reshape(1, -1, 3)
    table = torch.cat([torch.full((1, 1, 3), 7.0), grid], dim=1)
    resized = resize_positions(table, (10, 10, 10), (6, 6, 6))
    axis = [1 / 3, 2, 11 / 3, 16 / 3, 7, 26 / 3]
    assert torch.allclose(resized[0, 1:], torch.tensor(list(itertools.product(axis, repeat=3))), atol=1e-5)
    assert resized[0, 0].tolist() == [7, 7, 7]


@pytest.mark.parity
def test_native_and_interpolated_positions_differ_as_measured():
    native = sincos_positions((6, 6, 6), 768).float()
    home = torch.cat([torch.zeros(1, 768), sincos_positions((10, 10, 10), 768).float()])[None]
    resized = resize_positions(home, (10,) * 3, (6,) * 3)[0, 1:]
    cosine = torch.cosine_similarity(native, resized, dim=1)
    golden = GOLDEN["native_against_interpolated_10_to_6"]
    assert cosine.mean().item() == pytest.approx(golden["mean_cosine"], abs=1e-3)
    assert cosine.min().item() == pytest.approx(golden["min_cosine"], abs=1e-3)
    assert ((native - resized).norm() / native.norm()).item() == pytest.approx(golden["relative_l2"], abs=1e-3)


def test_a_non_cubic_table_is_resized_by_the_grids_that_are_stated():
    rows = torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 6)  # grid (4, 2, 1): the value is the first index
    table = torch.cat([torch.zeros(1, 6), rows])[None]
    resized = resize_positions(table, (4, 2, 1), (2, 2, 1))
    assert resized[0, 1:, 0].tolist() == [0.5, 0.5, 2.5, 2.5]
    with pytest.raises(ValueError, match=r"9 rows does not belong to the grid \(2, 2, 3\)"):
        resize_positions(table, (2, 2, 3), (2, 2, 2))


@pytest.mark.parity
@pytest.mark.parametrize("size", [96, 160])
def test_the_paper_s_encoder_has_the_card_s_parameter_counts(size):
    with torch.device("meta"):
        model = VisionTransformer(size_voxel=size)
        tokens = model.tokens(torch.empty(2, 1, size, size, size))
    golden = GOLDEN["parameters"][f"encoder_{size}"]
    assert num_weights(model, trained=False) == golden["total"]
    assert num_weights(model, trained=True) == golden["trained"]
    assert len(model.state_dict()) == GOLDEN["parameters"]["tensors_encoder"]
    assert tokens.shape == (2, 1 + (size // 16) ** 3, 768)


@pytest.mark.parity
def test_the_paper_s_decoder_has_the_card_s_parameter_counts():
    golden = GOLDEN["parameters"]
    with torch.device("meta"):
        encoder, decoder = VisionTransformer(size_voxel=96), MaskedDecoder(size_voxel=96)
        large = MaskedDecoder(size_voxel=160)
        patches = decoder(torch.empty(2, 87, 768), torch.zeros(2, 86, dtype=torch.long), grid=(6, 6, 6))
    assert num_weights(decoder, trained=True) == golden["decoder_576"]["trained"]
    assert decoder.pos_embed.numel() == golden["decoder_576"]["table_96"]
    assert large.pos_embed.numel() == golden["decoder_576"]["table_160"]
    assert len(encoder.state_dict()) + len(decoder.state_dict()) == golden["tensors_with_decoder"]
    assert patches.shape == (2, 216, 4096)
    # The published 512-wide decoder: linear in the width where the table is not, so its count follows from ours.
    width, table = 512, 217 * 512
    trained = 768 * width + 2 * width + 8 * (12 * width**2 + 13 * width) + 2 * width + width * 4096 + 4096
    assert 88369920 + trained + table == golden["full_model_512_96"]["total"]
    assert 88203264 + trained == golden["full_model_512_96"]["trained"]


@pytest.mark.parity
def test_encoder_tokens_equal_a_plain_loop():
    model = randomise(tiny(in_channels=2)).double()
    image = torch.randn(2, 2, 12, 12, 12, dtype=torch.float64)
    for sample, tokens in zip(image, model.tokens(image), strict=True):
        expected = transformer.encode(sample, model.state_dict(), patch=4, num_heads=4)
        assert torch.allclose(tokens, expected, atol=1e-10)


@pytest.mark.parity
def test_encoder_tokens_of_kept_patches_equal_a_plain_loop():
    model = randomise(tiny()).double()
    image = torch.randn(2, 1, 12, 12, 12, dtype=torch.float64)
    keep = torch.tensor([[5, 0, 26, 13], [1, 2, 3, 25]])
    for sample, places, tokens in zip(image, keep, model.tokens(image, keep), strict=True):
        expected = transformer.encode(sample, model.state_dict(), patch=4, num_heads=4, keep=places)
        assert torch.allclose(tokens, expected, atol=1e-10)


@pytest.mark.parity
def test_the_patch_embedding_equals_its_convolution():
    model = randomise(tiny(patch_voxel=(2, 4, 3), in_channels=2))
    image = torch.randn(1, 2, 12, 12, 12)
    keep = torch.arange(6 * 3 * 4)[None]
    expected = model.patch_embed.proj(image).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    assert torch.allclose(model._embed(image, keep)[:, 1:], expected, atol=1e-5)
    assert torch.allclose(model._embed(image, None)[:, 1:], expected, atol=1e-5)


@pytest.mark.parity
def test_decoder_patches_equal_a_plain_loop():
    torch.manual_seed(2)
    decoder = MaskedDecoder(encoder_dim=24, size_voxel=12, patch_voxel=4, dim=12, depth=2, num_heads=3)
    decoder = randomise(decoder).double()
    mask = random_mask(torch.rand(2, 27, dtype=torch.float64), ratio=0.6)
    tokens = torch.randn(2, 11, 24, dtype=torch.float64)
    patches = decoder(tokens, mask.keep, grid=(3, 3, 3))
    for sample, keep, prediction in zip(tokens, mask.keep, patches, strict=True):
        expected = transformer.decode(sample, decoder.state_dict(), keep=keep, num_tokens=27, num_heads=3)
        assert torch.allclose(prediction, expected, atol=1e-10)


def test_masked_voxels_do_not_enter_the_visible_tokens_but_enter_all_tokens():
    model = tiny()
    image = torch.randn(1, 1, 12, 12, 12)
    keep = torch.arange(1, 27)[None]
    changed = image.clone()
    changed[..., :4, :4, :4] += 10  # patch 0, the one removed
    assert torch.equal(model.tokens(image, keep), model.tokens(changed, keep))
    assert not torch.allclose(model.tokens(image), model.tokens(changed))


def test_permuting_samples_permutes_their_tokens():
    model = tiny()
    image, order = torch.randn(4, 1, 12, 12, 12), torch.tensor([2, 0, 3, 1])
    keep = torch.rand(4, 27).argsort(dim=1)[:, :9]
    assert torch.allclose(model.tokens(image[order], keep[order]), model.tokens(image, keep)[order], atol=1e-5)


def test_feature_maps_are_the_states_after_each_quarter_on_the_grid():
    model = tiny(depth=4)
    image = torch.randn(2, 1, 12, 8, 16)
    maps = model(image)
    assert [tuple(level.shape) for level in maps] == [(2, 24, 3, 2, 4)] * 4
    assert model.channels == (24,) * 4
    assert model.strides == ((4, 4, 4),) * 4
    state = model._embed(image, None)
    for block, level in zip(model.blocks, maps, strict=True):
        state = block(state)
        expected = state if block is not model.blocks[-1] else model.norm(state)
        assert torch.allclose(level.flatten(2).transpose(1, 2), expected[:, 1:], atol=1e-6)
    assert torch.allclose(maps[-1][0, :, 1, 0, 2], model.tokens(image)[0, 1 + (1 * 2 + 0) * 4 + 2], atol=1e-6)


def test_the_depths_of_the_feature_maps_can_be_chosen():
    assert VisionTransformer(size_voxel=16, depth=12, dim=12).feature_depths == (3, 6, 9, 12)
    model = tiny(depth=3, feature_depths=[2, 3])
    assert len(model(torch.zeros(1, 1, 12, 12, 12))) == len(model.channels) == 2
    with pytest.raises(ValueError, match=r"must lie in 1\.\.3 and end with 3"):
        tiny(depth=3, feature_depths=[1, 2])


@pytest.mark.parametrize("position", ["interpolate_from_global", "native"])
def test_positions_on_another_grid_follow_the_option(position):
    model = tiny(position=position)
    rows = model.positions((2, 3, 4))
    expected = {
        "interpolate_from_global": resize_positions(model.pos_embed, (3, 3, 3), (2, 3, 4))[0, 1:],
        "native": sincos_positions((2, 3, 4), 24).float(),
    }
    assert torch.equal(rows[1:], expected[position])
    assert torch.equal(model.positions((3, 3, 3)), model.pos_embed[0])
    assert model.tokens(torch.zeros(1, 1, 8, 12, 16)).shape == (1, 25, 24)


def test_checkpointed_activations_change_neither_tokens_nor_gradients():
    plain, light = tiny(), tiny(checkpoint_activations=True)
    image = torch.randn(1, 1, 12, 12, 12)
    gradients = []
    for model in (plain, light):
        model.tokens(image).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_weights_follow_the_masked_autoencoder():
    model = VisionTransformer(size_voxel=32, depth=1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(GOLDEN["patch_std_of_initial_weight"], abs=1e-4)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    linear = model.blocks[0].mlp.fc1
    assert linear.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (768 + 3072)), rel=1e-3)
    assert max(layer.bias.abs().max().item() for layer in model.modules() if isinstance(layer, nn.Linear)) == 0


def test_tokens_in_half_precision_stay_near_those_in_full():
    model = tiny()
    image = torch.randn(1, 1, 12, 12, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.tokens(image)
    assert tokens.float().sub(model.tokens(image)).abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "image", "message"),
    [
        ({}, (1, 1, 12, 13, 12), r"\(12, 13, 12\) voxels cannot be cut into patches.*\(12, 16, 12\)"),
        ({}, (1, 2, 12, 12, 12), "reads 1 channels, the image has 2"),
        ({"dim": 32}, None, "width divisible by 6, got 32"),
        ({"num_heads": 5}, None, "width of 24 cannot be split over 5"),
        ({"position": "learned"}, None, "position is 'learned', allowed are interpolate_from_global, native"),
        ({"size_voxel": (12, 12)}, None, "expected one positive integer or three"),
    ],
)
def test_what_does_not_fit_is_refused(options, image, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options).tokens(torch.zeros(image or (1, 1, 12, 12, 12)))


def test_a_table_that_is_no_cube_fits_no_other_grid():
    stored = tiny(size_voxel=(12, 8, 4)).state_dict()
    with pytest.raises(ValueError, match="has 7 rows, which is no cubic grid plus CLS"):
        tiny().adapt(stored)
    assert torch.equal(tiny(size_voxel=(12, 8, 4)).adapt(stored)["pos_embed"], stored["pos_embed"])


@pytest.mark.parametrize("position", ["interpolate_from_global", "native"])
def test_without_a_class_token_there_is_no_row_for_it(position):
    model = tiny(class_token=False, position=position)
    assert "cls_token" not in model.state_dict()
    assert torch.equal(model.pos_embed, tiny().pos_embed[:, 1:])
    assert torch.equal(model.positions((2, 3, 4)), tiny(position=position).positions((2, 3, 4))[1:])
    image = torch.randn(1, 1, 8, 12, 16)
    assert model.tokens(image).shape == (1, 24, 24)
    assert model.tokens(image, torch.tensor([[3, 0, 23]])).shape == (1, 3, 24)
    deepest = model.eval()(image)[-1]
    assert torch.equal(deepest.flatten(2).transpose(1, 2), model.tokens(image))


def test_a_class_token_in_a_file_is_left_out_with_its_row_where_the_network_has_none():
    stored = tiny().state_dict()
    adapted = tiny(class_token=False, size_voxel=(8, 16, 12)).adapt(stored)
    assert stored.keys() - adapted.keys() == {"cls_token"}
    assert torch.equal(adapted["pos_embed"], resize_positions(stored["pos_embed"], (3, 3, 3), (2, 4, 3))[:, 1:])
    assert stored["pos_embed"].shape == (1, 28, 24)
    again = tiny(class_token=False).adapt(tiny(class_token=False).state_dict())
    assert again.keys() == tiny(class_token=False).state_dict().keys()
    with pytest.raises(ValueError, match=r"has 6 rows, which is no cubic grid; build"):
        tiny(class_token=False).adapt(tiny(size_voxel=(12, 8, 4)).state_dict())
