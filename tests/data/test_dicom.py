"""DICOM series and files of several frames: a volume is not its first slice."""

import shutil

import numpy as np
import pytest
from dicom_slices import CT, PET, SECONDARY, dataset, frames, saved, series
from pydicom.pixels import compress
from pydicom.uid import RLELossless

from medssl.data.formats import ReadError, open_image
from medssl.data.formats.dicom import LOW_IS_BRIGHT, NO_INTERCEPT
from medssl.data.formats.dicom_files import begins_as_dicom
from medssl.data.measurements import measure
from medssl.data.prepare import prepare_store
from medssl.data.reading import read_volume
from medssl.data.sources import Folder
from medssl.data.store import VolumeStore
from medssl.evaluation.store_report import overview


def noise(seed, shape=(9, 8, 12), dtype=np.int16, low=-900, high=900):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def loaded(path, **options):
    header, load = open_image(path, **options)
    return header, load(None)[..., 0]


def reason(path, **options):
    with pytest.raises(ReadError) as caught:
        loaded(path, **options)
    assert caught.value.path == path
    return caught.value.reason


def directions(rng):
    """Two directions at right angles, as a header states them, and the normal."""
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    turn = np.round(turn, 6) if rng.random() < 0.5 else np.eye(3)[rng.permutation(3)]
    return turn[0], turn[1], np.cross(turn[0], turn[1])


@pytest.mark.parametrize("seed", range(50))
def test_every_slice_has_its_own_scale_and_place(seed, tmp_path):
    rng = np.random.default_rng(seed)
    dtype = rng.choice([np.int16, np.uint16, np.uint8, np.int32])
    bits = 8 if dtype is np.uint8 else int(rng.choice([12, 16]))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if np.issubdtype(dtype, np.signedinteger) else (0, 2**bits)
    voxels = rng.integers(low, high, (18, 16, 4)).astype(dtype)
    voxels[0, 0, 0], voxels[1, 0, 0] = low, high - 1
    whole = rng.random() < 0.5
    slopes = rng.integers(1, 300, 4) if whole else np.round(rng.uniform(0.01, 40, 4), 4)
    intercepts = rng.integers(-1024, 1024, 4) if whole else np.round(rng.uniform(-9, 9, 4), 3)
    row, column, normal = directions(rng)
    step = normal * rng.uniform(0.5, 5) + rng.choice([0, 1]) * 0.3 * column  # a tilted gantry shifts the slices
    origin = rng.uniform(-200, 200, 3)
    places = [np.round(origin + z * step, 6) for z in range(4)]
    spacing = [round(float(s), 4) for s in rng.uniform(0.3, 3, 2)]
    photometric = str(rng.choice(["MONOCHROME1", "MONOCHROME2"]))
    common = {"BitsStored": bits, "HighBit": bits - 1, "PhotometricInterpretation": photometric}
    coded = rng.random() < 0.4 and dtype is not np.int32  # what pydicom can code
    if rng.random() < 0.4:
        path = frames(
            tmp_path / "frames.dcm", voxels, order=rng.permutation(4), positions=places,
            slopes=[(float(s), float(i)) for s, i in zip(slopes, intercepts, strict=True)],
            orientation=[*row, *column], **common,
        )  # fmt: skip
        spacing = [2.0, 1.5]
    else:
        path, name = tmp_path / "s", rng.choice(["{}.dcm", "{}.dcm.gz", "{}.IMA", "CT.1.{}", "{}.ima"])
        for z, file in enumerate(rng.permutation(4)):
            made = dataset(voxels[..., z], kind=PET, number=int(file) + 1, slope=slopes[z], intercept=intercepts[z],
                           ImagePositionPatient=list(places[z]), ImageOrientationPatient=[*row, *column],
                           PixelSpacing=spacing, **common)  # fmt: skip
            if coded:
                compress(made, RLELossless)
            saved(made, path / name.format(file))
    header, found = loaded(path)
    expected = voxels * slopes.astype(float) + intercepts
    exact = np.abs(found - expected).max() == 0
    assert exact if whole else np.abs(found - expected).max() < 0.5 * slopes.min()
    assert found.dtype.kind == ("i" if whole else "f") or (whole and expected.min() >= 0)
    affine = np.stack([row * spacing[1], column * spacing[0], (places[-1] - places[0]) / 3, places[0]], 1)
    np.testing.assert_allclose(header.affine[:3], affine * [[-1], [-1], [1]], atol=1e-4)
    assert header.integer == whole


