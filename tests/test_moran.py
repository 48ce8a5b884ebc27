"""Global Moran's I: hand-worked values, esda as the oracle, p-values, planted truths, bad input."""

from itertools import permutations as orders

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import sparse
from scipy.stats import kstest

pytest.importorskip("numba")

from sae_apps.geospatial import moran_null
from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.moran_table import load_moran
from sae_apps.geospatial.permutation import draw, free, inverse
from sae_apps.geospatial.tails import Null, family_wise, tail_p
from sae_apps.geospatial.tally import Tally
from sae_apps.geospatial.weights import spatial_weights
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

EXACT = 1e-10  # what is promised against esda
SAME = 1e-12  # the same numbers in another order of float64 sums
NUMBERS = ("I", "EI", "VI_rand", "z_rand", "EI_sim", "seI_sim", "z_sim", "p_sim", "p_tail", "q")


def places(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.uniform(6, 18, n), generator.uniform(37, 47, n)


def weights(n: int = 300, k: int = 8, seed: int = 0):
    return spatial_weights(*places(n, seed), k=k)


def codes(n: int = 300, f: int = 20, density: float = 0.15, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.exponential(size=(n, f)) * (generator.random((n, f)) < density)
    return values.astype(np.float32)


def smooth(n: int = 300) -> np.ndarray:
    """Larger in the north: a field that its neighbours share."""
    return places(n)[1] - 37


GRID = sparse.csr_array(np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]], float))


# ---- by hand ----


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_a_grid_of_two_by_two(form):
    # corners 0 1 / 2 3, rook links of weight 1, S0 = 8. z of (0,0,0,4) = (-1,-1,-1,3): the links
    # 01 and 02 give 1 each, 13 and 23 give -3 each, both ways: z'Wz = -8, z'z = 12, I = -1/3.
    # (1,0,0,1) is a chessboard: each link joins opposites, I = -1. (1,1,0,0): 2 links agree, I = 0.
    x = np.array([[0, 0, 0, 4], [1, 0, 0, 1], [1, 1, 0, 0]], dtype=float).T
    table = moran(form(x), GRID, min_active=1, permutations=9)
    np.testing.assert_allclose(table.column("I"), [-1 / 3, -1, 0], atol=1e-15)
    np.testing.assert_allclose(table.column("EI"), -1 / 3)
    # (1,1,0,0) in all orders: 2 of 6 are chessboards, I = -1, the others 0: mean -1/3, variance 2/9
    np.testing.assert_allclose(table.column("VI_rand")[1:], 2 / 9, atol=1e-15)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_ties_count_as_reached(form):
    x = np.array([[1.0, 1, 0, 0]]).T
    options = {"min_active": 1, "permutations": 3999}
    # exact: I* >= 0 in 4 of 6 orders and I* <= 0 in all; the error of 3999 draws is 0.0075
    assert abs(moran(form(x), GRID, **options).column("p_sim")[0] - 2 / 3) < 0.03
    assert moran(form(x), GRID, alternative="less", **options).column("p_sim")[0] == 1
    assert moran(form(x), GRID, alternative="two-sided", **options).column("p_sim")[0] == 1


def test_a_binary_feature_of_any_scale_has_the_same_ties():
    w = weights(60, k=5)
    x = np.zeros((60, 3), dtype=np.float32)
    x[:12] = [1, 0.1, 1e-7]
    tables = [moran(form(x), w, permutations=400) for form in (np.asarray, sparse.csr_array)]
    p = [table.column("p_sim") for table in tables]
    assert len({*p[0], *p[1]}) == 1


# ---- oracle ----


def test_every_number_is_that_of_esda():
    esda = pytest.importorskip("esda")
    w = weights()
    x = np.hstack([codes(), codes() + 3, np.random.default_rng(5).normal(size=(300, 4))])
    x[:, 5] = x[:, 5] > 0
    table = moran(x, w, permutations=9, min_active=1)
    sparse_table = moran(sparse.csr_array(x), w, permutations=9, min_active=1)
    graph = w.to_graph()
    for j in range(x.shape[1]):
        wanted = esda.Moran(x[:, j].astype(float), graph, permutations=0)
        for found in (table, sparse_table):
            for name in ("I", "EI", "VI_rand", "z_rand"):
                np.testing.assert_allclose(
                    found.column(name)[j], getattr(wanted, name), rtol=1e-9, atol=EXACT
                )


