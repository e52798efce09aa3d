"""DICOM files for tests: slices and files of several frames, written by pydicom."""

import gzip
import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

CT, PET, SECONDARY = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "128", "7"))
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def dataset(plane, *, series="1.2.3", number=1, kind=CT, modality="CT", slope=1, intercept=0, **entries):
    """The header and voxels of one slice (column, row); an entry of None is left out."""
    meta, made = FileMetaDataset(), Dataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = made.SOPClassUID = UID(kind)
    meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = UID(f"{series}.{number}")
    made.file_meta = meta
    made.SeriesInstanceUID, made.Modality, made.InstanceNumber = series, modality, number
    made.PixelSpacing, made.SliceThickness = [2.0, 1.5], 3.0
    made.ImagePositionPatient, made.ImageOrientationPatient = [-10.0, -20.0, 3.0 * number], [1, 0, 0, 0, 1, 0]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Columns, made.Rows = plane.shape[:2]
    bits = plane.dtype.itemsize * 8
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.PixelRepresentation = int(plane.dtype.kind == "i")
    if slope is not None:
        made.RescaleSlope, made.RescaleIntercept = str(slope), str(intercept)
    made.PixelData = plane.T.astype(plane.dtype.newbyteorder("<")).tobytes()
    for name, value in entries.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def saved(made, path):
    """Write a data set: compressed where the name ends in .gz, without a preamble where it ends in .ima."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    whole = stream.getvalue()
    if path.name.endswith(".ima"):
        whole = whole[132:]
    path.write_bytes(gzip.compress(whole, 1) if path.name.endswith(".gz") else whole)
    return path


def series(folder, voxels, *, name="IM{:03d}.dcm", step=3.0, **options):
    """Write the slices of an array (column, row, slice); an option that is a function gives each slice its value."""
    for z in range(voxels.shape[2]):
        given = {key: value(z) if callable(value) else value for key, value in options.items()}
        place = {"ImagePositionPatient": [-10.0, -20.0, -5 + step * z]} | given
        saved(dataset(voxels[..., z], number=z + 1, **place), folder / name.format(z))
    return folder


def frames(path, voxels, *, order=None, positions=None, slopes=None, shared_slope=None, orientation=None, **entries):
    """Write an array (column, row, slice) as one file of several frames, in the order that is given."""
    num = voxels.shape[2]
    order = list(range(num)) if order is None else list(order)
    positions = [[-10.0, -20.0, -5 + 3.0 * z] for z in range(num)] if positions is None else positions
    made = dataset(voxels[..., 0], kind=ENHANCED_MR, modality="MR", slope=None, PixelSpacing=None, SliceThickness=None,
                   ImagePositionPatient=None, ImageOrientationPatient=None)  # fmt: skip
    made.NumberOfFrames = num
    made.PixelData = np.stack([voxels[..., z].T for z in order]).astype(voxels.dtype.newbyteorder("<")).tobytes()
    shared = _item("PixelMeasuresSequence", PixelSpacing=[2.0, 1.5], SliceThickness=3.0)
    direction = [1, 0, 0, 0, 1, 0] if orientation is None else orientation
    shared.update(_item("PlaneOrientationSequence", ImageOrientationPatient=direction))
    if shared_slope is not None:
        shared.update(_item("PixelValueTransformationSequence", RescaleSlope=shared_slope, RescaleIntercept=0))
    made.SharedFunctionalGroupsSequence = [shared]
    made.PerFrameFunctionalGroupsSequence = []
    for z in order:
        own = _item("PlanePositionSequence", ImagePositionPatient=list(map(float, positions[z])))
        if slopes is not None:
            slope, intercept = slopes[z]
            own.update(_item("PixelValueTransformationSequence", RescaleSlope=slope, RescaleIntercept=intercept))
        made.PerFrameFunctionalGroupsSequence.append(own)
    for name, value in entries.items():
        setattr(made, name, value)
    return saved(made, path)


def _item(sequence, **entries):
    inner, outer = Dataset(), Dataset()
    for name, value in entries.items():
        setattr(inner, name, value)
    setattr(outer, sequence, [inner])
    return outer
