"""Damage in a store is noticed, and a case that is made again leaves the old one to those who read it."""

from pathlib import Path

import numpy as np
import pytest
from volume_files import image, tree

from medssl.data.checksums import DamagedError, is_whole_line, read_sealed, sealed_line
from medssl.data.description import command_for, read_description
from medssl.data.prepare import prepare_store
from medssl.data.sources import Csv, Folder
from medssl.data.store import Record, VolumeStore
from medssl.phantoms.source import Phantoms
from medssl.tables.derived import Body, derive

QUIET = {"num_workers": 0, "progress": False}


def content(root: Path) -> list:
    """All that can be read from a store with a table of bodies, as comparable values."""
    store = VolumeStore(root)
    found: list = [store.names, store.cohorts, store.label_names, store.ignored_label, store.recipe]
    for number, record in enumerate(store.records()):
        found += [record, store.has_label(number), store.points(number).tobytes()]
        for level, factor in enumerate(record.level_factors):
            sides = -(-np.array(record.shape) // factor)
            found.append(store.read(number, level, [0] * 3, sides).result().tobytes())
        found.append(store.read_label(number, [0] * 3, record.shape).result().tobytes())
        found.append({name: array.tobytes() for name, array in store.derived("body", number).items()})
    return found


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("damage") / "s"
    prepare_store(Phantoms(num_cases=2, size_voxel=24, spacing_mm=16.0), root, checksums=True, **QUIET)
    derive(root, Body(), **QUIET)
    return root


def flip(root: Path, number: int) -> tuple[Path, bytes]:
    """Flip a bit of a file below the root, and return the file with its bytes before."""
    generator = np.random.default_rng(number)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "quality.csv")
    path = files[number % len(files)]
    before = path.read_bytes()
    changed = bytearray(before)
    changed[int(generator.integers(len(before)))] ^= 1 << int(generator.integers(8))
    path.write_bytes(bytes(changed))
    return path, before


def check_flips(root: Path, numbers: range) -> int:
    """Return how many of the flips raise an error; all others must not change what is read."""
    expected, noticed = content(root), 0
    for number in numbers:
        path, before = flip(root, number)
        found, error = None, ""
        try:
            found = content(root)
        except ValueError as raised:
            error = str(raised)
            noticed += 1
        path.write_bytes(before)
        assert found == expected or str(root) in error, (number, path, error)
        assert len(error.splitlines()) <= 1, (number, path, error)
    return noticed


def test_a_flipped_bit_is_noticed_or_does_not_matter(labelled):
    assert check_flips(labelled, range(120)) >= 80


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_noticed_or_do_not_matter(labelled):
    assert check_flips(labelled, range(1000, 2000)) >= 600


def test_a_sealed_line_is_plain_json_and_every_flip_of_it_is_seen():
    line = sealed_line({"case": "a", "values": [1.5, None]}).encode()
    assert is_whole_line(line)
    assert line.endswith(b'"}')
    for place in range(len(line)):
        for bit in range(8):
            changed = bytearray(line)
            changed[place] ^= 1 << bit
            assert not is_whole_line(bytes(changed))
    assert not is_whole_line(b'{"case": "a"}')


def test_prepare_makes_a_damaged_line_and_a_damaged_case_again(tmp_path):
    for number in range(3):
        image(tmp_path / "in" / f"{number}.nii.gz", shape=(10, 10, 10), seed=number)
    source, root = Folder(root=tmp_path / "in"), tmp_path / "s"
    prepare_store(source, root, **QUIET)
    whole = tree(root)
    index = root / "index.jsonl"
    index.write_bytes(index.read_bytes().replace(b'"case": "1"', b'"case": "7"'))
    with pytest.raises(ValueError, match=r"index\.jsonl, line 2 \(case 7\) is damaged: .*prepare again"):
        VolumeStore(root).record(1)
    assert VolumeStore(root).record(2).case == "2"
    assert prepare_store(source, root, **QUIET).num_new == 0
    assert tree(root) == whole
    index.unlink()
    (described,) = root.glob("1-*.zarr/zarr.json")
    described.write_bytes(described.read_bytes().replace(b'"channels": 1', b'"channels": 2'))
    assert prepare_store(source, root, **QUIET).num_new == 1
    assert tree(root) == whole


