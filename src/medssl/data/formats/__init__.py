"""Image file formats: the header as the file states it, and a function that loads voxels in the file's order.

Other rooms import from here; the files of this folder import from each other.
"""

from medssl.data.formats.base import (
    ARCHIVES,
    IMAGE_SUFFIXES,
    NIFTI_SUFFIXES,
    PICTURES,
    Header,
    Load,
    ReadError,
    has_image_suffix,
    is_other_kind,
    size_text,
    stem,
)
from medssl.data.formats.claims import MAX_VOXELS, NO_PERMISSION, irregularity
from medssl.data.formats.dicom_files import dicom_class, has_dicom_suffix, is_dicom, is_image_class
from medssl.data.formats.image import open_image
from medssl.data.formats.parts import other_parts
from medssl.data.formats.reasons import NO_MEMORY, reasons_for

__all__ = [
    "ARCHIVES",
    "IMAGE_SUFFIXES",
    "MAX_VOXELS",
    "NIFTI_SUFFIXES",
    "NO_MEMORY",
    "NO_PERMISSION",
    "PICTURES",
    "Header",
    "Load",
    "ReadError",
    "dicom_class",
    "has_dicom_suffix",
    "has_image_suffix",
    "irregularity",
    "is_dicom",
    "is_image_class",
    "is_other_kind",
    "open_image",
    "other_parts",
    "reasons_for",
    "size_text",
    "stem",
]
