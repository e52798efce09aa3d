from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from synthetic import classes_of_grey, reading, smooth
from torch import nn

from medssl.data.augment import ByModality, MinMax, Percentiles, Standardise, Window
from medssl.data.description import write_description
from medssl.data.store import VolumeStore
from medssl.data.store_writer import write_case, write_index
from medssl.data.volume import Box, Volume, intensity_statistics
from medssl.inference.reading import Reading
from medssl.inference.record import fetch_from, record_of
from medssl.inference.working_grid import WorkingImage
from medssl.segmentation.segment import Averaged, Member, NotFiniteError, segment, segment_stored, segment_volume
from medssl.segmentation.sliding_window import SlidingWindow

AFFINE = np.diag([0.9, 1.1, 2.5, 1.0])


def _segmented(array, how, predict=None, **options):
    record = record_of(Volume(array, AFFINE, "synthetic"))
    return segment_volume(predict or classes_of_grey(), array, record, how, num_classes=3, **options)


def _context_network(num_classes=3, channels=1, seed=0):
    """A small network whose output at a voxel depends on its neighbours."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, num_classes, 3, padding=1))


class Halves(nn.Module):
    """Labels what lies right of, in front of and above the body's middle: by location alone."""

    takes_coordinate = True

    def forward(self, image, coordinate):
        beyond = torch.stack([coordinate[:, axis] > 0 for axis in range(3)], dim=1).all(1)
        return 9.0 * torch.stack([~beyond, beyond], dim=1)


@pytest.mark.parametrize("flips", [(), (0, 2)])
def test_a_network_that_takes_locations_is_told_where_each_voxel_of_a_window_lies(flips):
    array = smooth((30, 21, 26))
    record = record_of(Volume(array, AFFINE, ""))
    member = Member(Averaged([Halves(), Halves()], flips=flips), reading("native", (12, 8, 10)))
    found = segment([member], fetch_from(array), record, num_classes=2)
    expected = np.zeros((30, 21, 26), np.uint8)
    expected[15:, 11:, 13:] = 1
    assert np.array_equal(found, expected)
    mixed = Averaged([Halves(), _context_network(num_classes=2)], flips=flips)
    assert segment([Member(mixed, reading("native", (12, 8, 10)))], fetch_from(array), record, num_classes=2).any()


@pytest.mark.parametrize("spacing_mm", ["native", (1.5, 1.5, 2.0), (0.7, 1.1, 4.0), (6.0, 5.0, 9.0)])
def test_classes_are_those_of_probabilities_predicted_at_once_and_interpolated_to_the_voxels(spacing_mm):
    array = smooth((30, 21, 26))
    network = _context_network()
    how = reading(spacing_mm, (12, 8, 10))
    record = record_of(Volume(array, AFFINE, ""))
    image = WorkingImage(record, how, fetch_from(array), torch.device("cpu"))
    drawn = image.layer(0, image.grid.frame.shape[2])
    whole = SlidingWindow((12, 8, 10))(how.normaliser(record)(drawn[None])[0], Averaged([network]))
    points = np.stack(np.meshgrid(*[image.grid.positions(axis) for axis in range(3)], indexing="ij"))
    expected = np.stack([map_coordinates(one.numpy().astype(float), points, order=1) for one in whole])
    probabilities = np.empty((3, *array.shape[1:]), np.float16)
    found = _segmented(array, how, Averaged([network]), probabilities=probabilities)
    np.testing.assert_allclose(probabilities, expected, atol=1e-3)
    assert (found == expected.argmax(0)).mean() > 0.9999
    assert np.array_equal(found, _segmented(array, how, Averaged([network])))
    assert found.dtype == np.uint8


def test_the_prediction_does_not_depend_on_the_windows_where_the_network_looks_at_single_voxels():
    array = smooth((30, 21, 26))
    expected = np.argmin([np.abs(array[0] - middle) for middle in (-1000, 0, 1000)], axis=0)
    for window, overlap, batch in (((8, 8, 8), 0.5, 3), ((30, 21, 26), 0.0, 1), ((40, 10, 40), 0.3, 2)):
        found = _segmented(array, reading("native", window), overlap=overlap, window_batch=batch)
        assert (found == expected).mean() > 0.9999


def _store(root, array):
    write_description(root, {})
    record = write_case(
        root, case="one", volume=Volume(array, AFFINE, ""), label=None, modality="ct", group="", split="",
        statistics=intensity_statistics(array), body=Box.whole(array.shape[1:]),
        points=np.full((1, 4), -1, dtype=np.int32), voxel_hash="", source="",
    )  # fmt: skip
    write_index(root, [record])
    return VolumeStore(root)