def test_who_holds_the_old_index_reads_the_old_case_until_prepare_ends(tmp_path):
    table, options = tmp_path / "t.csv", QUIET
    first = image(tmp_path / "a.nii.gz", shape=(10, 10, 10), seed=1)
    table.write_text("case,image\nx,a.nii.gz\n")
    prepare_store(Csv(root=table), tmp_path / "s", **options)
    reader = VolumeStore(tmp_path / "s")
    second = image(tmp_path / "a.nii.gz", shape=(10, 10, 10), seed=2)
    assert prepare_store(Csv(root=table), tmp_path / "s", prune=False, **options).num_new == 1
    assert np.array_equal(reader.read(0, 0, [0] * 3, [10] * 3).result()[0], first)
    assert np.array_equal(VolumeStore(tmp_path / "s").read(0, 0, [0] * 3, [10] * 3).result()[0], second)
    assert len(list((tmp_path / "s").glob("x-*.zarr"))) == 2
    assert prepare_store(Csv(root=table), tmp_path / "s", **options).num_new == 0
    (left,) = (tmp_path / "s").glob("x-*.zarr")
    assert left.name == VolumeStore(tmp_path / "s").record(0).folder


def test_an_index_cannot_name_a_case_outside_of_the_store(labelled, tmp_path):
    record = VolumeStore(labelled).record(0)
    for change in ({"case": "../x"}, {"folder": "/etc"}, {"folder": ".hidden.zarr"}, {"case": "a\nb"}, {"case": ""}):
        values = {**record.to_json(), **change}
        (tmp_path / "index.jsonl").write_text(sealed_line(values) + "\n")
        (tmp_path / "store.json").write_bytes((labelled / "store.json").read_bytes())
        with pytest.raises(ValueError, match="may lie outside of the store"):
            VolumeStore(tmp_path).record(0)


def test_the_record_in_the_folder_of_a_case_is_that_of_the_index(labelled):
    store = VolumeStore(labelled)
    for number, record in enumerate(store.records()):
        inside = read_sealed(store.folder(number) / "zarr.json", remedy="", inside="attributes")["medssl"]
        assert Record.from_json(inside) == record
        assert record.folder.startswith(f"{record.case}-")


def test_files_that_were_left_out_are_listed_at_every_prepare(tmp_path, monkeypatch):
    from dataclasses import replace

    import medssl.data.cases as reading

    image(tmp_path / "in" / "a.nii.gz", shape=(10, 10, 10))
    read = reading.read_volume
    rows = ((str(tmp_path / "in" / "scout.dcm"), "a scout"),)
    monkeypatch.setattr(reading, "read_volume", lambda *a, **k: replace(read(*a, **k), left_out=rows))
    for expected in (1, 0):
        summary = prepare_store(Folder(root=tmp_path / "in"), tmp_path / "s", **QUIET)
        assert (summary.num_new, summary.num_skipped) == (expected, 1)
        assert "scout.dcm" in (tmp_path / "s" / "skipped.jsonl").read_text()


def test_a_description_that_is_damaged_or_of_another_format_is_one_line(labelled, tmp_path):
    text = (labelled / "store.json").read_text()
    for changed, message in (
        (text.replace('"format": 2', '"format": 3'), "does not fit its checksum"),
        ("[", "is no JSON with a checksum"),
        ('{"format": 1, "recipe": {"source": {"kind": "csv", "root": "/t.csv"}}}', "store=.* has format 1"),
    ):
        (tmp_path / "store.json").write_text(changed)
        with pytest.raises(ValueError, match=message) as caught:
            read_description(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    assert issubclass(DamagedError, ValueError)


def test_the_command_of_a_recipe_says_what_the_recipe_says():
    source = {"kind": "folder", "root": "/a b", "include_labels": True}
    recipe = {"source": source, "channels": "all", "spacing_mm": [1.0, 1.0, 2.0], "min_side_voxel": 8, "body": {}}
    assert command_for(recipe, "s-2") == (
        "python -m medssl.prepare data=folder 'data.root=/a b' data.include_labels=true data.channels=all"
        " 'data.spacing_mm=[1.0,1.0,2.0]' data.min_side_voxel=8 store=s-2"
    )
    assert command_for(None, "s-2") == "python -m medssl.prepare data=... store=s-2"
