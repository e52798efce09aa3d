import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.ops.masking import (
    block_mask,
    drawn_ratio,
    num_blocks,
    num_kept,
    random_mask,
    ratio_range,
    voxel_mask,
    without_hidden,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "glmae.json").read_text())


@pytest.mark.parity
@pytest.mark.parametrize(("tokens", "ratio", "kept"), GOLDEN["kept"])
def test_counts_are_those_of_the_card_for_every_sample(tokens, ratio, kept):
    mask = random_mask(torch.rand(3, tokens), ratio=ratio)
    assert num_kept(tokens, ratio) == kept
    assert mask.keep.shape == (3, kept)
    assert mask.masked.sum(1).tolist() == [tokens - kept] * 3


@pytest.mark.parity
def test_ids_mask_and_kept_tokens_are_those_of_the_sorted_noise():
    noise = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    mask = random_mask(noise, ratio=0.6)
    for row in range(4):
        shuffle = sorted(range(20), key=lambda place, row=row: noise[row, place].item())
        assert mask.keep[row].tolist() == shuffle[:8]
        assert mask.masked[row].tolist() == [place not in shuffle[:8] for place in range(20)]
        assert [shuffle[i] for i in mask.restore[row]] == list(range(20))


def test_tokens_are_drawn_evenly():
    mask = random_mask(torch.rand(20000, 8, generator=torch.Generator().manual_seed(0)), ratio=0.5)
    assert mask.masked.float().mean(0).tolist() == pytest.approx([0.5] * 8, abs=0.02)


def test_a_ratio_of_zero_keeps_all_tokens():
    mask = random_mask(torch.rand(2, 5), ratio=0.0)
    assert sorted(mask.keep[0].tolist()) == list(range(5))
    assert not mask.masked.any()


@pytest.mark.parametrize(("tokens", "ratio"), [(8, 0.95), (8, 1.0), (8, -0.1), (0, 0.5)])
def test_a_ratio_that_leaves_nothing_to_see_or_predict_is_refused(tokens, ratio):
    with pytest.raises(ValueError, match=f"a mask ratio of {ratio} keeps"):
        num_kept(tokens, ratio)


@pytest.mark.parity
def test_columns_are_those_of_the_card_for_the_same_permutation():
    """The released code masks the first blocks of a permutation: here those with the largest noise."""
    shuffled = np.random.RandomState(0).permutation(16)  # the card's own generator
    noise = torch.empty(1, 16)
    noise[0, torch.from_numpy(shuffled)] = -torch.arange(16.0)
    mask = block_mask(noise, grid=(4, 4, 4), ratio=0.75)
    expected = json.loads((Path(__file__).parents[1] / "golden" / "alice.json").read_text())["blocks"]
    assert mask[0, 0, :, :, 0].flatten().int().tolist() == expected
    assert mask.float().mean().item() == 0.75
    assert all(torch.equal(mask[..., 0], mask[..., k]) for k in range(4))


def test_cubes_are_masked_one_by_one_and_rounded_up_in_number():
    noise = torch.rand(3, 4 * 3 * 2, generator=torch.Generator().manual_seed(0))
    mask = block_mask(noise, grid=(4, 3, 2), ratio=0.7, shape="cube")
    assert mask.shape == (3, 1, 4, 3, 2)
    assert mask.flatten(1).sum(1).tolist() == [17] * 3  # 16.8 of 24
    for row, values in zip(mask[:, 0], noise.unflatten(1, (4, 3, 2)), strict=True):
        assert values[row].min() > values[~row].max()
    assert block_mask(torch.rand(1, 9), grid=(3, 3, 3), ratio=0.75).sum() == 7 * 3
    assert block_mask(torch.rand(1, 64), grid=(4, 4, 4), ratio=0.75, shape="cube").sum() == 48


def test_a_mask_of_another_shape_or_size_is_refused():
    assert (num_blocks((4, 3, 2), shape="column"), num_blocks((4, 3, 2), shape="cube")) == (12, 24)
    with pytest.raises(ValueError, match="the shape of a mask is 'ball', allowed are column, cube"):
        num_blocks((4, 3, 2), shape="ball")
    with pytest.raises(ValueError, match=r"a column mask over \(4, 3, 2\) has 12 blocks, the noise is for 24"):
        block_mask(torch.rand(1, 24), grid=(4, 3, 2), ratio=0.5)


@pytest.mark.parity
def test_counts_of_cells_are_those_of_the_card_and_one_more_at_nine_tenths():
    """References card, 0.4 (G2): the released code masks int(r * cells), ours keeps int(cells * (1 - r))."""
    for size, ratio, released, ours in ((160, 0.75, 750, 750), (96, 0.75, 162, 162), (160, 0.9, 900, 901)):
        num_cells = (size // 16) ** 3
        assert int(ratio * num_cells) == released
        assert random_mask(torch.rand(2, num_cells), ratio=ratio).masked.sum(1).tolist() == [ours] * 2


def test_each_voxel_has_the_mask_of_its_cell():
    cells = torch.rand(2, 1, 3, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    voxels = voxel_mask(cells, (12, 4, 4))
    assert voxels.shape == (2, 1, 12, 4, 4)
    for sample, x, y, z in itertools.product(range(2), range(12), range(4), range(4)):
        assert voxels[sample, 0, x, y, z] == cells[sample, 0, x // 4, y // 2, z]


def test_an_image_that_does_not_consist_of_the_cells_is_refused():
    with pytest.raises(ValueError, match=r"an image of \(12, 5, 4\) voxels does not consist of \(3, 2, 4\) equal"):
        voxel_mask(torch.ones(1, 1, 3, 2, 4, dtype=torch.bool), (12, 5, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hidden_voxels_become_zero_or_the_mean_of_the_visible_ones_of_sample_and_channel(dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 4, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    hidden = torch.rand(2, 1, 4, 4, 4, generator=generator) < 0.5
    zero, mean = without_hidden(image, hidden), without_hidden(image, hidden, fill="mean")
    assert zero.dtype == mean.dtype == dtype
    for sample, channel in itertools.product(range(2), range(3)):
        hole = hidden[sample, 0]
        whole = image[sample, channel]
        expected = whole[~hole].double().mean().item()
        for filled, value in ((zero[sample, channel], 0.0), (mean[sample, channel], expected)):
            assert torch.equal(filled[~hole], whole[~hole])
            assert filled[hole].double().tolist() == pytest.approx([value] * int(hole.sum()), rel=4e-3)
    changed = torch.where(hidden, image + 5, image)
    assert torch.equal(without_hidden(changed, hidden, fill="mean"), mean)
    with pytest.raises(ValueError, match="fill is 'noise', allowed are zero, mean"):
        without_hidden(image, hidden, fill="noise")


def test_a_ratio_is_one_number_or_drawn_evenly_between_two():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert drawn_ratio(ratio_range("mask_ratio", 0.75), generator) == 0.75
    assert torch.equal(generator.get_state(), before)
    drawn = [drawn_ratio(ratio_range("mask_ratio", [0.6, 0.9]), generator) for _ in range(2000)]
    assert 0.6 <= min(drawn) < 0.61
    assert 0.89 < max(drawn) <= 0.9
    assert sum(drawn) / len(drawn) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, [0.6], [0.9, 0.6], [0.6, 1.0], [0.2, 0.3, 0.4], True])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match=r"mask_ratio=.* must lie between 0 and 1"):
        ratio_range("mask_ratio", ratio)
