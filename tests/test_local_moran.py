"""Local Moran's I: by hand, against loops, against esda, and where it must find nothing."""

import sys
from itertools import permutations as arrangements

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse, stats

from sae_apps.geospatial import local_null
from sae_apps.geospatial.local import ALTERNATIVES, moran_local
from sae_apps.geospatial.local_result import COLOURS, LABELS
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.weights import SpatialWeights, spatial_weights
from sae_core.errors import MissingExtraError, UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

ROUNDING = 1e-12  # of numbers of size 1 in float64, after sums of a few terms
SIGMAS = 5  # bound on a Monte-Carlo error; one of a million would pass it
ORIGIN = Provenance("model", "main", "layers.1.out", "none", "demo", "0", "torch 2")


def scattered(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.uniform(5, 15, n), generator.uniform(40, 50, n)


def knn(n: int, k: int = 4, seed: int = 0, **options) -> SpatialWeights:
    return spatial_weights(*scattered(n, seed), k=k, **options)


def places_at(lon, lat, row_id=None) -> Places:
    n = len(lon)
    ids = np.arange(n) if row_id is None else row_id
    names = [f"place {i}" for i in range(n)]
    table = pa.table({"row_id": pa.array(ids, pa.int64()), "name": names, "lat": lat, "lon": lon})
    return Places(table, "GeoNames, for a test")


def random_weights(n: int, seed: int, spread: bool) -> sparse.csr_array:
    """Between 0 and 5 neighbours a place, equal weights or all different; place 3 is an island."""
    generator = np.random.default_rng(seed)
    dense = np.zeros((n, n))
    for i in range(n):
        c = 0 if i == 3 else generator.integers(1, 6)
        others = generator.choice(np.delete(np.arange(n), i), c, replace=False)
        dense[i, others] = generator.uniform(0.1, 1, c) if spread else 1 / max(c, 1)
    return sparse.csr_array(dense)


def features(n: int, seed: int = 0) -> np.ndarray:
    """Dense, two in three zeros, nearly all zeros, binary, skewed with a negative tail."""
    generator = np.random.default_rng(seed)
    dense = generator.normal(size=n)
    sparse_one = np.maximum(generator.normal(size=n) - 0.4, 0)
    rare = np.zeros(n)
    rare[generator.choice(n, 4, replace=False)] = [1.0, 2.0, 2.0, 5.0]
    binary = (generator.random(n) < 0.3).astype(float)
    return np.stack([dense, sparse_one, rare, binary, -np.exp(dense)], axis=1)


GRID = sparse.csr_array(  # a b / c d, side by side or one above the other
    np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]) / 2
)


def test_a_grid_of_two_by_two_by_hand():
    # Mean 1, deviations 2 0 -1 -1, variance 6/4; I_a = 3/4 * 2 * (0 - 1)/2 / 1.5.
    local = moran_local(np.array([3.0, 1.0, 0.0, 0.0]), GRID, p_adjust=None)
    assert local.Is == pytest.approx([-0.5, 0.0, -0.25, 0.25])
    assert local.q.tolist() == [4, 2, 2, 3]
    assert local.EIc == pytest.approx(-np.array([4, 0, 1, 1]) / 1.5 / 3)
    assert local.global_i == pytest.approx([(-1 - 0.5 + 0.5) / 6])


def exact_tails(x: np.ndarray, w: np.ndarray, i: int) -> tuple[float, float]:
    """P(I* >= I) and P(I* <= I) over all arrangements of the others on the neighbours of i."""
    z = (x - x.mean()) / x.std()
    weights = w[i][w[i] > 0]
    lags = [
        weights @ z[list(chosen)]
        for chosen in arrangements([j for j in range(len(x)) if j != i], len(weights))
    ]
    simulated, observed = z[i] * np.array(lags), z[i] * (w[i] @ z)
    return (simulated >= observed - ROUNDING).mean(), (simulated <= observed + ROUNDING).mean()


@pytest.mark.parametrize("spread", [False, True])
def test_p_values_are_those_of_all_arrangements(spread: bool):
    n, n_draws = 7, 20_000
    w = random_weights(n, 1, spread)
    x = np.array([0.0, 0.0, 1.0, 2.0, 2.0, -3.0, 0.0])
    greater, less = (
        moran_local(x, w, permutations=n_draws, alternative=side, p_adjust=None).p_sim
        for side in ("greater", "less")
    )
    for i in set(range(n)) - {3}:
        exact = np.array(exact_tails(x, w.toarray(), i))
        error = SIGMAS * np.sqrt(exact * (1 - exact) / n_draws) + 2 / n_draws
        assert (np.abs([greater[i], less[i]] - exact) <= error).all()


