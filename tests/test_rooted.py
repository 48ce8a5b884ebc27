"""The centred cosine of fourth roots, against its dense formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sae_apps.selection.rooted import directions, explain, mean_of, rooted, score
from sae_core.errors import UserError

TOLERANCE = 1e-5  # float32 products of unit vectors


def codes(seed: int, n: int = 12, d: int = 30, density: float = 0.3) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(0, 2, (n, d)) * (rng.random((n, d)) < density)
    return sparse.csr_array(dense.astype(np.float32))


def dense_roots(acts: sparse.csr_array) -> np.ndarray:
    roots = acts.toarray().astype(np.float64) ** 0.25 * (acts.toarray() > 0)
    norms = np.linalg.norm(roots, axis=1, keepdims=True)
    return roots / np.where(norms > 0, norms, 1)


def dense_score(acts: sparse.csr_array, prototypes: np.ndarray, centre: np.ndarray) -> np.ndarray:
    left, right = dense_roots(acts) - centre, prototypes - centre
    found = left @ right.T
    found /= np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    found[np.diff(acts.indptr) == 0] = 0
    return found


@given(st.integers(0, 10_000), st.floats(0.1, 0.9))
def test_sparse_equals_dense(seed, density):
    acts, targets = codes(seed, density=density), codes(seed + 1, n=5)
    centre = mean_of([acts])
    prototypes = np.vstack([dense_roots(targets).mean(0), dense_roots(targets)[:2]])
    found = score(acts, prototypes, centre)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, dense_score(acts, prototypes, centre), atol=TOLERANCE)


def test_scale_of_a_row_does_not_matter_but_its_latents_do():
    acts = codes(0)
    centre, p = mean_of([acts]), dense_roots(codes(1))[:1]
    louder = sparse.csr_array(acts * np.float32(7))
    np.testing.assert_allclose(score(louder, p, centre), score(acts, p, centre), atol=TOLERANCE)
    other = acts[:, np.roll(np.arange(30), 1)]
    other.sort_indices()
    assert np.abs(score(other, p, centre) - score(acts, p, centre)).max() > 0.05


def test_the_mean_does_not_depend_on_the_shards():
    acts = codes(3)
    np.testing.assert_allclose(mean_of([acts[:5], acts[5:]]), mean_of([acts]), atol=1e-7)
    np.testing.assert_allclose(mean_of([acts]), dense_roots(acts).mean(0), atol=1e-6)
    with pytest.raises(UserError, match="got none"):
        mean_of([])


def test_a_row_without_latents_scores_0_and_stays_empty():
    acts = sparse.csr_array(np.array([[0, 0, 0, 0], [0, 0, 3, 0]], dtype=np.float32))
    assert rooted(acts).nnz == 1
    found = score(acts, np.eye(4, dtype=np.float32)[2:3], np.full(4, 0.1, dtype=np.float32))
    assert found[0, 0] == 0
    assert found[1, 0] > 0.9


def test_shares_are_the_positive_parts_and_all_parts_make_the_score():
    acts, targets = codes(4, n=3), dense_roots(codes(5))
    centre = mean_of([codes(6)])
    aims = directions(targets[:2], centre).mean(0)[None].repeat(3, axis=0)
    scores = score(acts, targets[:2], centre).mean(1)
    for i, share in enumerate(explain(acts, aims, centre, top=30)):
        parts = (dense_roots(acts)[i] - centre) * aims[i]
        length = np.linalg.norm(dense_roots(acts)[i] - centre)
        np.testing.assert_allclose(parts.sum() / length, scores[i], atol=TOLERANCE)
        wanted = parts[share.latents] / parts[parts > 0].sum()
        np.testing.assert_allclose(share.shares, wanted, atol=TOLERANCE)
        assert (np.diff(share.shares) <= 0).all()
        active = np.flatnonzero((acts.toarray()[i] > 0) & (parts > 0))
        assert set(share.latents) == set(active)
