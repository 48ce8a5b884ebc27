"""The two steps of re-ranking: what is passed over could not have been among the best."""

import numpy as np
import pytest
from scipy import sparse

from sae_apps.selection.cascade import PROBE, SPREAD, plausible, probes, rerank
from sae_apps.selection.rerank import Part, exact_scores

pytest.importorskip("numba")
D_SAE, K = 60, 5


def matrix(n: int, seed: int) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(sigma=1, size=(n, D_SAE)) * (rng.random((n, D_SAE)) < 0.3)
    return sparse.csr_array(dense.astype(np.float32))


def ordered(noise: float, seed: int = 0) -> tuple[sparse.csr_array, list[Part], np.ndarray, ...]:
    """Queries, parts, candidates with their approximate similarity, and all exact scores."""
    queries, rows = matrix(12, 1), matrix(900, 2)
    parts = [Part.of(sparse.csr_array(rows[:400])), Part.of(sparse.csr_array(rows[400:]))]
    everything = np.tile(np.arange(900), (12, 1))
    exact = exact_scores(parts, queries, everything)
    near = 3 * exact - 7 + noise * np.random.default_rng(seed).normal(size=exact.shape)
    order = np.argsort(-near, axis=1, kind="stable")
    near = np.take_along_axis(near, order, 1).astype(np.float32)
    return queries, parts, order, near, exact


def share_found(scores: np.ndarray, exact: np.ndarray) -> float:
    bars = np.sort(exact, axis=1)[:, -K, None]
    return float((scores >= np.nextafter(bars, np.float32(-1))).mean())


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
def test_the_best_are_found_and_few_are_scored(noise: float) -> None:
    queries, parts, rows, near, exact = ordered(noise)
    found = rerank(parts, queries, rows, near, K)
    assert share_found(found.scores, exact) == 1
    assert (found.scores == np.take_along_axis(exact, found.rows, 1)).all()
    assert found.n_scored < (0.13 if noise == 0 else 0.75) * exact.size
    probed = np.take_along_axis(exact, rows[:, probes(900, K)], 1)
    if noise == 0.1:  # the first step alone would not do
        assert share_found(np.sort(probed, axis=1)[:, -K:], exact) < 1


def test_similarities_that_say_nothing_pass_nothing_over() -> None:
    queries, parts, rows, near, exact = ordered(0)
    near = np.random.default_rng(3).normal(size=near.shape).astype(np.float32)
    order = np.random.default_rng(4).permuted(rows, axis=1)
    found = rerank(parts, queries, order, -np.sort(-near, axis=1), K)
    assert found.n_scored > 0.9 * exact.size and share_found(found.scores, exact) > 0.98


def test_places_without_a_candidate() -> None:
    queries, parts, rows, near, exact = ordered(0.1)
    rows[:6, 300:], near[:6, 300:] = -1, -np.finfo(np.float32).max
    rows[0] = -1
    found = rerank(parts, queries, rows, near, K)
    assert (found.rows[0] == -1).all() and (found.rows[1:] >= 0).all()
    assert share_found(found.scores[1:], exact[1:]) == 1


def test_probes() -> None:
    assert probes(2 * (PROBE + SPREAD), 1).tolist() == list(range(2 * (PROBE + SPREAD)))
    places = probes(1000, 1)
    assert len(places) == len(set(places)) == PROBE + SPREAD
    assert places[PROBE - 1] == PROBE - 1 and places[-1] == 999
    assert len(probes(1000, 50)) == 200 + SPREAD  # four times k


def test_hand_worked_line() -> None:
    # scores .9, .5, .1 at similarities 9, 5, 1: J = g / 10, no residual; the second best is .5
    rows = np.array([[3, 4, 8]])
    near = np.array([[9, 5, 1]], dtype=np.float32)
    scores = near / 10
    rest = np.array([[5.1, 4.3]], dtype=np.float32)
    assert plausible(rows, near, scores, rest, 2).tolist() == [[True, False]]
    assert plausible(rows, near, scores, rest, 1).tolist() == [[False, False]]
    # the residuals are -.025 and +.075: .43 + .025 + .075 reaches the third best, .5
    bent = np.array([[0.9, 0.5, 0.1, 0.6]], dtype=np.float32)
    rows, near = np.array([[3, 4, 8, 9]]), np.array([[9, 5, 1, 5]], dtype=np.float32)
    assert plausible(rows, near, bent, rest, 3).tolist() == [[True, True]]
    # one probe less
    rows[0, 3] = -1
    assert plausible(rows, near, bent, rest, 2).tolist() == [[True, False]]
