import json

import numpy as np
import pytest
import zarr

from medssl.data.store import VolumeStore, read_case_record
from medssl.data.store_writer import write_index


def _noise(shape=(1, 40, 36, 32), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def test_integers_come_back_exactly_and_boxes_are_the_slices(noise_store):
    array = _noise()
    np.testing.assert_array_equal(noise_store.read(0, 0, (0, 0, 0), (40, 36, 32)).result(), array)
    np.testing.assert_array_equal(noise_store.read(0, 0, (3, 5, 7), (33, 36, 9)).result(), array[:, 3:33, 5:36, 7:9])
    label = noise_store.read_label(0, (3, 5, 7), (33, 36, 9)).result()
    np.testing.assert_array_equal(label[0] > 0, array[0, 3:33, 5:36, 7:9] > 500)


def test_real_numbers_are_quantised_to_half_a_step(make_store):
    array = np.random.default_rng(0).normal(0, 1e-4, (2, 12, 12, 12)).astype(np.float32)
    store = make_store(array)
    record = store.record(0)
    values = record.values(store.read(0, 0, (0, 0, 0), (12, 12, 12)).result())
    for channel in range(2):
        assert np.abs(values - array)[channel].max() <= 0.51 * record.slope[channel]
        assert record.slope[channel] == pytest.approx(np.ptp(array[channel]) / 65535)


def test_channels_of_different_ranges_keep_their_own_resolution(make_store):
    generator = np.random.default_rng(0)
    array = np.stack([generator.uniform(0, 1, (12,) * 3), generator.uniform(0, 5e4, (12,) * 3)]).astype(np.float32)
    store = make_store(array)
    values = store.record(0).values(store.read(0, 0, (0, 0, 0), (12, 12, 12)).result())
    assert np.abs(values[0] - array[0]).max() < 1e-5
    assert np.abs(values[1] - array[1]).max() < 0.5


def test_whole_numbers_of_sixteen_bits_are_exact_wherever_they_begin(make_store):
    array = np.random.default_rng(0).integers(0, 60000, (1, 12, 12, 12)).astype(np.uint16)
    store = make_store(array)
    stored = store.read(0, 0, (0, 0, 0), (12, 12, 12)).result()
    np.testing.assert_array_equal(store.record(0).values(stored), array)


def test_one_hot_voxel_does_not_cost_the_resolution_of_the_others(make_store):
    array = np.random.default_rng(0).normal(0, 300, (1, 16, 16, 16)).astype(np.float32)
    array[0, 3, 3, 3] = 1e7
    store = make_store(array)
    values = store.record(0).values(store.read(0, 0, (0, 0, 0), (16, 16, 16)).result())
    assert np.sort(np.abs(values - array).ravel())[-2] < 0.3
    assert values.max() == values[0, 3, 3, 3]


def test_large_integers_beyond_int16_are_quantised(make_store):
    array = np.arange(12**3, dtype=np.int32).reshape(1, 12, 12, 12) * 100
    store = make_store(array)
    record = store.record(0)
    values = record.values(store.read(0, 0, (0, 0, 0), (12, 12, 12)).result())
    assert np.abs(values - array).max() <= 0.51 * record.slope[0]


def test_zarr_python_reads_the_case_as_an_ome_zarr_group(make_store):
    array = _noise((1, 130, 70, 40))
    store = make_store(array, labels=[(array[0] > 0).astype(np.int32)], affine=np.diag([1.0, 1.5, 4.0, 1.0]))
    group = zarr.open_group(store.folder(0), mode="r")
    scales = group.attrs["ome"]["multiscales"][0]
    assert [axis["name"] for axis in scales["axes"]] == ["c", "x", "y", "z"]
    assert {axis.get("unit") for axis in scales["axes"][1:]} == {"millimeter"}
    np.testing.assert_array_equal(group["0"][:], array)
    assert group["1"].shape == (1, 65, 35, 40)  # z is coarser than 1.5 times x: not halved
    assert scales["datasets"][1]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1, 2, 3, 4]},
        {"type": "translation", "translation": [0, 0.5, 0.75, 0]},
    ]
    np.testing.assert_array_equal(group["labels/segmentation/0"][0], array[0] > 0)
    assert group["labels"].attrs["ome"]["labels"] == ["segmentation"]


def test_equal_input_gives_equal_bytes(make_store, tmp_path):
    first = {p.name: p.read_bytes() for p in make_store(_noise()).root.rglob("*") if p.is_file()}
    (tmp_path / "store").rename(tmp_path / "other")
    second = {p.name: p.read_bytes() for p in make_store(_noise()).root.rglob("*") if p.is_file()}
    assert first == second
    assert not list((tmp_path / "store").glob(".*")), "no temporary file is left"


def test_records_survive_the_index_and_the_case_folder(noise_store):
    record = noise_store.record(2)
    assert record == read_case_record(noise_store.folder(2))
    assert record.labels == (1, 2, 3)
    assert record.body.size.tolist() == [36, 32, 28]
    assert len(noise_store) == 4
    assert [r.case for r in noise_store.records()] == [f"case_{n:03d}" for n in range(4)]


def test_the_index_is_sorted_whatever_the_order_of_writing(noise_store):
    before = (noise_store.root / "index.jsonl").read_bytes()
    write_index(noise_store.root, list(noise_store.records())[::-1])
    assert (noise_store.root / "index.jsonl").read_bytes() == before


def test_opening_parses_no_record(noise_store, monkeypatch):
    """What makes a store of 100,000 cases open at once; scripts/bench_data.py measures it."""
    line = (noise_store.root / "index.jsonl").read_text().splitlines()[0]
    (noise_store.root / "index.jsonl").write_text((line + "\n") * 5000)
    parsed = []
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads: parsed.append(1) or loads(text))
    store = VolumeStore(noise_store.root)
    assert len(store) == 5000
    assert len(parsed) == 1, "store.json alone"
    assert store.record(4999).case == "case_000"
    assert len(parsed) == 2


def test_what_is_not_a_store_is_said_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"is not a medssl store.*medssl\.prepare"):
        VolumeStore(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(ValueError, match="is not finished"):
        VolumeStore(tmp_path)


def test_missing_labels_and_derived_tables_name_what_to_run(make_store):
    store = make_store(_noise())
    with pytest.raises(ValueError, match=r"case_000 .* has no label"):
        store.read_label(0, (0, 0, 0), (2, 2, 2))
    with pytest.raises(ValueError, match="derive what=keypoints"):
        store.derived("keypoints", 0)


def test_values_that_are_clipped_when_they_are_stored_are_a_doubt(make_store):
    array = np.random.default_rng(0).random((1, 40, 36, 32)).astype(np.float32)
    assert make_store(array).record(0).doubts == ()
    array[0, 20, 20, 20] = 60.0
    (doubt,) = make_store(array).record(0).doubts
    assert doubt.startswith("values of ")
    assert " to 60 are stored as " in doubt
