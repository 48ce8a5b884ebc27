"""Similarity by presence, against its dense formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sae_apps.selection import presence as module
from sae_apps.selection.presence import background_of, directions, explain, presence, score
from sae_core.errors import UserError

TOLERANCE = 1e-4  # float32 components and products of unit vectors


def codes(seed: int, n: int = 40, d: int = 30, density: float = 0.3) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(0, 2, (n, d)) * (rng.random((n, d)) < density * rng.random(d) * 2)
    return sparse.csr_array(dense.astype(np.float32))


def dense_presence(acts: sparse.csr_array) -> np.ndarray:
    there = (acts.toarray() > 0).astype(np.float64)
    norms = np.linalg.norm(there, axis=1, keepdims=True)
    return there / np.where(norms > 0, norms, 1)


def whitening(b: np.ndarray, r: int) -> np.ndarray:
    """W by its definition, from the full covariance."""
    values, vectors = np.linalg.eigh(np.cov(b.T))
    lead = values.argsort()[::-1][:r]
    level = module.LAMBDA * np.cov(b.T, bias=True).trace() / b.shape[1]
    u = vectors[:, lead]
    return np.eye(len(values)) - u * (1 - np.sqrt(level / (values[lead] + level))) @ u.T


def dense_score(acts: sparse.csr_array, prototypes: np.ndarray, r: int) -> np.ndarray:
    b = dense_presence(acts)
    w, m = whitening(b, r), b.mean(0)
    left, right = (b - m) @ w, (prototypes - m) @ w
    found = left @ right.T
    found /= np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    found[np.diff(acts.indptr) == 0] = 0
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 0.9), st.integers(1, 20))
def test_sparse_equals_dense(seed, density, r):
    acts, targets = codes(seed, density=density), codes(seed + 1, n=5)
    prototypes = np.vstack([dense_presence(targets).mean(0), dense_presence(targets)[:2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMPONENTS", r)
        found = score(acts, prototypes, background_of([acts]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, dense_score(acts, prototypes, r), atol=TOLERANCE)


def test_sizes_do_not_matter_but_latents_do():
    acts = codes(0)
    background, p = background_of([acts]), dense_presence(codes(1))[:1]
    louder = sparse.csr_array(acts * np.float32(7))
    np.testing.assert_array_equal(score(louder, p, background), score(acts, p, background))
    other = acts[:, np.roll(np.arange(30), 1)]
    other.sort_indices()
    assert np.abs(score(other, p, background) - score(acts, p, background)).max() > 0.05


def test_a_direction_that_the_pool_varies_in_counts_less():
    rng = np.random.default_rng(0)
    topic = rng.random(400) < 0.5  # half of the pool has ten latents that the other half lacks
    there = rng.random((400, 60)) < 0.2
    there[:, :10] = topic[:, None]
    there[:, 50:] = False
    there[:8, 50:] = True  # few rows have what the target has
    acts = sparse.csr_array(there.astype(np.float32))
    aim = np.zeros((1, 60))
    aim[0, :10] = aim[0, 50:] = 20**-0.5
    background = background_of([acts])
    flat = module.Background(background.mean, background.axes, np.zeros_like(background.damping))
    gaps = [
        found[8:][topic[8:]].mean() - found[8:][~topic[8:]].mean()
        for found in (score(acts, aim, one)[:, 0] for one in (background, flat))
    ]
    assert 0 < gaps[0] < 0.8 * gaps[1]
    assert set(score(acts, aim, background)[:, 0].argsort()[-8:]) == set(range(8))


def test_the_background_does_not_depend_on_the_shards(monkeypatch):
    acts = codes(3)
    whole, parts = background_of([acts]), background_of([acts[:15], acts[15:]])
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-7)
    np.testing.assert_allclose(whole.mean, dense_presence(acts).mean(0), atol=1e-6)
    x = np.random.default_rng(0).normal(size=(3, 30))
    np.testing.assert_allclose(parts.shrink(x), whole.shrink(x), atol=TOLERANCE)
    monkeypatch.setattr(module, "SAMPLE", 20)
    few, again = background_of([acts]), background_of([acts[:7], acts[7:33], acts[33:]])
    np.testing.assert_allclose(few.shrink(x), again.shrink(x), atol=TOLERANCE)
    assert np.abs(few.shrink(x) - whole.shrink(x)).max() > 0.01
    np.testing.assert_allclose(few.mean, whole.mean, atol=1e-7)
    with pytest.raises(UserError, match="got none"):
        background_of([])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_pool_of_few_rows_has_few_components(n):
    acts = codes(2, n=n)
    background = background_of([acts])
    assert len(background.axes) == max(0, n - 2)
    assert np.isfinite(score(acts, dense_presence(codes(5, n=2)), background)).all()


def test_a_row_without_latents_scores_0_and_stays_empty():
    acts = sparse.csr_array(np.array([[0, 0, 0, 0], [0, 0, 3, 0]], dtype=np.float32))
    assert presence(acts).nnz == 1
    background = background_of([codes(1, d=4, density=0.5)])
    found = score(acts, np.eye(4, dtype=np.float32)[2:3], background)
    assert found[0, 0] == 0
    assert found[1, 0] > 0.9
    with pytest.raises(UserError, match="width 4 as the activations, got 5 and 4"):
        score(acts, np.eye(5, dtype=np.float32), background)


def test_shares_are_the_positive_parts_and_all_parts_make_the_score():
    pool, acts, targets = codes(6), codes(4, n=3), dense_presence(codes(5))
    background = background_of([pool])
    aims = directions(targets[:2], background).mean(0)[None].repeat(3, axis=0)
    scores = score(acts, targets[:2], background).mean(1)
    for i, share in enumerate(explain(acts, aims, background, top=30)):
        away = dense_presence(acts)[i] - background.mean
        parts = away * aims[i]
        length = np.sqrt(away @ background.shrink(away[None])[0])
        np.testing.assert_allclose(parts.sum() / length, scores[i], atol=TOLERANCE)
        wanted = parts[share.latents] / parts[parts > 0].sum()
        np.testing.assert_allclose(share.shares, wanted, atol=TOLERANCE)
        assert (np.diff(share.shares) <= 0).all()
        active = np.flatnonzero((acts.toarray()[i] > 0) & (parts > 1e-9))
        assert set(active) <= set(share.latents)
