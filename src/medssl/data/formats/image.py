"""The header and the voxels of any image, by the format that its name or folder says."""

from pathlib import Path

from medssl.data.formats.base import NIFTI_SUFFIXES, Header, Load, ReadError
from medssl.data.formats.dicom import open_series
from medssl.data.formats.itk import open_itk
from medssl.data.formats.nifti import open_nifti


def open_image(path: Path) -> tuple[Header, Load]:
    """Return the header of an image file or of the DICOM series in a folder, and the function that loads its voxels.

    Raises:
        ReadError: The file is not an image, its voxel type is not supported, or its header claims what it cannot hold.
    """
    if path.is_dir():
        return open_series(path)
    if not path.exists():
        raise ReadError(path, "the file does not exist")
    if path.stat().st_size == 0:
        raise ReadError(path, "the file is empty (0 bytes)")
    return (open_nifti if path.name.lower().endswith(NIFTI_SUFFIXES) else open_itk)(path)
