"""The files of inference: images to predict, and NIfTI files that lie exactly where the image lies."""

import contextlib
import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Shaped

from medssl.data.atomic import whole_file
from medssl.data.cases import Case, Scan, case_names, file_name
from medssl.data.channel_files import by_case, channel_of, in_order
from medssl.data.dataset_json import FILE, DatasetJson
from medssl.data.formats import (
    NIFTI_SUFFIXES,
    ReadError,
    has_image_suffix,
    irregularity,
    is_dicom,
    open_image,
    reasons_for,
    stem,
)
from medssl.data.geometry import apply
from medssl.data.sources import Folder
from medssl.data.volume import Volume

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

MIN_SIDE_VOXEL = 2
"""Thin slabs are predicted; a single slice is no volume."""
COMPRESSION = 4
MOST_SHEAR_MM = 0.05
"""How far a corner may lie from where a grid with right angles puts it; beyond, the grid is sheared."""


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image as it was read, with the geometry that places a segmentation exactly on it.

    Args:
        path: File, or folder of a DICOM series.
        volume: The voxels of the image in canonical RAS.
        affine: The map from voxel index of the file to RAS mm.
        header: NIfTI header with the geometry of the file; without a qform where the image is sheared.
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

    @property
    def is_sheared(self) -> bool:
        """Whether the axes of the image are not at right angles, as those of a CT with a tilted gantry."""
        return _shear_mm(self.affine, self.shape[:3]) > MOST_SHEAR_MM

    def in_file_order(self, array: Shaped[np.ndarray, "x y z"]) -> Shaped[np.ndarray, "x2 y2 z2"]:
        """Return an array of the volume's grid with its axes flipped and permuted to those of the file; no copy."""
        from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

        canonical = [[0, 1], [1, 1], [2, 1]]
        return apply_orientation(array, ornt_transform(canonical, io_orientation(self.affine)))


@dataclass(frozen=True)
class Input:
    """An image to predict: the name of its results, its path, and the files of its channels after the first."""

    name: str
    path: Path
    skip_label_maps: bool = False
    more_channels: tuple[Path, ...] = ()


def read_image(
    path: Path,
    *,
    channels: str | int | None = None,
    skip_label_maps: bool = False,
    more_channels: Sequence[Path] = (),
    assume_spacing_mm: tuple[float, ...] | None = None,
) -> ImageFile:
    """Return the image in a file or in the DICOM series of a folder, or in a file for each channel.

    Raises:
        LabelMapError: The image looks like a label map.
        ReadError: The image cannot be used; the reason says why.
    """
    import nibabel

    case = Case("", path, more_channels=tuple(more_channels), skip_label_maps=skip_label_maps,
                assume_spacing_mm=assume_spacing_mm)  # fmt: skip
    volume = case.read(channels=channels, min_side_voxel=MIN_SIDE_VOXEL)[0]
    first = Path(volume.source)  # the file of the chosen channel, where each has its own
    header: Any
    with reasons_for(first):
        found = open_image(first, assume_spacing_mm=assume_spacing_mm)[0]
        if first.name.lower().endswith(NIFTI_SUFFIXES) and first.is_file() and not found.spacing_is_assumed:
            header = nibabel.load(first).header.copy()
        else:
            header = nibabel.Nifti1Header()
            header.set_data_shape(found.shape)
            header.set_qform(found.affine, code=1, strip_shears=True)
            header.set_sform(found.affine, code=1)
            header.set_xyzt_units("mm")
    if _shear_mm(found.affine, found.shape) > MOST_SHEAR_MM:
        header.set_qform(None, code=0)  # it knows no shear: readers that prefer it would see another place
    return ImageFile(path, volume, found.affine, header)


