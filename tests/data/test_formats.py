"""Files of every format, drawn from a seed: voxels, spacing and affine are those that were written."""

import gzip
import os
import stat
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from medssl.data.formats import ReadError, claims, open_image

NO_SPACING = "the header states no spacing; data.assume_spacing_mm=[x,y,z] lets it in"
TYPES = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64)


def loaded(path, **options):
    header, load = open_image(path, **options)
    return header, load(None)


def reason(path, **options):
    with pytest.raises(ReadError) as caught:
        loaded(path, **options)
    return caught.value.reason


def drawn(rng, *, turned=True):
    """An array (x, y, z, channel) and an affine, with shears where nothing forbids them."""
    kind = np.dtype(rng.choice(TYPES))
    shape = (*rng.integers(4, 9, 3), int(rng.choice([1, 1, 3])))
    array = rng.normal(0, 50, shape) if kind.kind == "f" else rng.integers(0, 100, shape)
    affine = np.eye(4)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] if turned else np.eye(3)[rng.permutation(3)]
    affine[:3, :3] = turn @ np.diag(rng.uniform(0.3, 4, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return array.astype(kind), affine


def squeezed(array):
    return array[..., 0] if array.shape[3] == 1 else array


def check(path, array, affine, *, step=0.0, **options):
    header, found = loaded(path, **options)
    assert found.shape == array.shape
    assert np.abs(found.astype(float) - array.astype(float)).max() <= 0.5 * step + 1e-6 * np.abs(array).max()
    np.testing.assert_allclose(header.affine, affine, rtol=1e-5, atol=1e-4)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(np.linalg.norm(header.affine[:3, :3], axis=0), spacing, rtol=1e-5)


@pytest.mark.parametrize("seed", range(50))
def test_nifti_analyze_and_freesurfer_files_give_what_was_written(seed, tmp_path):
    rng = np.random.default_rng(seed)
    suffix = str(rng.choice([".nii", ".nii.gz", ".hdr", ".mgz", ".mgh", "analyze"]))
    array, affine = drawn(rng)
    step = np.float32(0)
    if suffix in (".mgz", ".mgh"):
        array = array.astype(rng.choice([np.uint8, np.int16, np.int32, np.float32]))
        made = nibabel.MGHImage(squeezed(array), affine)
    elif suffix == "analyze":  # states a spacing, and no directions
        suffix, spacing = ".hdr", rng.uniform(0.3, 4, 3)
        array = array.astype(rng.choice([np.uint8, np.int16, np.float32]))
        affine = np.diag([-spacing[0], spacing[1], spacing[2], 1])
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(array.shape[:3]) - 1) / 2)
        made = nibabel.AnalyzeImage(squeezed(array), affine)
    else:
        kind = {".hdr": nibabel.Nifti1Pair}.get(suffix, rng.choice([nibabel.Nifti1Image, nibabel.Nifti2Image]))
        name, unit = list({"mm": 1.0, "micron": 1e-3, "meter": 1e3, "unknown": 1.0}.items())[rng.integers(4)]
        stored = affine / [[unit], [unit], [unit], [1]]
        made = kind(array, stored)
        if rng.random() < 0.5:
            made.set_qform(stored, code=1)
            made.set_sform(None, code=0)
        made.header.set_xyzt_units(name)
    nibabel.save(made, tmp_path / f"a{suffix}")
    if suffix == ".nii" and type(made) is nibabel.Nifti1Image and array.dtype.kind in "iu":
        raw = bytearray(made.to_bytes())
        step, shift = rng.uniform(0.1, 9, 2).astype(np.float32)
        raw[112:120] = step.tobytes() + shift.tobytes()  # scl_slope and scl_inter
        (tmp_path / f"a{suffix}").write_bytes(raw)
        array = array * step.astype(float) + shift
    check(tmp_path / f"a{suffix}", array, affine, step=step)


