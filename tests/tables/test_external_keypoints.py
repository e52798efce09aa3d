"""Keypoints from a file become a table that travels with views."""

import csv

import numpy as np
import pytest
import torch

from medssl.config import main
from medssl.data.augment import Flip
from medssl.data.placements import Nearby, RandomCrop
from medssl.data.sampling import Request
from medssl.data.store import VolumeStore
from medssl.data.views import ViewPlan
from medssl.derive import run as run_derive
from medssl.methods.base import Progress
from medssl.methods.kaf_points import PointRule

AFFINE = np.array([[2.0, 0, 0, -30], [0, 2, 0, -20], [0, 0.2, 3, 100], [0, 0, 0, 1]])  # slightly tilted
SHAPE = (30, 24, 40)
COLUMNS = ("case", "x_mm", "y_mm", "z_mm", "sigma_mm", "response")


@pytest.fixture
def store(make_store):
    generator = np.random.default_rng(0)
    return make_store(*(generator.integers(-500, 500, (1, *SHAPE)).astype(np.int16) for _ in range(2)), affine=AFFINE)


def in_mm(voxel):
    return (AFFINE[:3, :3] @ voxel + AFFINE[:3, 3]).round(6).tolist()


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def derived(store, path):
    arguments = ["what=external_keypoints", f"store={store.root}", f"file={path}", "num_workers=0"]
    main("derive", run_derive, arguments=arguments)
    return VolumeStore(store.root)


def test_the_command_writes_voxels_and_features_with_the_strongest_first(store, tmp_path, capsys):
    one, two = (record.case for record in store.records())
    voxels = np.array([[3.5, 4, 5], [29, 23, 39], [-0.4, 0, 0]])
    features = [(1, 0.2), (2, -0.9), (3, 0.5)]
    rows = [(one, *in_mm(voxel), *values) for voxel, values in zip(voxels, features, strict=True)]
    rows.append((two, *in_mm(voxels[0]), 4, 0.1))
    opened = derived(store, write(tmp_path / "points.csv", rows))
    assert "mean quality: points 2" in capsys.readouterr().out
    first, second = (opened.derived("external_keypoints", case) for case in (0, 1))
    assert first["points_voxel"] == pytest.approx(voxels[[1, 2, 0]], abs=1e-4)
    assert first["features"] == pytest.approx(np.array([[2, -0.9], [3, 0.5], [1, 0.2]]))
    assert second["points_voxel"][0] == pytest.approx(voxels[0], abs=1e-4)
    assert np.isnan(second["points_voxel"][1:]).all()
    assert np.isnan(second["features"][1:]).all()


def test_without_features_points_keep_their_order_and_a_case_may_have_none(store, tmp_path):
    one, _ = (record.case for record in store.records())
    voxels = np.array([[3, 4, 5], [20, 2, 30]])
    path = write(tmp_path / "points.csv", [(one, *in_mm(voxel)) for voxel in voxels], COLUMNS[:4])
    opened = derived(store, path)
    first, second = (opened.derived("external_keypoints", case) for case in (0, 1))
    assert first["points_voxel"] == pytest.approx(voxels, abs=1e-4)
    assert np.isnan(first["features"]).all()
    assert second["points_voxel"].shape == (2, 3)
    assert np.isnan(second["points_voxel"]).all()


def test_views_carry_the_points_and_pairs_show_the_same_place(store, tmp_path, draw):
    generator = np.random.default_rng(1)
    voxels = [generator.uniform(0, np.array(SHAPE) - 1, (60 + 20 * case, 3)) for case in (0, 1)]
    rows = [(store.record(case).case, *in_mm(voxel)) for case in (0, 1) for voxel in voxels[case]]
    opened = derived(store, write(tmp_path / "points.csv", rows, COLUMNS[:4]))
    first = RandomCrop(size=[16, 16, 16], points="external_keypoints", augment=[Flip(axes=[0, 1])])
    second = Nearby(of="first", shift=0.1, size=[16, 16, 16], points="external_keypoints", augment=first.augment)
    plan = ViewPlan(groups={"first": first, "second": second})
    assert plan.notes(opened) == []
    views = draw(opened, plan, [Request(cases=(n % 2,), sample=n) for n in range(4)])
    for sample in range(4):
        inside = views["first"].inside[sample, 0]
        place = views["first"].to_view(views["first"].points)[sample, 0]
        expected = ((place[: len(voxels[sample % 2])] >= 0) & (place[: len(voxels[sample % 2])] <= 15)).all(-1)
        assert inside.nonzero()[:, 0].tolist() == expected.nonzero()[:, 0].tolist()
        found = views["first"].points[sample, 0][inside].numpy()
        assert found == pytest.approx(voxels[sample % 2][inside[: len(voxels[sample % 2])]], abs=1e-3)
    points = PointRule()(views["first"], views["second"], Progress(0, 10, 0.0, 10.0, 0), is_random=True)
    pairs = points.pairs[(points.pairs >= 0).all(1)]
    assert len(pairs) > 8
    one, two = (view.to_volume(place[:, None])[:, 0] for view, place in zip(views.values(), points[:2], strict=True))
    torch.testing.assert_close(one[pairs[:, 0], pairs[:, 1]], two[pairs[:, 0], pairs[:, 2]], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([("case", 1, 2)], ("case", "x_mm", "y_mm"), "has no column 'z_mm'; it needs case, x_mm, y_mm, z_mm"),
        ([("case", 0, 0, "low")], COLUMNS[:4], "line 2: z_mm must be a number, got 'low'"),
        ([("case", 0, 0, 110, 1, "")], COLUMNS, "line 2: response must be a number, got ''"),
        ([("case", 0, 0, "inf")], COLUMNS[:4], "line 2: z_mm must be finite, got 'inf'"),
        ([("case", 0, 0, 110), ("case", 0, 0, 900)], COLUMNS[:4], "1 of 2 points of case"),
        ([("case", 0, 0, 110), ("nobody", 0, 0, 110)], COLUMNS[:4], "has rows of nobody, which"),
        ([], COLUMNS[:4], "has no rows below its header"),
    ],
)
def test_mistakes_are_one_line(store, tmp_path, capsys, rows, columns, message):
    known = store.record(0).case
    rows = [(known if case == "case" else case, *rest) for case, *rest in rows]
    with pytest.raises(SystemExit) as stop:
        derived(store, write(tmp_path / "points.csv", rows, columns))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error.strip().splitlines()[-1]  # a bar may come before it


def test_a_missing_file_is_one_line(store, capsys):
    for path, message in (("null", "needs file=FILE.csv"), ("/no/where.csv", "there is no table /no/where.csv")):
        with pytest.raises(SystemExit) as stop:
            derived(store, path)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_a_store_without_the_table_tells_how_to_make_it(store):
    with pytest.raises(ValueError, match=r"what=external_keypoints file=FILE.csv store="):
        store.derived("external_keypoints", 0)