def damaged(rng, path, voxels, slice_):
    """Put one fault into one slice, and return the reason that must be given."""
    file = path / f"IM{slice_:03d}.dcm"
    whole, name = file.read_bytes(), file.name
    kind = rng.choice(["empty", "cut header", "cut voxels", "text", "colours", "size", "orientation", "spacing",
                       "no position", "no orientation", "repeat", "gap", "no slope", "slope 0", "table", "frames",
                       "bits", "position"])  # fmt: skip
    place = [-10.0, -20.0, -5 + 3.0 * slice_]
    make = {
        "colours": {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "PlanarConfiguration": 0},
        "size": {"Rows": 4, "Columns": 18},
        "orientation": {"ImageOrientationPatient": [1, 0, 0, 0, 0.9, 0.4358899]},
        "spacing": {"PixelSpacing": [2.0, 1.6]},
        "no position": {"ImagePositionPatient": None},
        "no orientation": {"ImageOrientationPatient": None},
        "repeat": {"ImagePositionPatient": [-10.0, -20.0, -5 + 3.0 * (slice_ - 1 if slice_ else 1)]},
        "gap": {"ImagePositionPatient": [-10.0, -20.0, -5 + 3.0 * slice_ + 0.9]},
        "no slope": {"RescaleSlope": None, "RescaleIntercept": None},
        "slope 0": {"RescaleSlope": 0},
        "bits": {"BitsStored": 17},
        "frames": {"NumberOfFrames": 2},
        "position": {"ImagePositionPatient": [-10.0, -20.0, float("nan")]},
    }.get(kind)
    if kind == "table":
        from pydicom.dataset import Dataset

        make = {"ModalityLUTSequence": [Dataset()]}
    if make is not None:
        saved(dataset(voxels[..., slice_], number=slice_ + 1, **({"ImagePositionPatient": place} | make)), file)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_text("no slice " * 100)
    else:
        file.write_bytes(whole[: 300 if kind == "cut header" else -20])
    return {
        "empty": f"{name}: the file is empty (0 bytes)",
        "cut header": f"{name}: the file is cut",
        "cut voxels": f"{name}: the file is cut: its voxels need 144 bytes, it has 124",
        "text": f"{name}: the file is no DICOM file, whatever its name says",
        "colours": f"{name}: the voxels are colours (RGB); grey values are needed",
        "size": "the slices differ in size: 18 x 4, 9 x 8",
        "orientation": "slices of two orientations in one series",
        "spacing": "slices of two pixel spacings in one series",
        "no position": f"no ImagePositionPatient in 1 of 6 slices, such as {name}",
        "no orientation": f"no ImageOrientationPatient in 1 of 6 slices, such as {name}",
        "repeat": "one position twice (",
        "gap": "the slices are not evenly spaced",
        "no slope": f"no RescaleSlope in 1 of 6 slices, such as {name}",
        "slope 0": f"{name}: RescaleSlope is 0",
        "table": f"{name}: grey values are stated by a table",
        "frames": f"{name}: the file is cut: its voxels need 288 bytes",
        "bits": f"{name}: 17 of 16 bits a voxel",
        "position": f"{name}: ImagePositionPatient is ",
    }[kind]


@pytest.mark.parametrize("seed", range(50))
def test_a_fault_of_any_slice_is_named(seed, tmp_path, capfd):
    rng = np.random.default_rng(seed)
    voxels = noise(seed, (9, 8, 6))
    path = series(tmp_path / "s", voxels)
    expected = damaged(rng, path, voxels, int(rng.integers(6)))
    assert reason(path).startswith(expected)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("slopes", [None, "one", "several"])
def test_frames_are_sorted_and_scaled_each(slopes, coded, tmp_path):
    voxels = noise(0)
    order = np.random.default_rng(0).permutation(12)
    scales = [(0.5 + z, 3.0 * z) for z in range(12)] if slopes == "several" else None
    path = frames(tmp_path / "f.dcm", voxels, order=order, slopes=scales, shared_slope=4 if slopes == "one" else None)
    if coded:
        from pydicom import dcmread

        made = dcmread(path)
        compress(made, RLELossless)
        saved(made, path)
    header, found = loaded(path)
    expected = voxels * {None: 1.0, "one": 4.0, "several": [s for s, _ in scales or []]}[slopes]
    expected = expected + ([i for _, i in scales] if scales else 0)
    np.testing.assert_array_equal(found, expected)
    assert header.affine.tolist() == [[-1.5, 0, 0, 10], [0, -2, 0, 20], [0, 0, 3, -5], [0, 0, 0, 1]]
    assert header.modality == "mr"
    volume = read_volume(tmp_path, min_side_voxel=2)  # a folder with the file is the same volume
    np.testing.assert_array_equal(volume.array[0], expected[::-1, ::-1])
    assert volume.stated_modality == "mr"


