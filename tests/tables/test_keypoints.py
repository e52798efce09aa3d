import csv
import json

import numpy as np
import pytest
import torch

from medssl.config import main
from medssl.data.reading import read_volume
from medssl.data.store import VolumeStore
from medssl.derive import run as run_derive
from medssl.models.keypoints import DifferenceOfGaussians, Foerstner, RandomPoints
from medssl.tables.derived import derive, folder_of, table_of
from medssl.tables.keypoints import KeypointTables, body_mask

SHAPE, SPACING_MM = (44, 40, 20), (1.0, 1.0, 2.0)
BLOBS_MM = np.array([[14.2, 20.0, 19.1], [30.0, 12.5, 17.0], [22.3, 29.8, 22.9]])
DETECTOR = DifferenceOfGaussians(value_range=(0, 1))


def affine():
    matrix = np.diag([*SPACING_MM, 1.0])
    matrix[:3, 3] = (-10.0, 5.0, 30.0)
    return matrix


def blob_volume(*, places_mm=BLOBS_MM, width_mm=3.0):
    """Bright balls with soft edges, distances in mm: round in space, flat in voxels."""
    grid = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(SHAPE, SPACING_MM, strict=True)), indexing="ij"))
    square = [((grid - place[:, None, None, None]) ** 2).sum(0) for place in places_mm]
    bright = sum((np.exp(-s / (2 * width_mm**2)) for s in square), start=np.zeros(SHAPE))
    return np.rint(400 * bright - 160)[None].astype(np.int16)


@pytest.fixture
def store(make_store):
    return make_store(blob_volume(), blob_volume(places_mm=BLOBS_MM[:1]), blob_volume()[:, ::-1], affine=affine())


def tables(store, derivation):
    derive(store.root, derivation, num_workers=0, progress=False)
    return [dict(table_of(VolumeStore(store.root), derivation, case)) for case in range(len(store))]


def test_blobs_of_anisotropic_voxels_are_found_in_level_0_voxels_with_their_width_in_mm(store):
    first, second, _ = tables(store, KeypointTables(detector=DETECTOR, num_points=16))
    assert first["points_voxel"].shape == (16, 3)
    assert first["points_voxel"].dtype == first["features"].dtype == np.float32
    strong = first["features"][:, 1] < -0.05
    assert strong.sum() == 3
    found_mm = first["points_voxel"][strong] * SPACING_MM
    distance = np.linalg.norm(found_mm[:, None] - BLOBS_MM, axis=2)
    assert distance.min(0).max() < 0.4
    assert first["features"][strong, 0] == pytest.approx([3.0 * np.sqrt(2 / 3) / 1.13 * 1.01] * 3, rel=0.15)
    assert (second["features"][:, 1] < -0.05).sum() == 1


def test_missing_keypoints_are_not_a_number_and_the_strongest_come_first(store):
    whole = tables(store, KeypointTables(detector=DETECTOR, num_points=64))[0]
    known = np.isfinite(whole["features"][:, 0])
    count = known.sum()
    assert 3 <= count < 64
    assert known[:count].all()
    assert np.isnan(whole["points_voxel"][count:]).all()
    assert np.isnan(whole["features"][count:]).all()
    assert (np.diff(np.abs(whole["features"][:count, 1])) <= 0).all()
    few = tables(store, KeypointTables(detector=DETECTOR, num_points=2))[0]
    assert np.array_equal(few["points_voxel"], whole["points_voxel"][:2])


def test_coarser_copies_find_the_same_blobs(store):
    for spacing_mm in (0.5, 1.5, 2.0):
        table = tables(store, KeypointTables(detector=DETECTOR, num_points=8, spacing_mm=spacing_mm))[0]
        strong = np.nan_to_num(table["features"][:, 1]) < -0.05
        distance = np.linalg.norm(table["points_voxel"][strong][:, None] * SPACING_MM - BLOBS_MM, axis=2)
        assert distance.min(0).max() < 0.5


def test_the_command_writes_a_quality_table_and_a_picture(store, capsys):
    arguments = ["what=keypoints", f"store={store.root}", "num_workers=0", "what.num_points=8"]
    main("derive", run_derive, arguments=arguments)
    told = capsys.readouterr().out
    assert "3 tables (3 new)" in told
    assert "mean quality: points " in told
    pointer = json.loads((store.root / "derived" / "keypoints.json").read_text())
    folder = store.root / "derived" / pointer["folder"]
    assert pointer["recipe"]["detector"] == {
        "_target_": "medssl.models.keypoints.DifferenceOfGaussians",
        "sigma0": 0.8,
        "levels_per_octave": 3,
        "contrast": 0.04,
        "edge_ratio": 10.0,
        "border": 3,
        "refine": True,
        "neighbourhood": "full",
        "num_octaves": None,
        "value_range": [0, 1],
    }
    with (folder / "quality.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["case", "points", "full", "sigma_mm", "weakest"]
    assert float(rows[0]["weakest"]) >= 0.04 / 3
    assert (folder / "keypoints.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*partial*"))


