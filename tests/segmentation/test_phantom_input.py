"""A scan that is drawn where none is at hand."""

from pathlib import Path

import nibabel
import numpy as np

from medssl.phantoms.torso import draw_phantom
from medssl.segmentation.phantom_input import drawn_phantom


def test_a_phantom_is_drawn_with_its_labels_and_any_other_input_is_left_alone(tmp_path):
    path = drawn_phantom(Path("phantom:40"), tmp_path)
    volume, label = draw_phantom(40)
    image = nibabel.load(path)
    assert path == tmp_path / "phantoms" / "images" / "phantom_0040.nii.gz"
    assert np.array_equal(np.asanyarray(image.dataobj), volume.array[0])
    assert np.allclose(image.affine, volume.affine)
    truth = nibabel.load(tmp_path / "phantoms" / "labels" / "phantom_0040.nii.gz")
    assert np.array_equal(np.asanyarray(truth.dataobj), label)
    assert drawn_phantom(Path("scan.nii.gz"), tmp_path) == Path("scan.nii.gz")
