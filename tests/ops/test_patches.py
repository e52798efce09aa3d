import pytest
import torch

from medssl.ops.patches import patch_grid, patchify, unpatchify


@pytest.mark.parity
def test_voxels_go_where_the_card_says():
    volume = torch.zeros(1, 1, 96, 96, 96)
    volume[0, 0, 16, 0, 0], volume[0, 0, 1, 2, 3] = 5.0, 7.0
    patches = patchify(volume, 16)
    assert patches.shape == (1, 216, 4096)
    assert patches[0, 36, 0] == 5
    assert patches[0, 0, 291] == 7
    assert patches.count_nonzero() == 2


def test_patchify_matches_slices_for_unequal_axes_and_channels():
    volume = torch.randn(2, 3, 4, 6, 10)
    patches = patchify(volume, (2, 3, 5))
    for token in range(8):
        i, j, k = token // 4, token // 2 % 2, token % 2
        cube = volume[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, 5 * k : 5 * k + 5]
        assert torch.equal(patches[:, token], cube.permute(0, 2, 3, 4, 1).flatten(1))


def test_unpatchify_undoes_patchify():
    volume = torch.randn(2, 3, 4, 6, 10)
    assert torch.equal(unpatchify(patchify(volume, (2, 3, 5)), (2, 2, 2), patch_voxel=(2, 3, 5)), volume)


def test_a_size_that_cannot_be_cut_is_refused_with_one_that_can():
    with pytest.raises(ValueError, match=r"\(8, 9, 8\).*\(8, 12, 8\)"):
        patch_grid((8, 9, 8), (4, 4, 4))
