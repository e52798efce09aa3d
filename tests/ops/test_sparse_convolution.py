import pytest
import torch
from torch import nn

from medssl.ops.sparse_convolution import convolve_points, place, voxel_number, voxel_share


def points_in(size, *, count, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    voxel = torch.stack([torch.randint(side, (count,), generator=generator) for side in size], dim=1)
    return voxel, torch.randint(batch, (count,), generator=generator)


@pytest.mark.parametrize("size", [(5, 7), (6, 4, 5), (1, 2, 3), (4, 4, 1), (1, 1)])
def test_sparse_and_dense_convolution_agree_in_value_and_gradient(size):
    voxel, sample = points_in(size, count=40, batch=3)  # many share a voxel, many lie at a border
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(size)](5, 4, 3, padding=1).double()
    results = []
    for sparse in (True, False):
        values = torch.linspace(-1, 1, 200, dtype=torch.float64).sin().view(40, 5).requires_grad_()
        if sparse:
            spread = convolve_points(
                values, voxel, sample, weight=conv.weight, bias=conv.bias, batch=3, size_voxel=size
            )
        else:
            number = voxel_number(voxel, sample, size_voxel=size)
            spread = conv(place(values, number, batch=3, size_voxel=size))
        conv.zero_grad()
        (spread * torch.arange(spread.numel(), dtype=torch.float64).cos().view_as(spread)).sum().backward()
        results.append((spread, values.grad, conv.weight.grad, conv.bias.grad))
    assert results[0][0].is_contiguous()
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).abs().max().item() < 1e-12
        assert ours.abs().sum() > 0


def test_without_points_the_convolution_is_its_bias():
    conv = nn.Conv3d(5, 1, 3, padding=1)
    none = torch.zeros(0, 3, dtype=torch.long)
    spread = convolve_points(
        torch.zeros(0, 5), none, none[:, 0], weight=conv.weight, bias=conv.bias, batch=1, size_voxel=(2, 3, 4)
    )
    assert torch.equal(spread, conv.bias.detach().expand(1, 1, 2, 3, 4))


def test_tokens_of_one_voxel_share_it_or_the_last_has_it():
    number = torch.tensor([4, 1, 4, 7, 4])
    options = {"num_voxels": 9, "dtype": torch.float64}
    mean = voxel_share(number, scatter="mean", **options)
    assert mean.tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1, 1 / 3])
    assert voxel_share(number, scatter="overwrite", **options).tolist() == [0, 1, 0, 1, 1]


def test_voxels_are_numbered_as_a_batch_of_maps_is_flattened():
    voxel, sample = points_in((3, 4, 5), count=10, batch=2)
    grid = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    assert torch.equal(voxel_number(voxel, sample, size_voxel=(3, 4, 5)), grid[sample, *voxel.T])
