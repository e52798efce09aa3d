"""Shuffling, intensity maps and painting against plain loops and the numbers of the card."""

import itertools

import pytest
import torch

from medssl.ops.deformations import (
    MOST_PAINTED,
    Deformation,
    Windows,
    deform,
    inpainted_windows,
    inside_windows,
    kept_windows,
    map_intensity,
    shuffle_in_windows,
    shuffle_windows,
)

VALUES = (0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1)
CURVES = {
    (0.2, 0.9, 0.7, 0.1, True): (0, 0.286890, 0.444174, 0.490993, 0.505105, 0.524190, 0.594011, 0.769718, 1),
    (0.2, 0.9, 0.7, 0.1, False): (1, 0.713110, 0.555826, 0.509007, 0.494895, 0.475810, 0.405989, 0.230282, 0),
    (0.8, 0.1, 0.3, 0.6, True): (0, 0.015820, 0.057570, 0.146370, 0.288676, 0.567595, 0.806835, 0.936731, 1),
    (0.8, 0.1, 0.3, 0.6, False): (1, 0.945634, 0.841336, 0.682582, 0.493864, 0.228300, 0.074391, 0.018819, 0),
}
"""Models Genesis' maps of `VALUES`, with the curve (0, 0), (u1, u2), (u3, u4), (1, 1) and its direction."""


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slices(windows, crop, number):
    start, side = windows.start[crop, number].tolist(), windows.side[crop, number].tolist()
    return tuple(slice(a, a + n) for a, n in zip(start, side, strict=True))


@pytest.mark.parity
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("num_nodes", "error"), [(100_000, 1e-6), (1001, 1.3e-5)])
def test_a_curve_maps_intensities_as_released(curve, num_nodes, error):
    *controls, increasing = curve
    image = torch.tensor(VALUES).view(1, 1, 9, 1, 1)
    found = map_intensity(
        image, torch.tensor([controls]), increasing=torch.tensor([increasing]), num_nodes=num_nodes
    ).flatten()
    assert found.tolist() == pytest.approx(CURVES[curve], abs=error)


@pytest.mark.parity
def test_intensities_beyond_the_range_are_those_of_its_ends():
    image = torch.tensor([-1.0, 2.0]).view(1, 1, 2, 1, 1).expand(2, 1, 2, 1, 1)
    found = map_intensity(image, torch.tensor([[0.2, 0.9, 0.7, 0.1]] * 2), increasing=torch.tensor([True, False]))
    assert found.flatten(1).tolist() == [[0, 1], [1, 0]]


def test_an_increasing_map_keeps_the_order_of_intensities_and_both_ends():
    image = torch.linspace(0, 1, 512).view(1, 1, 8, 8, 8).expand(20, 1, 8, 8, 8)
    found = map_intensity(image, noise(20, 4), increasing=torch.ones(20, dtype=torch.bool)).flatten(1)
    assert (found.diff(dim=1) >= 0).all()
    assert (found[:, 0] == 0).all()
    assert (found[:, -1] == 1).all()
    assert found.std(0).max() > 0.1


def looped(image, windows, keys):
    """The shuffle as a loop over crops and windows, with loops over the voxels of each."""
    result, at = image.clone(), 0
    for crop, number in itertools.product(*map(range, windows.side.shape[:2])):
        box = slices(windows, crop, number)
        original = image[crop][:, *box].flatten(1)
        order = sorted(range(original.shape[1]), key=lambda place, at=at: keys[at + place].item())
        shape = result[crop][:, *box].shape
        result[crop][:, *box] = original[:, order].reshape(shape)
        at += original.shape[1]
    return result


def drawn_shuffle(batch, num_windows, size, *, divisor=4):
    windows = shuffle_windows(noise(batch, num_windows, 2, 3), size, divisor=divisor)
    return windows, noise(int(windows.volume().sum()), seed=1, dtype=torch.float64)


def test_the_shuffle_is_that_of_a_loop_over_overlapping_windows_in_order():
    windows, keys = drawn_shuffle(3, 40, (12, 8, 16))
    windows = windows.without(torch.tensor([[False], [True], [False]]))
    keys = keys[: int(windows.volume().sum())]
    image = noise(3, 2, 12, 8, 16, seed=2)
    found = shuffle_in_windows(image, windows, keys)
    assert torch.equal(found, looped(image, windows, keys))
    assert torch.equal(found[1], image[1])
    assert (found[0] != image[0]).float().mean() > 0.1


