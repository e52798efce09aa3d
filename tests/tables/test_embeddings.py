import numpy as np
import pytest
from synthetic import smooth

from medssl.data.matching import Matched, Matcher
from medssl.data.sampling import Request
from medssl.data.scene import Scene
from medssl.data.store import VolumeStore
from medssl.extraction.embedder import Embedder
from medssl.extraction.embedding import match_points
from medssl.tables.derived import derive
from medssl.tables.embeddings import Embeddings, OnlineMatcher
from medssl.tables.pairs import PairPoints


@pytest.fixture
def store(make_store, embedding_weights):
    """Three volumes with their embeddings, the second the first but for a shift along y."""
    large = smooth((36, 40, 20), seed=6).astype(np.int16)
    cuts = [large[:, :, :32].copy(), large[:, :, 8:].copy(), smooth((36, 32, 20), seed=7).astype(np.int16)]
    made = make_store(*cuts, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    points = PairPoints(weights=str(embedding_weights), num_candidates=32, low_hu=-900.0)
    derive(made.root, Embeddings(points=points), num_workers=0, progress=False)
    return VolumeStore(made.root)


def test_a_proposal_is_the_match_of_a_body_point_in_the_other_case(store, embedding_weights):
    matcher = OnlineMatcher()
    assert isinstance(matcher, Matcher)
    embedder = Embedder.load(embedding_weights)
    query, key = (embedder.of_case(store, case) for case in (0, 2))
    known = store.derived("embeddings", 0)["points_mm"]
    for seed in range(5):
        point, found, score = matcher.propose(Scene(store, Request((0, 2), 0)), np.random.default_rng(seed))
        assert (known == point).all(1).any()
        expected, best = match_points(query, point[None], key)
        assert score == pytest.approx(best[0], abs=3e-3)  # half precision
        if np.abs(found - expected[0]).max() > 1e-6:
            assert best[0] - score < 3e-3
    point, found, score = matcher.propose(Scene(store, Request((1, 1), 0)), np.random.default_rng(0))
    assert score == pytest.approx(1, abs=2e-3)
    assert np.abs(found - point).max() <= 2


def test_embeddings_are_kept_in_memory_up_to_a_number(store):
    matcher = OnlineMatcher(num_cached=2)
    for cases in ((0, 1), (0, 1), (1, 0), (1, 2)):
        matcher.propose(Scene(store, Request(cases, 0)), np.random.default_rng(0))
    assert (matcher.load.cache_info().misses, matcher.load.cache_info().currsize) == (3, 2)
    with pytest.raises(ValueError, match="num_cached must be at least 2"):
        OnlineMatcher(num_cached=1)


class Counting(OnlineMatcher):
    """Remembers what it proposed."""

    def propose(self, scene, rng):
        """See `Matcher`."""
        self.proposed = [*getattr(self, "proposed", []), super().propose(scene, rng)]
        return self.proposed[-1]


def test_crops_are_placed_about_the_best_of_its_proposals(store):
    scene = Scene(store, Request((0, 1), 0))
    for threshold, number in ((2.0, 5), (-1.0, 1)):
        counting, rng = Counting(), np.random.default_rng(0)
        spec = Matched(size=[9, 9, 9], matcher=counting, score_threshold=threshold, tries=5)
        placed = spec.place(scene, {}, np.random.default_rng(0))
        expected = [OnlineMatcher().propose(scene, rng) for _ in range(number)]
        assert len(counting.proposed) == number
        assert [score for _, _, score in counting.proposed] == [score for _, _, score in expected]
        best = max(reversed(expected), key=lambda proposal: proposal[2])
        assert [placement.slot for placement in placed] == [0, 1]
        for placement, point_mm in zip(placed, best[:2], strict=True):
            np.testing.assert_array_equal(placement.frame.center, np.floor(point_mm / 2 + 0.5))


def test_the_automatic_threshold_is_the_median_score_of_random_matches(store, embedding_weights):
    scene, matcher = Scene(store, Request((0, 1), 0)), OnlineMatcher()
    threshold = matcher.auto_threshold(scene)
    scores = []
    for seed in range(200):
        cases = tuple(np.random.default_rng(seed).choice(3, 2, replace=False).tolist())
        scores.append(matcher.propose(Scene(store, Request(cases, 0)), np.random.default_rng(seed))[2])
    assert threshold == pytest.approx(np.median(scores), abs=0.01)
    assert 0.3 < np.mean(np.array(scores) > threshold) < 0.7
    spec = Matched(size=[9, 9, 9], matcher=matcher, score_threshold="auto", tries=50)
    assert len(spec.place(scene, {}, np.random.default_rng(0))) == 2
    points = PairPoints(weights=str(embedding_weights), num_candidates=32, low_hu=-900.0)
    summary = derive(store.root, Embeddings(points=points), num_workers=0, progress=False)
    assert summary.num_new == 0
    assert f"median score of random matches {threshold:.4f}: what Matched takes for score_threshold=auto" in str(
        summary
    )


def test_embeddings_without_a_median_score_say_how_to_get_it(store):
    for file in (store.root / "derived").glob("embeddings-*/threshold.json"):
        file.unlink()
    with pytest.raises(ValueError, match="derive what=embeddings weights=FILE again, which measures it"):
        OnlineMatcher().auto_threshold(Scene(store, Request((0, 1), 0)))
