"""From a file through a resampled grid and back into the file's own place."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, inv_ornt_aff
from synthetic import index_channels, oracle, reading

from medssl.data.volume import Volume
from medssl.inference.files import read_image, slices_of, write_nifti
from medssl.inference.record import record_of
from medssl.phantoms.torso import LABELS, draw_phantom
from medssl.segmentation.segment import segment_volume

ORIENTATIONS = [
    np.array([axes, flips]).T for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)
]  # fmt: skip
LEAST_VOXELS = 2000
TISSUES = [LABELS[name] for name in ("body", "fat", "muscle")]  # sheets between the organs


def _dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def _blocks(shape):
    """Labels 0 to 5 in blocks that no turn or flip maps onto themselves."""
    x, y, z = (axis // 4 for axis in index_channels(shape).astype(int))
    return (x + 2 * y * y + 3 * z * x) % 6


@pytest.mark.parametrize(
    "spacing_mm", ["native", pytest.param((1.0, 1.0, 1.0), marks=pytest.mark.slow), (2.9, 0.7, 4.1)]
)
def test_all_48_orientations_come_back_into_their_own_place(tmp_path, spacing_mm):
    shape = (18, 15, 12)
    label, image = _blocks(shape), index_channels(shape)
    affine = np.diag([1.5, 0.8, 2.4, 1.0])
    affine[:3, 3] = -7, 3, 11
    seen, alone = set(), None
    for orientation in ORIENTATIONS:
        turned = apply_orientation(np.moveaxis(image, 0, -1), orientation)
        own = affine @ inv_ornt_aff(orientation, shape)
        nibabel.save(nibabel.Nifti1Image(turned, own), tmp_path / "scan.nii")
        file = read_image(tmp_path / "scan.nii", channels="all")
        classes = segment_volume(
            oracle(label, num_classes=6),
            file.volume.array,
            record_of(file.volume),
            reading(spacing_mm, window=(10, 10, 10), normalise=()),
            num_classes=6,
        )
        assert classes is not None
        write_nifti(
            tmp_path / "found.nii.gz",
            slices_of(file.in_file_order(classes)),
            like=file,
            shape=file.shape,
            dtype=np.dtype(np.uint8),
        )
        result = nibabel.load(tmp_path / "found.nii.gz")
        found, expected = np.asarray(result.dataobj), apply_orientation(label, orientation)
        assert found.shape == turned.shape[:3]
        np.testing.assert_array_equal(result.affine, nibabel.load(tmp_path / "scan.nii").affine)
        alone = classes if alone is None else alone
        np.testing.assert_array_equal(found, apply_orientation(alone, orientation))
        if spacing_mm == "native":
            np.testing.assert_array_equal(found, expected)
        seen.add(nibabel.aff2axcodes(result.affine))
    assert len(seen) == 48


FINE = [(False, (0.8, 0.8, 0.8)), (True, (0.6, 1, 0.5)), (True, (0.97, 0.95, 0.96)), (True, (1, 0.9, 1))]
COARSE = [(False, (1.3, 1.5, 1.4)), (True, (1.5, 1.5, 1)), (True, (1.3, 1.5, 1.4))]


@pytest.fixture(scope="module")
def phantom():
    return draw_phantom(3, size_voxel=(88, 80, 72), spacing_mm=2.0)


@pytest.mark.parametrize(("thick", "ratio", "least"), [(*c, 0.98) for c in FINE] + [(*c, 0.90) for c in COARSE])
def test_organs_of_a_phantom_come_back_from_another_spacing(phantom, thick, ratio, least):
    volume, label = phantom
    affine = volume.affine
    if thick:  # every second slice: an anisotropic scan
        label, affine = np.ascontiguousarray(label[:, :, ::2]), affine @ np.diag([1, 1, 2, 1.0])
    image = Volume(index_channels(label.shape), affine, "")
    num_classes = int(label.max()) + 1
    found = segment_volume(
        oracle(label, num_classes=num_classes),
        image.array,
        record_of(image),
        reading(
            tuple(float(s * r) for s, r in zip(image.spacing_mm, ratio, strict=True)),
            window=(48, 48, 48),
            normalise=(),
        ),
        num_classes=num_classes,
    )
    organs = {value: label == value for value in range(1, num_classes) if value not in TISSUES}
    large = {value: organ for value, organ in organs.items() if np.count_nonzero(organ) > LEAST_VOXELS}
    assert len(large) == 7
    scores = {value: _dice(found == value, organ) for value, organ in large.items()}
    assert min(scores.values()) >= least, scores