def test_the_order_of_windows_decides_where_they_overlap():
    start, side = torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([[[1, 1, 3], [1, 1, 2]]])
    image = torch.arange(4.0).view(1, 1, 1, 1, 4)
    keys = torch.tensor([0.5, 0.2, 0.1, 0.9, 0.3], dtype=torch.float64)
    assert shuffle_in_windows(image, Windows(start, side), keys).flatten().tolist() == [1, 0, 0, 3]
    swapped = Windows(start, side.flip(1)), keys[[3, 4, 0, 1, 2]]
    assert shuffle_in_windows(image, *swapped).flatten().tolist() == [2, 1, 0, 3]


def test_rising_keys_leave_all_voxels_in_place():
    windows, keys = drawn_shuffle(2, 30, (16, 16, 16))
    image = noise(2, 1, 16, 16, 16)
    rising = torch.arange(len(keys), dtype=torch.float64) / len(keys)
    assert torch.equal(shuffle_in_windows(image, windows, rising), image)


def test_one_window_is_permuted_and_nothing_else():
    windows, keys = drawn_shuffle(1, 1, (16, 16, 16), divisor=2)
    windows = Windows(windows.start, torch.full_like(windows.side, 5))
    keys, image = noise(125, dtype=torch.float64), noise(1, 1, 16, 16, 16)
    found, box = shuffle_in_windows(image, windows, keys), slices(windows, 0, 0)
    inside = inside_windows(windows, (16, 16, 16))
    assert inside.sum() == 125
    assert torch.equal(found[~inside], image[~inside])
    assert torch.equal(found[0, 0][box].flatten().sort().values, image[0, 0][box].flatten().sort().values)
    assert (found[inside] != image[inside]).sum() > 100


def test_every_order_of_a_window_is_as_likely():
    windows = Windows(torch.zeros(6000, 1, 3, dtype=torch.int64), torch.tensor([[[1, 1, 3]]]).expand(6000, 1, 3))
    image = torch.arange(3.0).view(1, 1, 1, 1, 3).expand(6000, 1, 1, 1, 3)
    found = shuffle_in_windows(image, windows, noise(18000, dtype=torch.float64)).flatten(1)
    counts = (found @ torch.tensor([9.0, 3.0, 1.0])).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 100).all()  # a standard deviation is 29


def test_keys_that_do_not_fit_the_windows_are_refused():
    windows, keys = drawn_shuffle(1, 4, (16, 16, 16))
    with pytest.raises(ValueError, match=f"hold {len(keys)} voxels, there are {len(keys) - 1} keys"):
        shuffle_in_windows(noise(1, 1, 16, 16, 16), windows, keys[1:])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("size", "most", "covered"), [((64, 64, 32), (6, 6, 3), 0.82), ((96, 96, 96), (9, 9, 9), 0.72)]
)
def test_ten_thousand_windows_have_the_sides_of_the_card_and_cover_as_much(size, most, covered):
    windows = shuffle_windows(noise(1, 10_000, 2, 3), size)
    assert [sorted(set(axis)) for axis in windows.side[0].T.tolist()] == [list(range(1, n + 1)) for n in most]
    assert windows.start.amin((0, 1)).tolist() == [0, 0, 0]
    assert (windows.start + windows.side).amax((0, 1)).tolist() == list(size)
    held = torch.zeros(size)
    for number in range(10_000):
        held[slices(windows, 0, number)] = 1
    assert held.mean().item() == pytest.approx(covered, abs=0.01)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("place", "sides", "starts", "share"),
    [
        (inpainted_windows, ((10, 21), (10, 21), (5, 10)), 3, 0.054),
        (kept_windows, ((28, 37), (28, 37), (14, 19)), 3, 0.32),
    ],
)
def test_painted_windows_have_the_ranges_of_the_card_and_fill_as_much(place, sides, starts, share):
    size = (64, 64, 32)
    windows = place(noise(300, MOST_PAINTED, 2, 3), noise(300, MOST_PAINTED, seed=1), size)
    there = windows.volume() > 0
    for axis, (low, high) in enumerate(sides):
        side, start = windows.side[..., axis][there], windows.start[..., axis][there]
        assert (side.min(), side.max()) == (low, high)
        assert start.min() == starts
        assert (start + side).max() == size[axis] - starts
    assert inside_windows(windows, size).float().mean().item() == pytest.approx(share, abs=0.012)