def text_header(rng, path, array, affine):
    """Write an NRRD or MetaImage file by hand, and return what was drawn of it."""
    lps = np.diag([-1, -1, 1]) @ affine[:3]
    num, kind = array.shape[3], array.dtype
    big, zipped, detached = (bool(b) for b in rng.integers(0, 2, 3))
    unit, name = [(1.0, ""), (1e-3, "um"), (1.0, "mm")][rng.integers(3)]
    data = np.moveaxis(array, 3, 0).astype(kind.newbyteorder(">" if big else "<")).tobytes(order="F")
    lps = lps / unit
    numbers = lambda row: " ".join(f"{v:.9g}" for v in row)  # noqa: E731
    if path.suffix in (".mha", ".mhd"):
        lengths = np.linalg.norm(lps[:, :3], axis=0)
        types = {"u1": "UCHAR", "i1": "CHAR", "i2": "SHORT", "u2": "USHORT", "i4": "INT", "f4": "FLOAT", "f8": "DOUBLE"}
        detached = path.suffix == ".mhd"
        data = zlib.compress(data) if zipped else data
        lines = ["ObjectType = Image", "NDims = 3", f"BinaryDataByteOrderMSB = {big}", f"CompressedData = {zipped}",
                 f"DimSize = {numbers(array.shape[:3])}", f"ElementType = MET_{types[kind.str[1:]]}",
                 f"ElementNumberOfChannels = {num}", f"ElementSpacing = {numbers(lengths)}",
                 f"TransformMatrix = {numbers((lps[:, :3] / lengths).T.ravel())}", f"Offset = {numbers(lps[:, 3])}",
                 f"DistanceUnits = {name or '?'}",
                 f"ElementDataFile = {path.stem + '.raw' if detached else 'LOCAL'}"]  # fmt: skip
        head = "\n".join(lines) + "\n"
    else:
        types = {"u1": "uchar", "i1": "int8", "i2": "short", "u2": "ushort", "i4": "int", "f4": "float", "f8": "double"}
        detached = path.suffix == ".nhdr"
        space, flip = [("left-posterior-superior", (1, 1, 1)), ("RAS", (-1, -1, 1)), ("LAS", (1, -1, 1))][
            rng.integers(3)
        ]
        lps = np.array(flip)[:, None] * lps
        data = gzip.compress(data) if zipped else data
        vectors = ["(" + ",".join(f"{v:.9g}" for v in column) + ")" for column in lps.T]
        lines = ["NRRD0005", f"type: {types[kind.str[1:]]}", f"dimension: {3 + (num > 1)}",
                 f"sizes: {numbers((num, *array.shape[:3]) if num > 1 else array.shape[:3])}", f"space: {space}",
                 f"space directions: {'none ' * (num > 1)}{' '.join(vectors[:3])}", f"space origin: {vectors[3]}",
                 f"kinds: {'vector ' * (num > 1)}domain domain domain", f"endian: {'big' if big else 'little'}",
                 f"encoding: {'gzip' if zipped else 'raw'}"]  # fmt: skip
        lines += [f'space units: "{name}" "{name}" "{name}"'] * bool(name) + [f"data file: {path.stem}.raw"] * detached
        head = "\n".join(lines) + "\n\n"
    path.write_bytes(head.encode() + (b"" if detached else data))
    if detached:
        path.with_suffix(".raw").write_bytes(data)


@pytest.mark.parametrize("seed", range(50))
def test_nrrd_and_metaimage_files_give_what_was_written(seed, tmp_path):
    rng = np.random.default_rng(seed)
    array, affine = drawn(rng)
    path = tmp_path / f"a{rng.choice(['.nrrd', '.nhdr', '.mha', '.mhd'])}"
    text_header(rng, path, array, affine)
    check(path, array, affine)


