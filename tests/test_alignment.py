"""Relational alignment: hand-worked, against SciPy, under the null, where nothing is aligned."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse
from scipy.spatial.distance import pdist, squareform
from scipy.stats import kendalltau, spearmanr

from sae_apps.alignment import code_distances, great_circle, relational_alignment
from sae_apps.alignment.ranks import Weighted, correlation, pairs
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

QUICK = {"permutations": 199, "n_boot": 100}


def planted(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse codes and an embedding that share what lies behind them."""
    rng = np.random.default_rng(seed)
    behind = rng.normal(size=(n, 4))
    codes = np.maximum(behind @ rng.normal(size=(4, 60)) - 1, 0)
    return codes, behind + noise * rng.normal(size=(n, 4))


# ---- distances and ranks ----


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_distances_are_those_of_scipy_and_of_dense_codes(metric: str) -> None:
    codes, _ = planted(40, 0)
    codes = codes[codes.sum(1) > 0]
    found = code_distances(sparse.csr_array(codes), metric)
    assert np.allclose(found, squareform(pdist(codes, metric)), atol=1e-7)
    assert np.allclose(found, code_distances(codes, metric), atol=1e-7)
    assert (found == found.T).all() and not np.diagonal(found).any()


def test_great_circles() -> None:
    lat, lon = np.array([0.0, 0.0, 90.0, -90.0, 0.0]), np.array([0.0, 90.0, 0.0, 0.0, -180.0])
    quarter = np.pi / 2 * 6371.0088
    found = great_circle(lat, lon)
    assert np.allclose(found[0, 1:], [quarter, quarter, quarter, 2 * quarter])
    assert found[2, 3] == pytest.approx(2 * quarter)
    assert great_circle(np.array([5.0, 5.0]), np.array([179.9, -179.9]))[0, 1] < 23  # antimeridian


def test_correlations_are_those_of_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(5, size=60).astype(float)
    y = x + rng.integers(4, size=60)
    assert correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    assert correlation(x, y, "tau-a") == pytest.approx(signs.sum() / (60 * 59))
    assert correlation(x, y, "tau-a") < kendalltau(x, y).statistic


def test_weighted_ranks_are_those_of_repeated_values() -> None:
    rng = np.random.default_rng(1)
    values, times = rng.integers(6, size=30).astype(float), rng.integers(0, 4, size=30)
    from scipy.stats import rankdata

    ranks = Weighted(values).ranks(times.astype(float))
    expected = rankdata(np.repeat(values, times))
    assert np.allclose(np.repeat(ranks, times), expected)


# ---- the measure ----


def test_hand_worked() -> None:
    # on a line, 0 1 3 7: distances 1 3 7 2 6 4; the other space swaps the last two items
    mine = np.abs(np.subtract.outer([0.0, 1, 3, 7], [0.0, 1, 3, 7]))
    theirs = np.abs(np.subtract.outer([0.0, 1, 7, 3], [0.0, 1, 7, 3]))
    codes = np.array([[0.0], [1], [3], [7]])
    found = relational_alignment(codes, theirs, distances=True, metric="euclidean", **QUICK)
    # ranks 1 3 6 2 5 4 against 1 6 3 5 2 4: 1 - 6 * (0 + 9 + 9 + 9 + 9 + 0) / (6 * 35)
    assert found.rho == pytest.approx(1 - 6 * 36 / 210)
    assert relational_alignment(
        codes, mine, distances=True, metric="euclidean", **QUICK
    ).rho == pytest.approx(1)
    # the last item lies at 7 6 4 and at 3 2 4
    assert found.per_item[3] == pytest.approx(spearmanr([7, 6, 4], [3, 2, 4]).statistic)


def test_what_is_planted_is_found_and_its_shuffled_copy_is_not() -> None:
    codes, space = planted(80, 0.3)
    found = relational_alignment(sparse.csr_array(codes), space, **QUICK)
    order = np.random.default_rng(5).permutation(80)
    none = relational_alignment(sparse.csr_array(codes), space[order], **QUICK)
    assert found.p == 1 / 200 and found.rho > 0.4 and found.ci is not None
    assert found.ci[0] < found.rho < found.ci[1] and found.ci[0] > 0.2
    assert none.p > 0.02 and abs(none.rho) < 0.15
    assert abs(found.null_mean) < 0.02 and 0 < found.null_sd < 0.1


def test_p_values_are_uniform_without_alignment() -> None:
    p = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        codes, space = np.abs(rng.normal(size=(20, 5))), rng.normal(size=(20, 3))
        p.append(relational_alignment(codes, space, permutations=99, n_boot=0, seed=seed).p)
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.11
    assert 0.4 < np.mean(p) < 0.6


def test_structure_between_groups_vanishes_within_them() -> None:
    rng = np.random.default_rng(0)
    group = np.arange(60) % 3
    codes = np.abs(rng.normal(size=(60, 9))) + 5 * np.eye(9)[group * 3]
    space = rng.normal(size=(60, 6)) + 5 * np.eye(6)[group]
    free = relational_alignment(codes, space, **QUICK)
    within = relational_alignment(codes, space, strata=group.tolist(), **QUICK)
    assert relational_alignment(codes, space, strata=group, **QUICK).p == within.p
    assert free.p == 1 / 200 and within.p > 0.05 and within.rho == free.rho
    assert within.null_mean > 0.5 * free.rho > 5 * abs(free.null_mean)
    lonely = ["alone", *["many"] * 59]
    assert relational_alignment(codes, space, strata=lonely, **QUICK).n_fixed == 1


