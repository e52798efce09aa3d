import json
import shutil
import subprocess
import sys

import pytest
import torch
from oracles.kaf import Oracle, fill, published_shapes

from medssl.layouts import kaf as layout
from medssl.models.kaf_layer import KAFLayer, Keypoints, interpolate
from medssl.models.keypoint_attention import MessageLayer, Packing, TokenBatchNorm, TokenLayerNorm, normalised

NAMES = "encoder.graph_1"


def part(state, prefix):
    """The tensors of the network at `prefix` of our names."""
    ours = layout.kaf(state, source="made up", branch="student")
    return {key.removeprefix(prefix): tensor for key, tensor in ours.items() if key.startswith(prefix)}


def made_up(**options):
    return fill(published_shapes(**{"base": 4, "pairs": 1, "dim": 16, "hidden": 8, "code_widths": (8, 8), **options}))


def test_packing_there_and_back_keeps_tokens_and_zeroes_the_rest():
    valid = torch.tensor([[True, False, True], [False, False, False]])
    packing, rows = Packing.of(valid), torch.arange(12.0).view(2, 3, 2) + 1
    assert packing.sample.tolist() == [0, 0]
    assert torch.equal(packing.pack(rows), rows[0, [0, 2]])
    assert torch.equal(packing.pad(packing.pack(rows)), rows * valid[:, :, None])
    assert packing.keys[:, 0, 0].tolist() == [[True, False, True], [True, True, True]]
    assert Packing.of(torch.ones(2, 3, dtype=torch.bool)).keys is None


@pytest.mark.parity
def test_normalised_voxels_are_the_published_numbers():
    voxel = torch.tensor([[0, 0], [10, 20], [31, 63]])
    wanted = [[-0.7143, -0.3571], [-0.4911, 0.0893], [-0.0223, 1.0491]]
    swapped = normalised(voxel, (32, 64), axis_swap=True)
    assert torch.allclose(swapped, torch.tensor(wanted), atol=5e-5)
    assert torch.allclose(normalised(voxel, (32, 64)), torch.tensor([[-16, -32], [-6, -12], [15, 31]]) / 44.8)


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
def test_a_layer_gives_what_heads_and_queries_one_by_one_give(train):
    state = made_up(dim=16)
    oracle = Oracle(state, train=train)
    layer = MessageLayer(16, num_heads=4).double().train(train)
    layer.load_state_dict(part(state, "encoder.kaf.0.attention.0."))
    sets = [torch.randn(n, 16, dtype=torch.float64) for n in (5, 3)]
    sources = [torch.randn(n, 16, dtype=torch.float64) for n in (2, 6)]
    wanted = oracle.gain(f"{NAMES}.superglue.gnn.layers.0", sets, sources)
    at, of = (Packing.of(torch.arange(7) < torch.tensor([[a], [b]])) for a, b in ((5, 3), (2, 6)))
    gained = layer(torch.cat(sets), torch.cat(sources), at=at, of=of)
    assert torch.allclose(gained, torch.cat(wanted), atol=1e-11, rtol=0)
    assert torch.allclose(layer.mlp[1].running_var, oracle.state[f"{NAMES}.superglue.gnn.layers.0.mlp.1.running_var"])


@pytest.mark.parity
def test_one_branch_with_momentum_019_equals_two_branches_of_equal_sets():
    state = made_up()
    oracle = Oracle(state, train=True)
    tokens = [torch.randn(17, 16, dtype=torch.float64) for _ in range(2)]
    first, second = oracle.layers(f"{NAMES}.superglue", tokens, tokens, ["self", "cross"])
    packing, ours = Packing.of(torch.ones(2, 17, dtype=torch.bool)), torch.cat(tokens)
    for number in range(2):
        layer = MessageLayer(16, num_heads=4, bn_momentum=0.19).double()
        layer.load_state_dict(part(state, f"encoder.kaf.0.attention.{number}."))
        ours = ours + layer(ours, ours, at=packing, of=packing)
        for name in ("running_mean", "running_var"):
            wanted = oracle.state[f"{NAMES}.superglue.gnn.layers.{number}.mlp.1.{name}"]
            assert torch.allclose(getattr(layer.mlp[1], name), wanted, atol=1e-11, rtol=0)
    assert torch.allclose(ours, torch.cat(first), atol=1e-11, rtol=0)
    assert torch.equal(torch.cat(first), torch.cat(second))


def test_projections_start_equal_and_heads_run_fastest():
    layer = MessageLayer(8, num_heads=4)
    assert torch.equal(layer.query.weight, layer.merge.weight)
    assert torch.equal(layer.key.bias, layer.value.bias)
    assert layer.query.weight.data_ptr() != layer.key.weight.data_ptr()
    assert layer._heads(torch.arange(8.0).view(1, 1, 8))[0, :, 0].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