@pytest.mark.parametrize("seed", range(50))
def test_a_file_without_spacing_is_refused_unless_one_is_assumed(seed, tmp_path):
    rng = np.random.default_rng(seed)
    array, _ = drawn(rng)
    array, assumed = array[..., :1], rng.uniform(0.3, 4, 3)
    kind = str(rng.choice(["qform", "base", ".mha", ".nrrd", ".hdr"]))
    expected = np.diag([*assumed, 1.0])
    if kind in (".mha", ".nrrd"):
        path = tmp_path / f"a{kind}"
        text_header(rng, path, array, np.eye(4))
        head, data = path.read_bytes().split(b"LOCAL\n" if kind == ".mha" else b"\n\n", 1)
        words = (b"ElementSpacing", b"DistanceUnits", b"space", b"kinds")
        lines = [line for line in head.split(b"\n") if not line.startswith(words)]
        path.write_bytes(b"\n".join(lines) + (b"LOCAL\n" if kind == ".mha" else b"\n\n") + data)
        if kind == ".nrrd":
            expected[:2] *= -1
    else:
        path, middle = tmp_path / "a.nii", (np.array(array.shape[:3]) - 1) / 2
        expected[:3, 3] = (3, 4, 5)
        made = nibabel.Nifti1Image(array, None)
        if kind == "qform":
            made.set_qform(expected, code=1)
        else:
            expected[0] *= -1  # the convention of nibabel
            expected[:3, 3] = -expected[:3, :3] @ middle
        made.set_sform(None, code=0)
        nibabel.save(made, path)
        raw = bytearray(path.read_bytes())
        missing = rng.random(3) < 0.5
        missing[rng.integers(3)] = True
        for axis in range(3):
            place = 80 + 4 * axis
            raw[place : place + 4] = np.float32(0 if missing[axis] else assumed[axis]).tobytes()
        path.write_bytes(raw)
        if kind == ".hdr":
            made = nibabel.AnalyzeImage(squeezed(array).astype(np.float32), np.eye(4))
            path = tmp_path / "b.hdr"
            nibabel.save(made, path)
            head = bytearray(path.read_bytes())
            head[80:92] = raw[80:92]
            path.write_bytes(head)
    assert reason(path) == NO_SPACING
    check(path, array, expected, assume_spacing_mm=tuple(assumed))


def test_a_freesurfer_file_without_a_place_is_refused(tmp_path):
    nibabel.save(nibabel.MGHImage(np.ones((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "a.mgz")
    raw = bytearray(gzip.decompress((tmp_path / "a.mgz").read_bytes()))
    raw[28:30] = bytes(2)  # goodRASFlag
    (tmp_path / "a.mgz").write_bytes(gzip.compress(raw))
    assert reason(tmp_path / "a.mgz", assume_spacing_mm=(1.0, 1.0, 1.0)).startswith("the header states no place in")


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(-500, 500, (10, 12, 14)).astype(np.int16)


def test_names_that_do_not_say_whether_a_file_is_compressed_are_refused_by_name(voxels, tmp_path):
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    nibabel.save(nibabel.MGHImage(voxels, np.eye(4)), tmp_path / "a.mgh")
    for name in ("a.nii", "a.mgh"):
        whole = (tmp_path / name).read_bytes()
        packed = (tmp_path / name).with_suffix({".nii": ".nii.gz", ".mgh": ".mgz"}[name[1:]])
        packed.write_bytes(whole)
        assert reason(packed) == f"not compressed although named {packed.suffix}; rename it"
        (tmp_path / name).write_bytes(gzip.compress(whole))
        assert reason(tmp_path / name).startswith(f"compressed although named {name[1:]}; rename it to ")


def test_the_missing_half_of_an_image_is_named(voxels, tmp_path):
    nibabel.save(nibabel.Nifti1Pair(voxels, np.eye(4)), tmp_path / "a.hdr")
    check(tmp_path / "a.img", voxels[..., None], np.eye(4))  # either half names the pair
    (tmp_path / "a.img").unlink()
    assert reason(tmp_path / "a.hdr") == "its .img is missing (a.img)"
    (tmp_path / "b.img").write_bytes(bytes(100))
    assert reason(tmp_path / "b.img") == "its .hdr is missing (b.hdr)"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / "c.mhd"))
    (tmp_path / "c.raw").unlink()
    assert reason(tmp_path / "c.mhd") == "its .raw is missing (c.raw)"
    (tmp_path / "c.raw").symlink_to("/dev/zero")
    assert reason(tmp_path / "c.mhd") == "c.raw: a device, not a file; only files and folders are opened"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", "z.mha", ".nrrd", "z.nrrd"])
def test_data_that_go_on_far_behind_their_voxels_are_named(suffix, voxels, tmp_path):
    path = tmp_path / f"a{suffix}"
    if "nii" in suffix:
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), suffix.startswith("z"))
    assert open_image(path)[0].shape[0] in (10, 14)
    whole = path.read_bytes()
    if suffix == ".nii.gz":
        path.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(3000)))
    elif suffix == "z.nrrd":
        head, data = whole.split(b"\n\n", 1)
        path.write_bytes(head + b"\n\n" + gzip.compress(gzip.decompress(data) + bytes(3000)))
    elif suffix == "z.mha":
        head, data = whole.split(b"LOCAL\n", 1)
        path.write_bytes(head + b"LOCAL\n" + zlib.compress(zlib.decompress(data) + bytes(3000)))
    else:
        path.write_bytes(whole + bytes(3000))
    assert reason(path).startswith("the data go on far behind the voxels: ")


