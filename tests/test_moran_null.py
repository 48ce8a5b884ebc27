"""The permuted statistic, permutation by permutation, against a naive dense implementation."""

import numpy as np
import pytest
from scipy import sparse

pytest.importorskip("numba")

from sae_apps.geospatial import moran_dense, moran_sparse
from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.moran_dense import DenseStatistic, pairs_of
from sae_apps.geospatial.moran_links import table_of
from sae_apps.geospatial.moran_sparse import SparseStatistic
from sae_apps.geospatial.permutation import draw, free, inverse, strata_of
from sae_apps.geospatial.residual import covariate_table, projection
from sae_core.errors import UserError

EXACT = 1e-12  # of I, which is about 1: float64 sums of some thousand terms
N, F = 90, 7


def neighbours(n: int = N, k: int = 5, seed: int = 0) -> sparse.csr_array:
    """k nearest of random points of the plane, rows of 1/k; not symmetric."""
    points = np.random.default_rng(seed).random((n, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    columns = np.argsort(distance, axis=1)[:, :k]
    matrix = np.zeros((n, n))
    np.put_along_axis(matrix, columns, 1 / k, axis=1)
    return sparse.csr_array(matrix)


def uneven(n: int = N, seed: int = 0) -> sparse.csr_array:
    """Rows of any length and weights that differ within a row, one row empty."""
    generator = np.random.default_rng(seed)
    matrix = generator.random((n, n)) * (
        generator.random((n, n)) < generator.random(n)[:, None] / 5
    )
    matrix[3] = 0
    np.fill_diagonal(matrix, 0)
    return sparse.csr_array(matrix)


def banded(n: int = N, seed: int = 0) -> sparse.csr_array:
    """Row-standardised rows of 0 to 6 links."""
    generator = np.random.default_rng(seed)
    matrix = np.zeros((n, n))
    for i in range(1, n):
        others = generator.choice(np.delete(np.arange(n), i), size=5 + i % 2, replace=False)
        matrix[i, others] = 1 / len(others)
    return sparse.csr_array(matrix)


WEIGHTS = {"neighbours": neighbours, "uneven": uneven, "banded": banded}


def codes(n: int = N, f: int = F, density: float = 0.2, seed: int = 1) -> np.ndarray:
    """Sparse positive features, float32 as those of an SAE."""
    generator = np.random.default_rng(seed)
    values = generator.exponential(size=(n, f)) * (generator.random((n, f)) < density)
    values[:3] += 0.5  # none is dead
    return values.astype(np.float32)


LABELS = np.array([*(["a"] * 30), *(["b"] * 40), *(["c"] * 15), "d", "d", None, None, ""])


def labels(seed: int = 2) -> list[str | None]:
    """Three strata, one of two places, three places without label; mixed."""
    return list(np.random.default_rng(seed).permutation(LABELS))


def covariates(n: int = N, seed: int = 3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.column_stack([generator.integers(1, 6, n), generator.normal(size=n)])


def naive(x: np.ndarray, w: np.ndarray, perm: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """I of (I - H) P (I - H) x by its definition, H = A A^+."""
    hat = removed @ np.linalg.pinv(removed)
    e = x - hat @ x
    moved = np.empty_like(e)
    moved[perm] = e
    moved = moved - hat @ moved
    return len(x) / w.sum() * np.einsum("ij,ij->j", moved, w @ moved) / (moved**2).sum(axis=0)


def removed_columns(groups: np.ndarray | None, table: np.ndarray | None) -> np.ndarray:
    """A: the indicators of the groups, or ones, and the covariates."""
    means = np.ones((N, 1)) if groups is None else np.eye(groups.max() + 1)[groups]
    return means if table is None else np.hstack([means, table])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("form", ["sparse", "dense", "torch"])
@pytest.mark.parametrize(
    ("within", "means", "regressed"),
    [
        (False, False, False),
        (False, False, True),
        (True, False, False),
        (True, False, True),
        (True, True, False),
        (True, True, True),
    ],
)
def test_every_permutation_is_that_of_the_naive_form(
    kind: str, form: str, within: bool, means: bool, regressed: bool
):
    weights, x = WEIGHTS[kind](), codes()
    assert (table_of(weights) is None) == (kind == "uneven"), "control: both forms are tested"
    strata = strata_of(labels(), N) if within else free(N)
    table = covariates() if regressed else None
    groups = strata.codes if means else None
    removed = projection(groups, table, N)
    perms = np.stack([draw(strata, 5, b) for b in range(9)])
    if form == "sparse":
        statistic = SparseStatistic(sparse.csc_array(x), weights, removed)
    else:
        device = "cpu" if form == "torch" else None
        statistic = DenseStatistic(removed.residual(x), weights, pairs_of(weights), removed, device)
    live = np.array([0, 2, 3, 6])
    columns = removed_columns(groups, table)
    wanted = [naive(x.astype(float), weights.toarray(), perm, columns)[live] for perm in perms]
    np.testing.assert_allclose(statistic(perms, live), np.array(wanted).T, rtol=0, atol=EXACT)


def test_without_numba_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch):
    weights, x = neighbours(), codes()
    x[:, 0] += 1  # a dense one
    options = {"strata": labels(), "strata_means": True, "covariates": covariates()}
    with_numba = [moran(x, weights, permutations=19), moran(x, weights, permutations=19, **options)]
    for module in (moran_sparse, moran_dense):
        monkeypatch.setattr(module, "has_numba", lambda: False)
    without = [moran(x, weights, permutations=19), moran(x, weights, permutations=19, **options)]
    for a, b in zip(with_numba, without, strict=True):
        for name in ("I", "EI_sim", "seI_sim", "p_sim"):
            np.testing.assert_allclose(a.column(name), b.column(name), rtol=0, atol=EXACT)


# ---- permutations ----


def test_a_free_permutation_is_uniform():
    counts = np.zeros((5, 5))
    for b in range(2000):
        counts[np.arange(5), draw(free(5), 0, b)] += 1
    # 400 each, standard deviation 18
    assert np.abs(counts - 400).max() < 5 * 18


def test_strata_keep_their_places_and_are_uniform():
    strata = strata_of(["b", "a", "b", None, "a", "b", "c", "a", "c"], 9)
    assert (strata.n_permuted, strata.n_small, strata.n_unlabelled) == (2, 2, 1)
    counts = np.zeros((9, 9))
    for b in range(3000):
        counts[np.arange(9), draw(strata, 1, b)] += 1
    wanted = np.zeros((9, 9))
    for group in ([0, 2, 5], [1, 4, 7]):
        wanted[np.ix_(group, group)] = 1000
    wanted[[3, 6, 8], [3, 6, 8]] = 3000
    assert (counts[wanted == 0] == 0).all()
    assert np.abs(counts - wanted).max() < 5 * 26


def test_a_permutation_depends_on_its_number_and_seed_alone():
    strata = free(50)
    assert (draw(strata, 0, 3) == draw(strata, 0, 3)).all()
    different = [draw(strata, 0, 4), draw(strata, 1, 3), draw(strata, 0, 3, 1)]
    assert all((draw(strata, 0, 3) != other).any() for other in different)
    perm = draw(strata, 0, 3)
    assert (perm[inverse(perm)] == np.arange(50)).all() and (np.sort(perm) == np.arange(50)).all()


def test_labels_may_be_numbers_and_nan_is_none():
    strata = strata_of(np.array([1.0, 1.0, np.nan, 1.0, 2.0, 2.0, 2.0]), 7)
    assert (strata.n_permuted, strata.n_unlabelled) == (2, 1)


def test_bad_strata_are_refused():
    with pytest.raises(UserError, match="one stratum for each of 5 places, got 2"):
        strata_of(["a", "b"], 5)
    with pytest.raises(UserError, match="at least 3 places, got 2 strata of at most 2"):
        strata_of(["a", "a", "b", None], 4)


# ---- what is removed ----


def test_residuals_are_orthogonal_to_what_was_removed():
    strata = strata_of(labels(), N)
    removed = projection(strata.codes, covariates(), N)
    assert removed.rank == 4 + 2
    e = removed.residual(codes() + 1e4)
    columns = removed_columns(strata.codes, covariates())
    # inner products of residuals of size 1 with columns of size 5
    assert np.abs(columns.T @ e).max() < 1e-9


def test_redundant_covariates_are_dropped():
    strata = strata_of(labels(), N)
    table = covariates()
    twice = np.column_stack([table, 2 * table[:, 0] - table[:, 1], strata.codes == 1, np.ones(N)])
    assert projection(strata.codes, twice, N).rank == projection(strata.codes, table, N).rank
    assert projection(None, twice, N).rank == 1 + 2 + 1, "control: the label counts without means"


def test_covariates_come_as_arrays_mappings_and_tables():
    import pandas as pd
    import pyarrow as pa

    table = covariates()
    mapping = {"tokens": table[:, 0], "noise": table[:, 1]}
    for given in (mapping, pd.DataFrame(mapping), pa.table(mapping)):
        found, names = covariate_table(given, N)
        assert names == ["tokens", "noise"]
        np.testing.assert_array_equal(found, table)
    assert covariate_table(table[:, 0], N)[1] == ["covariate 0"]
    assert covariate_table(pd.Series(table[:, 0], name="tokens"), N)[1] == ["covariate 0"]
    with pytest.raises(UserError, match="covariate noise for 3 places, got the shape"):
        covariate_table({"noise": [1.0, 2.0]}, 3)
    with pytest.raises(UserError, match="covariate noise, got nan for place 1"):
        covariate_table({"noise": [1.0, np.nan]}, 2)
    with pytest.raises(UserError, match="numbers in the covariate kind"):
        covariate_table({"kind": ["x", "y"]}, 2)
