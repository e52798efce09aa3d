"""Files whose headers state no spacing: rejected, or read with the spacing that is given for them."""

import nibabel
import numpy as np
import pytest

from medssl.config import compose
from medssl.data.prepare import PrepareError, prepare_store
from medssl.data.recipes import preparation, store_recipe
from medssl.data.sources import Csv, Folder
from medssl.data.store import VolumeStore
from medssl.inference.files import read_image
from medssl.segmentation.settings import PredictSettings

NO_SPACING = "the header states no spacing; data.assume_spacing_mm=[x,y,z] lets it in"
QUIET = {"num_workers": 0, "progress": False}


@pytest.fixture
def root(tmp_path):
    """A folder with an image that states a spacing, and an image and a label map that state none."""
    folder = tmp_path / "in"
    folder.mkdir()
    array = np.random.default_rng(0).integers(-500, 500, (10, 11, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([0.5, 0.6, 0.7, 1])), folder / "stated.nii")
    for name, voxels in (("bare", array), ("bare_label", (array > 0).astype(np.float32))):
        raw = bytearray(nibabel.Nifti1Image(voxels, None).to_bytes())
        raw[80:92] = bytes(12)  # pixdim 1 to 3
        (folder / f"{name}.nii").write_bytes(raw)
    return folder


def test_a_store_holds_them_only_where_a_spacing_is_assumed(root, tmp_path):
    with pytest.raises(PrepareError, match="the header states no spacing") as caught:
        prepare_store(Folder(root=root), tmp_path / "a", **QUIET)
    assert NO_SPACING in str(caught.value)
    prepare_store(Folder(root=root), tmp_path / "b", **QUIET, assume_spacing_mm=[2, 3, 4])
    spacings = {record.case: record.spacing_mm for record in VolumeStore(tmp_path / "b").records()}
    assert spacings["bare"] == pytest.approx((2, 3, 4))
    assert spacings["stated"] == pytest.approx((0.5, 0.6, 0.7))


def test_it_holds_for_labels_too_and_one_number_means_all_axes(root, tmp_path):
    (root / "list.csv").write_text("image,label\nbare.nii,bare_label.nii\n")
    with pytest.raises(PrepareError, match="the header states no spacing"):
        prepare_store(Csv(root=root / "list.csv"), tmp_path / "a", **QUIET)
    prepare_store(Csv(root=root / "list.csv"), tmp_path / "b", **QUIET, assume_spacing_mm=1.5)
    (record,) = VolumeStore(tmp_path / "b").records()
    assert record.spacing_mm == pytest.approx((1.5, 1.5, 1.5))


def test_the_recipe_names_it_only_where_it_is_given(root):
    source = Folder(root=root)
    assert "assume_spacing_mm" not in store_recipe(source)
    assert store_recipe(source, assume_spacing_mm=2)["assume_spacing_mm"] == [2.0, 2.0, 2.0]
    for name in ("folder", "csv", "decathlon", "nnunet", "btcv", "amos"):
        data = compose("prepare", [f"data={name}", "data.root=x"]).data
        assert "assume_spacing_mm" not in preparation(data)
        data = compose("prepare", [f"data={name}", "data.root=x", "data.assume_spacing_mm=[1,2,3]"]).data
        assert preparation(data)["assume_spacing_mm"] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"data\.assume_spacing_mm takes one or three positive numbers, or null; got"):
        store_recipe(source, assume_spacing_mm=[1, 2])


def test_the_unit_of_the_header_does_not_touch_it(root):
    raw = bytearray((root / "bare.nii").read_bytes())
    raw[123] = 3  # xyzt_units: micrometres
    (root / "bare.nii").write_bytes(raw)
    assert read_image(root / "bare.nii", assume_spacing_mm=(2.0, 3.0, 4.0)).volume.spacing_mm == pytest.approx(
        (2, 3, 4)
    )


def test_a_prediction_lies_where_its_image_was_assumed_to_lie(root):
    file = read_image(root / "bare.nii", assume_spacing_mm=(2.0, 3.0, 4.0))
    np.testing.assert_allclose(file.header.get_best_affine(), file.affine)
    np.testing.assert_allclose(np.abs(np.diag(file.affine)), [2, 3, 4, 1])


def test_predict_takes_it_from_its_configuration(root, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"1")
    given = [f"weights.path={tmp_path}/w.safetensors", f"input={root}", f"output_dir={tmp_path}/out"]
    assert PredictSettings.of(compose("predict", given)).assume_spacing_mm is None
    config = compose("predict", [*given, "data.assume_spacing_mm=[1,2,3.5]"])
    assert PredictSettings.of(config).assume_spacing_mm == (1.0, 2.0, 3.5)
