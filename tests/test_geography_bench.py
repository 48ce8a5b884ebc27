"""The probes of the benchmark of geography: what is planted within countries, and what is not."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import sparse

from benchmarks import geography_probe, moran_exact
from benchmarks.geography_probe import LEAST, block_km, probe_row, probe_within, within_row
from sae_apps.geospatial.coordinates import probe_coordinates
from sae_apps.geospatial.places import Places
from sae_apps.geospatial.sphere import angle_km, unit_vectors
from sae_apps.geospatial.weights import spatial_weights
from sae_core.errors import UserError

N_COUNTRIES, EACH = 20, 15
N = N_COUNTRIES * EACH


def made_up(seed: int = 0, spread: float = 4.0) -> Places:
    """Countries as clouds of some degrees, anywhere between 50 degrees south and north."""
    rng = np.random.default_rng(seed)
    lat = np.repeat(rng.uniform(-50, 50, N_COUNTRIES), EACH) + spread * rng.standard_normal(N)
    lon = np.repeat(rng.uniform(-150, 150, N_COUNTRIES), EACH) + spread * rng.standard_normal(N)
    label = [f"Land {i // EACH}" for i in range(N)]
    table = {"row_id": np.arange(N), "name": label, "lat": lat, "lon": lon, "admin": label}
    return Places(pa.table(table), "made up")


PLACES = made_up()
OF = np.repeat(np.arange(N_COUNTRIES), EACH)
U = unit_vectors(PLACES.lon, PLACES.lat)


def noise(width: int, scale: float, seed: int = 1) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((N, width))


def test_who_knows_the_country_alone_knows_the_world_and_nothing_within_countries() -> None:
    centre = np.stack([U[c == OF].mean(axis=0) for c in range(N_COUNTRIES)])[OF]
    x = np.concatenate([centre, np.eye(N_COUNTRIES)[OF], noise(4, 0.01)], axis=1)
    world = probe_coordinates(x, PLACES)
    assert min(world.r2_lat, world.r2_lon) > 0.8, "control: the map is there"
    within = probe_within(x, PLACES)
    assert max(within.r2_lat, within.r2_lon) < 0.05
    assert within.median_km > 0.95 * within.chance_km


def test_a_direction_that_is_north_everywhere_is_found_and_east_is_not() -> None:
    offset = PLACES.lat - np.array([PLACES.lat[c == OF].mean() for c in range(N_COUNTRIES)])[OF]
    level = np.random.default_rng(2).uniform(-50, 50, N_COUNTRIES)[OF]  # tells nothing of north
    x = np.concatenate([(level + offset)[:, None], noise(6, 1.0)], axis=1)
    for features in (x, sparse.csr_array(x)):
        within = probe_within(features, PLACES)
        assert within.r2_lat > 0.95 and within.r2_lon < 0.05
        assert within.median_km < within.chance_km
        assert (within.n_places, within.n_labels) == (N, N_COUNTRIES)


def test_north_in_some_countries_and_south_in_others_is_no_direction() -> None:
    offset = PLACES.lat - np.array([PLACES.lat[c == OF].mean() for c in range(N_COUNTRIES)])[OF]
    sign = np.where(np.arange(N_COUNTRIES) % 2 == 0, 1.0, -1.0)[OF]
    x = np.stack([sign * offset, noise(1, 1.0)[:, 0]], axis=1)
    assert probe_within(x, PLACES).r2_lat < 0.1


def test_shuffled_places_have_no_direction() -> None:
    x = np.stack([PLACES.lat, PLACES.lon], axis=1)
    assert probe_within(x, PLACES).r2_lat > 0.8, "control"
    mixed = np.random.default_rng(0).permutation(N)
    assert probe_within(x[mixed], PLACES).r2_lat < 0.05


def test_chance_is_the_distance_from_the_middle_of_the_country() -> None:
    within = probe_within(noise(5, 1.0), PLACES)
    middle = np.stack([U[c == OF].mean(axis=0) for c in range(N_COUNTRIES)])[OF]
    km = angle_km(U, middle / np.linalg.norm(middle, axis=1, keepdims=True))
    assert within.chance_km == pytest.approx(np.median(km), rel=0.05)


def test_small_countries_and_places_without_a_label_do_not_count() -> None:
    label = [f"Land {i // EACH}" if i < N - EACH else None for i in range(N)]
    label[: LEAST - 1] = ["Small"] * (LEAST - 1)
    places = Places(PLACES.table.set_column(4, "admin", pa.array(label)), "made up")
    within = probe_within(noise(5, 1.0), places)
    assert within.n_places == N - EACH - (LEAST - 1) and within.n_labels == N_COUNTRIES - 1
    with pytest.raises(UserError, match="10 labels with 5 places, got 7"):
        probe_within(noise(5, 1.0)[:100], PLACES.take(np.arange(100)))


def test_labels_stay_whole_and_blocks_are_of_like_size() -> None:
    of = np.repeat(np.arange(7), [50, 30, 20, 20, 10, 5, 5])
    block = geography_probe.dealt(of, 3)
    assert all(len(set(block[of == label])) == 1 for label in range(7))
    assert sorted(np.bincount(block)) == [45, 45, 50]


def test_rows_name_their_area_and_say_how_large_blocks_are() -> None:
    facts = {"model": "m", "area": "GB", "set": "units", "folds": "blocked"}
    row = probe_row(U, PLACES, facts)
    assert row["name"] == "m | GB | units | blocked" and row["part"] == "probe"
    assert row["r2_lat"] > 0.9 and row["median_km"] < row["chance_km"]
    found = probe_coordinates(U, PLACES)
    assert row["block_km"] == pytest.approx(block_km(found, PLACES))
    leaky = probe_row(U, PLACES, facts | {"folds": "random"})
    assert leaky["block_km"] > 3 * row["block_km"], "random folds lie everywhere"
    inside = within_row(U, PLACES, facts | {"area": geography_probe.WITHIN})
    assert inside["n_places"] == N and inside["name"].startswith("m | world, within countries")
    assert set(inside) == set(row)


def test_blocks_are_as_large_as_their_places_lie_apart() -> None:
    places = made_up(spread=0.0)  # a point each
    found = probe_coordinates(noise(3, 1.0), places, blocks=OF, n_blocks=N_COUNTRIES)
    assert block_km(found, places) == pytest.approx(0, abs=1e-3)


# ---- exactness ----


def test_every_latent_is_compared_dead_ones_too() -> None:
    w = spatial_weights(PLACES, k=8)
    rng = np.random.default_rng(0)
    x = sparse.random_array((N, 12), density=0.2, format="csr", dtype=np.float32, rng=rng)
    x = sparse.csr_array(sparse.hstack([x, np.zeros((N, 2)), np.ones((N, 1))]), dtype="f4")
    rows = moran_exact.exact_rows(sparse.csr_array(x), w, "made up")
    assert [row["column"] for row in rows] == list(moran_exact.COLUMNS)
    for row in rows:
        assert (row["features"], row["compared"], row["undefined"]) == (15, 12, 3)
        assert row["disagree"] == 0 and row["difference"] <= moran_exact.EXACT
    assert rows[0]["largest"] > 0.01, "control: something is compared"
    assert all(goal.met for goal in moran_exact.goals(rows))


def test_a_difference_or_a_missing_number_is_not_met() -> None:
    ours, theirs = np.array([1.0, 2, 50]), np.array([1.0, 2.5, 60])
    where = np.array([True, True, False])
    assert moran_exact.largest(ours, theirs, where) == 0.5
    assert moran_exact.largest(ours, theirs, where, relative=True) == 0.2
    row = {
        "name": "world | I", "column": "I", "features": 3, "compared": 3, "undefined": 0,
        "disagree": 0, "difference": 0.0, "relative": 0.0,
    }  # fmt: skip
    assert [goal.met for goal in moran_exact.goals([row])] == [True, True]
    assert [goal.met for goal in moran_exact.goals([row | {"difference": 1e-9}])] == [False, True]
    assert [goal.met for goal in moran_exact.goals([row | {"disagree": 1}])] == [True, False]
