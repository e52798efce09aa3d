"""Mining on a small store: volumes of 2 mm that are shifted copies of one another, an untrained embedding."""

import json

import numpy as np
import pytest
import torch
from embedding_stand_in import FixedFeatures
from synthetic import reading, smooth

from medssl.config import main
from medssl.data.body_points import draw_body_points
from medssl.data.matching import TableMatcher
from medssl.data.sampling import Pairs as PairSampler
from medssl.data.sampling import linked_cases
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.derive import run as run_derive
from medssl.extraction.embedder import Embedder
from medssl.extraction.embedding import match_points
from medssl.tables import pairs as pairs_module
from medssl.tables.derived import derive, table_of
from medssl.tables.pairs import PairPoints, PairTable

NUM_CASES = 4
SHIFT_VOXEL = 4


@pytest.fixture
def store(make_store):
    """Each case shows the next 4 voxels of one body further along x."""
    large = smooth((64, 36, 20), seed=4, sigma=2.5).astype(np.int16)
    cuts = [large[:, SHIFT_VOXEL * n : SHIFT_VOXEL * n + 40].copy() for n in range(NUM_CASES)]
    return make_store(*cuts, affine=np.diag([2.0, 2.0, 2.0, 1.0]))


@pytest.fixture
def mining(monkeypatch, tmp_path):
    """Pairs by the stand-in network instead of that of a file."""
    network = Embedder(FixedFeatures(), reading((2.0, 2.0, 2.0), window=(1, 1, 1)), torch.device("cpu"))
    monkeypatch.setattr(pairs_module, "_embedder", lambda *recipe: network)
    file = tmp_path / "network"
    file.write_bytes(b"stand-in")

    def made(*, num_points=12, num_candidates=24, low_hu=-300.0, margin_voxel=4, **settings):
        points = PairPoints(weights=str(file), num_candidates=num_candidates, low_hu=low_hu, margin_voxel=margin_voxel)
        return PairTable(points=points, num_points=num_points, **settings)

    made.embedder = network
    return made


def run(store, derivation):
    summary = derive(store.root, derivation, num_workers=0, progress=False)
    return summary, [dict(table_of(VolumeStore(store.root), derivation, case)) for case in range(NUM_CASES)]


def test_pairs_show_the_same_landmark_of_shifted_copies(store, mining):
    _, tables = run(store, mining())
    for case, table in enumerate(tables):
        linked = [other for other in linked_cases(case) if other < NUM_CASES]
        assert table["partner"].tolist() == [f"case_{other:03d}" for other in linked]
        for row, other in enumerate(linked):
            rows = slice(*table["first"][row : row + 2])
            shift_mm = 2.0 * SHIFT_VOXEL * (case - other) * np.array([1, 0, 0])
            error = np.abs(table["key_mm"][rows] - table["query_mm"][rows] - shift_mm).max(1)
            assert np.median(error) <= 4
            assert (table["score"][rows] > table["threshold"]).all()
            assert len(error) >= 1


def test_a_table_holds_what_matching_point_by_point_gives_above_the_median_score(store, mining):
    derivation = mining()
    _, tables = run(store, derivation)
    embeddings = [mining.embedder.of_case(store, case) for case in range(NUM_CASES)]
    scores, expected = [], []
    for case in range(NUM_CASES):
        points = table_of(store, derivation.points, case)["points_mm"]
        found = {o: match_points(embeddings[case], points, embeddings[o]) for o in linked_cases(case) if o < NUM_CASES}
        scores += [score for _, score in found.values()]
        expected.append((points, found))
    threshold = np.median(np.concatenate(scores))
    for table, (points, found) in zip(tables, expected, strict=True):
        assert float(table["threshold"]) == pytest.approx(threshold, abs=2e-3)
        for row, (key_mm, score) in enumerate(found.values()):
            rows = slice(*table["first"][row : row + 2])
            kept = np.flatnonzero(score > float(table["threshold"]) + 2e-3)[:6]  # vectors travel in half precision
            for number in kept:
                at = np.flatnonzero((table["query_mm"][rows] == points[number]).all(1))
                np.testing.assert_allclose(table["key_mm"][rows][at[0]], key_mm[number], atol=4.01)
                assert table["score"][rows][at[0]] == pytest.approx(score[number], abs=2e-3)


def test_points_that_do_not_return_to_themselves_fall_to_the_cycle_check(store, mining):
    loose, strict = (
        run(store, mining(score_threshold=-1.0, num_points=24, cycle_mm=limit_mm))[1] for limit_mm in (1000.0, 4.0)
    )
    far = []
    for tables in (loose, strict):
        shift = np.concatenate([table["key_mm"] - table["query_mm"] for table in tables])
        far.append((np.abs(shift[:, 1:]).max(1) > 4).mean())  # copies are shifted along x
    assert sum(len(table["score"]) for table in loose) == 24 * sum(len(table["partner"]) for table in loose)
    assert sum(len(table["score"]) for table in strict) < 0.95 * sum(len(table["score"]) for table in loose)
    assert far[1] < far[0]


def test_a_partner_without_a_good_match_keeps_its_best_one(store, mining):
    summary, tables = run(store, mining(score_threshold=2.0))
    assert all(np.diff(table["first"]).tolist() == [1] * len(table["partner"]) for table in tables)
    assert summary.mean_quality["above"] == 0
    assert summary.mean_quality["threshold"] == 2.0