def _shear_mm(affine: Float[np.ndarray, "4 4"], shape: Sequence[int]) -> float:
    """Return how far the corners of a grid lie from where the nearest grid with right angles puts them."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_qform(affine, strip_shears=True)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(shape) - 1)
    return float(np.linalg.norm(apply(affine, corners) - apply(header.get_qform(), corners), axis=1).max())


def find_inputs(
    path: Path, output_dir: Path, *, include_labels: bool = False, num_channels: int = 1
) -> tuple[list[Input], Scan]:
    """Return the images that `input=PATH` means, and the scan that found them: what was skipped, what cannot be read.

    In a folder, files CASE_0000, CASE_0001, ... are the channels of one image called CASE: if the network reads
    several channels, if a `dataset.json` beside the folder states several, or if all its files end in _0000.
    If `output_dir` lies below the folder, nothing in it is an input.

    Args:
        path: An image file, a folder of images, or the folder of a DICOM series.
        output_dir: Folder of the results.
        include_labels: Whether files that are label maps by their name are inputs.
        num_channels: Number of channels that the network reads.

    Raises:
        ValueError: There is nothing to predict, or results would lie among the inputs.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"input={path} does not exist")
    if reason := irregularity(path):
        raise ValueError(f"input={path}: {reason}")
    if path.is_file():
        if not has_image_suffix(path):
            folder = f"; DICOM slices are given by their folder, {path.parent}" if is_dicom(path) else ""
            raise ValueError(f"input={path} is no image file that can be read, by its name{folder}")
        return [Input(file_name(stem(path)), path)], Scan()
    if output_dir.resolve() == path.resolve():
        raise ValueError(f"output_dir={output_dir} is the folder of the images; give the results one of their own")
    scan = Folder(root=path, include_labels=include_labels).scan()
    root, results = path.resolve(), output_dir.resolve()

    def is_result(file: Path) -> bool:
        return root in results.parents and results in (file, *file.parents)

    found = Scan([], [row for row in scan.skipped if not is_result(Path(row["file"]))], scan.problems)
    by_folder: dict[Path, list[Case]] = {}
    for case in scan.cases:
        if not is_result(case.image):
            by_folder.setdefault(case.image.parent, []).append(case)
    images = [image for cases in by_folder.values() for image in _images_in(cases, found, num_channels)]
    names = case_names([place.relative_to(root) for place, _ in images], root.name)
    inputs = [
        Input(name, case.image, case.skip_label_maps, case.more_channels)
        for name, (_, case) in zip(names, images, strict=True)
    ]
    return inputs, found


def _images_in(cases: Sequence[Case], scan: Scan, num_channels: int) -> list[tuple[Path, Case]]:
    """Return the images among the files of one folder, each with the path that it is named by.

    That is its own or, where it has a file for each channel, the folder with the name of the case.
    """
    files = [case.image for case in cases if case.image.is_file()]
    named = [file for file in files if channel_of(file) is not None]
    stated, who = num_channels, "the network reads"
    if num_channels > 1:
        named = [file for file in named if not _holds_channels(file)]
    else:
        stated, who = _stated_channels(cases[0].image.parent), f"{FILE} states"
        if len(named) < len(files) or (stated == 1 and not all(stem(file).endswith("_0000") for file in named)):
            named = []
    images = [(case.image, case) for case in cases if case.image not in named]
    for name, channels in by_case(named, scan).items():
        ordered = in_order(channels, scan, case=file_name(name), channels=range(stated), stated=who)
        if ordered:
            case = replace(cases[0], image=ordered[0], more_channels=ordered[1:])
            images.append((ordered[0].parent / name, case))
    return images


def _stated_channels(folder: Path) -> int:
    """Return how many channels a `dataset.json` in or beside the folder states; 1 where there is none."""
    for place in (folder, folder.parent):
        with contextlib.suppress(ValueError):  # it may be of something else
            if (listed := DatasetJson.find(place)) is not None:
                return max(1, len(listed.channel_names()))
    return 1


def _holds_channels(file: Path) -> bool:
    """Return whether a file holds several channels; a file that cannot be read does not."""
    with contextlib.suppress(ReadError), reasons_for(file):
        return open_image(file)[0].num_channels > 1
    return False


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


def write_nrrd(
    path: Path,
    planes: Iterable[Shaped[np.ndarray, "x y"]],
    *,
    like: ImageFile,
    dtype: np.dtype[Any],
) -> None:
    """Write planes, x running fastest, as an NRRD file with the geometry of `like`, shear included, all or nothing.

    Source: https://teem.sourceforge.net/nrrd/format.html (NRRD0004; space directions in RAS millimetres).
    """
    vectors = [f"({','.join(repr(float(v)) for v in column)})" for column in like.affine[:3].T]
    header = [
        "NRRD0004",
        f"type: {np.dtype(dtype).name}",
        "dimension: 3",
        "space: right-anterior-superior",
        f"sizes: {' '.join(map(str, like.shape[:3]))}",
        f"space directions: {' '.join(vectors[:3])}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: {vectors[3]}",
    ]
    stored = np.dtype(dtype).newbyteorder("<")
    with whole_file(path) as partial, partial.open("wb") as raw:
        raw.write(("\n".join(header) + "\n\n").encode())
        with gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as file:
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
