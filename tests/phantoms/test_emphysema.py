import csv
import itertools

import numpy as np
import pytest

from medssl.data.fingerprints import Contents
from medssl.data.prepare import prepare_store
from medssl.data.store import VolumeStore
from medssl.phantoms.emphysema import draw_severity, hole_share, low_attenuation
from medssl.phantoms.source import Phantoms
from medssl.phantoms.torso import LABELS, draw_phantom

SMALL = {"size_voxel": (32, 32, 32), "spacing_mm": 12.0}
ILL, HEALTHY = 172, 2  # severities 0.95 and 0


def points(low, high, spacing_mm):
    """Voxel centres that fill a box of atlas space."""
    axes = [np.arange(a + spacing_mm / 2, b, spacing_mm) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


def share_of_box(*, severity, low=(40, -32, 120), high=(88, 16, 168), spacing_mm=4.0, seed=0):
    return hole_share(points(low, high, spacing_mm), seed=seed, severity=severity, spacing_mm=spacing_mm)


def test_the_severity_follows_from_the_seed_and_a_quarter_of_the_subjects_is_healthy():
    severities = np.array([draw_severity(seed) for seed in range(2000)])
    assert np.array_equal(severities[:50], [draw_severity(seed) for seed in range(50)])
    assert (severities == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert severities[severities > 0].mean() == pytest.approx(0.5, abs=0.02)
    assert (severities.min(), severities.max()) == (0, pytest.approx(1, abs=0.01))
    anatomy = [np.random.default_rng(seed).uniform() for seed in range(2000)]
    assert abs(np.corrcoef(severities, anatomy)[0, 1]) < 0.06  # 2.7 standard errors


def test_emphysema_changes_nothing_but_the_lungs_of_the_ill():
    for seed, is_ill in ((ILL, True), (HEALTHY, False)):
        plain, label = draw_phantom(seed, **SMALL)
        other, other_label = draw_phantom(seed, **SMALL, emphysema=True)
        lungs = label == LABELS["lungs"]
        assert np.array_equal(label, other_label)
        darker = plain.array[0].astype(int) - other.array[0]
        assert (darker[lungs] > 5).any() == is_ill
        assert darker.min() >= 0
        assert np.count_nonzero(darker[~lungs]) < 0.05 * np.count_nonzero(darker) + 1  # voxels that hold some lung


def test_phantoms_without_emphysema_are_those_of_their_version():
    volume, label = draw_phantom(5, size_voxel=(40, 32, 24), spacing_mm=10.0)
    assert volume.array.astype(int).sum() == pytest.approx(
        -18_903_528, abs=200
    )  # versions of NumPy may round otherwise
    assert (label == LABELS["lungs"]).sum() == pytest.approx(2_662, abs=5)


def test_holes_are_added_with_the_severity_and_none_moves():
    shares = [share_of_box(severity=severity) for severity in (0, 0.3, 0.6, 1)]
    assert shares[0].max() == 0
    for less, more in itertools.pairwise(shares):
        assert (more >= less).all()
        assert more.mean() > less.mean() + 0.01
    assert shares[-1].mean() == pytest.approx(0.25, abs=0.15)


def test_holes_are_of_4_to_15_mm_and_lie_in_the_upper_lobes_rather_than_the_lower():
    upper, lower = (
        np.mean([share_of_box(severity=1, low=(40, -32, z), high=(88, 16, z + 48), seed=s).mean() for s in range(4)])
        for z in (120, -20)
    )
    assert upper > 2.5 * lower > 0
    fine = share_of_box(severity=0.1, spacing_mm=1.0, high=(72, 0, 152)).reshape(32, 32, 32) > 0.5
    runs = [len(run) for line in fine.reshape(-1, 32) for run in line.astype(np.uint8).tobytes().split(b"\0") if run]
    assert 4 <= max(runs) <= 16


def test_holes_take_as_much_of_large_voxels_as_of_small_ones():
    fine, coarse = (share_of_box(severity=0.5, spacing_mm=spacing).mean() for spacing in (1.5, 6.0))
    assert coarse == pytest.approx(fine, rel=0.5)


def test_large_holes_have_the_density_of_air():
    plain, label = draw_phantom(ILL, size_voxel=(40, 40, 40), spacing_mm=2.0)
    ill, _ = draw_phantom(ILL, size_voxel=(40, 40, 40), spacing_mm=2.0, emphysema=True)
    lungs = label == LABELS["lungs"]
    darkened = lungs & (plain.array[0].astype(int) - ill.array[0] > 110)
    assert darkened.sum() > 20
    assert ill.array[0][darkened].mean() == pytest.approx(-970, abs=20)
    assert low_attenuation(ill.array[0], lungs) > low_attenuation(plain.array[0], lungs)
    assert np.isnan(low_attenuation(ill.array[0], np.zeros_like(lungs)))


def test_a_store_lists_how_ill_its_subjects_are(tmp_path):
    source = Phantoms(num_cases=2, size_voxel=12, spacing_mm=30.0, seed=1, emphysema=True)
    summary = prepare_store(source, tmp_path / "ill", num_workers=0, progress=False)
    assert str(summary).endswith(f"; targets: {tmp_path / 'ill' / 'targets.csv'}")
    with (tmp_path / "ill" / "targets.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    store = VolumeStore(tmp_path / "ill")
    assert [row["case"] for row in rows] == store.names
    for number, row in enumerate(rows):
        assert float(row["severity"]) == draw_severity(1_000_003 + number)
        volume, label = source.scan().cases[number].read(channels=None, min_side_voxel=8)
        assert float(row["laa950"]) == low_attenuation(volume.array[0], label == LABELS["lungs"])
    written = (tmp_path / "ill" / "targets.csv").read_bytes()
    (tmp_path / "ill" / "targets.csv").unlink()
    assert prepare_store(source, tmp_path / "ill", num_workers=0, progress=False).num_new == 0
    assert (tmp_path / "ill" / "targets.csv").read_bytes() == written


def test_without_emphysema_recipe_and_store_are_as_ever(tmp_path):
    small = {"num_cases": 1, "size_voxel": 16, "spacing_mm": 24.0}
    assert "emphysema" not in Phantoms(**small).recipe()
    assert Phantoms(**small, emphysema=True).recipe()["emphysema"] == 1
    plain, ill = (Phantoms(**small, emphysema=emphysema).scan().cases[0] for emphysema in (False, True))
    assert plain.fingerprint(Contents()) == "7dcb10288bff6b9bdaea09c50090b368" != ill.fingerprint(Contents())
    prepare_store(Phantoms(**small), tmp_path / "plain", num_workers=0, progress=False)
    assert not (tmp_path / "plain" / "targets.csv").exists()
