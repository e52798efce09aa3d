"""Damaged headers: what is accepted equals an independent reading, and all else has a reason in plain words."""

import gzip
import re
import warnings
import zlib

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_slices import frames, series
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medssl.data.formats import ReadError, open_image, reasons_for

NOT_OURS = re.compile(
    r"ITK|itk|gdcm|GDCM|\[nrrd\]|nrrd:|0x[0-9a-f]{4}|Error\b|Exception|Traceback|NoneType|<class|errno"
)
TOKENS = ("-1", "0", "nan", "1e30", "99999999999", "", "abc", "3.5", "1 1", "inf", "7", "True", "-3", "0.5")


def voxels_of(rng):
    return rng.integers(-500, 500, (9, 8, 7)).astype(np.int16)


def attempt(path):
    """The header and voxels, or None where the file is refused with a reason of our own."""
    try:
        with reasons_for(path):
            header, load = open_image(path)
            return header, load(None)
    except ReadError as error:
        reason = error.reason
    if not reason or NOT_OURS.search(reason):
        pytest.fail(f"not in words of our own: {reason}")
    return None


def mutated_bytes(rng, raw, end):
    """One to three bytes of the first `end` are others, or the file is cut."""
    raw = bytearray(raw)
    if rng.random() < 0.1:
        return bytes(raw[: rng.integers(len(raw))])
    for place in rng.integers(0, end, rng.integers(1, 4)):
        raw[place] = rng.choice([0, 255, raw[place] ^ (1 << int(rng.integers(8))), rng.integers(256)])
    return bytes(raw)


