"""The table and the page of a prepared store: odd cases with their reasons, harmless names, bytes that repeat."""

import re
from dataclasses import replace

import numpy as np
from volume_files import image

from medssl.config import main
from medssl.data.store import VolumeStore
from medssl.evaluation.store_report import REPORT, _png, overview, write_report
from medssl.prepare import run


def test_the_odd_ones_out_are_named_with_their_reasons(noise_store):
    usual = noise_store.record(0)
    changes = (
        {},
        {"modality": ("unknown",), "doubts": ("values of 0 to 1 do not tell the modality",)},
        {"modality": ("unknown",)},
        {"padding": (((-9999.0, 0.25),),)},
        {"spacing_mm": (1.0, 1.0, 9.0)},
        {"shape": (400, 36, 32)},
        {"statistics": ({**usual.statistics[0], "p99_5": 9000.0},)},
        {"doubts": ("the body is 0.2 % of the volume",)},
        {"modality": ("mr",), "modality_from": "voxels"},
        *[{}] * 4,
    )
    tables = overview([replace(usual, case=f"c{n:02d}", **change) for n, change in enumerate(changes)])
    odd = dict(map(tuple, tables.odd[1:]))
    assert odd.keys() == {f"c{n:02d}" for n in range(1, 9)}
    assert odd["c01"] == "values of 0 to 1 do not tell the modality"
    assert odd["c02"] == "stated as of unknown modality"
    assert odd["c03"] == "padding -9999 (25 %) left out"
    assert odd["c04"] == "spacing 1 x 1 x 9, that of the others is about 1 x 1 x 1"
    assert odd["c05"] == "size 400 x 36 x 32, that of the others is about 40 x 36 x 32"
    assert odd["c06"].startswith("range ")
    assert odd["c07"] == "the body is 0.2 % of the volume"
    assert odd["c08"] == "mr by its values, which 12 others are not"
    assert [row[:2] for row in tables.summary[1:]] == [["ct", "10"], ["mr", "1"], ["unknown", "2"]]
    lines = str(tables).splitlines()
    assert lines[4] == "to look at: 8 of 13 cases"
    assert "c03: padding -9999" in lines[7]


def test_the_page_shows_each_case_escapes_names_and_repeats_its_bytes(noise_store):
    records = list(noise_store.records())
    doubtful = [replace(records[0], doubts=("<img src=x onerror=alert(1)>",)), *records[1:]]
    page = write_report(noise_store, overview(doubtful))
    first = page.read_bytes()
    text = first.decode()
    assert "&lt;img src=x onerror" in text
    assert "<img src=x" not in text
    assert text.count("data:image/png;base64,") == 3 * len(noise_store)
    assert text.count('<svg class="histogram"') == len(noise_store)
    assert "channel" not in text.split("Slices</h2>")[1].replace("of each channel", "")
    assert not re.search(r"""(src|href)=["'](?!data:)""", text), "a page that loads nothing"
    page.unlink()
    assert write_report(noise_store, overview(doubtful)).read_bytes() == first


def test_a_large_store_has_the_table_alone(noise_store, monkeypatch):
    monkeypatch.setattr("medssl.evaluation.store_report.MOST_PICTURES", 3)
    text = write_report(noise_store, overview(list(noise_store.records()))).read_text(encoding="utf-8")
    assert "base64" not in text
    assert "case_003" in text


def test_pictures_are_pngs_of_the_grey_values(tmp_path):
    from matplotlib.image import imread

    grey = np.random.default_rng(0).integers(0, 256, (7, 5)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(_png(grey))
    assert np.array_equal(np.rint(255 * imread(tmp_path / "a.png")), grey)


def test_prepare_ends_with_the_table_and_the_same_page_at_every_place(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for number in range(3):
        array = np.abs(generator.normal(0, 300, (14, 14, 14))).astype(np.int16)
        array[:3] = -9999 if number == 1 else array[:3]
        image(tmp_path / "in" / f"{number}.nii.gz", array)
    arguments = ["data=folder", f"data.root={tmp_path / 'in'}", "num_workers=0"]
    main("prepare", run, arguments=[*arguments, f"store={tmp_path / 's'}"])
    out = capsys.readouterr().out
    assert "to look at: 1 of 3 cases\n  1: padding -9999 (21.4 %) left out\n" in out
    assert f"3 cases (3 new) -> {tmp_path / 's'}; report: {tmp_path / 's' / REPORT}" in out
    page = (tmp_path / "s" / REPORT).read_bytes()
    main("prepare", run, arguments=[*arguments, f"store={tmp_path / 't'}"])
    assert (tmp_path / "t" / REPORT).read_bytes() == page
    assert len(VolumeStore(tmp_path / "t")) == 3


def test_each_channel_has_slices_and_a_histogram(make_store):
    array = np.random.default_rng(0).normal(0, 9, (2, 12, 11, 10)).astype(np.float32)
    store = make_store(array)
    text = write_report(store, overview(list(store.records()))).read_text()
    assert text.count("data:image/png;base64,") == 6
    for channel in (0, 1):
        assert text.count(f", channel {channel} (") == 1


def test_ranges_are_given_for_each_channel(make_store):
    array = np.random.default_rng(0).integers(0, 100, (2, 12, 11, 10)).astype(np.int16)
    array[1] += 1000
    array[:, 0, 0, 0], array[:, 0, 0, 1] = (0, 1000), (99, 1099)
    tables = overview(list(make_store(array).records()))
    assert tables.summary[1][2] == "0 to 99; 1000 to 1099"
    assert tables.cases[1][3] == "0 to 99; 1000 to 1099"