def test_several_scans_in_one_series_or_file_are_refused_by_name(tmp_path):
    voxels = noise(0)
    twice = [[-10.0, -20.0, 3.0 * (z % 6)] for z in range(12)]
    found = reason(frames(tmp_path / "two.dcm", voxels, positions=twice))
    assert found == "two scans (6 positions, each twice) in one file; split them"
    thrice = series(tmp_path / "s", voxels, ImagePositionPatient=lambda z: [0.0, 0.0, 3.0 * (z % 4)])
    assert reason(thrice) == "3 scans (4 positions, each 3 times) in one series; split them"
    for name in ("a.dcm", "b.dcm"):
        frames(tmp_path / "files" / name, voxels)
    assert reason(tmp_path / "files") == "2 files of several frames each in one series; give each a folder of its own"
    views = {0: [1, 0, 0, 0, 1, 0], 1: [1, 0, 0, 0, 0, -1], 2: [0, 1, 0, 0, 0, -1]}
    localizer = series(tmp_path / "l", voxels, ImageOrientationPatient=lambda z: views[z % 3])
    assert reason(localizer) == "slices of 3 orientations in one series"


def test_frames_without_places_are_refused(tmp_path):
    voxels = noise(0)
    made = dataset(voxels[..., 0], kind=SECONDARY, NumberOfFrames=12, PixelData=voxels.T.astype("<i2").tobytes())
    saved(made, tmp_path / "f.dcm")
    assert reason(tmp_path / "f.dcm") == "no ImagePositionPatient: the places of its 12 frames are not stated"


def test_pixel_data_behind_the_voxels_are_named(tmp_path):
    voxels = noise(0)
    made = dataset(voxels[..., 0], PixelData=voxels[..., :3].T.astype("<i2").tobytes())
    saved(made, tmp_path / "f.dcm")
    assert reason(tmp_path / "f.dcm").endswith("go on behind the voxels that the header states: 144 bytes of 432")


def test_no_pixel_spacing_is_refused_unless_one_is_assumed(tmp_path):
    path = series(tmp_path / "s", noise(0), PixelSpacing=None)
    assert reason(path) == "the header states no spacing; data.assume_spacing_mm=[x,y,z] lets it in"
    header, _ = loaded(path, assume_spacing_mm=(0.5, 0.75, 9))
    np.testing.assert_allclose(np.diag(header.affine), [-0.5, -0.75, 3, 1])  # the positions state the third


def test_scouts_and_objects_beside_a_scan_are_left_out_by_name(tmp_path):
    voxels = noise(0)
    path = series(tmp_path / "s", voxels)
    series(path, voxels[..., :2] + 1, name="scout{}.dcm", series="1.9", SamplesPerPixel=3,
           PhotometricInterpretation="RGB")  # fmt: skip
    saved(dataset(voxels[..., 0], kind="1.2.840.10008.5.1.4.1.1.88.22", series="1.7"), path / "report.dcm")
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array[0], voxels[::-1, ::-1])
    scout = "of a series of 2 slices beside one of 12: a scout view"
    assert volume.left_out == (
        (str(path / "report.dcm"), "a DICOM object that is no image (structures, a plan, a report, ...)"),
        (str(path / "scout0.dcm"), scout),
        (str(path / "scout1.dcm"), scout),
    )
    assert volume.stated_modality == "ct"
    series(path, voxels, name="more{}.dcm", series="1.10")
    assert reason(path) == "the folder holds 2 DICOM series of 12, 12 slices; each series needs a folder of its own"


def test_a_file_named_like_a_slice_belongs_to_the_series_and_others_do_not(tmp_path):
    path = series(tmp_path / "s", noise(0), name="CT.1.2.{}")
    (path / "notes").write_text("of no concern")
    (path / "CT.txt").write_text("of no concern")
    assert read_volume(path).shape == (9, 8, 12)
    assert read_volume(path).left_out == ((str(path / "notes"), "no DICOM file, and not named like a slice"),)
    (path / "CT.7.8.99").write_bytes(b"")
    assert reason(path) == "CT.7.8.99: the file is empty (0 bytes)"


def test_an_empty_file_among_slices_with_names_of_letters_and_digits_is_a_fault(tmp_path):
    path = series(tmp_path / "s", noise(0), name="IM{}")
    for number, name in enumerate(("A7F3", "5FACE", "DEAF", "C0DE")):
        (path / f"IM{number}").rename(path / name)
    (path / "DEAF").write_bytes(b"")
    assert reason(path) == "DEAF: the file is empty (0 bytes)"


