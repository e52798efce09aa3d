"""Heights from a file become a table that travels with views."""

import csv
import json

import numpy as np
import pytest
import torch

from medssl.config import main
from medssl.data.placements import RandomCrop
from medssl.data.sampling import Request
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.derive import run as run_derive
from medssl.methods.positions import PositionRule, Positions

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2, 0, -20], [0, 0.2, 3, 100], [0, 0, 0, 1]])  # slightly tilted
ROWS = [
    ("case0", 190, 0.9),
    ("case0", 100, 0.0),
    ("case0", 160, 0.5),
    ("case1", 90, 0.2),
    ("case1", 200, 0.8),
    ("other", 1, 0),
    ("other", 2, 1),
]


@pytest.fixture
def store(make_store):
    generator = np.random.default_rng(0)
    return make_store(
        *(generator.integers(-500, 500, (1, 30, 24, 40)).astype(np.int16) for _ in range(2)), affine=AFFINE
    )


def write(path, rows, columns=("case", "z_mm", "score")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def derived(store, path):
    main("derive", run_derive, arguments=["what=heights", f"store={store.root}", f"file={path}", "num_workers=0"])
    return VolumeStore(store.root)


def test_a_view_reads_its_height_from_the_table_of_its_case(store, tmp_path, draw):
    names = [record.case for record in store.records()]
    rows = [(dict(zip(("case0", "case1"), names, strict=True)).get(case, case), *rest) for case, *rest in ROWS]
    opened = derived(store, write(tmp_path / "heights.csv", rows))
    plan = ViewPlan(groups={"crop": RandomCrop(size=[8, 8, 8], points="heights")})
    requests = [Request(cases=(n % 2,), sample=n) for n in range(20)]
    view = draw(opened, plan, requests)["crop"]
    positions = Positions.of_view(view)
    z_mm = positions.along("mm")[:, 2].numpy()
    for number in range(20):
        own = np.array(sorted([r[1:] for r in rows if r[0] == names[number % 2]]))
        if own[0, 0] <= z_mm[number] <= own[-1, 0]:
            expected = np.interp(z_mm[number], own[:, 0], own[:, 1])
            assert positions.along("external")[number, 2].item() == pytest.approx(expected, abs=1e-6)
    assert ((z_mm > 100) & (z_mm < 190)).sum() > 10
    torch.testing.assert_close(positions.along("external")[:, :2], view.location_body[:, 0, :2])
    positive, _ = PositionRule(axes=["z"], frame="external", threshold=0.2)(view)
    score = positions.along("external")[:, 2]
    assert positive.equal((score[:, None] - score).abs() < 0.2)
    assert positive.sum() < 400


def test_the_order_of_rows_is_of_no_account_and_a_changed_score_makes_new_tables(store, tmp_path):
    names = [record.case for record in store.records()]
    rows = [(name, z, z / 100) for name in names for z in (100, 150, 200)]

    def folder(rows):
        derived(store, write(tmp_path / f"{len(list(tmp_path.iterdir()))}.csv", rows))
        return json.loads((store.root / "derived" / "heights.json").read_text())["folder"]

    first = folder(rows)
    assert folder(rows[::-1]) == first
    assert folder([*rows[:-1], (names[1], 200, 2.1)]) != first


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("a", 1, 2)], ("case", "z", "score"), "has no column 'z_mm'"),
        ([("a", 1, 2)], None, "case a needs at least two rows"),
        ([("a", 1, 2), ("a", 2, 1)], None, "whose score rises with z_mm"),
        ([("a", 1, "high")], None, "line 2: score must be a number, got 'high'"),
        ([("a", 1, 2), ("a", 2, 3)], None, "has no row of case"),
    ],
)
def test_mistakes_are_one_line(store, tmp_path, capsys, rows, columns, message):
    path = write(tmp_path / "heights.csv", rows, columns or ("case", "z_mm", "score"))
    with pytest.raises(SystemExit) as stop:
        derived(store, path)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error.strip().splitlines()[-1]  # a bar may come before it


def test_a_missing_file_is_one_line(store, capsys):
    for argument, message in (
        ("file=null", "needs file=FILE.csv"),
        ("file=/no/where.csv", "there is no table /no/where.csv"),
    ):
        with pytest.raises(SystemExit) as stop:
            main("derive", run_derive, arguments=["what=heights", f"store={store.root}", argument, "num_workers=0"])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