@pytest.mark.parametrize("spacing_mm", ["native", (1.5, 1.5, 2.0)])
def test_a_stored_case_and_a_volume_in_memory_give_the_same(tmp_path, spacing_mm):
    array = smooth((40, 30, 26)).round().astype(np.int16)
    how = reading(spacing_mm, outside="minimum", normalise=(ByModality(), Percentiles(low=1, high=99)))
    predict = Averaged([_context_network()])
    probabilities = [np.empty((3, 40, 30, 26), np.float16) for _ in range(2)]
    stored = segment_stored(predict, _store(tmp_path, array), 0, how, num_classes=3, probabilities=probabilities[0])
    assert np.array_equal(stored, _segmented(array, how, predict, probabilities=probabilities[1]))
    np.testing.assert_array_equal(*probabilities)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("with_probabilities", [False, True])
def test_an_output_that_is_not_finite_is_an_error_that_names_the_case(tmp_path, with_probabilities, wrong):
    array = smooth((24, 20, 18)).round().astype(np.int16)

    def predict(windows):
        found = classes_of_grey()(windows)
        found[-1, 1, 2, 3, 4] = wrong
        return found

    probabilities = np.empty((3, 24, 20, 18), np.float16) if with_probabilities else None
    store, how = _store(tmp_path, array), reading((1.5, 1.5, 2.0), (8, 8, 8))
    with pytest.raises(ValueError, match=r"not finite for case one; its training diverged: lower optimizer\.lr"):
        segment_stored(predict, store, 0, how, num_classes=3, probabilities=probabilities)
    with pytest.raises(NotFiniteError, match="for case synthetic"):
        _segmented(array, how, predict, probabilities=probabilities)


def test_windows_are_normalised_as_views_of_training_are():
    array = np.stack([smooth((9, 8, 7), seed=n)[0] for n in range(2)])
    record = record_of(Volume(array, AFFINE, ""))
    windows = torch.from_numpy(np.stack([array, array / 3 + 7]))
    scaled = reading(normalise=(Window(low_hu=-500, high_hu=500, out=(-1, 1)),)).normaliser(record)(windows.clone())
    torch.testing.assert_close(scaled, (windows / 500).clamp(-1, 1))
    ranged = reading(normalise=(MinMax(),)).normaliser(record)(windows.clone())
    assert torch.equal(ranged.amin((2, 3, 4)), torch.zeros(2, 2))
    torch.testing.assert_close(ranged.amax((2, 3, 4)), torch.ones(2, 2))
    both = reading(normalise=(MinMax(), Standardise())).normaliser(record)(windows.clone())
    torch.testing.assert_close(both.mean((2, 3, 4)), torch.zeros(2, 2), atol=1e-5, rtol=0)


def test_a_stop_that_is_asked_for_ends_it_between_two_windows():
    told = []
    stopped = _segmented(
        smooth((24, 24, 24)),
        reading("native", (8, 8, 8)),
        on_window=lambda done, total: told.append((done, total)),
        should_stop=lambda: len(told) == 3,
        window_batch=2,
    )
    assert stopped is None
    assert told == [(2, 125), (4, 125), (6, 125)]


def test_every_window_is_told():
    told = []
    _segmented(smooth((24, 24, 24)), reading((1.8, 2.2, 5.0), (8, 8, 8)), on_window=lambda *n: told.append(n))
    assert told[-1] == (told[-1][1],) * 2


def test_flips_and_networks_are_averaged():
    networks, windows = [_context_network(seed=n) for n in range(2)], torch.rand(2, 1, 5, 6, 7)
    total, count = torch.zeros(2, 3, 5, 6, 7), 0
    for network in networks:
        for x, y, z in product((False, True), repeat=3):
            dims = [2 + axis for axis, flip in enumerate((x, y, z)) if flip]
            total += network(windows.flip(dims)).flip(dims).softmax(1).detach()
            count += 1
    assert count == 16
    torch.testing.assert_close(Averaged(networks, flips=(0, 1, 2))(windows), total / 16)
    single = Averaged(networks[:1], flips=(1,))(windows)
    expected = (networks[0](windows).softmax(1) + networks[0](windows.flip(3)).flip(3).softmax(1)) / 2
    torch.testing.assert_close(single, expected.detach())


def test_mixed_precision_gives_float32_close_to_full_precision():
    network, windows = _context_network(), torch.rand(1, 1, 6, 6, 6)
    found = Averaged([network], dtype=torch.bfloat16)(windows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Averaged([network])(windows), atol=0.02, rtol=0)