def test_weights_of_libpysal_are_taken():
    pytest.importorskip("libpysal")
    w, x = weights(), codes()
    wanted = moran(x, w, permutations=19)
    for other in (w.to_graph(), w.to_w(), w.matrix):
        np.testing.assert_array_equal(
            moran(x, other, permutations=19).column("I"), wanted.column("I")
        )


def test_the_null_is_that_of_all_orders():
    # all 120 orders of five values by brute force, against the analytic and the simulated moments
    w = weights(5, k=2)
    x = np.array([1.0, 0, 2.5, 0, 7])
    z = x - x.mean()
    matrix = w.matrix.toarray()
    values = [5 / w.s0 * (z[list(o)] @ matrix @ z[list(o)]) / (z @ z) for o in orders(range(5))]
    table = moran(x, w, min_active=1, permutations=6000)
    np.testing.assert_allclose(table.column("EI"), np.mean(values), atol=SAME)
    np.testing.assert_allclose(table.column("VI_rand"), np.var(values), atol=SAME)
    error = np.std(values) / np.sqrt(6000)
    assert abs(table.column("EI_sim")[0] - np.mean(values)) < 4 * error
    share = np.mean(np.array(values) >= table.column("I")[0] - 1e-9)
    assert abs(table.column("p_sim")[0] - share) < 4 * np.sqrt(share * (1 - share) / 6000)


def test_moments_and_counts_are_those_of_the_permuted_values():
    w, x = weights(), codes(f=6)
    table = moran(x, w, permutations=50, seed=3)
    z = x - x.mean(axis=0, dtype=float)
    values = []
    for b in range(50):
        moved = z[inverse(draw(free(300), 3, b))]
        values.append(300 / w.s0 * (moved * (w.matrix @ moved)).sum(0) / (z**2).sum(0))
    np.testing.assert_allclose(table.column("EI_sim"), np.mean(values, axis=0), atol=SAME)
    np.testing.assert_allclose(table.column("seI_sim"), np.std(values, axis=0), atol=SAME)
    above = (np.array(values) >= table.column("I")).sum(axis=0)
    np.testing.assert_allclose(table.column("p_sim"), (1 + above) / 51)
    assert len(set(above)) > 3, "control: the counts differ"


# ---- laws ----


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_scale_and_shift_change_nothing(form):
    w, x = weights(), codes().astype(float)
    table, other = (moran(form(v), w, permutations=29) for v in (x, 250 * x + 3))
    for name in NUMBERS:
        np.testing.assert_allclose(table.column(name), other.column(name), atol=1e-9, err_msg=name)
    mirrored = moran(-x, w, permutations=29)
    np.testing.assert_allclose(table.column("p_sim"), mirrored.column("p_sim"))


def test_relabelling_the_places_changes_no_statistic():
    w, x = weights(), codes()
    order = np.random.default_rng(4).permutation(300)
    table = moran(x, w, permutations=499)
    other = moran(x[order], sparse.csr_array(w.matrix[order][:, order]), permutations=499)
    for name in ("I", "VI_rand", "z_rand"):
        np.testing.assert_allclose(table.column(name), other.column(name), atol=SAME)
    # other permutations, the same null: 499 draws know its mean to 4.5 % of its deviation
    z = (table.column("EI_sim") - other.column("EI_sim")) / table.column("seI_sim")
    assert np.abs(z).max() < 5 * np.sqrt(2 / 499)


def test_features_find_their_places_by_row_id():
    x, ids = codes(), np.random.default_rng(0).permutation(1000)[:300]
    w = spatial_weights(*places(), row_id=ids)
    order = np.random.default_rng(1).permutation(300)
    provenance = Provenance("a", "b", "c", "d", "e", "0", "f")
    features = SparseFeatures(
        sparse.csr_array(x[order]), pa.table({"row_id": ids[order]}), provenance
    )
    table = moran(features, w, permutations=9)
    np.testing.assert_allclose(
        table.column("I"), moran(x, w, permutations=9).column("I"), atol=SAME
    )


def test_the_seed_decides_and_threads_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch):
    w, x = weights(), np.hstack([codes(), codes() + 1])
    options = {"p_adjust": "max", "permutations": 40}
    table = moran(x, w, seed=1, **options)
    assert (table.column("p_sim") != moran(x, w, seed=2, **options).column("p_sim")).any()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(moran_null, "BLOCK", 7)
    monkeypatch.setattr(moran_null, "DENSE_COLUMNS", 3)
    try:
        assert moran(x, w, seed=1, **options).table.equals(table.table)
    finally:
        torch.set_num_threads(before)


