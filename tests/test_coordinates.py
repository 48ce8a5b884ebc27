"""The probe of coordinates: scikit-learn fit by fit, planted maps found, leaks shown, bad input."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge

from sae_apps.geospatial.coordinates import probe_coordinates, spherical_median
from sae_apps.geospatial.places import load_places
from sae_apps.geospatial.ridge import left_out, total_variance
from sae_apps.geospatial.sphere import angle_km, lon_lat, unit_vectors
from sae_core.errors import UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance

SOLVED = 1e-8  # relative error of systems whose condition is at most 1e7 here
SHARES = (1e-5, 1e-3, 0.1)


def around(n: int, seed: int = 0, spread: float = 0.7) -> np.ndarray:
    """Unit vectors about a point of the antimeridian."""
    generator = np.random.default_rng(seed)
    v = np.array([-1.0, 0.0, 0.5]) + spread * generator.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def some_features(n: int, width: int, seed: int = 1) -> np.ndarray:
    """Non-negative, sparse, with means far from 0 and scales apart."""
    generator = np.random.default_rng(seed)
    dense = generator.random((n, width)) * (generator.random((n, width)) < 0.4)
    return dense * generator.uniform(0.2, 5, width)


def with_map(u: np.ndarray, width: int, noise: float, seed: int = 2) -> np.ndarray:
    """Features that are linear in the place, and noise."""
    generator = np.random.default_rng(seed)
    mixed = u @ generator.standard_normal((3, width))
    return mixed + noise * generator.standard_normal(mixed.shape)


# ---- closed forms ----


@pytest.mark.parametrize("width", [7, 200])  # n > 2 F, and less
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
def test_leaving_out_is_fitting_without(width: int, kind):
    x, y = some_features(60, width), around(60)
    block = np.arange(60) % 4
    rows_of = [np.flatnonzero(block == b) for b in range(4)]
    alphas = np.array(SHARES) * total_variance(kind(x))
    sets = [(0,), (3,), (1, 2)]
    seen = 0
    for blocks, a, predicted in left_out(kind(x), y, rows_of, sets, alphas):
        rows = np.concatenate([rows_of[b] for b in blocks])
        train = np.setdiff1d(np.arange(60), rows)
        theirs = Ridge(alpha=alphas[a]).fit(x[train], y[train]).predict(x[rows])
        np.testing.assert_allclose(predicted, theirs, atol=SOLVED)
        seen += 1
    assert seen == len(sets) * len(alphas)


@pytest.mark.parametrize("width", [9, 150])
def test_the_probe_is_nested_ridge_by_scikit_learn(width: int):
    u = around(90)
    x = with_map(u, width, noise=1.5) + 3.0
    found = probe_coordinates(x, lon_lat(u), n_blocks=4, alphas=SHARES)
    variance = total_variance(x)
    for b in range(4):
        mine, rest = found.block == b, found.block != b
        errors = []
        for share in SHARES:
            error = 0.0
            for inner in set(range(4)) - {b}:
                held, train = found.block == inner, rest & (found.block != inner)
                ridge = Ridge(alpha=share * variance).fit(x[train], u[train])
                error += ((ridge.predict(x[held]) - u[held]) ** 2).sum()
            errors.append(error)
        share = SHARES[int(np.argmin(errors))]
        assert found.alpha[b] == share
        ridge = Ridge(alpha=share * variance).fit(x[rest], u[rest])
        wanted = np.stack(lon_lat(ridge.predict(x[mine])), axis=1)
        np.testing.assert_allclose(found.predictions[mine], wanted, atol=1e-5)


def test_total_variance_is_that_of_numpy():
    x = some_features(40, 6)
    assert total_variance(x) == pytest.approx(40 * x.var(axis=0).sum())
    assert total_variance(sparse.csr_array(x)) == pytest.approx(40 * x.var(axis=0).sum())


# ---- what it finds ----


def test_a_planted_map_is_found_across_the_antimeridian_and_its_shuffled_copy_is_not():
    u = around(300)
    assert np.ptp(lon_lat(u)[0]) > 350, "control: the places are on both sides"
    x = with_map(u, 20, noise=0.05)
    found = probe_coordinates(x, lon_lat(u), n_blocks=6)
    assert found.median_km < 0.05 * found.chance_km
    assert min(found.r2_lat, found.r2_lon) > 0.98
    order = np.random.default_rng(3).permutation(300)
    lost = probe_coordinates(x[order], lon_lat(u), n_blocks=6)
    assert lost.median_km > 0.8 * lost.chance_km
    assert max(lost.r2_lat, lost.r2_lon) < 0.1


def test_latitude_alone_is_told_apart():
    u = around(400, spread=0.25)
    x = np.concatenate([u[:, 2:], 0.3 * np.random.default_rng(0).standard_normal((400, 5))], axis=1)
    found = probe_coordinates(x, lon_lat(u), blocks="random", n_blocks=6)
    assert found.r2_lat > 0.9 and found.r2_lon < 0.3


def test_random_folds_leak_what_neighbours_share():
    """Each small cluster has a code of its own: no map, but a lookup that random folds can use."""
    generator = np.random.default_rng(0)
    centres = around(40)
    of = np.repeat(np.arange(40), 8)
    u = centres[of] + 0.01 * generator.standard_normal((320, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    x = np.eye(40)[of]
    leaking = probe_coordinates(x, lon_lat(u), blocks="random", n_blocks=8)
    honest = probe_coordinates(x, lon_lat(u), blocks=of, n_blocks=8)
    assert leaking.median_km < 0.1 * leaking.chance_km
    assert honest.median_km > 0.8 * honest.chance_km
    assert "leak" in leaking.how["blocks"] and honest.how["blocks"] == "40 labels in 8 blocks"
    for cluster in range(40):
        assert len(set(honest.block[of == cluster])) == 1


def test_errors_and_chance_are_distances_to_the_predictions():
    u = around(80)
    found = probe_coordinates(with_map(u, 5, noise=1.0), lon_lat(u), n_blocks=5, seed=4)
    km = angle_km(u, unit_vectors(*found.predictions.T))
    np.testing.assert_allclose(found.error_km, km, atol=1e-6)
    assert found.median_km == pytest.approx(np.median(km))
    chance = np.empty(80)
    for b in range(5):
        mine = found.block == b
        middle = spherical_median(u[~mine])
        chance[mine] = angle_km(u[mine], np.broadcast_to(middle, u[mine].shape))
    assert found.chance_km == pytest.approx(np.median(chance))
    assert found.how["n"] == 80 and found.how["n_features"] == 5 and len(found.alpha) == 5


def test_without_use_of_the_features_r2_is_zero():
    """Strong penalties leave the others' mean direction."""
    u = around(200)
    x = np.random.default_rng(0).standard_normal((200, 4))
    found = probe_coordinates(x, lon_lat(u), blocks="random", n_blocks=5, alphas=[1e6])
    assert abs(found.r2_lat) < 1e-3 and abs(found.r2_lon) < 1e-3
    assert found.median_km == pytest.approx(found.chance_km, rel=0.1)