def test_the_first_window_that_fails_ends_the_painting_and_out_painting_keeps_one():
    chance = torch.tensor([[0.1, 0.96, 0.1, 0.1, 0.1], [0.96, 0.1, 0.1, 0.1, 0.1], [0.1] * 5])
    places = noise(3, MOST_PAINTED, 2, 3)
    found = [
        (place(places, chance, (16, 16, 16)).volume() > 0).sum(1).tolist()
        for place in (inpainted_windows, kept_windows)
    ]
    assert found == [[1, 0, 5], [1, 5, 5]]


def test_numbers_next_to_one_stay_in_range():
    last = torch.full((1, 1, 2, 3), 1 - 2**-24)
    windows = shuffle_windows(last, (160, 157, 96))
    assert windows.side.flatten().tolist() == [16, 15, 9]
    assert (windows.start + windows.side).flatten().tolist() == [160, 157, 96]


@pytest.mark.parametrize("place", [inpainted_windows, kept_windows])
def test_crops_too_small_to_paint_are_refused_and_the_smallest_is_not(place):
    draws = noise(50, MOST_PAINTED, 2, 3), noise(50, MOST_PAINTED, seed=1)
    windows = place(*draws, (16, 16, 16))
    there = windows.volume() > 0
    assert windows.start[there].min() == 3
    with pytest.raises(ValueError, match=r"\[64, 15, 64\].* at least 16 voxels; take \[64, 16, 64\]"):
        place(*draws, (64, 15, 64))
    with pytest.raises(ValueError, match="no windows"):
        shuffle_windows(noise(1, 1, 2, 3), (16, 9, 16))


def drawn(image, *, inside, painted=True, mapped=True, device="cpu"):
    """One deformation of each crop."""
    size, batch = image.shape[2:], len(image)
    windows, keys = drawn_shuffle(batch, 200, size)
    place = inpainted_windows if inside else kept_windows
    holes = place(noise(batch, MOST_PAINTED, 2, 3), noise(batch, MOST_PAINTED, seed=1), size)
    draws = Deformation(
        windows,
        keys,
        noise(batch, 4, seed=3),
        noise(batch, seed=4) < 0.5,
        torch.full((batch,), mapped),
        holes.without(torch.full((batch, 1), not painted)),
        torch.full((batch,), inside or not painted),
        noise(*image.shape, seed=5),
    )
    moved = (
        Windows(*(part.to(device) for part in one)) if isinstance(one, Windows) else one.to(device) for one in draws
    )
    return Deformation(*moved)


@pytest.mark.parametrize("inside", [True, False])
def test_painting_puts_noise_into_its_windows_or_around_them(inside):
    image = noise(4, 2, 24, 24, 24, seed=6)
    draws = drawn(image, inside=inside)
    stages = deform(image, draws)
    windows = inside_windows(draws.painted, image.shape[2:]).expand_as(image)
    painted = windows if inside else ~windows
    assert torch.equal(stages.painted[painted], draws.noise[painted])
    assert torch.equal(stages.painted[~painted], stages.mapped[~painted])
    assert 0 < painted.float().mean() < 1


def test_channels_are_deformed_alike_and_painted_with_noise_of_their_own():
    image = noise(2, 1, 24, 24, 24, seed=6).expand(2, 3, 24, 24, 24).contiguous()
    stages = deform(image, drawn(image, inside=False))
    assert torch.equal(stages.mapped[:, 0], stages.mapped[:, 2])
    assert (stages.painted[:, 0] != stages.painted[:, 2]).float().mean() > 0.5


def test_a_crop_for_which_no_step_is_drawn_stays_as_it_is_and_none_is_written_to():
    image = noise(2, 1, 16, 16, 16)
    before = image.clone()
    draws = drawn(image, inside=False, painted=False, mapped=False)
    draws = draws._replace(shuffled=draws.shuffled.without(torch.ones(2, 1, dtype=torch.bool)), keys=draws.keys[:0])
    assert torch.equal(deform(image, draws).painted, before)
    deform(image, drawn(image, inside=True))
    assert torch.equal(image, before)


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [True, False])
def test_equal_draws_give_equal_crops_on_a_gpu(inside):
    image = noise(2, 2, 48, 32, 32)
    here = deform(image, drawn(image, inside=inside)).painted
    there = deform(image.cuda(), drawn(image, inside=inside, device="cuda")).painted
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)
