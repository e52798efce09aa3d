import json
from pathlib import Path

import pytest
import torch
from oracles.nnformer import fill, plain_attention, published_shapes, wave

from medssl.layouts import alice as layout
from medssl.models.nnformer import NnFormer, NnFormerDecoder, NnFormerEncoder
from medssl.models.segmenter import build_segmenter
from medssl.models.vit import sincos_positions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nnformer.json").read_text())
SMALL = {"size_voxel": 32, "feature_size": 24, "num_heads": (3, 6, 12, 24), "window_tokens": (4, 4, 4, 2)}
TINY = {"size_voxel": 32, "feature_size": 12, "num_heads": (2, 2, 4, 4), "window_tokens": (4, 4, 4, 2)}


def tiny(**options):
    torch.manual_seed(0)
    return NnFormer(**{**TINY, "drop_path": 0.0, **options}).eval()


def encoder(**options):
    torch.manual_seed(0)
    return NnFormerEncoder(**{**TINY, "drop_path": 0.0, **options}).eval()


def load(network, state):
    """Fill a backbone from tensors under their published names."""
    parts = layout.alice(state, source="made up", branch="student")
    network.load_state_dict(parts)
    return network


@pytest.fixture(scope="module")
def golden():
    shapes = published_shapes(width=24, heads=(3, 6, 12, 24), windows=(4, 4, 4, 2))
    return load(NnFormer(**SMALL, ape="none"), {name: fill(name, shape) for name, shape in shapes.items()}).eval()


@pytest.mark.parity
def test_whole_crops_give_the_published_numbers(golden):
    with torch.no_grad():
        output = golden(wave((1, 1, 32, 32, 32), 0.001))
    wanted = GOLDEN["whole"]
    assert output.pooled.sum().item() == pytest.approx(wanted["pooled_sum"], rel=1e-4)
    assert output.pooled.abs().sum().item() == pytest.approx(wanted["pooled_abs_sum"], rel=1e-4)
    assert output.pooled[0, :2].tolist() == pytest.approx(wanted["pooled_first"], rel=1e-4)
    assert output.bottleneck.abs().sum().item() == pytest.approx(wanted["bottleneck_abs_sum"], rel=1e-4)
    assert output.decoded.abs().sum().item() == pytest.approx(wanted["decoded_abs_sum"], rel=1e-4)
    assert output.decoded[0, 0, 0, 0, 0].item() == pytest.approx(wanted["decoded_first"], rel=1e-4)
    assert output.reconstruction.sum().item() == pytest.approx(wanted["reconstruction_sum"], rel=1e-4)
    assert output.reconstruction[0, 0, 0, 0, 0].item() == pytest.approx(wanted["reconstruction_first"], rel=1e-4)
    assert output.decoded.shape == (1, 96, 4, 4, 4)


@pytest.mark.parity
def test_masked_crops_give_the_published_numbers(golden):
    i, j = torch.meshgrid(torch.arange(16) // 4, torch.arange(16) // 4, indexing="ij")
    mask = ((i + j) % 4 != 0)[None, None, :, :, None].expand(1, 1, 16, 16, 16)
    with torch.no_grad():
        output = golden(wave((1, 1, 32, 32, 32), 0.001), mask)
    wanted = GOLDEN["masked"]
    assert output.pooled.sum().item() == pytest.approx(wanted["pooled_sum"], rel=1e-4)
    assert output.bottleneck.abs().sum().item() == pytest.approx(wanted["bottleneck_abs_sum"], rel=1e-4)
    assert output.reconstruction.sum().item() == pytest.approx(wanted["reconstruction_sum"], rel=1e-4)


@pytest.mark.parity
def test_published_sizes_have_the_published_number_of_weights():
    with torch.device("meta"):
        network = NnFormer(ape="none")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in network.parts().items()}
    assert count == {"encoder": 7_651_668, "decoder": 2_071_404, "reconstruction": 385}
    coarser = (96 * 8 + 1) + (192 * 8 + 1)  # reconstructions that the published network has and never uses
    assert sum(count.values()) + coarser == 9_725_763
    assert sum(p.numel() for p in network.encoder.patch_embed.parameters()) == 109_944


@pytest.mark.parity
@pytest.mark.parametrize("size", [64, 128])
def test_published_names_and_shapes_are_ours_at_every_home_size_from_64(size):
    published = published_shapes(width=48, heads=(6, 12, 24, 48), windows=(4, 4, 8, 4))
    assert len(published) == 251
    with torch.device("meta"):
        network = NnFormer(ape="none", size_voxel=size)
        state = {name: torch.empty(shape) for name, shape in published.items()}
    mapped = layout.alice(state, source="made up", branch="student")
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (mapped, network.state_dict())]
    assert shapes[0] == shapes[1]


