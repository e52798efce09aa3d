import pytest
import torch

from medssl.ops.downsample import shrunk


def test_linear_keeps_the_first_and_the_last_voxel_and_area_takes_means():
    image = torch.tensor([0.0, 1, 2, 9, 4, 5]).reshape(1, 1, 6)
    assert shrunk(image, (2,)).flatten().tolist() == [0, 5]
    assert shrunk(image, (3,)).flatten().tolist() == pytest.approx([0, 5.5, 5])
    assert shrunk(image, (2,), how="area").flatten().tolist() == [1, 6]


@pytest.mark.parametrize("how", ["linear", "area"])
def test_an_axis_of_which_one_voxel_is_left_is_its_mean_and_not_a_corner(how):
    image = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert shrunk(image, (2, 1), how=how).flatten().tolist() == [1.5, 5.5]
    assert shrunk(image, (1, 1), how=how).item() == 3.5


def test_other_ways_are_refused():
    with pytest.raises(ValueError, match="how is 'cubic', allowed are linear, area"):
        shrunk(torch.zeros(1, 1, 4), (2,), how="cubic")