def test_mixed_precision_of_the_caller_is_for_the_network_alone():
    array, how, seen = smooth((24, 20, 18)), reading((1.5, 1.5, 2.0), (8, 8, 8)), []

    def predict(windows):
        seen.append((windows.dtype, (torch.ones(2, 2) @ torch.ones(2, 2)).dtype))
        return classes_of_grey()(windows)

    found = [np.empty((3, 24, 20, 18), np.float16) for _ in range(2)]
    _segmented(array, how, predict, probabilities=found[0])
    with torch.autocast("cpu", torch.bfloat16):
        _segmented(array, how, predict, probabilities=found[1])
        assert Averaged([nn.Conv3d(1, 3, 1)])(torch.rand(1, 1, 2, 2, 2)).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32), (torch.float32, torch.bfloat16)}
    np.testing.assert_array_equal(*found)


def test_members_with_readings_of_their_own_are_averaged_on_the_grid_of_the_image():
    array = smooth((26, 22, 20))
    record = record_of(Volume(array, AFFINE, ""))
    members = [
        Member(Averaged([_context_network(seed=0)]), reading((1.5, 1.5, 2.0), (8, 8, 8)), weight=2.0),
        Member(Averaged([_context_network(seed=1)]), reading("native", (12, 12, 12), outside="minimum")),
    ]
    single = [np.empty((3, 26, 22, 20), np.float16) for _ in members]
    for member, out in zip(members, single, strict=True):
        segment([member], fetch_from(array), record, num_classes=3, probabilities=out)
    together = np.empty((3, 26, 22, 20), np.float16)
    classes = segment(members, fetch_from(array), record, num_classes=3, probabilities=together)
    expected = (2 * single[0].astype(float) + single[1]) / 3
    np.testing.assert_allclose(together, expected, atol=1e-3)
    assert (classes == expected.argmax(0)).mean() > 0.99  # float16 makes ties
    assert np.array_equal(classes, segment(members, fetch_from(array), record, num_classes=3))


@pytest.mark.gpu
def test_cpu_and_gpu_give_the_same():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    array, how = smooth((40, 30, 26)), reading((1.5, 1.5, 2.0))
    network, found = _context_network(), []
    for device in ("cpu", "cuda"):
        probabilities = np.empty((3, 40, 30, 26), np.float16)
        classes = _segmented(array, how, Averaged([network.to(device)]), device=device, probabilities=probabilities)
        found.append((classes, probabilities))
    np.testing.assert_allclose(found[0][1], found[1][1], atol=2e-3)
    assert (found[0][0] == found[1][0]).mean() > 0.999


def test_a_card_gives_the_reading():
    normalise = {"_target_": "medssl.data.augment.ByModality", "window_hu": [-175, 250], "out": [-1, 1]}
    card = {"channels": "all", "spacing_mm": [1.5, 1.5, 2], "crop_voxel": [96, 96, 64], "outside": "minimum"}
    found = Reading.from_card({**card, "normalise": [normalise]})
    expected = Reading(
        spacing_mm=(1.5, 1.5, 2.0),
        crop_voxel=(96, 96, 64),
        outside="minimum",
        normalise=(ByModality(window_hu=[-175, 250], out=[-1, 1]),),
        channels="all",
    )
    assert found == expected
    assert found.modality is None
    for modality, expected in (("ct", ("ct",)), (["ct", "pet"], ("ct", "pet")), (None, None)):
        changed = Reading.from_card({**card, "spacing_mm": "native", "normalise": [], "modality": modality})
        assert (changed.spacing_mm, changed.modality) == ("native", expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outside": None}, "lacks outside"),
        ({"spacing_mm": "coarse"}, "native or three numbers"),
        ({"modality": "xray"}, "modality of the card's reading: 'xray' is no modality; allowed are ct, mr, pet"),
        ({"normalise": [{"_target_": "medssl.data.augment.GaussianNoise"}]}, "GaussianNoise, which is no"),
        ({"normalise": [{"_target_": "os.system", "command": "true"}]}, "outside medssl.data.augment"),
    ],
)
def test_a_card_that_cannot_be_read_by_is_refused(change, message):
    card = {"channels": None, "spacing_mm": "native", "crop_voxel": [8, 8, 8], "outside": "minimum", "normalise": []}
    card = {key: value for key, value in {**card, **change}.items() if key == "channels" or value is not None}
    with pytest.raises(ValueError, match=message):
        Reading.from_card(card)


def test_flips_along_axes_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="0 \\(x\\)"):
        Averaged([_context_network()], flips=(0, 3))
    with pytest.raises(ValueError, match="at least one"):
        Averaged([])