def test_the_spherical_median_is_the_place_of_least_distance():
    u = around(51, spread=0.3)
    found = spherical_median(u)
    least = np.linalg.norm(u - found, axis=1).sum()
    for near in found + 1e-3 * np.random.default_rng(0).standard_normal((50, 3)):
        assert np.linalg.norm(u - near / np.linalg.norm(near), axis=1).sum() > least
    aside = np.cross(found, [0.0, 0.0, 1.0])  # a quarter of the earth away
    outliers = np.concatenate([u, np.tile(aside / np.linalg.norm(aside), (10, 1))])
    mean = outliers.mean(axis=0)
    both = np.stack([spherical_median(outliers), mean / np.linalg.norm(mean)])
    median_moved, mean_moved = angle_km(both, np.stack([found, found]))
    assert median_moved < 0.5 * mean_moved
    both_ends = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    assert np.linalg.norm(spherical_median(both_ends)) == 1.0


def test_the_seed_decides_the_folds():
    u = around(60)
    x, where = with_map(u, 5, noise=1.0), lon_lat(u)
    first, again, other = (
        probe_coordinates(x, where, blocks="random", n_blocks=4, seed=s).predictions
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# ---- what it takes ----


def test_sparse_features_are_joined_on_row_id():
    u = around(40)
    lon, lat = lon_lat(u)
    ids = np.random.default_rng(0).permutation(np.arange(100, 150))
    x = np.maximum(some_features(50, 6), 0).astype(np.float32)
    provenance = Provenance("model", "main", "layers.1.out", "none", "demo", "0", "torch 2")
    features = SparseFeatures(sparse.csr_array(x), pa.table({"row_id": ids}), provenance)
    names = [f"p{i}" for i in range(40)]
    places = load_places(pa.table({"row_id": ids[:40], "name": names, "lat": lat, "lon": lon}))
    options = {"n_blocks": 4, "blocks": np.arange(40) % 4}
    found = probe_coordinates(features, places, **options)
    order = features.row_index(places.row_id)
    wanted = probe_coordinates(x[order].astype(float), (places.lon, places.lat), **options)
    np.testing.assert_allclose(found.predictions, wanted.predictions, atol=1e-6)
    strangers = places.table.set_column(0, "row_id", pa.array(np.arange(1000, 1040)))
    with pytest.raises(UserError, match="row ids between 100 and 149, got 1000"):
        probe_coordinates(features, load_places(strangers), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((9, 2))}, r"features of 30 places, got the shape \(9, 2\)"),
        ({"features": np.ones(30)}, r"features of 30 places, got the shape \(30,\)"),
        ({"features": np.ones((30, 2))}, "features that vary, got none among 2"),
        ({"features": np.full((30, 2), np.nan)}, "finite features"),
        ({"n_blocks": 2}, "between 3 and 30 blocks for 30 places, got 2"),
        ({"n_blocks": 31}, "got 31"),
        ({"blocks": ["a", "b"] * 15}, "at least 3 blocks, got 2"),
        ({"blocks": ["a"] * 29}, "block for each of 30 places, got 29"),
        ({"blocks": ["a", None, "c"] * 10}, "got 30 or None"),
        ({"blocks": "kmeans"}, "None or 'random', got 'kmeans'"),
        ({"alphas": [0.0]}, "penalties above 0, got"),
        ({"alphas": []}, "penalties above 0, got"),
    ],
)
def test_bad_input_is_refused_with_its_value(change, message: str):
    u = around(30)
    options = {"features": some_features(30, 4), "places": lon_lat(u), "n_blocks": 3} | change
    features, places = options.pop("features"), options.pop("places")
    with pytest.raises(UserError, match=message):
        probe_coordinates(features, places, **options)


def test_coordinates_out_of_range_are_refused():
    with pytest.raises(UserError, match="latitude.*got 95.0 for place 1"):
        probe_coordinates(some_features(2, 4), ([0.0, 1.0], [0.0, 95.0]))
