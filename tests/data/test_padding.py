"""Padding far from the image: found, left out of statistics, and no cost to grey levels, in fifty drawn variants."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from volume_files import image

from medssl.data.measurements import measure
from medssl.data.modality import guess_modality
from medssl.data.padding import find_padding, shown
from medssl.data.prepare import prepare_store
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.data.volume import Volume, channel_statistics, voxel_hash

LOWEST = float(np.finfo(np.float32).min)
KINDS = (
    ("normalised", np.float32, (-1000.0,)),
    ("normalised", np.float32, (-9999.0,)),
    ("normalised", np.float32, (LOWEST,)),
    ("normalised", np.float32, (-9999.0, -1000.0)),
    ("normalised", np.float64, (-1e30,)),
    ("standardised", np.float32, (-1024.0,)),
    ("mr", np.int32, (-(2**31),)),
    ("mr", np.int16, (-9999,)),
    ("mr", np.int16, (-1000,)),
    ("mr", np.float32, (-9999.0, -9998.0)),
    ("mr", np.uint16, (65535,)),
    ("ct", np.int16, (-9999,)),
    ("ct", np.int16, (-32768,)),
    ("ct", np.float32, (LOWEST,)),
    ("ct", np.float32, (1e6,)),
)


def scan(kind: str, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A smooth body in the middle with the values of a kind of image, noise everywhere."""
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = sum((a / generator.uniform(0.6, 0.8)) ** 2 for a in axes) < 1
    field = gaussian_filter(generator.standard_normal(shape), 2)
    field /= np.abs(field).max()
    noise = generator.standard_normal(shape)
    if kind == "ct":
        return gaussian_filter(np.where(body, 40 + 200 * field, -1000), 0.6) + 10 * noise  # skin is part air
    if kind == "mr":
        return np.abs(np.where(body, 900 + 500 * field, 0) + 15 * noise)
    values = np.abs(np.where(body, 0.6 + 0.4 * field, 0) + 0.01 * noise)
    return values / values.max() if kind == "normalised" else (values - values.mean()) / values.std()


def drawn(number: int) -> tuple[np.ndarray, np.ndarray, dict[float, np.ndarray]]:
    """A scan, the same scan with padding, and the voxels of each value of padding."""
    generator = np.random.default_rng(number)
    kind, dtype, values = KINDS[number % len(KINDS)]
    shape = tuple(int(n) for n in generator.integers(20, 34, 3))
    whole = scan(kind, generator, shape)
    whole = (np.rint(whole) if np.dtype(dtype).kind in "iu" else whole).astype(dtype)
    padded, places, left = whole.copy(), {}, np.ones(shape, bool)
    for value in values:
        axis, depth = int(generator.integers(3)), int(generator.integers(2, 7))
        ends = [slice(None)] * 3
        ends[axis] = slice(0, depth) if generator.random() < 0.5 else slice(-depth, None)
        place = np.zeros(shape, bool)
        place[tuple(ends)] = True
        place &= left
        left &= ~place
        padded[place], places[float(np.asarray(value).astype(dtype))] = value, place
    return whole, padded, places


@pytest.mark.parametrize("number", range(50))
def test_padding_is_found_left_out_and_costs_no_grey_levels(number):
    _, padded, places = drawn(number)
    measured = measure(Volume(padded[None], np.eye(4), "synthetic"))
    found = dict(measured.padding[0])
    assert found == {value: pytest.approx(place.mean()) for value, place in places.items()}
    outside = np.any(list(places.values()), axis=0)
    assert measured.statistics[0] == pytest.approx(channel_statistics(padded[~outside]), rel=1e-9)
    filled = measured.volume.array[0]
    assert (filled[outside] == padded[~outside].min()).all()
    assert np.array_equal(filled[~outside], padded[~outside])
    assert filled.dtype == padded.dtype
    assert measured.modality == (guess_modality(padded[~outside])[0],)


@pytest.mark.parametrize("number", range(0, 50, 5))
def test_half_of_the_grey_levels_of_the_body_survive_in_the_store(number, make_store):
    whole, padded, places = drawn(number)
    outside = np.any(list(places.values()), axis=0)
    body = (whole > np.median(whole)) & ~outside

    def levels(array):
        store = make_store(array[None])
        return len(np.unique(store.read(0, 0, [0] * 3, array.shape).result()[0][body]))

    filled = measure(Volume(padded[None], np.eye(4), "")).volume.array[0]
    assert levels(filled) >= 0.5 * levels(whole)


