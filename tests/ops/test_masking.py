import json
from pathlib import Path

import pytest
import torch

from medssl.ops.masking import num_kept, random_mask

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