def test_a_volume_that_shows_nothing_has_a_table_without_keypoints(make_store):
    store = make_store(np.full((1, 24, 24, 24), -1000, np.int16))
    derivation = KeypointTables(detector=DETECTOR, num_points=4)
    table = tables(store, derivation)[0]
    assert np.isnan(table["points_voxel"]).all()
    assert derivation.quality(table) == pytest.approx(
        {"points": 0, "full": 0, "sigma_mm": np.nan, "weakest": np.nan}, nan_ok=True
    )


def test_full_tables_are_told_and_keypoints_may_be_kept_to_the_body(make_store):
    array = np.full((1, 40, 40, 40), -1000, np.int16)
    array[:, 6:34, 6:34, 6:34] = 100 * np.random.default_rng(0).standard_normal((1, 28, 28, 28))
    array[:, 0:4, 0:4, 0:4] = 200  # something beside the body
    store = make_store(array)
    derivation = KeypointTables(detector=DETECTOR, num_points=100_000, within="volume")
    everywhere = tables(store, derivation)[0]["points_voxel"]
    inside = tables(store, KeypointTables(detector=DETECTOR, num_points=100_000, within="body"))[0]["points_voxel"]
    inside = inside[np.isfinite(inside[:, 0])]
    assert 8 < len(inside) <= np.isfinite(everywhere[:, 0]).sum()
    assert ((inside > 2) & (inside < 37)).all()
    full = derive(store.root, KeypointTables(detector=DETECTOR, num_points=5), num_workers=0, progress=False)
    assert "1 of 1 tables are full" in full.report


def test_the_mask_of_the_body_has_the_grid_of_its_volume(make_store):
    from medssl.data.volume import Volume

    array = np.full((1, 41, 38, 23), -1000, np.int16)
    array[:, 8:32, 8:32, 4:20] = 0
    mask = body_mask(Volume(array, np.eye(4), ""), modality="ct")
    assert mask.shape == (41, 38, 23)
    assert mask[12:28, 12:28, 8:16].all()
    assert not mask[:4].any()
    assert not mask[-4:].any()


def test_other_detectors_have_tables_of_their_own_and_random_points_differ_between_cases(store):
    folders = {
        folder_of(store.root, KeypointTables(detector=detector, num_points=9))
        for detector in (DETECTOR, DifferenceOfGaussians(), Foerstner(), RandomPoints(), RandomPoints(seed=1))
    }
    assert len(folders) == 5
    first, second, _ = tables(store, KeypointTables(detector=RandomPoints(), num_points=9))
    assert not np.array_equal(first["points_voxel"], second["points_voxel"])
    again = tables(store, KeypointTables(detector=RandomPoints(), num_points=9))[0]
    assert np.array_equal(first["points_voxel"], again["points_voxel"])


def test_the_command_takes_random_points_without_a_range(store, capsys):
    detector = ["what.detector._target_=medssl.models.keypoints.RandomPoints", "~what.detector.value_range"]
    few = ["num_workers=0", "what.num_points=8"]
    main("derive", run_derive, arguments=["what=keypoints", f"store={store.root}", *few, *detector])
    recipe = json.loads((store.root / "derived" / "keypoints.json").read_text())["recipe"]
    assert recipe["detector"] == {"_target_": "medssl.models.keypoints.RandomPoints", "seed": 0}
    assert "3 tables (3 new)" in (told := capsys.readouterr().out)
    assert "points 8, full 1," in told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("what.within=head", "what.within must be volume or body"),
        ("what.num_points=0", "what.num_points=0 must be at least 1"),
        ("what.spacing_mm=0", "what.spacing_mm=0 positive"),
        ("what.window_hu=[240,-160]", "low_hu must be below high_hu"),
        ("what.detector._target_=medssl.tables.derived.Body", "value_range"),
        ("+what.detector.sigma0=0.2", "sigma0 must exceed 0.5"),
    ],
)
def test_mistakes_are_one_line(store, capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        main("derive", run_derive, arguments=["what=keypoints", f"store={store.root}", option])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_real_scan_has_keypoints_inside_it(make_store, real_data):
    volume = read_volume(real_data / "mr_abdomen" / "mr_slab_3mm.nii.gz")
    store = make_store(volume.array, affine=volume.affine, modality="mr")
    derivation = KeypointTables(detector=DETECTOR, num_points=512)
    table = tables(store, derivation)[0]
    quality = derivation.quality(table)
    assert 40 < quality["points"] < 512
    assert 2.4 < quality["sigma_mm"] < 6.0
    known = table["points_voxel"][np.isfinite(table["points_voxel"][:, 0])]
    assert ((known >= 2) & (known <= np.array(volume.shape) - 3)).all()
    assert torch.tensor(table["features"][:1]).isfinite().all()
