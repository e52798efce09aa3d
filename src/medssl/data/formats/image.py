"""The header and the voxels of any image, by the format that its name or folder says."""

from pathlib import Path

from medssl.data.formats.base import IMAGE_SUFFIXES, ITK_SUFFIXES, Header, Load, ReadError, Spacing
from medssl.data.formats.claims import check_readable
from medssl.data.formats.dicom import open_dicom
from medssl.data.formats.dicom_files import has_dicom_suffix, is_dicom
from medssl.data.formats.itk import open_itk
from medssl.data.formats.nifti import open_nifti


def open_image(path: Path, *, assume_spacing_mm: Spacing | None = None) -> tuple[Header, Load]:
    """Return the header of an image file or of the DICOM series in a folder, and the function that loads its voxels.

    Args:
        path: Image file, or folder of a DICOM series.
        assume_spacing_mm: Spacing along the axes of the file where its header states none.

    Raises:
        ReadError: The file is not an image, its voxel type is not supported, its header states no spacing, or it
            claims what the file or the memory cannot hold.
    """
    check_readable(path)
    name = path.name.lower()
    if path.is_dir():
        return open_dicom(path, assumed=assume_spacing_mm)
    if name.endswith(ITK_SUFFIXES):
        return open_itk(path, assumed=assume_spacing_mm)
    if name.endswith((*IMAGE_SUFFIXES, ".img")):
        return open_nifti(path, assumed=assume_spacing_mm)
    if has_dicom_suffix(path) or is_dicom(path):
        return open_dicom(path, assumed=assume_spacing_mm)
    kinds = f"{' '.join(IMAGE_SUFFIXES)} and DICOM can be read"
    raise ReadError(path, f"files that end in {path.suffix or 'nothing'} are not read; {kinds}")
