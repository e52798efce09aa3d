"""The features command, from an encoder and a store to a file."""

import json
import re

import nibabel
import numpy as np
import pytest
import torch

from medssl.building import build_network
from medssl.config import main
from medssl.data.checksums import sealed
from medssl.extraction.feature_file import Features, load_features, read_feature_card
from medssl.extraction.patch_encoder import CellGrid, coordinate_at
from medssl.features import run
from medssl.weights import load_encoder, save_weights

CONDITIONED = {
    "_target_": "medssl.models.conditioned.ConditionedEncoder",
    "widths": [2, 2, 2, 2, 4, 4],
    "rep_dim": 6,
    "num_experts": 2,
    "init": "per_expert",
}
UNET = {"_target_": "medssl.models.unet.UNetEncoder", "in_channels": 1, "widths": [2, 4]}
WINDOW = {"_target_": "medssl.data.augment.Window", "low_hu": -1000, "high_hu": 1000}
NOISE = {"_target_": "medssl.data.augment.GaussianNoise", "std": [0, 0.1]}
SIDES = (24, 20, 22)


def written(path, encoder, *, view):
    """A file of an untrained encoder whose card states one group of views."""
    torch.manual_seed(0)
    group = {"size": [8, 8, 8], "spacing_mm": "native", "outside": -1000, "augment": [WINDOW, NOISE], **view}
    card = {"encoder": encoder, "method": "none", "reading": {"channels": None, "views": {"groups": {"a": group}}}}
    save_weights(path, {"encoder": build_network(encoder)}, card)
    return path


@pytest.fixture
def weights(tmp_path):
    return written(tmp_path / "encoder.safetensors", CONDITIONED, view={"grid": [2, 1, 2], "within": "body"})


@pytest.fixture
def volumes():
    return [np.random.default_rng(seed).integers(-1000, 1000, (1, *SIDES)).astype(np.int16) for seed in range(3)]


@pytest.fixture
def store(make_store, volumes):
    return make_store(*volumes)


def features(*, code=None, **keys):
    words = [f"{key}={value}" for key, value in keys.items()]
    if code is None:
        main("features", run, arguments=["data=store", *words])
    else:
        with pytest.raises(SystemExit) as stop:
            main("features", run, arguments=["data=store", *words])
        assert stop.value.code == code


def patches(volume, centers):
    """Cut by hand: the 8 voxels from 4 before the middle on, rounded, -1000 beyond the volume; -1000..1000 to 0..1."""
    wide = np.pad(volume, [(0, 0), *[(8, 8)] * 3], constant_values=-1000)
    corners = np.floor(np.asarray(centers) - 3.5 + 0.5).astype(int) + 8
    cut = [wide[:, x : x + 8, y : y + 8, z : z + 8] for x, y, z in corners]
    return torch.from_numpy((np.stack(cut).astype(np.float32) + 1000) / 2000)


def grid_centers(*, grid):
    """Centres of equal cells of the body box, which leaves two voxels on each side."""
    size = np.array(SIDES) - 4
    return [(np.array(cell) + 0.5) / grid * size + 1.5 for cell in np.ndindex(*grid)]


def test_a_feature_is_the_encoder_s_at_the_locations_that_it_was_trained_at(weights, store, volumes, tmp_path):
    features(weights=weights, store=store.root, output_dir=tmp_path / "f", batch_size=3)
    found = load_features(tmp_path / "f")
    assert found.case.tolist() == ["case_000", "case_001", "case_002"]
    coordinate = np.array([[-1, 0, -1], [-1, 0, 1], [1, 0, -1], [1, 0, 1]], dtype=np.float32) / 2
    assert np.array_equal(found.coordinate, coordinate)
    network, centers = load_encoder(weights), grid_centers(grid=(2, 1, 2))
    for number, volume in enumerate(volumes):
        with torch.no_grad():
            expected = network(patches(volume, centers), torch.from_numpy(coordinate))[-1].mean((2, 3, 4)).numpy()
        assert found.feature[number] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert found.pooled[number] == pytest.approx(expected.mean(0), rel=1e-4, abs=1e-6)
        assert found.centre_mm[number] == pytest.approx(np.array(centers), abs=1e-5)
    assert found.valid.all()