def blob(array: np.ndarray, value: float, side: int) -> np.ndarray:
    """The array with a cube of one value in its middle."""
    array = array.copy()
    array[tuple(slice(n // 2 - side // 2, n // 2 + side // 2) for n in array.shape)] = value
    return array


@pytest.mark.parametrize("number", range(50))
def test_metal_air_and_a_black_background_are_no_padding(number):
    generator = np.random.default_rng(1000 + number)
    shape = tuple(int(n) for n in generator.integers(20, 34, 3))
    ct, mr = scan("ct", generator, shape), scan("mr", generator, shape)
    outside = ct < -500
    exact_air = np.where(outside, -1000 if number % 2 else -1024, ct)
    for array in (
        blob(ct.round().astype(np.int16), 3071, int(generator.integers(4, 14))),
        blob(ct.astype(np.float32), 30000, int(generator.integers(4, 14))),
        exact_air.round().astype(np.int16),
        exact_air.astype(np.float32),
        np.where(outside, 0, mr).astype(np.float32),
        np.where(outside, 0, mr + 500).round().astype(np.uint16),
        blob(mr.round().astype(np.uint16), 65535, 6),
        np.where(outside, -1000, np.where(ct > 60, 300, 40)).astype(np.int16),  # a drawing of three values
    ):
        assert find_padding(array) == ()


@pytest.mark.parametrize("number", range(50))
def test_an_mr_filled_like_air_is_no_ct_whatever_its_range_and_its_negative_voxels(number):
    generator = np.random.default_rng(number)
    gain = float(generator.choice([0.5, 1, 4]))
    mr = gain * scan("mr", generator, tuple(int(n) for n in generator.integers(20, 34, 3)))
    mr[generator.random(mr.shape) < 0.01] = -generator.uniform(10, 60)  # as a spline overshoots
    fill = float(generator.choice([-1000, -1024]))
    mr[: int(generator.integers(2, 7))] = fill
    measured = measure(Volume(mr.astype(np.float32)[None], np.eye(4), "synthetic"))
    if measured.modality == ("mr",):
        assert [value for value, _ in measured.padding[0]] == [fill]
        assert measured.statistics[0]["minimum"] > -100
    else:
        assert measured.modality == ("unknown",)
        assert measured.doubts
    for stated in ("mr", "pet"):
        told = measure(Volume(mr.astype(np.float32)[None], np.eye(4), "synthetic"), setting=stated)
        assert [value for value, _ in told.padding[0]] == [fill]


def test_air_of_a_stated_ct_stays_whatever_surrounds_it():
    brain = np.abs(scan("mr", np.random.default_rng(0), (24, 24, 24))) / 20  # 0 to 80 HU, all else removed
    brain[:5] = -1000
    assert [value for value, _ in find_padding(brain)] == [-1000]
    assert find_padding(brain, is_ct=True) == ()


def test_a_prepared_store_holds_the_padding_of_each_channel_and_the_hash_of_the_voxels_as_read(tmp_path):
    _, padded, places = drawn(0)
    (value, place), *_ = places.items()
    both = np.stack([padded, scan("mr", np.random.default_rng(1), padded.shape).astype(np.float32)], axis=-1)
    image(tmp_path / "in" / "a.nii.gz", both)
    prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", channels="all", num_workers=0, progress=False)
    record = VolumeStore(tmp_path / "s").record(0)
    assert record.padding == (((value, pytest.approx(place.mean())),), ())
    assert record.statistics[0]["minimum"] == pytest.approx(padded[~place].min())
    assert record.voxel_hash == voxel_hash(np.moveaxis(both, -1, 0))
    assert shown(record.padding) == f"channel 0: -1000 ({100 * place.mean():.3g} %)"


def test_resampling_keeps_padding_out_of_the_statistics(tmp_path):
    _, padded, places = drawn(1)
    image(tmp_path / "in" / "a.nii.gz", padded)
    source = Folder(root=tmp_path / "in")
    prepare_store(source, tmp_path / "s", spacing_mm=1.3, num_workers=0, progress=False)
    record = VolumeStore(tmp_path / "s").record(0)
    assert dict(record.padding[0]).keys() == places.keys()
    assert 0 <= record.statistics[0]["minimum"] < record.statistics[0]["maximum"] <= 1.0
    inside = padded[~next(iter(places.values()))]
    assert record.statistics[0]["p5"] == pytest.approx(np.percentile(inside, 5), abs=0.02)
