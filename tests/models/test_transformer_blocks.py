"""Options of the transformer's blocks, off by default: LayerScale and drop path."""

import pytest
import torch

from medssl.models.transformer_blocks import Block, drop_path, path_rates
from medssl.models.vit import VisionTransformer

IMAGE = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def small(**options):
    torch.manual_seed(0)
    return VisionTransformer(size_voxel=8, patch_voxel=4, dim=12, depth=3, num_heads=2, **options)


def test_rates_grow_evenly_from_nothing_in_the_first_block():
    assert path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert path_rates(0.3, 1) == [0.0]
    assert [block.drop_path for block in small(drop_path=0.2).blocks] == pytest.approx([0.0, 0.1, 0.2])
    for rate, message in ((1.0, "drop_path=1 drops every branch"), (-0.1, "drop_path must be a number from 0 up")):
        with pytest.raises(ValueError, match=message):
            small(drop_path=rate)


def test_whole_samples_are_dropped_and_the_others_scaled_so_that_the_mean_stays():
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    dropped = drop_path(branch, 0.25, training=True)
    assert (dropped.amin((1, 2)) == dropped.amax((1, 2))).all()
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert drop_path(branch, 0.25, training=False) is branch


def test_dropped_branches_leave_the_input_and_evaluation_drops_nothing():
    torch.manual_seed(0)
    block = Block(12, 2, drop_path=0.999_999)
    tokens = torch.randn(3, 5, 12)
    assert torch.equal(block(tokens), tokens)
    plain = Block(12, 2)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(block.eval()(tokens), plain(tokens))
    assert not torch.equal(plain(tokens), tokens)
    network, bare = small(drop_path=0.5), small()
    assert network.state_dict().keys() == bare.state_dict().keys()
    assert torch.equal(network.eval().tokens(IMAGE), bare.tokens(IMAGE))
    assert not torch.equal(network.train().tokens(IMAGE), bare.tokens(IMAGE))


def test_factors_scale_the_branches_and_learn():
    bare, scaled = small(), small(layer_scale=1e-5)
    own = {f"blocks.{block}.ls{branch}.gamma" for block in range(3) for branch in (1, 2)}
    assert scaled.state_dict().keys() - bare.state_dict().keys() == own
    assert all(torch.equal(scaled.state_dict()[name], tensor) for name, tensor in bare.state_dict().items())
    assert all(scaled.state_dict()[name].tolist() == pytest.approx([1e-5] * 12) for name in own)
    assert torch.allclose(scaled.tokens(IMAGE), scaled.norm(scaled._embed(IMAGE)), atol=1e-3)
    for block in scaled.blocks:
        block.ls1.gamma.data.fill_(1)
        block.ls2.gamma.data.fill_(1)
    assert torch.equal(scaled.tokens(IMAGE), bare.tokens(IMAGE))
    scaled.tokens(IMAGE).square().sum().backward()
    assert all(block.ls1.gamma.grad.abs().sum() > 0 for block in scaled.blocks)
    with pytest.raises(ValueError, match="layer_scale must be a number above 0; got 0"):
        small(layer_scale=0)


def test_recomputed_activations_drop_the_same_branches():
    gradients = []
    for checkpointed in (False, True):
        network = small(drop_path=0.5, checkpoint_activations=checkpointed)
        torch.manual_seed(1)
        network.tokens(IMAGE).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
