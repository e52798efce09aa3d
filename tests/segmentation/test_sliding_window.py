import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from medssl.segmentation.sliding_window import SlidingWindow, importance_map, window_starts


def _network(num_classes=3, channels=1):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, num_classes, 3, padding=1))
    return lambda windows: net(windows).softmax(1).detach()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize(
    ("sides", "window"),
    [
        ((20, 17, 23), (8, 8, 8)),
        ((12, 16, 30), (12, 10, 7)),
        ((5, 20, 9), (8, 8, 8)),  # smaller along one axis
        ((5, 4, 3), (8, 9, 6)),  # along all
        ((8, 8, 8), (8, 8, 8)),
    ],
)
def test_results_equal_those_of_monai(sides, window, overlap):
    image = torch.rand(2, *sides)
    predict = _network(channels=2)
    found = SlidingWindow(window, overlap, batch_size=3)(image, predict)
    monai = SlidingWindowInferer(window, sw_batch_size=3, overlap=overlap, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(found, monai(image[None], predict)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_slabs_are_the_whole_piece_by_piece_and_hold_no_more_than_a_window_is_high(overlap):
    image, predict = torch.rand(1, 11, 13, 41), _network()
    window = SlidingWindow((6, 8, 10), overlap)
    asked, slabs = [], []

    def layer(first, last):
        asked.append((first, last))
        return image[..., first:last]

    for first, slab in window.slabs(layer, image.shape[1:], predict):
        assert first == sum(s.shape[-1] for s in slabs)
        assert slab.untyped_storage().nbytes() == 3 * 11 * 13 * 10 * 4
        slabs.append(slab.clone())
    torch.testing.assert_close(torch.cat(slabs, -1), window(image, predict), atol=1e-6, rtol=0)
    assert asked == [(z, z + 10) for z in window_starts(41, 10, overlap)]


def test_windows_are_counted_and_told():
    image, told = torch.rand(1, 20, 20, 20), []
    window = SlidingWindow((8, 8, 8), batch_size=4)
    window(image, _network(), on_window=told.append)
    assert sum(told) == window.num_windows((20, 20, 20)) == 4**3
    assert max(told) == 4


def test_a_voxel_of_one_window_keeps_its_prediction_and_all_weights_are_positive():
    weights = importance_map((9, 5, 33))
    assert weights[4, 2, 16] == 1
    assert weights.min() == pytest.approx(1e-3)
    image = torch.rand(1, 4, 6, 8)
    torch.testing.assert_close(SlidingWindow((4, 6, 8))(image, lambda w: torch.cat([w, 1 - w], 1))[0], image[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_voxel": (8, 8)}, "three positive sides"),
        ({"window_voxel": (8, 8, 0)}, "three positive sides"),
        ({"window_voxel": (8, 8, 8), "overlap": 1.0}, r"\[0, 1\)"),
        ({"window_voxel": (8, 8, 8), "batch_size": 0}, "from 1 up"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlidingWindow(**arguments)


def test_maps_of_another_size_than_the_window_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 2, 2\) for windows of \(2, 1, 4, 4, 4\)"):
        SlidingWindow((4, 4, 4))(torch.rand(1, 8, 4, 4), lambda windows: windows[..., ::2, ::2, ::2])
    with pytest.raises(ValueError, match="pad the image"):
        window_starts(3, 4, 0.5)