def test_zipped_slices_are_bounded_and_checked(tmp_path):
    path = series(tmp_path / "s", noise(0), name="{:02d}.dcm.gz")
    assert loaded(path)[0].shape == (9, 8, 12)
    import gzip

    whole = gzip.decompress((path / "03.dcm.gz").read_bytes())
    (path / "03.dcm.gz").write_bytes(gzip.compress(whole + bytes(2**21)))
    assert reason(path) == "03.dcm.gz: the compressed file has data far behind its voxels"
    (path / "03.dcm.gz").write_bytes(whole)
    assert reason(path) == "03.dcm.gz: not compressed although named .gz; rename it"


def test_text_does_not_begin_as_dicom():
    assert not begins_as_dicom(b"no slice " * 40)
    assert not begins_as_dicom(bytes(256))
    assert begins_as_dicom(bytes(128) + b"DICM")


def test_hidden_files_and_folders_beside_the_slices_are_not_read(tmp_path):
    path = series(tmp_path / "s", noise(0))
    shutil.copyfile(path / "IM000.dcm", path / ".IM000.dcm")  # hidden
    (path / "below").mkdir()
    assert loaded(path)[0].shape == (9, 8, 12)
    assert CT == "1.2.840.10008.5.1.4.1.1.2"


def test_a_slice_whose_class_is_no_image_is_a_fault_of_its_series(tmp_path):
    path = series(tmp_path / "s", noise(0))
    saved(dataset(noise(0)[..., 11], kind="1.2.840.10008.5.1.4.1.1.88.22", number=12), path / "IM011.dcm")
    assert reason(path) == "IM011.dcm: its class is not one of images, and it belongs to the series"


def test_values_beyond_the_stated_bits_are_refused(tmp_path):
    path = series(
        tmp_path / "s", noise(0), BitsStored=lambda z: 8 if z == 5 else 16, HighBit=lambda z: 7 if z == 5 else 15
    )
    assert reason(path).startswith("IM005.dcm: values lie beyond the 8 bits up to bit 7 that the header states")


@pytest.mark.parametrize("modality", ["CT", "MR", "US"])
def test_bright_low_values_are_a_doubt_unless_values_are_hounsfield_units(modality, tmp_path):
    voxels = noise(0)
    series(tmp_path / "s", voxels, modality=modality, PhotometricInterpretation="MONOCHROME1")
    header, found = loaded(tmp_path / "s")
    assert np.array_equal(found, voxels)
    assert header.modality == modality.lower()
    assert header.doubts == (() if modality == "CT" else (LOW_IS_BRIGHT,))
    volume = read_volume(tmp_path / "s", min_side_voxel=2)
    assert measure(volume).doubts[: len(header.doubts)] == header.doubts
    series(tmp_path / "t", voxels, modality=modality, PhotometricInterpretation=lambda z: f"MONOCHROME{1 + (z > 0)}")
    if modality == "CT":
        assert np.array_equal(loaded(tmp_path / "t")[1], voxels)
    else:
        with pytest.raises(ReadError, match=f"1 of {voxels.shape[2]} slices are MONOCHROME1, the others MONOCHROME2"):
            loaded(tmp_path / "t")


def test_a_ct_whose_header_states_no_intercept_is_doubtful(tmp_path):
    series(tmp_path / "s", noise(0), slope=None)
    header, _ = loaded(tmp_path / "s")
    assert header.doubts == (NO_INTERCEPT,)
    series(tmp_path / "m", noise(0), slope=None, modality="MR")
    assert loaded(tmp_path / "m")[0].doubts == ()


def test_a_series_in_two_folders_is_named_once_it_is_prepared(tmp_path):
    voxels = noise(0, shape=(16, 16, 20))
    for number, name in enumerate("ab"):
        series(tmp_path / "in" / name, voxels[..., number::2], step=6.0, series="1.2.77")
    series(tmp_path / "in" / "c", voxels[..., ::2], step=6.0, series="1.2.78")
    prepare_store(Folder(root=tmp_path / "in"), tmp_path / "store", num_workers=0, progress=False)
    odd = dict(map(tuple, overview(list(VolumeStore(tmp_path / "store").records())).odd[1:]))
    named = {case: reasons for case, reasons in odd.items() if "one DICOM series" in reasons}
    assert named.keys() == {"b"}
    assert "of one DICOM series with a" in named["b"]