def looped(x: np.ndarray, w: sparse.csr_array, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The definition: for each place and draw the neighbours' values, then counts and moments."""
    n = len(x)
    z = (x - x.mean()) / x.std()
    found = {name: np.zeros(n) for name in ("above", "below", "EI_sim", "seI_sim", "folded")}
    for i in range(n):
        weights = np.sort(w.data[w.indptr[i] : w.indptr[i + 1]])
        c = len(weights)
        if c == 0:
            continue
        simulated = np.empty(len(ids))
        for b, sequence in enumerate(ids):
            chosen = sequence[:c].copy()
            chosen[chosen == i] = sequence[c]
            simulated[b] = z[i] * (weights @ z[chosen]) * (n - 1) / n
        observed = z[i] * (w[[i]] @ z)[0] * (n - 1) / n
        mean = simulated.mean()
        found["above"][i] = (simulated >= observed - ROUNDING).sum()
        found["below"][i] = (simulated <= observed + ROUNDING).sum()
        found["folded"][i] = (abs(simulated - mean) >= abs(observed - mean) - ROUNDING).sum()
        found["EI_sim"][i], found["seI_sim"][i] = mean, simulated.std()
    return found


@pytest.mark.parametrize("spread", [False, True])
def test_shared_draws_give_what_explicit_loops_give(spread: bool, monkeypatch: pytest.MonkeyPatch):
    n, n_draws = 23, 200
    w, table = random_weights(n, 2, spread), features(n)
    ids = local_null.draw_sequences(n, int(np.diff(w.indptr).max()) + 1, n_draws, 5).ids
    monkeypatch.setattr(local_null, "_BLOCK", 2 * ids.size)  # two features at a time
    local = {
        side: moran_local(table, w, permutations=n_draws, alternative=side, p_adjust=None, seed=5)
        for side in ALTERNATIVES
    }
    joined = np.arange(n) != 3
    for j in range(table.shape[1]):
        found = looped(table[:, j], w, ids)
        above, below = found["above"][joined], found["below"][joined]
        expected = {
            "greater": above + 1,
            "less": below + 1,
            "two-sided": np.minimum(2 * np.minimum(above, below) + 2, n_draws + 1),
            "directed": np.minimum(above, n_draws - above) + 1,
            "folded": found["folded"][joined] + 1,
        }
        for side, count in expected.items():
            got = local[side].p_sim[joined, j] * (n_draws + 1)
            np.testing.assert_array_equal(np.round(got, 9), count)
        one = local["greater"].feature(j)
        np.testing.assert_allclose(one.EI_sim, found["EI_sim"], atol=ROUNDING)
        np.testing.assert_allclose(one.seI_sim, found["seI_sim"], atol=1e-7)  # a square root


def test_the_others_are_drawn_evenly():
    n, c, n_draws = 5, 2, 12_000
    draws = local_null.draw_sequences(n, c + 1, n_draws, 0)
    assert (np.sort(draws.ids, axis=1)[:, 1:] != np.sort(draws.ids, axis=1)[:, :-1]).all()
    for place in range(n):
        chosen = draws.ids[:, :c].copy()
        hit = chosen == place
        chosen[hit] = np.broadcast_to(draws.ids[:, c:], hit.shape)[hit]
        assert not (chosen == place).any()
        counts = np.bincount(chosen[:, 0] * n + chosen[:, 1], minlength=n * n)
        assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4
        assert (counts > 0).sum() == (n - 1) * (n - 2)


def test_long_sequences_are_shuffles():
    ids = local_null.draw_sequences(6, 6, 50, 0).ids
    assert (np.sort(ids, axis=1) == np.arange(6)).all()


def test_a_place_may_have_all_others_as_neighbours():
    n = 6
    w = sparse.csr_array((np.ones((n, n)) - np.eye(n)) / (n - 1))
    local = moran_local(features(n)[:, 0], w, p_adjust=None)
    assert local.p_sim.tolist() == [1.0] * n  # every draw is the observed lag
    assert local.seI_sim.max() < 1e-7


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run esda's loops as Python: to compile them takes longer than all tests of this file."""
    from esda import crand, moran

    monkeypatch.setattr(crand, "boolean", bool)  # a type of numba
    for module in (crand, moran):
        for name, loop in list(vars(module).items()):
            if hasattr(loop, "py_func"):
                monkeypatch.setattr(module, name, loop.py_func)


@pytest.mark.filterwarnings("ignore:The alternative hypothesis:DeprecationWarning")
def test_it_agrees_with_esda(monkeypatch: pytest.MonkeyPatch):
    esda = pytest.importorskip("esda")
    uncompiled(monkeypatch)
    n, n_draws = 120, 9_999
    w = knn(n, 5)
    x = np.random.default_rng(3).normal(size=n) + scattered(n)[0] / 5
    ours = moran_local(x, w, permutations=n_draws, alternative="directed", p_adjust=None)
    theirs = esda.Moran_Local(x.copy(), w.to_graph(), permutations=n_draws, seed=1)
    np.testing.assert_allclose(ours.Is, theirs.Is, rtol=1e-11, atol=ROUNDING)
    np.testing.assert_array_equal(ours.q, theirs.q)
    np.testing.assert_allclose(ours.EIc, theirs.EIc, atol=ROUNDING)
    np.testing.assert_allclose(ours.VIc, theirs.VIc, rtol=1e-9, atol=ROUNDING)
    # Both are Monte-Carlo estimates of the same numbers.
    p = (ours.p_sim + theirs.p_sim) / 2
    error = SIGMAS * np.sqrt(2 * p * (1 - p) / n_draws) + 1 / n_draws
    assert (np.abs(ours.p_sim - theirs.p_sim) <= error).all()
    assert (
        np.abs((ours.EI_sim - theirs.EI_sim) / theirs.seI_sim).max() < SIGMAS * (2 / n_draws) ** 0.5
    )
    np.testing.assert_allclose(ours.seI_sim, theirs.seI_sim, rtol=0.05)
    # The same p-values give the same labels.
    same = moran_local(
        x, w, permutations=n_draws, alternative="directed", p_adjust=None, alpha=0.01
    )
    theirs.p_sim = same.p_sim
    np.testing.assert_array_equal(same.label, theirs.get_cluster_labels(0.01))
    assert len(set(same.label)) > 1
    assert ours.global_i[0] == pytest.approx(esda.Moran(x, w.to_graph(), permutations=0).I)


def test_the_analytic_moments_are_those_of_the_simulation():
    local = moran_local(features(60)[:, 0], knn(60), permutations=40_000)
    n = 60
    np.testing.assert_allclose(local.EI_sim, local.EIc * (n - 1) / n, atol=0.03)
    np.testing.assert_allclose(local.seI_sim**2, local.VIc * ((n - 1) / n) ** 2, rtol=0.05)


@pytest.mark.parametrize("kind", ["dense", "15 active", "binary"])
def test_p_values_under_the_null_are_uniform_or_above(kind: str):
    generator = np.random.default_rng(8)
    n, n_features, n_draws = 60, 600, 199
    table = generator.normal(size=(n, n_features))
    if kind != "dense":
        active = np.argsort(generator.random(table.shape), axis=0) < 15
        table = active * (1.0 if kind == "binary" else np.exp(table))
    w = knn(n)
    for side in ("greater", "two-sided"):
        local = moran_local(table, w, permutations=n_draws, alternative=side, p_adjust=None)
        p = local.p_sim[11]  # one place, many features that know nothing of it
        for level in (0.02, 0.05, 0.2, 0.5):
            error = SIGMAS * np.sqrt(level * (1 - level) / n_features)
            assert (p <= level).mean() <= level + error
            if kind == "dense":
                assert (p <= level).mean() >= level - error - 2 / n_draws


def test_a_planted_cluster_is_found_and_its_shuffled_copy_is_not():
    n = 400
    lon, lat = scattered(n)
    inside = np.hypot(lon - 10, lat - 45) < 1.5
    x = inside * 2.0 + np.random.default_rng(0).random(n)
    table = np.stack([x, np.random.default_rng(1).permutation(x)], axis=1)
    local = moran_local(table, spatial_weights(lon, lat, k=6), permutations=9_999)
    planted, shuffled = (local.label[:, j] == "High-High" for j in (0, 1))
    assert planted[inside].mean() > 0.8
    assert planted[~inside].mean() < 0.05
    assert not shuffled.any()
    assert set(local.label[:, 1]) == {"Insignificant"}


def test_an_empty_background_is_significant_only_to_the_directed_rule():
    x = np.zeros(300)
    x[:12] = 1.0
    x = np.random.default_rng(0).permutation(x)
    w = knn(300, 8)
    empty = (x == 0) & (w.lag(x) == 0)
    assert empty.sum() > 150
    fair = moran_local(x, w, p_adjust=None, permutations=999)
    assert fair.p_sim[empty].min() > 0.5
    directed = moran_local(x, w, p_adjust=None, permutations=999, alternative="directed")
    assert directed.p_sim[empty].max() < 0.4


def test_false_discovery_rates_are_scipys():
    w, table = knn(80), features(80)
    raw = moran_local(table, w, p_adjust=None)
    for method in ("bh", "by"):
        adjusted = moran_local(table, w, p_adjust=method).p_adjusted
        for j in range(table.shape[1]):
            expected = stats.false_discovery_control(raw.p_sim[:, j], method=method)
            np.testing.assert_array_equal(adjusted[:, j], expected)
    np.testing.assert_array_equal(raw.p_adjusted, raw.p_sim)


def test_a_seed_gives_the_same_numbers_and_another_seed_others():
    w, table = knn(80), features(80)
    first, again, other = (moran_local(table, w, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.p_sim, again.p_sim)
    assert (first.p_sim != other.p_sim).any()


def test_a_feature_among_others_is_the_feature_alone():
    w, table = knn(80), features(80)
    together = moran_local(sparse.csc_array(table), w, names=list("abcde"))
    for j, name in enumerate("abcde"):
        alone, one = moran_local(table[:, j], w), together.feature(name)
        for field in ("q", "label", "p_adjusted"):
            np.testing.assert_array_equal(getattr(one, field), getattr(alone, field))
        for field in ("Is", "z_sim", "VIc"):
            np.testing.assert_allclose(getattr(one, field), getattr(alone, field), atol=1e-9)
        assert one.names == (name,)


def test_rows_of_sparse_features_are_matched_by_row_id():
    n = 60
    lon, lat = scattered(n)
    ids = np.random.default_rng(0).permutation(n) + 100
    w = spatial_weights(lon, lat, k=4, row_id=ids)
    x = np.maximum(features(n)[:, :2], 0).astype(np.float32)
    order = np.random.default_rng(1).permutation(n)
    acts = SparseFeatures(
        sparse.csr_array(x[order]), pa.table({"row_id": pa.array(ids[order], pa.int64())}), ORIGIN
    )
    direct, joined = moran_local(x, w), moran_local(acts, w)
    np.testing.assert_array_equal(joined.row_id, ids[order])
    np.testing.assert_allclose(joined.Is, direct.Is[order], atol=ROUNDING)
    assert (joined.q != direct.q).any()  # the orders do differ


def test_groups_are_analysed_one_by_one():
    n = 120
    labels = np.array(["a", "b"] * (n // 2))
    w = knn(n, groups=labels)
    x = np.random.default_rng(0).normal(size=n) + 5 * (labels == "b")
    apart = moran_local(x, w, groups=labels, p_adjust=None)
    for label in "ab":
        at = np.flatnonzero(labels == label)
        block = sparse.csr_array(w.matrix[at][:, at])
        alone = moran_local(x[at], block, p_adjust=None)
        for field in ("Is", "p_sim", "q", "EIc"):
            np.testing.assert_array_equal(getattr(apart, field)[at], getattr(alone, field))
    pooled = moran_local(x, w, p_adjust=None)
    assert (pooled.q[labels == "b"] == 1).mean() > 0.9  # high relative to the common mean
    assert (apart.q[labels == "b"] == 1).mean() < 0.5
    with pytest.raises(UserError, match="without links between groups, got .* from 'a' to 'b'"):
        moran_local(x, knn(n), groups=labels)
    with pytest.raises(UserError, match="120 labels of groups, got 3"):
        moran_local(x, w, groups=["a", "b", "c"])


def test_undefined_entries_are_masked_and_counted():
    n = 30
    w = random_weights(n, 4, spread=False)
    table = np.stack([features(n)[:, 0], np.full(n, 0.1)], axis=1)
    local = moran_local(table, w)
    assert local.status == ("ok", "constant")
    assert local.how["n_tests"] == [n - 1, 0]
    assert not local.is_defined[3].any() and not local.is_defined[:, 1].any()
    masked = ~local.is_defined
    for field, value in (("Is", 0), ("q", 0), ("p_sim", 1), ("p_adjusted", 1), ("z_sim", 0)):
        assert (getattr(local, field)[masked] == value).all()
        assert np.isfinite(getattr(local, field)).all()
    assert (local.label[masked] == "Insignificant").all()
    assert local.global_i[1] == 0


def test_a_group_where_a_feature_is_constant_is_named():
    labels = np.repeat(["a", "b"], 20)
    w = knn(40, groups=labels)
    x = np.where(labels == "a", 1.0, features(40)[:, 0])
    local = moran_local(x, w, groups=labels)
    assert local.status == ("constant in some groups",)
    assert local.is_defined.tolist() == [False] * 20 + [True] * 20


def test_every_quadrant_has_its_label_and_colour():
    assert LABELS == ("Insignificant", "High-High", "Low-High", "Low-Low", "High-Low")
    assert [COLOURS[name] for name in LABELS] == [
        "#cccccc",
        "#d7191c",
        "#abd9e9",
        "#2c7bb6",
        "#fdae61",
    ]


def test_the_counts_add_up():
    local = moran_local(features(80), knn(80))
    for j, counts in enumerate(local.counts()):
        assert counts == {name: (local.label[:, j] == name).sum() for name in COLOURS}
        assert sum(counts.values()) == 80


def test_a_geodataframe_has_the_places_of_the_weights():
    pytest.importorskip("geopandas")
    lon, lat = scattered(40)
    ids = np.arange(40) + 7
    local = moran_local(features(40), spatial_weights(lon, lat, k=4, row_id=ids))
    more = places_at(np.append(lon, 0.0)[::-1], np.append(lat, 0.0)[::-1], np.arange(47, 6, -1))
    frame = local.to_geodataframe(more, 1)
    assert frame.index.tolist() == ids.tolist()
    np.testing.assert_array_equal(frame.geometry.x, lon)
    np.testing.assert_array_equal(frame["Is"], local.Is[:, 1])
    np.testing.assert_array_equal(frame["label"], local.label[:, 1])
    with pytest.raises(UserError, match="row_id 7 of the weights, got 39 places without it"):
        local.to_geodataframe(more.take(np.arange(39)))


def test_explore_shows_the_labels_in_their_colours_without_tiles():
    pytest.importorskip("folium")
    pytest.importorskip("mapclassify")
    lon, lat = scattered(40)
    local = moran_local(np.outer(lat, [1.0, -1.0]), spatial_weights(lon, lat, k=4))
    page = local.explore(places_at(lon, lat), 1, tiles=None).get_root().render()
    for label in set(local.label[:, 1]):
        assert label in page and COLOURS[label] in page
    assert "High-High" in local.label[:, 1] and "cartocdn" not in page


def test_without_folium_explore_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "folium", None)
    local = moran_local(features(40), knn(40))
    with pytest.raises(MissingExtraError, match="'folium' is not installed"):
        local.explore(places_at(*scattered(40)))


def test_a_feature_that_is_not_there():
    local = moran_local(features(40), knn(40), names=list("abcde"))
    for which in ("z", 5, -1):
        with pytest.raises(UserError, match="its position below 5, got"):
            local.feature(which)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones(29)}, "the 30 places of the weights, got 29"),
        ({"features": np.append(np.ones(29), np.nan)}, "nan"),
        ({"permutations": 0}, "at least 1 permutation, got 0"),
        ({"alternative": "lesser"}, "got 'lesser'"),
        ({"p_adjust": "max"}, "got 'max'"),
        ({"alpha": 1.0}, "between 0 and 1, got 1.0"),
        ({"names": ["a", "b"]}, "1 names of features, got 2"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str):
    arguments = {"features": np.arange(30.0), "w": knn(30)} | change
    with pytest.raises(UserError, match=message):
        moran_local(arguments.pop("features"), arguments.pop("w"), **arguments)