def test_any_encoder_gives_the_mean_of_its_deepest_map_over_a_grid_of_our_choice(store, volumes, tmp_path):
    path = written(tmp_path / "unet.safetensors", UNET, view={})
    features(weights=path, store=store.root, output_dir=tmp_path / "f", grid="[1,2,1]")
    found, network = load_features(tmp_path / "f" / "features.npz"), load_encoder(path)
    with torch.no_grad():
        expected = network(patches(volumes[1], grid_centers(grid=(1, 2, 1))))[-1].mean((2, 3, 4)).numpy()
    assert found.feature[1] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    features(weights=path, store=store.root, output_dir=tmp_path / "default")
    assert load_features(tmp_path / "default").feature.shape[1] == 27


def derived_table(store, *, hidden):
    """A table of four locations that lies in the store; case 1 does not show `hidden`."""
    folder = store.root / "derived" / "places-0123"
    folder.mkdir(parents=True)
    (folder.parent / "places.json").write_text(json.dumps(sealed({"folder": folder.name, "recipe": {}})))
    centre_mm = np.random.default_rng(5).uniform(6, 14, (4, 3))
    coordinate = np.random.default_rng(6).uniform(-1, 1, (4, 3)).astype(np.float32)
    for number, case in enumerate(store.names):
        valid = ~np.isin(np.arange(4), hidden if number == 1 else [])
        np.savez(folder / f"{case}.npz", centre_mm=centre_mm, coordinate=coordinate, valid=valid)
    return folder, centre_mm, coordinate


def test_locations_of_a_table_that_a_case_does_not_show_are_left_out_of_its_mean(weights, store, volumes, tmp_path):
    _, centre_mm, coordinate = derived_table(store, hidden=[0, 2])
    features(weights=weights, store=store.root, output_dir=tmp_path / "f", locations="places")
    found, network = load_features(tmp_path / "f"), load_encoder(weights)
    assert found.valid.tolist() == [[True] * 4, [False, True, False, True], [True] * 4]
    assert np.isnan(found.feature[1, [0, 2]]).all()
    with torch.no_grad():
        expected = network(patches(volumes[1], centre_mm), torch.from_numpy(coordinate))[-1].flatten(1).numpy()
    assert found.feature[1, [1, 3]] == pytest.approx(expected[[1, 3]], rel=1e-4, abs=1e-6)
    assert found.pooled[1] == pytest.approx(expected[[1, 3]].mean(0), rel=1e-4, abs=1e-6)


def test_cases_without_features_are_named_and_the_others_are_kept(weights, store, tmp_path, capsys):
    folder, *_ = derived_table(store, hidden=[0, 1, 2, 3])
    (folder / "case_002.npz").unlink()
    features(weights=weights, store=store.root, output_dir=tmp_path / "f", locations="places", code=1)
    errors = capsys.readouterr().err
    assert "case_001: it shows none of the locations" in errors
    assert "case_002: it has no table 'places'" in errors
    assert load_features(tmp_path / "f").case.tolist() == ["case_000"]
    assert sorted(read_feature_card(tmp_path / "f")["failed"]) == ["case_001", "case_002"]


def test_cases_of_other_channels_or_with_a_lost_chunk_are_rejected(weights, make_store, volumes, tmp_path, capsys):
    store = make_store(volumes[0], np.concatenate([volumes[1]] * 2), volumes[2])
    for file in (store.folder(2) / "0").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(file.read_bytes()[:-40])
    features(weights=weights, store=store.root, output_dir=tmp_path / "f", code=1)
    errors = capsys.readouterr().err
    assert "case_001: it has 2 channels, the encoder reads 1" in errors
    assert "case_002: it cannot be read from the store" in errors