def test_the_table_feeds_the_matcher_with_the_partners_of_the_sampler(store, mining):
    run(store, mining(num_links=1))
    opened = VolumeStore(store.root)
    sampler, matcher = PairSampler(partner="linked", num_links=1), TableMatcher()
    for step in range(6):
        (request,) = sampler.batch(step, index=range(NUM_CASES), batch_size=1, seed=0)
        query, key, score = matcher.propose(Scene(opened, request), np.random.default_rng(step))
        shift_mm = 2.0 * SHIFT_VOXEL * (request.cases[0] - request.cases[1])
        assert np.abs(key - query - [shift_mm, 0, 0]).max() <= 8
        assert 0 < score <= 1.001


def test_tables_are_small_and_made_again_for_other_weights_only(store, mining, tmp_path):
    first, _ = run(store, mining())
    assert first.num_new == NUM_CASES
    assert run(store, mining())[0].num_new == 0
    assert sum(file.stat().st_size for file in first.folder.glob("*.npz")) / NUM_CASES < 10_000
    (tmp_path / "network").write_bytes(b"another")
    again, _ = run(store, mining())
    assert again.num_new == NUM_CASES
    assert again.folder != first.folder
    assert json.loads((first.folder.parent / "pairs.json").read_text())["folder"] == again.folder.name


def test_body_points_are_no_air_and_keep_away_from_the_faces(make_store):
    array = np.full((1, 24, 24, 24), -800, np.int16)
    array[:, 6:18, :, 8:20] = 40
    store = make_store(array, np.full((1, 24, 24, 24), -800, np.int16) + np.arange(24, dtype=np.int16))
    options = {"rng": np.random.default_rng(0), "low_hu": -125.0, "margin_voxel": 10}
    points = draw_body_points(store, 0, 30, **options)
    assert len(points) == 30
    assert (array[0][tuple(points.T)] == 40).all()
    assert points.min() >= 6
    assert points.max() < 18, "a quarter of the side, where ten voxels would leave nothing"
    assert len(draw_body_points(store, 1, 30, **options)) > 0, "any body voxel, where all are air"
    inner = draw_body_points(store, 0, 1000, **options)
    assert len(inner) < 256


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda file: PairPoints(weights=None), "weights is missing"),
        (lambda file: PairPoints(weights="nowhere"), "there is no weight file nowhere"),
        (lambda file: PairPoints(weights=file, num_candidates=0), "num_candidates must be at least 1"),
        (lambda file: PairTable(points=PairPoints(weights=file), score_threshold="median"), "must be auto or a number"),
        (
            lambda file: PairTable(points=PairPoints(weights=file), num_points=300),
            "num_points=300 must lie between 1 and",
        ),
        (lambda file: PairTable(points=PairPoints(weights=file), cycle_mm=0), "cycle_mm must be positive or null"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, build, message):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path / "file"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device=cuda: PyTorch finds no CUDA device here"),
        ("tpu", "device is 'tpu', allowed are auto, cpu, cuda"),
    ],
)
def test_a_device_that_is_not_there_is_a_mistake_of_one_line(store, embedding_weights, capsys, device, message):
    arguments = ["what=pairs", f"store={store.root}", f"weights={embedding_weights}", f"what.points.device={device}"]
    with pytest.raises(SystemExit) as stop:
        main("derive", run_derive, arguments=arguments)
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error


@pytest.mark.parametrize("what", ["pairs", "embeddings"])
def test_a_file_that_holds_no_embedding_is_refused_before_a_table_is_begun(store, tmp_path, capsys, what):
    (tmp_path / "SAM.pth").write_bytes(b"no network")
    arguments = [f"what={what}", f"store={store.root}", f"weights={tmp_path / 'SAM.pth'}", "weights.layout=sam"]
    with pytest.raises(SystemExit) as stop:
        main("derive", run_derive, arguments=[*arguments, "num_workers=2"])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "SAM.pth is no PyTorch checkpoint" in error
    assert not (store.root / "derived").exists()


def test_points_are_embedded_alike_in_a_process_of_their_own(store, embedding_weights):
    points = PairPoints(weights=str(embedding_weights), num_candidates=8, low_hu=-900)
    derive(store.root, points, num_workers=1, progress=False)
    apart = [table_of(store, points, case)["descriptors"] for case in range(NUM_CASES)]
    for case in range(NUM_CASES):
        np.testing.assert_array_equal(points(store, case)["descriptors"], apart[case])
    np.testing.assert_allclose(np.linalg.norm(apart[0].astype(np.float32), axis=2).max(), 1, atol=2e-3)


def test_the_command_writes_the_table_that_placements_read(store, embedding_weights, capsys):
    arguments = ["what=pairs", f"store={store.root}", "num_workers=0", "what.points.num_candidates=8"]
    arguments += ["what.num_points=4", "what.points.low_hu=-900"]
    main("derive", run_derive, arguments=[*arguments, f"weights={embedding_weights}"])
    out = capsys.readouterr().out
    assert "4 tables (4 new)" in out
    assert "threshold" in out
    assert len(VolumeStore(store.root).derived("pairs", 0)["partner"]) == 2
    main("derive", run_derive, arguments=[*arguments, f"weights={embedding_weights}", "what.points.device=auto"])
    assert "4 tables (0 new)" in capsys.readouterr().out, "the device changes no table"
    with pytest.raises(SystemExit) as stop:
        main("derive", run_derive, arguments=arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: weights is missing")