COMPILED = """
import torch
from medssl.models.keypoint_attention import MessageLayer, Packing
for change in (lambda layer: layer, torch.compile):
    torch.manual_seed(0)
    layer, tokens = MessageLayer(8, num_heads=2), torch.randn(14, 8, requires_grad=True)
    packing = Packing.of(torch.arange(9) < torch.tensor([[9], [5]]))
    gained = change(layer)(tokens, tokens, at=packing, of=packing)
    (gained * torch.linspace(-1, 1, gained.numel()).view_as(gained)).sum().backward()
    found = gained, tokens.grad, layer.query.weight.grad, layer.value.weight.grad
    print(torch.cat([part.flatten() for part in found]).tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a compiler")
def test_a_compiled_layer_gives_what_it_gives_uncompiled():
    alone = [sys.executable, "-c", COMPILED]  # types are not checked there, the compiler cannot follow that
    said = subprocess.run(alone, capture_output=True, text=True, check=True).stdout
    eager, compiled = map(json.loads, said.splitlines())
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert max(map(abs, eager)) > 0.1


@pytest.mark.parametrize("count", [0, 1])
def test_batch_norm_of_too_few_tokens_goes_by_running_statistics(count):
    norm = TokenBatchNorm(3)
    norm.running_mean += 2
    tokens = torch.full((count, 3), 5.0, requires_grad=True)
    out = norm(tokens)
    assert torch.allclose(out, torch.full((count, 3), 3.0))
    out.sum().backward()
    assert norm.weight.grad.tolist() == pytest.approx([3.0 * count] * 3, rel=1e-4)
    assert norm.running_mean.tolist() == [2, 2, 2]


def test_layer_norm_takes_the_unbiased_deviation_and_adds_to_it():
    out = TokenLayerNorm(3, eps=0.5)(torch.tensor([[1.0, 2.0, 6.0]]))
    deviation = (14 / 2) ** 0.5
    assert out[0].tolist() == pytest.approx([value / (deviation + 0.5) for value in (-2, -1, 3)])


@pytest.mark.parity
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("scatter", ["overwrite", "mean"])
@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
def test_the_keypoint_layer_gives_what_the_written_out_one_gives(train, scatter, size):
    state = made_up(base=8)
    oracle = Oracle(state, train=train, scatter=scatter)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, *size, generator=generator, dtype=torch.float64)
    voxels = [torch.randint(8, (count, 2), generator=generator) for count in (9, 6)]  # some share a voxel
    wanted, wanted_tokens = oracle.kaf(NAMES, features, voxels)
    padded, valid = torch.full((2, 11, 2), torch.nan), torch.zeros(2, 11, dtype=torch.bool)
    for sample, own in enumerate(voxels):
        padded[sample, 1 : 1 + len(own)], valid[sample, 1 : 1 + len(own)] = own.float(), True
    packing = Packing.of(valid)
    for sparse in (True, False):
        layer = KAFLayer(
            8,
            **{"spatial_dims": 2, "dim": 16, "num_layers": 1, "hidden": 8, "position_widths": (8, 8)},
            **{"scatter": scatter, "sparse_first_conv": sparse, "bn_momentum": 0.19, "axis_swap": True},
        )
        layer.double().train(train).load_state_dict(part(state, "encoder.kaf.0."))
        joined, tokens = layer(features, Keypoints(packing.pack(padded), packing), stride=(1, 1))
        assert torch.allclose(tokens, torch.cat(wanted_tokens), atol=1e-11, rtol=0)
        assert torch.allclose(joined, wanted, atol=1e-11, rtol=0)
        wanted_state = part(oracle.state, "encoder.kaf.0.")
        for name, tensor in layer.state_dict().items():
            if "num_batches" not in name:
                assert torch.allclose(tensor, wanted_state[name], atol=1e-11, rtol=0), name


def test_keypoints_fall_into_the_cells_of_their_nearest_voxel():
    points = torch.tensor([[0.0, 7.4, 7.6], [-0.4, 8.49, 2.5]])
    keypoints = Keypoints(points, Packing.of(torch.ones(1, 2, dtype=torch.bool)))
    assert keypoints.voxel((1, 1, 1)).tolist() == [[0, 7, 8], [0, 8, 3]]
    assert keypoints.voxel((8, 8, 2)).tolist() == [[0, 0, 4], [0, 1, 1]]


def test_interpolated_features_of_linear_maps_are_linear_at_every_level():
    grid = torch.stack(torch.meshgrid(*(torch.arange(side) for side in (4, 5, 6)), indexing="ij")).double()
    points, sample = torch.tensor([[1.25, 3.5, 0.75], [3.0, 4.0, 5.0]]), torch.tensor([1, 0])
    found = interpolate(torch.stack([grid, 2 * grid]), points, sample)
    assert torch.allclose(found, points.double() * torch.tensor([[2], [1]]))
    outside = interpolate(grid[None], torch.tensor([[-0.5, 9.0, 2.0]]), sample[1:])
    assert outside.tolist() == [[0, 4, 2]]


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="dim=10 is no multiple of num_heads=4"):
        MessageLayer(10, num_heads=4)
    with pytest.raises(ValueError, match="token_norm is 'group', allowed are batch, layer"):
        MessageLayer(8, num_heads=4, norm="group")
    with pytest.raises(ValueError, match="scatter is 'max', allowed are mean, overwrite"):
        KAFLayer(4, spatial_dims=2, scatter="max")