def test_a_second_stream_behind_compressed_voxels_is_named(tmp_path):
    path = tmp_path / "a.mha"
    voxels = np.arange(10 * 12 * 14, dtype=np.int16).reshape(10, 12, 14)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), True)
    np.testing.assert_array_equal(loaded(path)[1][..., 0], voxels.T)
    with path.open("ab") as file:
        file.write(zlib.compress(bytes(3000)))
    assert reason(path).startswith("the data go on far behind the voxels: ")


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to nowhere", "socket"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".hdr", ".dcm", ""])
def test_only_files_and_folders_are_opened(kind, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path.symlink_to("/dev/zero" if kind == "link to a device" else tmp_path / "gone")
    word = {"link to a device": "a device, not a file", "link to nowhere": "a link that leads nowhere"}.get(kind, kind)
    assert word in reason(path)


def test_a_file_that_may_not_be_read_is_named_as_that_and_not_remembered(voxels, tmp_path, monkeypatch):
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ReadError, match=r"may not be read \(permission denied\)") as caught:
        open_image(tmp_path / "a.nii")
    assert not caught.value.lasting


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_what_does_not_fit_into_memory_is_refused_with_the_numbers_and_not_remembered(suffix, tmp_path, monkeypatch):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((20, 20, 20), np.int16)), str(tmp_path / f"a{suffix}"))
    monkeypatch.setattr(claims, "free_memory", lambda: 15_000)
    with pytest.raises(ReadError, match=r"it needs 1\.49e-05 GiB, 1\.4e-05 GiB are free") as caught:
        open_image(tmp_path / f"a{suffix}")
    assert not caught.value.lasting


def test_the_limit_of_a_control_group_counts(tmp_path):
    for name, text in (("memory.max", "1000000"), ("memory.current", "400000"), ("memory.stat", "inactive_file 100\n")):
        (tmp_path / name).write_text(text)
    assert claims._free_in_group(tmp_path) == 600_100
    (tmp_path / "memory.max").write_text("max\n")
    assert claims._free_in_group(tmp_path) is None
    assert claims.free_memory() > 0


def test_a_few_kilobytes_that_claim_gigabytes_take_no_memory(tmp_path):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((1600, 1600, 1600))
    header["vox_offset"] = 352
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(2**20)))
    assert reason(path).endswith("bytes of file cannot hold them")


def test_a_metaimage_whose_stated_length_is_wrong_gives_its_voxels(voxels, tmp_path):
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), True)
    whole = path.read_bytes()
    lines = [line for line in whole.split(b"LOCAL\n")[0].split(b"\n") if not line.startswith(b"CompressedDataSize")]
    path.write_bytes(b"\n".join(lines) + b"LOCAL\n" + whole.split(b"LOCAL\n", 1)[1])
    np.testing.assert_array_equal(loaded(path)[1][..., 0], voxels.transpose(2, 1, 0))


