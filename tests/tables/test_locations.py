"""The derived table `locations`: a phantom, itself moved, noise, and the files of an atlas."""

import csv
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medssl.config import main
from medssl.data.geometry import apply, rotation_matrix
from medssl.data.placements import GridCrop
from medssl.data.prepare import prepare_store
from medssl.data.scene import Request, Scene
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.derive import run
from medssl.phantoms.torso import draw_phantom
from medssl.tables.anchors import AnchorTable
from medssl.tables.derived import Derivation, derive
from medssl.tables.locations import AnatomicalLocations
from medssl.tables.registration import Coarse, resampled

SIZES = {"patch_voxel": 8, "step_voxel": 6, "spacing_mm": 12.0, "copy_spacing_mm": 12.0}
TRUTH = np.eye(4)
TRUTH[:3, :3] = rotation_matrix(np.deg2rad([6, -5, 8])) @ np.diag([1.1, 0.9, 1.15])
TRUTH[:3, 3] = (30, -20, 10)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Files of a phantom, of the same one after TRUTH, and of noise."""
    folder = tmp_path_factory.mktemp("images")
    volume, _ = draw_phantom(3, size_voxel=(32, 32, 32), spacing_mm=12.0)
    hu = volume.array[0].copy()
    hu[..., :2] = hu[..., -2:] = -1000
    grid = volume.affine.copy()
    grid[:3, 3] -= 60
    empty = Coarse(np.zeros((42, 42, 42), np.float32), np.zeros((42, 42, 42), bool), grid)
    source = Coarse((hu + 1024).astype(np.float32), hu > -300, volume.affine)
    other = np.rint(resampled(source, empty, np.linalg.inv(TRUTH))) - 1024
    noise = np.random.default_rng(0).integers(-1000, 1000, (32, 32, 32))
    for name, array, affine in (
        ("moved", other, grid),
        ("noise", noise, volume.affine),
        ("person", hu, volume.affine),
    ):
        nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), affine), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def root(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("locations") / "store"
    prepare_store(Folder(root=images), root, num_workers=0, progress=False)
    return root


@pytest.fixture(scope="module")
def derivation():
    return AnatomicalLocations(reference="person", **SIZES)


@pytest.fixture(scope="module")
def summary(root, derivation):
    assert isinstance(derivation, Derivation)
    return derive(root, derivation, num_workers=0, progress=False)


@pytest.fixture
def tables(root, summary):
    return {file.stem: dict(np.load(file)) for file in sorted(summary.folder.glob("*.npz"))}


def test_locations_lie_at_the_same_anatomy_in_a_moved_subject(tables, summary):
    person, moved = tables["person"], tables["moved"]
    assert np.array_equal(person["reference_to_subject"], np.eye(4))
    anchors = AnchorTable.load(summary.folder / "reference" / "anchors.npz")
    assert np.array_equal(person["centre_mm"], anchors.centre_mm)
    error = np.linalg.norm(moved["centre_mm"] - apply(TRUTH, person["centre_mm"]), axis=1)
    assert error.mean() < 4
    assert moved["centre_mm"] == pytest.approx(apply(moved["reference_to_subject"], person["centre_mm"]))
    assert float(moved["inverse_error_mm"]) < 5
    assert str(moved["provider"]) == "reference_affine"
    assert not moved["is_fallback"]
    assert moved["valid"].all()


def test_all_cases_have_the_same_locations_coordinates_and_neighbours(tables):
    number = len(tables["person"]["coordinate"])
    assert number > 20
    for table in tables.values():
        assert table["centre_mm"].shape == (number, 3)
        assert table["coordinate"].dtype == np.float32
        assert np.array_equal(table["coordinate"], tables["person"]["coordinate"])
        assert np.array_equal(table["neighbours"], tables["person"]["neighbours"])
        assert np.abs(table["coordinate"]).max() == 1
        assert table["neighbours"].dtype == np.int64
        assert table["valid"].dtype == bool


def test_a_subject_that_fails_the_check_takes_the_body_box_and_is_listed_with_the_reason(tables, summary):
    noise = tables["noise"]
    assert noise["is_fallback"]
    assert str(noise["provider"]) == "body_box"
    linear = noise["reference_to_subject"][:3, :3]
    assert np.array_equal(linear, np.diag(np.diag(linear))), "the map of boxes has no rotation"
    assert "1 of 3 failed the check (more than 10 mm off" in summary.report
    assert f"noise: {noise['problem']}; uses body_box instead" in summary.report
    assert "moved:" not in summary.report
    assert summary.report in str(summary)


def test_the_quality_table_and_the_picture_lie_beside_the_tables(summary):
    with (summary.folder / "quality.csv").open(newline="") as stream:
        rows = {row.pop("case"): row for row in csv.DictReader(stream)}
    assert list(rows["noise"]) == ["score", "inverse_error_mm", "volume_ratio", "fallback", "valid", "cut"]
    assert [rows[case]["fallback"] for case in ("moved", "noise", "person")] == ["0.0", "1.0", "0.0"]
    assert rows["person"]["inverse_error_mm"] == "nan", "the reference is not registered"
    others = [float(rows[case]["inverse_error_mm"]) for case in ("moved", "noise")]
    assert summary.mean_quality["inverse_error_mm"] == pytest.approx(np.mean(others))
    assert (summary.folder / "locations.png").read_bytes()[:4] == b"\x89PNG"
    assert str(summary.folder / "locations.png") in summary.report


def test_a_missing_table_is_made_again_alone_and_ends_in_the_same_bytes(root, derivation, summary):
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in summary.folder.glob("*.npz")}
    (summary.folder / "moved.npz").unlink()
    (summary.folder / ".moved.npz.1.partial").write_bytes(b"half")
    assert derive(root, derivation, num_workers=0, progress=False).num_new == 1
    for name, (content, time_ns) in before.items():
        file = summary.folder / name
        assert file.read_bytes() == content
        assert name == "moved.npz" or file.stat().st_mtime_ns == time_ns
    assert not list(summary.folder.glob(".*.partial"))


def test_views_are_cut_where_the_table_says(root, summary, tables):
    store = VolumeStore(root)
    scene = Scene(store, Request(cases=(store.names.index("moved"),), sample=0, location=5))
    crop = GridCrop(table="locations", size=[8, 8, 8], spacing_mm=12.0)
    placed = crop.place(scene, {}, np.random.default_rng(0))[0]
    middle_mm = apply(scene.record(0).volume_to_mm, placed.frame.center)
    assert np.abs(middle_mm - tables["moved"]["centre_mm"][5]).max() <= 6.01
    assert placed.coordinate == tuple(tables["moved"]["coordinate"][5].tolist())


def test_the_reference_is_the_case_with_the_median_body_and_all_tables_rest_on_it(root):
    store = VolumeStore(root)
    auto = AnatomicalLocations(provider="body_box", **SIZES)
    volumes = [np.prod(r.body.size * r.spacing_mm) for r in store.records()]
    assert auto.reference_case(store) == volumes.index(np.median(volumes))
    assert auto.rests_on(store, 0) == [auto.reference_case(store)]
    with pytest.raises(ValueError, match="neither an image file nor a case"):
        AnatomicalLocations(reference="nobody").reference_case(store)


def test_a_file_as_reference_gives_what_the_case_gives_and_its_content_is_in_the_recipe(root, images, tmp_path):
    file = tmp_path / "someone.nii.gz"
    file.write_bytes((images / "person.nii.gz").read_bytes())
    by_file = AnatomicalLocations(provider="body_box", reference=str(file), **SIZES)
    by_case = AnatomicalLocations(provider="body_box", reference="person", **SIZES)
    tables = [each(VolumeStore(root), 0) for each in (by_file, by_case)]
    assert tables[0]["centre_mm"] == pytest.approx(tables[1]["centre_mm"])
    recipe = by_file.recipe()
    file.write_bytes((images / "moved.nii.gz").read_bytes())
    assert by_file.recipe() != recipe
    assert by_file.rests_on(VolumeStore(root), 0) == []


def test_a_raw_grid_maps_volume_to_volume_whatever_they_show(root):
    raw = AnatomicalLocations(provider="raw_grid", reference="person", roi="volume", **SIZES)
    assert raw.recipe()["provider"] == "raw_grid"
    store = VolumeStore(root)
    table = raw(store, store.names.index("moved"))
    person, moved = (store.record(store.names.index(name)) for name in ("person", "moved"))
    ends = [apply(r.volume_to_mm, np.array([[-0.5] * 3, [n - 0.5 for n in r.shape]])) for r in (person, moved)]
    assert apply(table["reference_to_subject"], ends[0]) == pytest.approx(ends[1])
    assert np.isnan(table["inverse_error_mm"])
    assert not table["is_fallback"]


def test_the_body_box_says_whose_bodies_are_cut_at_both_ends(tmp_path):
    (tmp_path / "in").mkdir()
    for name, part in (("whole", slice(None)), ("slab", slice(8, 24))):
        volume, _ = draw_phantom(3, size_voxel=(32, 32, 32), spacing_mm=12.0)
        hu = volume.array[0].copy()
        hu[..., :2] = hu[..., -2:] = -1000
        affine = volume.affine
        nibabel.save(nibabel.Nifti1Image(hu[..., part], affine), tmp_path / "in" / f"{name}.nii.gz")
    prepare_store(Folder(root=tmp_path / "in"), tmp_path / "store", num_workers=0, progress=False)
    box = AnatomicalLocations(provider="body_box", reference="whole", **SIZES)
    report = derive(tmp_path / "store", box, num_workers=0, progress=False).report
    assert "reaches both the first and the last slice of 1 that use body_box" in report
    assert "\n  slab\n" in report


ATLAS_TO_MM = np.array([[-12.0, 0, 0, 186], [0, 12, 0, -186], [0, 0, 12, -186], [0, 0, 0, 1]])
HALF_MM = np.array([-42.0, 42, 42])
"""From the first voxel of a patch of 8 to its middle, in the axis order of the released atlas."""


def lungs():
    """Two lungs (50 and 100) with a flat floor."""
    grid = np.stack(np.meshgrid(*[np.arange(32.0)] * 3, indexing="ij"), axis=-1)
    right, left = (np.linalg.norm((grid - c) / [5, 7, 15], axis=-1) < 1 for c in ([9, 16, 10], [22, 17, 10]))
    above = grid[..., 2] > 8 - 0.3 * grid[..., 1] + 0.1 * grid[..., 0]
    return ((50 * right + 100 * left) * above).astype(np.int16)


@pytest.fixture
def atlas(tmp_path):
    """An atlas in the layout of the released one, with patches of 8 voxels."""
    folder = tmp_path / "atlas"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(lungs(), ATLAS_TO_MM), folder / "atlas_lung_mask.nii.gz")
    np.save(folder / "atlas_patch_loc.npy", np.array([[0, 6, 6], [6, 6, 6], [12, 6, 0], [12, 12, 12]]))
    return {"provider": "official_atlas", "reference": str(folder), "patch_voxel": 8}


def test_an_atlas_with_files_of_ants_gives_its_own_rows_and_coordinates(root, atlas, tmp_path):
    (tmp_path / "ants").mkdir()
    flip = np.diag([-1.0, -1, 1, 1])
    for case, matrix in {"person": np.eye(4), "moved": TRUTH, "noise": np.diag([3.0, 1, 1, 1])}.items():
        transform = sitk.AffineTransform(3)
        lps = flip @ matrix @ flip
        transform.SetMatrix(lps[:3, :3].ravel().tolist())
        transform.SetTranslation(lps[:3, 3].tolist())
        sitk.WriteTransform(transform, str(tmp_path / "ants" / f"{case}_Reg_Atlas_Affine_0GenericAffine.mat"))
    official = AnatomicalLocations(**atlas, transforms=str(tmp_path / "ants"), patch_anchor="corner")
    summary = derive(root, official, num_workers=0, progress=False)
    store = VolumeStore(root)
    person, moved, noise = (store.derived("locations", store.names.index(n)) for n in ("person", "moved", "noise"))
    corner = apply(ATLAS_TO_MM, np.array([6.0, 6, 6]))
    assert person["centre_mm"][1] == pytest.approx(np.add(corner, HALF_MM))
    assert moved["centre_mm"][1] == pytest.approx(np.add(apply(TRUTH, corner), HALF_MM))
    assert person["coordinate"].tolist() == [[1, 0, 0], [0, 0, 0], [-1, 0, -1], [-1, 1, 1]], "RAS"
    assert not noise["valid"].any(), "nothing to fall back on"
    assert str(noise["provider"]) == "none"
    assert "noise: volumes change by a factor of 3.00; all its locations are invalid" in summary.report
    (tmp_path / "ants" / "moved_Reg_Atlas_Affine_0GenericAffine.mat").unlink()
    with pytest.raises(ValueError, match=r"no file for 1 of 3 cases \(moved\); a file is called CASE\.mat"):
        derive(root, official, num_workers=0, progress=False)


def test_the_mask_of_an_atlas_lies_where_its_own_file_says_beside_given_anchors(root, atlas, tmp_path):
    (tmp_path / "masks").mkdir()
    image = nibabel.Nifti1Image((lungs() // 50).astype(np.uint8), ATLAS_TO_MM)
    for case in ("person", "moved", "noise"):
        nibabel.save(image, tmp_path / "masks" / f"{case}.nii.gz")
    fine = ATLAS_TO_MM @ np.diag([0.5, 0.5, 0.5, 1])
    anchors = AnchorTable.of_corners(np.array([[20, 20, 16], [30, 24, 20]]), fine, patch_voxel=16)
    anchors.save(tmp_path / "anchors.npz")
    given = {**atlas, "masks": str(tmp_path / "masks"), "anchors": str(tmp_path / "anchors.npz")}
    table = AnatomicalLocations(**given)(VolumeStore(root), 0)
    assert table["centre_mm"] == pytest.approx(anchors.centre_mm, abs=1), "equal masks need no motion"
    assert table["patch_mm"] == pytest.approx([96, 96, 96])
    anchors = AnchorTable.of_corners(
        np.array([[20, 20, 16]]), fine + np.array([[0, 0, 0, 900]] * 3 + [[0] * 4]), patch_voxel=16
    )
    anchors.save(tmp_path / "anchors.npz")
    with pytest.raises(ValueError, match=r"no anchor lies in the reference atlas_lung_mask\.nii\.gz"):
        AnatomicalLocations(**given)(VolumeStore(root), 0)


def test_an_atlas_with_lung_masks_registers_them(root, atlas, tmp_path):
    (tmp_path / "masks").mkdir()
    for case, matrix in (("moved", TRUTH), ("noise", np.diag([1.3, 1.3, 1.3, 1]))):
        image = nibabel.Nifti1Image((lungs() // 50).astype(np.uint8), matrix @ ATLAS_TO_MM)
        nibabel.save(image, tmp_path / "masks" / f"{case}.nii.gz")
    official = AnatomicalLocations(**atlas, masks=str(tmp_path / "masks"), max_volume_ratio=1.5)
    store = VolumeStore(root)
    table, failed = (official(store, store.names.index(case)) for case in ("moved", "noise"))
    corners = np.array([[0, 6, 6], [6, 6, 6], [12, 6, 0], [12, 12, 12]]) + 3.5
    truth = apply(TRUTH @ ATLAS_TO_MM, corners)
    assert np.linalg.norm(table["centre_mm"] - truth, axis=1).mean() < 4
    assert not table["is_fallback"]
    assert str(failed["provider"]) == "body_box", "the box of the mask"
    assert failed["reference_to_subject"] == pytest.approx(np.diag([1.3, 1.3, 1.3, 1]), abs=1e-5)


def test_the_command_derives_by_short_words_and_lists_what_failed(root):
    words = [f"what.{name}={value}" for name, value in SIZES.items()]
    command = [sys.executable, "-m", "medssl.derive", "what=locations", "provider=body_box", "reference=person", *words]
    done = subprocess.run([*command, f"store={root}", "num_workers=0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference person: " in done.stdout
    assert "inverse_error_mm nan" in done.stdout, "nothing was registered"
    assert "picture of the worst: " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["provider=magic"], "provider is 'magic', allowed are reference_affine, body_box, raw_grid, official_atlas"),
        (["reference=nobody"], "reference=nobody is neither an image file nor a case of"),
        (["what.coordinate=max"], "what.coordinate is 'max', allowed are auto, minmax, official_max"),
        (["what.patch_voxel=999"], "a patch of 999 fits into more than that only"),
        (["what.spacing_mm=0"], "what.spacing_mm must be positive"),
        (["what.spacing_mm=abc"], "what.spacing_mm must be "),
        (["what.min_shown=nan"], "what.min_shown must be a number, got nan"),
        (["what.patch_voxel=16.5"], "what.patch_voxel must be "),
        (["what.step_voxel=true"], "what.step_voxel must be a whole number from 1 up, got True"),
        (["what.max_anchors=1.5"], "what.max_anchors must be "),
        (["what.anchors=none.npz"], "what.anchors: there is no file none.npz"),
        (["what.masks=nowhere"], "what.masks=nowhere is no folder"),
        (["provider=official_atlas", "reference=nowhere"], "an atlas is a folder with atlas_patch_loc.npy"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(root, capsys, words, message):
    arguments = ["what=locations", f"store={root}", "num_workers=0", "provider=body_box", *words]
    with pytest.raises(SystemExit) as stop:
        main("derive", run, arguments=arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert message in error[-1]