def test_a_feature_does_not_depend_on_the_others():
    w, x = weights(), np.hstack([codes(f=40), codes(f=40) + 1])
    options = {"permutations": 3000, "adaptive": True, "p_adjust": None}
    some = np.array([3, 17, 44, 62])
    alone = moran(x[:, some], w, **options).table.drop_columns("feature")
    assert moran(x, w, **options).table.drop_columns("feature").take(some).equals(alone)


def test_forms_and_devices_agree():
    w, x = weights(), codes()
    wanted = moran(sparse.csr_array(x), w, permutations=60, p_adjust="max")
    for features, device in ((sparse.csc_array(x.astype(float)), None), (torch.from_numpy(x), None),
                             (x, "cpu"), (sparse.csr_array(x), "cpu")):  # fmt: skip
        found = moran(features, w, permutations=60, p_adjust="max", device=device)
        for name in NUMBERS:
            np.testing.assert_allclose(found.column(name), wanted.column(name), atol=1e-9)


# ---- p-values under the null ----


def randomised(x: np.ndarray, w, permutations: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """p, and p spread evenly over its ties, which is uniform for discrete statistics too."""
    p, below = (
        moran(x, w, permutations=permutations, alternative=a, **options).column("p_sim")
        for a in ("greater", "less")
    )
    reached, under = (np.rint(q * (permutations + 1)) - 1 for q in (p, below))
    ties = reached + under - permutations
    share = np.random.default_rng(0).random(x.shape[1])
    return p, (reached - ties + share * (ties + 1)) / (permutations + 1)


def null_features(kind: str, n: int, f: int) -> np.ndarray:
    generator = np.random.default_rng(7)
    if kind == "dense":
        return generator.normal(size=(n, f))
    m = 15 if kind == "15 active" else n // 3
    x = np.zeros((n, f))
    for j in range(f):
        where = generator.choice(n, m, replace=False)
        x[where, j] = generator.exponential(size=m) if kind == "15 active" else 1
    return x


KINDS = ("dense", "15 active", "binary")


@pytest.mark.parametrize("kind", KINDS)
def test_p_is_uniform_under_the_null(kind: str):
    plain, p = randomised(null_features(kind, 400, 1000), weights(400), 199)
    assert kstest(p, "uniform").pvalue > 0.01
    # three standard deviations of a share of 1000 above the level: p never promises too much
    assert np.mean(plain <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_a_null_that_permutes_the_lag_alone_is_not_uniform():
    # what another library does: rows of W are permuted and columns are not
    w, x = weights(400), null_features("dense", 400, 1000)
    z = x - x.mean(axis=0)
    lag = w.matrix @ z
    observed = (z * lag).sum(axis=0)
    above = np.zeros(1000)
    for b in range(199):
        above += (z * lag[draw(free(400), 0, b)]).sum(axis=0) >= observed
    p = (1 + above) / 200
    assert kstest(p, "uniform").pvalue < 1e-6
    assert np.mean(p <= 0.05) > 0.08, "the test rejects too often"


def test_p_is_uniform_within_strata_and_after_covariates():
    # values that depend on the stratum and on a smooth covariate, and on nothing else
    w, f = weights(400), 600
    generator = np.random.default_rng(3)
    label = (places(400)[0] > 12).astype(int)
    north = smooth(400)
    x = generator.normal(size=(400, f)) + 2.0 * label[:, None] + 0.5 * north[:, None]
    options = {"strata": label, "strata_means": True, "covariates": north}
    assert kstest(randomised(x, w, 199, **options)[1], "uniform").pvalue > 0.01
    assert moran(x, w, permutations=99).column("p_sim").max() < 0.05, "control: free is significant"


# ---- planted truths ----


def test_a_planted_feature_is_found_and_its_shuffled_copy_is_not():
    w, x = weights(), codes(f=30)
    x[:, 4] = np.maximum(smooth() - 7, 0)
    x[:, 5] = np.random.default_rng(0).permutation(x[:, 4])
    table = moran(sparse.csr_array(x), w)
    assert table.passing(min_i=0.3, alpha=0.01).tolist() == [4]
    assert table.passing(min_i=0.3, alpha=0.05, by="q").tolist() == [4]
    assert table.top(1).tolist() == [4] and table.column("q")[5] > 0.1
    assert moran(x, w, alternative="less").column("p_sim")[4] == 1


def test_a_chessboard_is_negative():
    side = 12
    row, column = np.divmod(np.arange(side**2), side)
    near = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1
    x = ((row + column) % 2).astype(float)
    w = sparse.csr_array(near.astype(float))
    options = {"permutations": 199}
    assert moran(x, w, **options).column("p_sim")[0] == 1
    assert moran(x, w, alternative="less", **options).column("p_sim")[0] == 1 / 200
    assert moran(x, w, alternative="two-sided", **options).column("p_sim")[0] == 2 / 200
    assert moran(x, w, **options).column("I")[0] == pytest.approx(-1)


def test_a_feature_that_is_its_label_vanishes_within_strata():
    w = weights()
    label = np.where(places()[0] > 12, "east", "west")
    noisy = (label == "east") * (1 + np.random.default_rng(9).random(300))
    x = np.column_stack([label == "east", noisy, smooth()]).astype(np.float32)
    freely, within = moran(x, w), moran(x, w, strata=label)
    assert (freely.column("p_sim") == 0.001).all() and freely.column("I").min() > 0.5
    # the pure label is the same under every permutation within labels
    assert within.column("p_sim")[0] == 1 and np.isnan(within.column("z_sim")[0])
    assert within.column("p_sim")[1] > 0.05
    assert within.column("p_sim")[2] == 0.001, "control: a gradient within labels stays"
    means = moran(x, w, strata=label, strata_means=True)
    assert means.column("status").tolist() == ["constant", "ok", "ok"]
    assert abs(means.column("I")[1]) < 0.1 < means.column("I")[2]
    assert within.how["strata"]["n_permuted"] == 2


def test_a_feature_that_is_a_covariate_vanishes():
    w, north = weights(), smooth()
    noise = np.random.default_rng(2).normal(size=300)
    # one that follows the covariate with noise, and one that follows another direction
    x = np.column_stack([north, 3 * north + noise, north + places()[0]]).astype(np.float32)
    assert (moran(x, w).column("p_sim") == 0.001).all()
    table = moran(x, w, covariates={"north": north})
    assert table.column("status").tolist() == ["constant", "ok", "ok"]
    assert table.column("p_sim")[1] > 0.05 and table.column("p_sim")[2] == 0.001
    assert table.how["covariates"] == ["north"]
    assert table.table["EI"].null_count == table.table["VI_rand"].null_count == 3


# ---- many tests, sequential tests, tails ----


def test_the_largest_statistic_controls_the_family():
    w = weights(120)
    generator = np.random.default_rng(0)
    rejected = 0
    for seed in range(40):
        x = np.hstack([codes(120, 6, 0.1, seed + 100), generator.normal(size=(120, 4))])
        table = moran(x, w, permutations=99, p_adjust="max", seed=seed, min_active=5)
        rejected += table.column("q").min() <= 0.1
    assert rejected <= 4 + 3 * np.sqrt(40 * 0.1 * 0.9)
    x[:, 9] = smooth(120)
    assert moran(x, w, p_adjust="max").column("q")[9] == 0.001


def test_family_wise_p_counts_the_permutations_whose_largest_reaches():
    largest = np.array([3.0, 1.0, 2.0, 5.0])
    np.testing.assert_allclose(
        family_wise(np.array([6.0, 5.0, 2.5, 0.0]), largest), np.array([1, 2, 3, 5]) / 5
    )


def test_scales_of_the_max_control_take_out_the_skewness():
    generator = np.random.default_rng(0)
    values = np.stack([generator.gamma(0.3, size=200_000), generator.normal(size=200_000)])
    mean, deviation = values.mean(axis=1), values.std(axis=1)
    skew = ((values - mean[:, None]) ** 3).mean(axis=1) / deviation**3
    top = np.quantile(Null(mean, deviation, skew).deviate(values, "greater"), 0.999, axis=1)
    unit = np.quantile((values - mean[:, None]) / deviation[:, None], 0.999, axis=1)
    assert np.abs(top - 3.09).max() < 0.15 and unit[0] > 6, "control: plainly scaled they differ"


def test_corrections_are_those_of_scipy_over_tested_features_only():
    from scipy.stats import false_discovery_control

    x = np.hstack([codes(f=8), np.zeros((300, 3), np.float32)])
    x[:5, 9], x[:, 10] = 1, 2
    for method in ("bh", "by"):
        table = moran(x, weights(), p_adjust=method, permutations=99)
        p = table.column("p_sim")
        np.testing.assert_allclose(
            table.column("q")[:8], false_discovery_control(p[:8], method=method)
        )
        assert table.how["n_tests"] == 8 and table.how["correction"] == method
    assert moran(x, weights(), p_adjust=None, permutations=9).table["q"].null_count == 11


def test_adaptive_p_agrees_with_the_full_one():
    w, x = weights(), codes(f=60)
    x[:, 7] = np.maximum(smooth() - 8, 0)
    full = moran(x, w, permutations=3000)
    quick = moran(x, w, permutations=3000, adaptive=True)
    p, q = full.column("p_sim"), quick.column("p_sim")
    # 20 exceedances know p to 1 / sqrt(20) of itself, 3000 draws nearly exactly
    stopped = quick.column("n_permutations") < 3000
    assert np.abs(np.log(q[stopped] / p[stopped])).max() < 4 / np.sqrt(20)
    np.testing.assert_array_equal(p[~stopped], q[~stopped])
    assert stopped.sum() > 50 and not stopped[7] and q[7] == 1 / 3001
    np.testing.assert_allclose(q[stopped], 20 / quick.column("n_permutations")[stopped])
    assert np.isnan(quick.column("p_tail")[stopped]).all()


def test_a_sequential_test_stops_at_its_last_exceedance():
    tally = Tally(np.zeros(2), np.zeros(2), np.ones(2), "greater", stop=2)
    values = np.array([[1.0, -1, 1, 1, 1], [-1, -1, -1, -1, 1]])
    tally.add(values, np.arange(2))
    assert tally.seen.tolist() == [3, 5] and tally.above.tolist() == [2, 1]
    np.testing.assert_allclose(tally.p(), [2 / 3, 2 / 6])
    np.testing.assert_allclose(tally.moments()[0], [1 / 3, -3 / 5])


def test_the_tail_is_that_of_the_permutations():
    w = weights(400)
    x = (np.random.default_rng(0).random((400, 60)) < 0.15).astype(np.float32)
    table = moran(x, w, permutations=4000)
    p, tail = table.column("p_sim"), table.column("p_tail")
    seen = p > 0.01
    assert not np.isnan(tail).any() and seen.sum() > 40
    # half a step of a discrete statistic is what p and its smooth tail may differ by
    assert np.abs(np.log(tail[seen] / p[seen])).max() < 0.35
    deeper = np.column_stack([smooth(400)])
    assert 0 < moran(deeper, w).column("p_tail")[0] < 1e-20


def test_the_tail_is_left_out_where_it_is_not_valid():
    x = np.random.default_rng(0).normal(size=(300, 4))
    x[:, 0] = 0
    x[:30, 0] = 1  # thirty active
    x[0, 1] = 500  # one value carries all
    x[:, 2] = x[:, 2] > 0.7
    table = moran(x, weights())
    assert np.isnan(table.column("p_tail")).tolist() == [True, True, False, False]
    assert np.isnan(moran(x, weights(), permutations=99).column("p_tail")).all()


def test_the_tail_has_two_sides():
    null = Null(np.zeros(1), np.ones(1), np.array([1.0]))
    above, below, both = (
        tail_p(np.array([2.0]), null, a)[0] for a in ("greater", "less", "two-sided")
    )
    assert above + below == pytest.approx(1) and both == pytest.approx(2 * above)
    # a gamma of shape 4: P(X >= 4 + 2 * 2) by the sum of a Poisson's first four terms
    poisson = np.exp(-8) * (1 + 8 + 32 + 512 / 6)
    assert above == pytest.approx(poisson)


# ---- the table ----


def test_every_feature_is_listed_with_a_status_and_no_nan(tmp_path):
    x = np.hstack([codes(f=3), np.zeros((300, 3), np.float32)])
    x[:9, 4] = 1
    x[:, 5] = 0.1
    names = [f"latent {j}" for j in range(6)]
    for features in (x, sparse.csr_array(x)):
        table = moran(features, weights(), permutations=19, names=names)
        assert table.column("status").tolist() == ["ok"] * 3 + ["dead", "rare", "constant"]
        assert table.counts() == {"ok": 3, "rare": 1, "constant": 1, "dead": 1}
        assert table.table.column_names == [
            "feature", "name", "n_active", "I", "EI", "VI_rand", "z_rand", "EI_sim", "seI_sim",
            "z_sim", "p_sim", "p_tail", "q", "n_permutations", "status",
        ]  # fmt: skip
        for column in table.table.select(["I", "EI", "VI_rand", "z_rand", "p_sim", "q"]).columns:
            found = [value for value in column.to_pylist() if value is not None]
            assert np.isfinite(found).all()
        assert table.table["I"].to_pylist()[3::2] == [None, None]
        assert table.table["p_sim"].null_count == 3
        assert table.column("I")[4] != 0, "a rare feature has its I"
    again = load_moran(table.save(tmp_path / "moran.parquet"))
    assert again.table.equals(table.table) and again.how == table.how
    assert again.to_pandas().shape == (6, 15)
    with pytest.raises(UserError, match="ends in .parquet, got moran.csv"):
        table.save(tmp_path / "moran.csv")
    with pytest.raises(UserError, match="by to be p_sim, p_tail or q, got 'p'"):
        table.passing(by="p")


def test_it_is_said_how_the_numbers_were_made():
    label = [None, "c", "c", *(["a"] * 147), *(["b"] * 150)]
    how = moran(codes(), weights(), permutations=9, strata=label, seed=5).how
    assert how["alternative"] == "greater" and how["seed"] == 5 and how["permutations"] == 9
    assert how["strata"] == {
        "n_permuted": 2, "n_places_fixed_in_small_strata": 2,
        "n_places_fixed_without_label": 1, "means_removed": False,
    }  # fmt: skip
    assert "8 nearest neighbours" in how["weights"]


def test_memory_does_not_grow_with_permutations():
    import tracemalloc

    w, x = weights(1000), sparse.csr_array(codes(1000, 200))
    peaks = []
    moran(x, w, permutations=5)
    for permutations in (40, 400):
        tracemalloc.start()
        moran(x, w, permutations=permutations)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # a matrix of all permuted values would be 0.6 MB more, all permutations 1.4 MB
    assert peaks[1] < peaks[0] + 100_000


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": GRID}, "places, got weights of 4"),
        ({"alternative": "both"}, "alternative as one of .*got 'both'"),
        ({"p_adjust": "bonferroni"}, "p_adjust as one of .*got 'bonferroni'"),
        ({"permutations": 0}, "permutations as a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed as a whole number of at least 0, got -1"),
        ({"min_active": 1.5}, "min_active as a whole number"),
        ({"adaptive": True, "p_adjust": "max"}, "every permutation for p_adjust='max'"),
        ({"strata": ["a"] * 3}, "one stratum for each of 300 places, got 3"),
        ({"strata_means": True}, "strata with strata_means=True"),
        ({"covariates": np.ones(3)}, "covariate 0 for 300 places, got the shape"),
        ({"names": ["a"]}, "20 names of features, got 1"),
        ({"features": np.full((300, 2), np.nan)}, "finite features, got nan at place 0, feature 0"),
        ({"features": np.array([["x"] * 300]).T}, "features as numbers, got <U1"),
        ({"features": np.ones((300, 2, 2))}, "got the shape"),
        ({"features": np.ones((300, 0))}, "got the shape"),
        ({"features": np.eye(4), "w": GRID, "covariates": np.eye(4)}, "fewer than 3 means"),
        ({"features": np.ones(3), "w": GRID[:3, :3]}, "at least 4 places, got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change: dict, message: str):
    arguments = {"features": codes(), "w": weights(), "permutations": 9} | change
    with pytest.raises(UserError, match=message):
        moran(arguments.pop("features"), arguments.pop("w"), **arguments)


def test_a_stored_value_that_is_not_finite_is_refused():
    x = sparse.csr_array(codes())
    x.data[x.indptr[2]] = np.inf
    with pytest.raises(UserError, match=f"inf at place 2, feature {x.indices[x.indptr[2]]}"):
        moran(x, weights())


def test_a_table_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    """A write that fails half-way leaves the old file, and nothing beside it."""
    import pyarrow.parquet as pq

    path = tmp_path / "moran.parquet"
    path.write_bytes(b"old")

    def fails(_table, out):
        out.write(b"half")
        raise RuntimeError("stopped")

    w = spatial_weights(np.arange(20.0), np.zeros(20), k=2)
    table = moran(np.arange(20.0), w, permutations=9)
    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(RuntimeError, match="stopped"):
        table.save(path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]