def test_kinds_that_are_not_read_are_named(tmp_path):
    (tmp_path / "a.mnc").write_bytes(bytes(400))
    assert reason(tmp_path / "a.mnc").startswith("files that end in .mnc are not read; .nii.gz")


def test_a_nifti_file_whose_voxels_begin_in_its_header_is_refused(voxels, tmp_path):
    raw = bytearray(nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes())
    raw[108:112] = bytes(4)  # vox_offset
    (tmp_path / "a.nii").write_bytes(raw)
    assert reason(tmp_path / "a.nii") == "the header says that voxels begin at byte 0, which is not believed"


@pytest.mark.parametrize("offset", [0, 1e9, float("nan")])
def test_a_header_whose_extensions_have_no_end_is_refused(offset, voxels, tmp_path):
    raw = bytearray(nibabel.Nifti1Image(voxels, np.eye(4)).to_bytes())
    raw[108:112] = np.float32(offset).tobytes()  # vox_offset
    raw[348:360] = b"\1\0\0\0" + np.int32([2**30, 6]).tobytes()  # an extension of a gibibyte
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw))
    assert "voxels begin at byte" in reason(tmp_path / "a.nii.gz")


def test_a_metaimage_that_made_the_decoder_crash_is_refused(voxels, tmp_path):
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path), True)
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims =-3").replace(b"BinaryData ", b"BinaryDcta "))
    assert reason(path) == "the header states -3 dimensions; 2 to 4 are read"


def test_a_qform_that_places_voxels_elsewhere_than_the_sform_is_a_doubt(tmp_path):
    array = np.random.default_rng(0).integers(0, 100, (8, 7, 6)).astype(np.int16)
    made = nibabel.Nifti1Image(array, np.diag([-2.0, 2, 3, 1]))
    for code, shift, expected in ((1, 0, ()), (1, 0.9, ()), (0, 9, ()), (1, 9, (9,)), (2, 30, (30,))):
        other = np.diag([-2.0, 2, 3, 1])
        other[1, 3] = shift
        made.set_sform(made.affine, 1)
        made.set_qform(other, code)
        nibabel.save(made, tmp_path / "a.nii.gz")
        header, _ = loaded(tmp_path / "a.nii.gz")
        np.testing.assert_allclose(header.affine, made.affine)
        told = tuple(f"sform and qform place voxels up to {mm} mm apart; the sform is used" for mm in expected)
        assert header.doubts == told


def test_a_damaged_qform_beside_a_sform_is_a_doubt(tmp_path):
    made = nibabel.Nifti1Image(np.arange(210, dtype=np.int16).reshape(7, 6, 5), np.eye(4))
    made.header["qform_code"], made.header["quatern_b"], made.header["quatern_c"] = 1, 3, 3
    made.to_filename(tmp_path / "a.nii")
    header, _ = loaded(tmp_path / "a.nii")
    assert header.doubts == ("the qform is damaged; the sform is used",)
    np.testing.assert_allclose(header.affine, np.eye(4))


def test_names_in_capitals_are_read_like_others(tmp_path):
    array = np.arange(210, dtype=np.int16).reshape(5, 6, 7)
    for suffix in (".mha", ".nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / f"a{suffix}"))
        (tmp_path / f"a{suffix}").rename(tmp_path / f"A{suffix.upper()}")
        assert np.array_equal(loaded(tmp_path / f"A{suffix.upper()}")[1][..., 0], array.T)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ElementByteOrderMSB = True", "BinaryDataByteOrderMSB and ElementByteOrderMSB contradict each other"),
        ("ElementToIntensityFunctionSlope = 2", "ElementToIntensityFunctionSlope is 2: such a scale is not read"),
        ("ElementToIntensityFunctionOffset = 100", "ElementToIntensityFunctionOffset is 100"),
    ],
)
def test_entries_of_a_metaimage_that_change_the_values_are_refused(line, message, tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7), np.int16)), str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(
        content.replace(b"ElementSize", b"ElementSize").replace(
            b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = False\n" + line.encode()
        )
    )
    assert message in reason(tmp_path / "a.mha")
