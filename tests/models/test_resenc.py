import pytest
import torch
import torch.nn.functional as F

from medssl.models.resenc import ResidualBlock, ResidualEncoder
from medssl.models.segmenter import build_segmenter


def randomised(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return network


def normed(x, weight, norm, **conv):
    x = F.conv3d(x, weight, **conv)
    x = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), keepdim=True, correction=0) + 1e-5).sqrt()
    return x * norm.weight[:, None, None, None] + norm.bias[:, None, None, None]


def rectified(x):
    return torch.where(x > 0, x, 0.01 * x)


@pytest.mark.parametrize(("width", "stride"), [(3, (1, 1, 1)), (5, (2, 2, 1)), (3, (2, 2, 2))])
def test_a_block_is_two_convolutions_added_to_an_averaged_and_projected_input(width, stride):
    block = randomised(ResidualBlock(3, width, kernel=(3, 3, 3), stride=stride))
    x = torch.randn(2, 3, 8, 8, 4)
    kept = x.clone()
    inner = rectified(normed(x, block.conv1.conv.weight, block.conv1.norm, stride=stride, padding=1))
    inner = normed(inner, block.conv2.conv.weight, block.conv2.norm, padding=1)
    a, b, c = stride
    skip = x.unflatten(4, (-1, c)).unflatten(3, (-1, b)).unflatten(2, (-1, a)).mean((3, 5, 7))
    if width != 3:
        skip = normed(skip, block.skip[1].conv.weight, block.skip[1].norm)
    assert torch.allclose(block(x), rectified(inner + skip), atol=1e-5)
    assert torch.equal(x, kept)  # nothing in place reaches the input


def test_an_encoder_gives_one_map_a_stage_after_all_its_blocks():
    encoder = randomised(ResidualEncoder(in_channels=2, widths=[4, 6], strides=[1, [2, 2, 1]], blocks=[1, 3]))
    image = torch.randn(1, 2, 8, 8, 4)
    fine, coarse = encoder(image)
    assert torch.equal(fine, encoder.stages[0](encoder.stem(image)))
    assert torch.equal(coarse, encoder.stages[1](fine))
    assert (encoder.channels, encoder.strides) == ((4, 6), ((1, 1, 1), (2, 2, 1)))
    assert [len(stage) for stage in encoder.stages] == [1, 3]
    assert coarse.shape == (1, 6, 4, 4, 4)


def test_the_default_encoder_has_the_counts_of_its_layers_written_out():
    with torch.device("meta"):
        encoder = ResidualEncoder()
    expected, before = 27 * 32 + 2 * 32, 32
    for width, count in zip((32, 64, 128, 256, 320), (1, 3, 4, 6, 6), strict=True):
        expected += 27 * width * (before + width * (2 * count - 1)) + 4 * count * width
        expected += before * width + 2 * width if before != width else 0
        before = width
    assert sum(p.numel() for p in encoder.parameters()) == expected


def test_it_makes_a_segmenter_whose_every_weight_learns():
    recipe = {"_target_": "medssl.models.resenc.ResidualEncoder", "widths": [4, 6, 8], "blocks": [1, 2, 2]}
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        recipe["checkpoint_activations"] = checkpointed
        network, _ = build_segmenter(recipe, None, num_classes=2, in_channels=1)
        network(torch.linspace(-2, 2, 1024).sin().reshape(1, 1, 8, 8, 16)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(g is not None and g.isfinite().all() for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_stem_of_another_number_of_channels_is_fitted():
    one, four = ResidualEncoder(widths=[4], blocks=[1]), ResidualEncoder(in_channels=4, widths=[4], blocks=[1])
    four.load_state_dict(four.adapt(one.state_dict()))
    image = torch.randn(1, 1, 4, 4, 4)
    assert torch.allclose(four(image.expand(-1, 4, -1, -1, -1))[0], one(image)[0], atol=1e-5)


@pytest.mark.parametrize("blocks", [[1], [1, 0]])
def test_a_stage_without_blocks_is_refused(blocks):
    with pytest.raises(ValueError, match="blocks must give a number above 0 for each of the 2 stages"):
        ResidualEncoder(widths=[4, 8], blocks=blocks)


def test_an_image_that_leaves_one_voxel_is_refused():
    with pytest.raises(ValueError, match="leaves a single voxel at the coarsest stage"):
        ResidualEncoder(widths=[4, 8], blocks=[1, 1])(torch.randn(1, 1, 2, 2, 2))
