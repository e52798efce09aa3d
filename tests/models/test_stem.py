import pytest
import torch

from medssl.models.stem import fit_stem


@pytest.mark.parametrize(("held", "wanted"), [(1, 4), (4, 1), (3, 3)])
def test_equal_channels_give_what_the_file_gave(held, wanted):
    weight, voxel = torch.randn(5, held, 2, 2, 2), torch.randn(2, 2, 2)
    fitted = fit_stem({"stem": weight, "other": torch.zeros(1)}, "stem", wanted)
    assert fitted["stem"].shape == (5, wanted, 2, 2, 2)
    assert fitted["other"].tolist() == [0.0]
    assert torch.allclose((fitted["stem"] * voxel).sum((1, 2, 3, 4)), (weight * voxel).sum((1, 2, 3, 4)), atol=1e-5)


def test_what_has_no_rule_is_left_as_it_is():
    tensors = {"stem": torch.randn(5, 3, 2, 2, 2)}
    assert fit_stem(tensors, "stem", 2) is tensors
    assert fit_stem(tensors, "another", 1) is tensors
    flat = {"stem": torch.zeros(3)}
    assert fit_stem(flat, "stem", 1) is flat