def test_fused_attention_gives_what_the_plain_composition_gives(monkeypatch):
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr("medssl.models.nnformer_blocks.window_attention", plain_attention)
        network, image = tiny(), wave((2, 1, 48, 32, 32), 0.37)  # tokens 24, 12, 6, 3 along x: padded and shifted
        for block in network.modules():
            if hasattr(block, "relative_position_bias_table"):
                block.relative_position_bias_table.data.mul_(20)
        with torch.no_grad():
            whole = network(image)
        output = network(image, torch.arange(48 // 8 * 16).reshape(1, 1, 6, 4, 4) % 3 == 0)
        sum(entry.square().mean() for entry in output).backward()
        results.append((*whole, *output, *(p.grad for p in network.parameters() if p.requires_grad)))
    assert all(torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5) for ours, wanted in zip(*results, strict=True))
    assert all(entry.abs().sum() > 0 for entry in results[0])


def test_under_autocast_features_stay_close_and_weights_learn():
    network, image = tiny(), wave((1, 1, 32, 32, 32), 0.37)
    with torch.no_grad():
        wanted = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(image)
    assert all(torch.allclose(a.float(), b, atol=0.1) for a, b in zip(output, wanted, strict=True))
    sum(entry.float().square().mean() for entry in output).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


def test_every_weight_of_a_segmenter_learns_with_and_without_recomputing():
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        options = {**TINY, "checkpoint_activations": checkpointed, "drop_path": 0.0}
        decoder = {**options, "num_heads": (2, 2, 4), "window_tokens": (4, 4, 4)}
        del decoder["feature_size"]
        network, recipes = build_segmenter(
            {"_target_": "medssl.models.nnformer.NnFormerEncoder", **options},
            {"_target_": "medssl.models.nnformer.NnFormerDecoder", **decoder},
            num_classes=3,
            in_channels=2,
            deep_supervision=1,
        )
        outputs = network.outputs(wave((1, 2, 32, 32, 32), 0.37))
        sum(output.square().mean() for output in outputs).backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert [tuple(output.shape) for output in outputs] == [(1, 3, 32, 32, 32), (1, 3, 16, 16, 16)]
    assert network.multiple_voxel == (16, 16, 16)
    assert recipes["encoder"]["in_channels"] == 2
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_drop_path_grows_with_depth_and_acts_in_training_alone():
    network = tiny(drop_path=0.2)
    rates = [
        [block.drop_path for stage in part.layers for block in stage.blocks]
        for part in (network.encoder, network.decoder)
    ]
    assert rates[0] == pytest.approx([0.2 * number / 7 for number in range(8)])
    assert rates[1] == pytest.approx([0.16, 0.2, 0.08, 0.12, 0.0, 0.04])  # fine to coarse; the coarsest comes first
    image = wave((1, 1, 32, 32, 32), 0.37)
    with torch.no_grad():
        still = network(image).pooled
        assert torch.equal(network(image).pooled, still)
        network.train()
        assert not torch.allclose(torch.stack([network(image).pooled for _ in range(4)]), still)


def test_sine_cosine_positions_are_those_of_the_grid_at_hand_and_in_no_file():
    network, bare = encoder(), encoder(ape="none")
    assert network.state_dict().keys() == bare.state_dict().keys()
    image = wave((1, 1, 32, 48, 32), 0.37)
    tokens = bare.patch_embed(image)
    assert torch.allclose(
        network._placed(tokens) - tokens,
        sincos_positions((16, 24, 16), 12).float().reshape(1, 16, 24, 16, 12),
        atol=1e-5,
    )
    assert not torch.allclose(network(image)[0], bare(image)[0], atol=1e-2)


def test_random_positions_are_kept_with_the_weights_and_resized():
    network, other = encoder(ape="random_frozen"), NnFormerEncoder(**TINY, ape="random_frozen").eval()
    assert network.ape.std().item() == pytest.approx(0.02, rel=0.05)
    assert not [name for name, _ in network.named_parameters() if "ape" in name]
    image = wave((1, 1, 48, 32, 32), 0.37)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(image)[-1], network(image)[-1])


def test_the_stem_is_fitted_to_other_channels():
    one, two = encoder(), encoder(in_channels=2)
    two.load_state_dict(two.adapt(one.state_dict()))
    image = wave((1, 1, 16, 16, 16), 0.37)
    for a, b in zip(one(image), two(image.expand(-1, 2, -1, -1, -1)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NnFormerEncoder(ape="learnt"), "ape is 'learnt', allowed are sincos, none, random_frozen"),
        (lambda: NnFormerEncoder(relative_index="new"), "relative_index is 'new', allowed are published, correct"),
        (lambda: NnFormerEncoder(depths=(2, 2)), "depths, num_heads and window_tokens need four entries"),
        (lambda: NnFormerEncoder(num_heads=(5, 10, 20, 40)), "width of 48 cannot be split over 5 attention heads"),
        (lambda: NnFormerEncoder(size_voxel=40), r"40\) voxels cannot be cut into patches of \(16, 16, 16\)"),
        (lambda: encoder()(torch.zeros(1, 1, 40, 32, 32)), r"\(40, 32, 32\) voxels cannot be cut into patches of"),
        (lambda: encoder()(torch.zeros(1, 3, 32, 32, 32)), "the encoder reads 1 channels, the image has 3"),
        (
            lambda: NnFormerDecoder(in_channels=1, encoder_channels=(8, 8), encoder_strides=[(2, 2, 2), (4, 4, 4)]),
            "takes four maps of doubling width at strides 2 to 16",
        ),
        (
            lambda: NnFormerDecoder(
                in_channels=1,
                encoder_channels=(48, 96, 192, 384),
                encoder_strides=NnFormerEncoder().strides,
                depths=(2, 0, 2),
            ),
            "need three entries, got .2, 0, 2.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