def test_the_order_of_the_items_and_the_seed() -> None:
    codes, space = planted(30, 0.5)
    order = np.random.default_rng(0).permutation(30)
    a = relational_alignment(codes, space, **QUICK)
    b = relational_alignment(codes[order], space[order], **QUICK)
    again, other = (relational_alignment(codes, space, seed=s, **QUICK) for s in (0, 1))
    assert b.rho == pytest.approx(a.rho) and np.allclose(a.per_item[order], b.per_item)
    assert again.ci == a.ci != other.ci and again.null_sd == a.null_sd != other.null_sd


def test_the_baseline_and_its_difference() -> None:
    codes, space = planted(60, 0.2)
    noise = np.random.default_rng(3).normal(size=(60, 8))
    worse = relational_alignment(codes, space, baseline=noise, **QUICK)
    assert worse.baseline_rho is not None and abs(worse.baseline_rho) < 0.2
    assert worse.delta == pytest.approx(worse.rho - worse.baseline_rho)
    assert worse.delta_ci is not None and 0 < worse.delta_ci[0] < worse.delta < worse.delta_ci[1]
    same = relational_alignment(codes, space, baseline=codes, **QUICK)
    assert same.delta == 0 and same.delta_ci == (0, 0)


def test_items_without_a_code_are_left_out_and_counted() -> None:
    codes, space = planted(40, 0.3)
    codes[[3, 17]] = 0
    left = (codes.sum(1) > 0).nonzero()[0]
    found = relational_alignment(codes, space, **QUICK)
    assert found.n_dropped == 40 - len(left) >= 2 and found.kept.tolist() == left.tolist()
    assert found.rho == pytest.approx(relational_alignment(codes[left], space[left], **QUICK).rho)
    matrix = squareform(pdist(space))
    given = relational_alignment(codes, matrix, distances=True, **QUICK)
    assert given.n_items == len(left) and np.isfinite(given.per_item).all()


def test_sparse_features_and_tau_a() -> None:
    codes, space = planted(25, 0.3)
    acts = sparse.csr_array(codes.astype(np.float32))
    rows = pa.table({"row_id": np.arange(25)})
    features = SparseFeatures(acts, rows, Provenance("m", "r", "layers.1.out", "h", "d", "0", "v"))
    assert relational_alignment(features, space, **QUICK).rho == pytest.approx(
        relational_alignment(codes, space, **QUICK).rho, abs=1e-3
    )
    tau = relational_alignment(features, space, method="tau-a", permutations=19, n_boot=50)
    assert tau.ci is None and 0 < tau.rho < 0.9 and tau.p <= 0.1
    codes_left = codes[tau.kept]
    expected = kendalltau(pairs(code_distances(codes_left)), pairs(code_distances(space[tau.kept])))
    assert tau.rho == pytest.approx(expected.statistic, abs=0.02)


CODES, SPACE = planted(12, 0.1, seed=4)
CODES += 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"space": SPACE[:5]}, "Expected 12 rows of the space, one for each item, got 5"),
        ({"baseline": SPACE[:5]}, "12 rows of the baseline"),
        ({"strata": ["a"] * 3}, "12 strata"),
        ({"strata": list(range(12))}, "a stratum of two items or more, got 12 of one item"),
        ({"method": "pearson"}, "a method of"),
        ({"metric": "manhattan"}, "a metric of"),
        ({"permutations": 0}, "at least 1 permutation"),
        ({"space": np.zeros((12, 3)), "metric": "euclidean"}, "distances that differ"),
        ({"space": np.zeros((12, 3))}, "at least 4 items with codes, got 0"),
        ({"space": np.triu(np.ones((12, 12)), 1), "distances": True}, "symmetric matrix"),
        ({"space": np.ones((12, 12)), "distances": True}, "0 from every item to itself"),
        ({"space": SPACE, "distances": True}, r"square matrix of distances, got shape \[12, 4\]"),
        ({"space": np.full((12, 12), np.nan), "distances": True}, "finite distances"),
        ({"features": np.where(CODES > 1, np.inf, CODES)}, "finite codes"),
        ({"features": np.where(CODES > 1, np.nan, CODES)}, "finite codes"),
        ({"space": np.where(np.eye(12, 4) > 0, np.nan, SPACE)}, "finite codes"),
        ({"baseline": np.where(np.eye(12, 4) > 0, np.nan, SPACE)}, "finite codes"),
    ],
)
def test_bad_input_has_its_sentence(change: dict, message: str) -> None:
    options = {"features": CODES, "space": SPACE, **QUICK} | change
    with pytest.raises(UserError, match=message):
        relational_alignment(options.pop("features"), options.pop("space"), **options)


def test_bad_places_are_refused() -> None:
    with pytest.raises(UserError, match="latitude between -90 and 90, got 91"):
        great_circle(np.array([91.0]), np.array([0.0]))
    with pytest.raises(UserError, match="as many latitudes as longitudes"):
        great_circle(np.zeros(2), np.zeros(3))
