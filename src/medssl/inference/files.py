"""The files of inference: images to predict, and NIfTI files that lie exactly where the image lies."""

import contextlib
import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from medssl.data.atomic import whole_file
from medssl.data.cases import Scan, case_names, file_name
from medssl.data.formats import NIFTI_SUFFIXES, has_image_suffix, is_dicom, open_image, reasons_for, stem
from medssl.data.reading import read_volume
from medssl.data.sources import Folder
from medssl.data.volume import Volume

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

MIN_SIDE_VOXEL = 2
"""Thin slabs are predicted; a single slice is no volume."""
COMPRESSION = 4


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image as it was read, with the geometry that places a segmentation exactly on it.

    Args:
        path: File, or folder of a DICOM series.
        volume: The voxels of the image in canonical RAS.
        affine: The map from voxel index of the file to RAS mm.
        header: NIfTI header with the geometry of the file.
    """

    path: Path
    volume: Volume
    affine: Float[np.ndarray, "4 4"]
    header: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The sides as the file states them, without the axis of channels."""
        shape = tuple(int(n) for n in self.header.get_data_shape())
        return shape if all(n == 1 for n in shape[3:]) else shape[:3]

    def in_file_order(self, array: Shaped[np.ndarray, "x y z"]) -> Shaped[np.ndarray, "x2 y2 z2"]:
        """Return an array of the volume's grid with its axes flipped and permuted to those of the file; no copy."""
        from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

        canonical = [[0, 1], [1, 1], [2, 1]]
        return apply_orientation(array, ornt_transform(canonical, io_orientation(self.affine)))


@dataclass(frozen=True)
class Input:
    """An image to predict: the name of its results, and its path."""

    name: str
    path: Path
    skip_label_maps: bool = False


def read_image(path: Path, *, channels: str | int | None = None, skip_label_maps: bool = False) -> ImageFile:
    """Return the image in a file or in the DICOM series of a folder.

    Raises:
        LabelMapError: The image looks like a label map.
        ReadError: The image cannot be used; the reason says why.
    """
    import nibabel

    volume = read_volume(path, channels=channels, min_side_voxel=MIN_SIDE_VOXEL, skip_label_maps=skip_label_maps)
    with reasons_for(path):
        found = open_image(path)[0]
        if path.name.lower().endswith(NIFTI_SUFFIXES) and path.is_file():
            header = nibabel.load(path).header.copy()
        else:
            header = nibabel.Nifti1Header()
            header.set_data_shape(found.shape)
            header.set_qform(found.affine, code=1, strip_shears=True)
            header.set_sform(found.affine, code=1)
            header.set_xyzt_units("mm")
    return ImageFile(path, volume, found.affine, header)


def find_inputs(path: Path, output_dir: Path, *, include_labels: bool = False) -> tuple[list[Input], Scan]:
    """Return the images that `input=PATH` means, and the scan that found them: what was skipped, what cannot be read.

    If `output_dir` lies below the folder, nothing in it is an input.

    Raises:
        ValueError: There is nothing to predict, or results would lie among the inputs.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"input={path} does not exist")
    if path.is_file():
        if not has_image_suffix(path):
            folder = f"; DICOM slices are given by their folder, {path.parent}" if is_dicom(path) else ""
            raise ValueError(f"input={path} is no NIfTI, NRRD or MetaImage file by its name{folder}")
        return [Input(file_name(stem(path)), path)], Scan()
    if output_dir.resolve() == path.resolve():
        raise ValueError(f"output_dir={output_dir} is the folder of the images; give the results one of their own")
    scan = Folder(root=path, include_labels=include_labels).scan()
    root, results = path.resolve(), output_dir.resolve()

    def is_result(file: Path) -> bool:
        return root in results.parents and results in (file, *file.parents)

    images = [case for case in scan.cases if not is_result(case.image)]
    names = case_names([case.image.relative_to(root) for case in images], root.name)
    inputs = [Input(name, c.image, c.skip_label_maps) for name, c in zip(names, images, strict=True)]
    return inputs, Scan([], [row for row in scan.skipped if not is_result(Path(row["file"]))], scan.problems)


def write_nifti(
    path: Path,
    planes: Iterable[Shaped[np.ndarray, "x y"]],
    *,
    like: ImageFile,
    shape: Sequence[int],
    dtype: np.dtype[Any],
) -> None:
    """Write planes, x running fastest, as a compressed NIfTI file with the geometry of `like`, all or nothing.

    Only one plane at a time is in memory; equal input gives equal bytes.
    """
    header = like.header.copy()
    header = header if header.endianness == "<" else header.as_byteswapped("<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_intent("none")
    offset = header["sizeof_hdr"] + 4  # four bytes that say that no extension follows
    for field, value in {"scl_slope": 1, "scl_inter": 0, "cal_min": 0, "cal_max": 0, "vox_offset": offset}.items():
        header[field] = value
    stored = np.dtype(dtype).newbyteorder("<")
    with _zipped(path) as file:
        file.write(header.binaryblock + bytes(4))
        for plane in planes:
            file.write(plane.astype(stored, copy=False).tobytes(order="F"))


def slices_of(array: Shaped[np.ndarray, "x y z"]) -> Iterator[Shaped[np.ndarray, "x y"]]:
    """Return the planes of an array along its last axis."""
    return (array[..., z] for z in range(array.shape[-1]))


def save_image(path: Path, image: "Nifti1Image") -> None:
    """Write an image of nibabel as a compressed NIfTI file, all or nothing; equal input gives equal bytes."""
    with _zipped(path) as file:
        image.to_stream(file)


@contextlib.contextmanager
def _zipped(path: Path) -> Iterator[gzip.GzipFile]:
    """Open a compressed file that appears once it is whole, without a date and a name in it."""
    with (
        whole_file(path) as partial,
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as file,
    ):
        yield file