def test_a_second_run_makes_only_what_is_missing_and_refuses_other_settings(weights, store, tmp_path, capsys):
    keys = {"weights": weights, "store": store.root, "output_dir": tmp_path / "f"}
    features(**keys)
    first = load_features(tmp_path / "f")
    (tmp_path / "f" / "cases" / "case_001.npz").unlink()
    (tmp_path / "f" / "features.npz").unlink()
    capsys.readouterr()
    features(**keys)
    assert "3 subjects (1 new)" in capsys.readouterr().out
    assert np.array_equal(first.feature, load_features(tmp_path / "f").feature)
    features(**keys, grid="[1,1,2]", code=2)
    error = capsys.readouterr().err
    assert "holds features made with another locations" in error
    assert error.count("\n") == 1
    features(**keys, grid="[1,1,2]", overwrite="true")
    assert load_features(tmp_path / "f").feature.shape == (3, 2, 6)


def test_features_of_a_table_that_was_made_anew_are_made_anew(weights, store, volumes, tmp_path, capsys):
    folder, centre_mm, coordinate = derived_table(store, hidden=[])
    keys = {"weights": weights, "store": store.root, "output_dir": tmp_path / "f", "locations": "places"}
    features(**keys)
    first, moved = load_features(tmp_path / "f"), centre_mm + np.array([1, 0, -1])
    np.savez(folder / "case_001.npz", centre_mm=moved, coordinate=coordinate, valid=np.ones(4, bool))
    capsys.readouterr()
    features(**keys)
    assert "3 subjects (1 new)" in capsys.readouterr().out
    again = load_features(tmp_path / "f")
    assert np.array_equal(again.feature[[0, 2]], first.feature[[0, 2]])
    assert again.centre_mm[1] == pytest.approx(moved, abs=1e-5)
    with torch.no_grad():
        expected = load_encoder(weights)(patches(volumes[1], moved), torch.from_numpy(coordinate))[-1].flatten(1)
    assert again.feature[1] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-6)


def test_patches_of_another_size_than_those_of_the_table_are_told_once(weights, store, tmp_path, capsys):
    folder, centre_mm, coordinate = derived_table(store, hidden=[])
    for patch_mm in (8.0, 48.0):
        for case in store.names:
            table = {"centre_mm": centre_mm, "coordinate": coordinate, "patch_mm": np.full(3, patch_mm)}
            np.savez(folder / f"{case}.npz", **table)
        features(weights=weights, store=store.root, output_dir=tmp_path / f"{patch_mm}", locations="places")
        warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert len(warned) == (patch_mm > 8)
    assert "crops of 8 x 8 x 8 mm show locations of the table 'places', whose patches have 48 x 48 x 48 mm" in warned[0]


