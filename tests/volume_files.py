"""Small NIfTI files for tests of sources and stores, and what a scan or a folder holds."""

from pathlib import Path

import nibabel
import numpy as np

from medssl.data.prepare import LOOKS


def image(path, array=None, *, shape=(10, 11, 12), seed=0, affine=None):
    """Write an image, of noise where no array is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if array is None:
        array = np.random.default_rng(seed).integers(-500, 500, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return array


def label(path, shape=(10, 11, 12), value=1.0, dtype=np.uint8):
    """Write a label map with one cube."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(shape, dtype)
    array[2:5, 2:5, 2:5] = value
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return array


def names(scan):
    """The names of the cases that were found."""
    return [case.case for case in scan.cases]


def reasons(scan):
    """The files that were set aside, and why."""
    return {(Path(p["file"]).name, p["reason"]) for p in scan.problems}


def tree(root):
    """All files below with their bytes, hidden ones included but for the looks at the source, which name its times."""
    files = (f for f in sorted(Path(root).rglob("*")) if f.is_file() and f.name != LOOKS)
    return {str(f.relative_to(root)): f.read_bytes() for f in files}