def mutated_text(rng, head):
    """A line of a text header is gone, twice there or changed."""
    lines = head.split("\n")
    for _ in range(rng.integers(1, 3)):
        at = int(rng.integers(len(lines)))
        kind, line = rng.random(), lines[at]
        if kind < 0.15:
            del lines[at]
        elif kind < 0.25:
            lines.insert(at, lines[int(rng.integers(len(lines)))])
        elif kind < 0.65 and line:
            words = re.split(r"([ (),:=]+)", line)
            words[2 * int(rng.integers((len(words) + 1) // 2))] = str(rng.choice(TOKENS))
            lines[at] = "".join(words)
        elif line:
            place = int(rng.integers(len(line)))
            lines[at] = line[:place] + chr(rng.integers(32, 127)) + line[place + 1 :]
        if not lines:
            return ""
    return "\n".join(lines)


def nifti(rng, folder):
    zipped = bool(rng.integers(2))
    affine = np.diag([1.5, 2, 3, 1]) + np.pad(rng.normal(0, 0.1, (3, 4)), ((0, 1), (0, 0)))
    made = rng.choice([nibabel.Nifti1Image, nibabel.Nifti2Image])(voxels_of(rng), affine)
    made.set_qform(affine, code=int(rng.integers(2)), strip_shears=True)
    made.set_sform(affine, code=int(rng.integers(2)))
    raw = mutated_bytes(rng, made.to_bytes(), 352 if type(made) is nibabel.Nifti1Image else 544)
    path = folder / ("a.nii.gz" if zipped else "a.nii")
    path.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    if (found := attempt(path)) is None:
        return False
    other = nibabel.load(path)
    unit = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}[int(other.header["xyzt_units"]) & 7]
    expected = np.asarray(other.dataobj, dtype=np.float32)
    np.testing.assert_allclose(found[0].affine, other.affine * [[unit], [unit], [unit], [1]], rtol=1e-6)
    shape = (*expected.shape, 1, 1, 1)[:3]
    np.testing.assert_array_equal(found[1].astype(np.float32), expected.reshape(*shape, -1, order="F"))
    return True


def dicom(rng, folder):
    array = voxels_of(rng)
    if rng.random() < 0.4:
        path = frames(folder / "f.dcm", array, order=rng.permutation(7), slopes=[(1 + z, z) for z in range(7)])
        files = [path]
    else:
        path = series(folder / "s", array, slope=lambda z: 1 + z, intercept=lambda z: z)
        files = sorted(path.iterdir())
    hit = files[int(rng.integers(len(files)))]
    raw = hit.read_bytes()
    hit.write_bytes(mutated_bytes(rng, raw, raw.rindex(b"\xe0\x7f\x10\x00") + 12))
    if (found := attempt(path)) is None:
        return False
    planes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for made in (dcmread(file, force=True) for file in files):
            implicit = made.original_encoding[0]
            made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            pixels = made.pixel_array.astype(float)
            for number, plane in enumerate(pixels if pixels.ndim == 3 else [pixels]):
                planes.append(_plane(made, number, plane))
    normal = np.cross(*planes[0][1])
    planes.sort(key=lambda p: p[0] @ normal)
    positions = np.array([p[0] for p in planes])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = planes[0][1][0] * planes[0][2][1], planes[0][1][1] * planes[0][2][0]
    affine[:3, 2], affine[:3, 3] = (positions[-1] - positions[0]) / (len(planes) - 1), positions[0]
    affine[:2] *= -1
    np.testing.assert_allclose(found[0].affine, affine, rtol=1e-5, atol=1e-3)
    expected = np.stack([plane * slope + intercept for _, _, _, slope, intercept, plane in planes], -1)
    np.testing.assert_allclose(found[1][..., 0], expected.transpose(1, 0, 2), rtol=1e-6)
    return True


def _plane(made, number, plane):
    """Position, directions, pixel spacing, slope, intercept and values of a frame."""
    holders = [made]
    if own := made.get("PerFrameFunctionalGroupsSequence"):
        inner = [s[0] for group in (own[number], made.SharedFunctionalGroupsSequence[0])
                 for s in (element.value for element in group if element.VR == "SQ")]  # fmt: skip
        holders = [*inner, made]
    values = [
        next((np.array(h.get(name), float) for h in holders if h.get(name) is not None), default)
        for name, default in (("ImagePositionPatient", None), ("ImageOrientationPatient", None), ("PixelSpacing", None),
                              ("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    ]  # fmt: skip
    directions = values[1].reshape(2, 3)
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return values[0], directions, values[2], values[3], values[4], plane


def text_headed(rng, folder):
    array, kind = voxels_of(rng), str(rng.choice([".nrrd", ".mha"]))
    zipped = bool(rng.integers(2))
    plain = array.tobytes(order="F")
    if kind == ".nrrd":
        head = ("NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 9 8 7\n"
                "space directions: (1.5,0.1,0) (0,2,0.2) (0,0,3)\nkinds: domain domain domain\nendian: little\n"
                f"encoding: {'gzip' if zipped else 'raw'}\nspace origin: (1,2,3)\n\n")  # fmt: skip
        data = gzip.compress(plain) if zipped else plain
    else:
        head = ("ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
                f"CompressedData = {zipped}\nTransformMatrix = 0.8 0.6 0 -0.6 0.8 0 0 0 1\nOffset = 1 2 3\n"
                "ElementSpacing = 1.5 2 3\nDimSize = 9 8 7\n"
                "ElementType = MET_SHORT\nElementDataFile = LOCAL\n")  # fmt: skip
        data = zlib.compress(plain) if zipped else plain
    head = mutated_text(rng, head)
    path = folder / f"a{kind}"
    path.write_bytes(head.encode("latin-1") + data)
    if (found := attempt(path)) is None:
        return False
    entries = {m[1].strip(): m[2].strip() for m in re.finditer(r"(?m)^([\w ]+?) *[:=] *(.*)$", head)}
    lps, unit = _lps(entries, kind), {"um": 1e-3, "cm": 10.0}.get(entries.get("DistanceUnits", ""), 1.0)
    lps *= unit
    np.testing.assert_allclose(found[0].affine[:3], np.diag([-1, -1, 1]) @ lps, rtol=1e-5, atol=1e-6)
    if zipped and kind == ".mha":  # SimpleITK gives garbage where the stated length is wrong
        msb = any(entries.get(f"{name}ByteOrderMSB", "").lower() in ("true", "1") for name in ("BinaryData", "Element"))
        kinds = {"MET_SHORT": "i2", "MET_USHORT": "u2"}
        expected = np.frombuffer(zlib.decompress(data), (">" if msb else "<") + kinds[entries["ElementType"]])
    else:
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(found[1].ravel(order="F"), expected.ravel())
    return True


def _lps(entries, kind):
    """The map from index to LPS of a text header that states three sides."""

    def row(name, default):
        return np.array(re.findall(r"[^\s(),]+", entries.get(name, default)), float)

    if kind == ".mha":
        spacing = row("ElementSpacing" if "ElementSpacing" in entries else "ElementSize", "")
        turn = row("TransformMatrix", "1 0 0 0 1 0 0 0 1").reshape(3, 3).T
        return np.column_stack([turn * spacing, row("Offset", "0 0 0")])
    if "space directions" not in entries:
        spacing = row("spacings", "")
        return np.column_stack([np.diag(spacing), np.zeros(3)])
    directions = row("space directions", "").reshape(3, 3).T
    flip = {"RAS": (-1, -1, 1), "right-anterior-superior": (-1, -1, 1), "LAS": (1, -1, 1)}
    sign = np.array(flip.get(entries.get("space", ""), (1, 1, 1)))[:, None]
    return sign * np.column_stack([directions, row("space origin", "(0,0,0)")])


def outcomes(kind, seeds, folder):
    accepted = 0
    for seed in seeds:
        rng, inner = np.random.default_rng(seed), folder / str(seed)
        inner.mkdir()
        try:
            accepted += kind(rng, inner)
        except BaseException as error:
            error.add_note(f"{kind.__name__}, seed {seed}")
            raise
    return accepted


@pytest.mark.parametrize("kind", [nifti, dicom, text_headed])
def test_a_damaged_header_is_read_rightly_or_refused_in_plain_words(kind, tmp_path):
    accepted = outcomes(kind, range(40), tmp_path)
    assert 0 < accepted < 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nifti, dicom, text_headed])
def test_two_thousand_damaged_headers_are_read_rightly_or_refused_in_plain_words(kind, tmp_path):
    accepted = outcomes(kind, range(1000, 1700), tmp_path)
    print(f"{kind.__name__}: {accepted} of 700 accepted")
    assert 50 < accepted < 650