def test_a_map_holds_the_features_of_patches_at_a_stride(weights, make_store, volumes, tmp_path):
    affine = np.array([[2.0, 0, 0, 10], [0, 2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
    store = make_store(volumes[0], affine=affine)
    features(weights=weights, store=store.root, output_dir=tmp_path / "f", dense="true", stride_voxel="[8,10,11]")
    image = nibabel.load(tmp_path / "f" / "dense" / "case_000.nii.gz")
    assert image.shape == (3, 2, 2, 6)
    middles = [np.array([3.5, 4.5, 5.0]) + np.array(cell) * [8, 10, 11] for cell in np.ndindex(3, 2, 2)]
    assert image.affine @ [2, 1, 0, 1] == pytest.approx(affine @ [*middles[-2], 1])
    # the grid of the card has one cell along y: its coordinate is 0; along x and z -1 to 1 from face to face
    size = np.array(SIDES) - 4
    shares = (np.array(middles) - 1.5) / size
    coordinate = np.clip((shares - 0.5) * 2, -1, 1) * [1, 0, 1]
    with torch.no_grad():
        expected = load_encoder(weights)(patches(volumes[0], middles), torch.tensor(coordinate, dtype=torch.float32))
    assert np.asarray(image.dataobj).reshape(12, 6) == pytest.approx(
        expected[-1].mean((2, 3, 4)).numpy(), rel=1e-4, abs=1e-6
    )


def test_coordinates_between_locations_follow_their_affine_map():
    rng = np.random.default_rng(0)
    centers, points, turned = rng.uniform(0, 100, (9, 3)), rng.uniform(40, 60, (5, 3)), rng.normal(size=(3, 3)) / 400
    found = coordinate_at(points, centers_voxel=centers, coordinate=(centers - 50) @ turned)
    assert found == pytest.approx((points - 50) @ turned, abs=1e-9)
    beyond = coordinate_at(np.full((1, 3), 1e4), centers_voxel=centers, coordinate=(centers - 50) / 50)
    assert beyond.tolist() == [[1.0, 1.0, 1.0]]


def test_cells_cover_a_volume_about_its_middle(store):
    grid = CellGrid.over(store.record(0), np.array([10.0, 20.0, 4.0]))
    assert grid.shape == (3, 1, 6)
    assert grid.centers_voxel.mean(0) == pytest.approx((np.array(SIDES) - 1) / 2)


def test_an_untrained_twin_differs_between_subjects(store, tmp_path):
    path = written(tmp_path / "e.safetensors", {**CONDITIONED, "init": "official"}, view={"grid": [2, 1, 2]})
    for name in ("one", "again"):
        features(weights=path, store=store.root, output_dir=tmp_path / name, untrained=3)
    one, again = load_features(tmp_path / "one"), load_features(tmp_path / "again")
    assert np.array_equal(one.feature, again.feature)
    assert one.pooled.std(0).mean() > 0.01  # 1e-9 with the statistics that a batch norm is born with


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weights": "nothing.safetensors"}, "there is no weight file"),
        ({"grid": "[2,0,2]"}, "grid=.* must be three whole numbers above 0"),
        ({"grid": "[2,2,2]", "locations": "places"}, "not both"),
        ({"locations": "locations"}, "derive what=locations"),
        ({"locations": "nope"}, r"has no table 'nope' for locations=TABLE; it has none\n$"),
        ({"batch_size": 65}, "from 1 to 64"),
        ({"stride_voxel": "[4,4,4]"}, "dense=true"),
        ({"dense": "1"}, "true or false"),
        ({"window_hu": "[5,1]"}, r"window_hu=\[5, 1\] must be two numbers \[low,high\], low below high"),
        ({"window_hu": "[a,b]"}, r"window_hu=\['a', 'b'\] must be two numbers"),
        ({"spacing_mm": "-1"}, "positive"),
        ({"weights.layout": "glmae"}, "give size_voxel, spacing_mm and window_hu"),
    ],
)
def test_a_wrong_setting_is_one_line(weights, store, tmp_path, capsys, keys, message):
    features(**{"weights": weights, "store": store.root, "output_dir": tmp_path / "f", **keys}, code=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_file_that_holds_no_features_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"medssl\.features makes them"):
        load_features(tmp_path)
    np.savez(tmp_path / "features.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="is no file of features"):
        load_features(tmp_path)


def test_features_are_pooled_over_what_a_subject_shows():
    feature = np.array([[[1.0, 2.0], [np.nan, np.nan], [3.0, 6.0]]], dtype=np.float32)
    row = {"feature": feature[0], "valid": np.array([True, False, True]), "centre_mm": np.zeros((3, 3), np.float32)}
    row["voxel_hash"] = "h"
    found = Features.of(["a"], [row], coordinate=np.zeros((3, 3), np.float32))
    assert found.pooled.tolist() == [[2.0, 4.0]]
