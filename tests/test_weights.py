"""Neighbours on the sphere against brute force and libpysal; ties, duplicates, islands, ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sae_apps.geospatial.sphere import (
    EARTH_RADIUS_KM,
    chord_of_km,
    great_circle_km,
    jittered,
    lon_lat,
    unit_vectors,
)
from sae_apps.geospatial.weights import SpatialWeights, as_weights, spatial_weights
from sae_core.errors import UserError

KM = 1e-6  # a millimetre; distances on the earth resolve 1e-12 km in float64
ROUNDING = 1e-12  # of sums of weights, which are of the order of 1 each
TIE_KM = 1e-8  # distances that are equal on paper differ by rounding, 1e-16 of the radius, only


def haversine(lon_a, lat_a, lon_b, lat_b):
    """The textbook formula in km, an oracle away from antipodes."""
    lon_a, lat_a, lon_b, lat_b = map(np.radians, (lon_a, lat_a, lon_b, lat_b))
    h = (
        np.sin((lat_b - lat_a) / 2) ** 2
        + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(h, 1.0)))


def all_km(lon, lat) -> np.ndarray:
    return haversine(lon[:, None], lat[:, None], lon[None], lat[None])


def brute_force(lon, lat, k: int) -> list[set[int]]:
    """The k nearest by distance, then by index, with distances that tie made equal."""
    km = all_km(lon, lat)
    found = []
    for i, row in enumerate(km):
        order = [int(j) for j in np.argsort(row, kind="stable") if j != i]
        level, last, ranked = 0, None, []
        for j in order:
            level += last is not None and row[j] - last > TIE_KM
            last = row[j]
            ranked.append((level, j))
        found.append({j for _, j in sorted(ranked)[:k]})
    return found


def neighbours(w: SpatialWeights) -> list[set[int]]:
    return [set(row.tolist()) for row in np.split(w.matrix.indices, w.matrix.indptr[1:-1])]


def scattered(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points evenly over the whole sphere."""
    generator = np.random.default_rng(seed)
    return lon_lat(generator.standard_normal((n, 3)))


def near(lon: float, lat: float, n: int, seed: int = 0, spread: float = 2.0):
    """Points within some degrees of a point, longitudes wrapped."""
    generator = np.random.default_rng(seed)
    x = lon + spread * generator.standard_normal(n)
    y = np.clip(lat + spread * generator.standard_normal(n), -90, 90)
    return (x + 180) % 360 - 180, y


# ---- the sphere ----


def test_distances_are_those_of_the_haversine_and_exact_at_antipodes():
    lon, lat = scattered(200)
    found = great_circle_km(lon[:100], lat[:100], lon[100:], lat[100:])
    np.testing.assert_allclose(
        found, haversine(lon[:100], lat[:100], lon[100:], lat[100:]), atol=KM
    )
    one = np.array([30.0])
    half = great_circle_km(one, one, one - 180, -one)
    np.testing.assert_allclose(half, np.pi * EARTH_RADIUS_KM, rtol=1e-15)
    degree = great_circle_km(one, 0 * one, one, 0 * one + 1)
    np.testing.assert_allclose(degree, 2 * np.pi * EARTH_RADIUS_KM / 360, rtol=1e-14)


def test_degrees_and_vectors_are_one_to_one():
    lon, lat = scattered(300)
    back = lon_lat(2.5 * unit_vectors(lon, lat))
    np.testing.assert_allclose(back, (lon, lat), atol=1e-12)
    assert chord_of_km(1e9) == 2.0
    assert chord_of_km(EARTH_RADIUS_KM * np.pi / 2) == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize("latitude", [0.0, 52.0, 90.0, -90.0])
def test_jitter_is_even_over_a_disc_in_metres_everywhere(latitude: float):
    n = 4000
    lon, lat = np.full(n, 12.0), np.full(n, latitude)
    new_lon, new_lat = jittered(lon, lat, np.arange(1, n), 1.0, seed=3)
    metres = 1000 * great_circle_km(lon, lat, new_lon, new_lat)
    assert metres[0] == 0 and metres.max() <= 1.0
    # evenly over a disc, half the points lie within 1 / sqrt 2; four standard errors of a median
    assert abs(np.median(metres) - np.sqrt(0.5)) < 4 * 0.5 / np.sqrt(n) / np.sqrt(2)
    mean = (unit_vectors(new_lon, new_lat) - unit_vectors(lon, lat)).mean(axis=0)
    assert np.abs(mean).max() * 1e6 * EARTH_RADIUS_KM / 1e3 < 4 * 0.5 / np.sqrt(n)


# ---- neighbours ----


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(scattered(150), id="sphere"),
        pytest.param(near(180, 0, 80), id="antimeridian"),
        pytest.param(near(-180, 65, 80), id="antimeridian in the north"),
        pytest.param(near(0, 90, 80), id="north pole"),
        pytest.param(near(0, -90, 80, spread=0.01), id="south pole, close"),
    ],
)
def test_neighbours_are_the_nearest_by_brute_force(points):
    for k in (1, 8):
        assert neighbours(spatial_weights(*points, k=k)) == brute_force(*points, k)


def test_planar_degrees_get_the_antimeridian_wrong():
    """Control: the case is one in which a plane errs."""
    lon, lat = near(180, 0, 80)
    flat = neighbours(spatial_weights(lon, lat, metric="planar", crs="degrees"))
    assert flat != brute_force(lon, lat, 8)


@st.composite
def grids(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Points on a coarse grid: many ties, coincident places, poles and the antimeridian."""
    n = draw(st.integers(4, 24))
    lon = draw(
        st.lists(st.sampled_from([-180, -179, -90, 0, 1, 2, 90, 179, 180]), min_size=n, max_size=n)
    )
    lat = draw(st.lists(st.sampled_from([-90, -89, -1, 0, 1, 45, 89, 90]), min_size=n, max_size=n))
    return np.array(lon, dtype=float), np.array(lat, dtype=float)


def has_two_locations(lon, lat) -> bool:
    return bool(all_km(lon, lat).max() > TIE_KM)


@given(grids(), st.integers(1, 3))
def test_ties_and_coincident_places_go_by_distance_then_index(points, k: int):
    if has_two_locations(*points):
        assert neighbours(spatial_weights(*points, k=k)) == brute_force(*points, k)


@given(grids(), st.integers(1, 3), st.floats(-180, 180))
def test_turning_the_earth_changes_no_neighbour(points, k: int, turn: float):
    lon, lat = points
    if has_two_locations(lon, lat):
        turned = (lon + turn + 180) % 360 - 180
        before, after = spatial_weights(lon, lat, k=k), spatial_weights(turned, lat, k=k)
        assert neighbours(before) == neighbours(after)


@given(st.permutations(range(30)))
def test_relabelling_the_places_relabels_the_neighbours(order):
    lon, lat = scattered(30, seed=5)  # without ties, which the index would decide
    order = np.array(order)
    before = spatial_weights(lon, lat, k=4).matrix.toarray()
    after = spatial_weights(lon[order], lat[order], k=4).matrix.toarray()
    np.testing.assert_array_equal(after, before[np.ix_(order, order)])


def test_thousands_of_places_at_one_point_are_no_burden():
    lon, lat = scattered(50)
    lon, lat = np.append(lon, np.full(5000, 10.0)), np.append(lat, np.full(5000, 50.0))
    w = spatial_weights(lon, lat, k=3)
    assert w.facts.n_links == 3 * 5050 and w.facts.max_coincident == 5000
    assert neighbours(w)[50] == {51, 52, 53} and neighbours(w)[52] == {50, 51, 53}
    assert neighbours(w)[5049] == {50, 51, 52}


def test_weights_of_the_published_kind_are_those_of_libpysal():
    geopandas, libpysal = pytest.importorskip("geopandas"), pytest.importorskip("libpysal")
    generator = np.random.default_rng(0)
    lon, lat = generator.uniform(7, 18, 400), generator.uniform(37, 47, 400)
    frame = geopandas.GeoDataFrame(geometry=geopandas.points_from_xy(lon, lat), crs=4326)
    theirs = libpysal.weights.KNN.from_dataframe(frame.to_crs(25832), k=8)
    theirs.transform = "R"
    ours = spatial_weights(lon, lat, metric="planar", crs=25832)
    np.testing.assert_allclose(ours.matrix.toarray(), theirs.sparse.toarray())
    for name in ("s0", "s1", "s2"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=ROUNDING)
    sphere = spatial_weights(lon, lat)
    assert 0 < abs(sphere.matrix - ours.matrix).nnz < 0.1 * ours.facts.n_links


def test_neighbours_and_bands_are_those_of_libpysal_graphs():
    libpysal = pytest.importorskip("libpysal.graph")
    lon, lat = near(10, 50, 200)
    points = np.stack([lon, lat], axis=1)
    theirs = libpysal.Graph.build_knn(points, 5, metric="haversine")
    np.testing.assert_array_equal(
        spatial_weights(lon, lat, k=5, transform="B").matrix.toarray(), theirs.sparse.toarray()
    )
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.GeoSeries(geopandas.points_from_xy(lon, lat), crs=4326).to_crs(25832)
    theirs = libpysal.Graph.build_distance_band(frame, 60_000)
    band = spatial_weights(
        lon, lat, method="band", band_km=60, metric="planar", crs=25832, transform="B"
    )
    np.testing.assert_array_equal(band.matrix.toarray(), theirs.sparse.toarray())
    assert band.facts.n_islands == len(theirs.isolates) > 0
    assert band.facts.n_components == theirs.n_components


@pytest.mark.parametrize("points", [scattered(120), near(180, 89, 60)])
def test_a_band_holds_all_within_its_length_and_no_other(points):
    km = all_km(*points)
    for band_km in (150.0, 4000.0):
        w = spatial_weights(*points, method="band", band_km=band_km, transform="B")
        wanted = (km <= band_km) & ~np.eye(len(km), dtype=bool)
        np.testing.assert_array_equal(w.matrix.toarray(), wanted)
    everyone = spatial_weights(*points, method="band", band_km=30_000)
    assert everyone.facts.n_links == len(km) * (len(km) - 1)


def test_the_end_of_a_band_belongs_to_it():
    degree = 2 * np.pi * EARTH_RADIUS_KM / 360
    w = spatial_weights([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], method="band", band_km=degree)
    assert neighbours(w) == [{1}, {0, 2}, {1}]


def test_a_planar_band_is_in_kilometres_whatever_the_unit():
    lon, lat = near(-75, 41, 100, spread=0.5)
    metres = spatial_weights(lon, lat, metric="planar", crs=32618, method="band", band_km=20)
    feet = spatial_weights(
        lon, lat, metric="planar", crs=2263, method="band", band_km=20
    )  # US feet
    km = spatial_weights(lon, lat, method="band", band_km=20)
    for w in (metres, feet):
        assert w.facts.n_links == pytest.approx(km.facts.n_links, rel=0.02)  # scale of the maps


# ---- choices ----


SHARED = (np.array([0.0, 0.0, 0.0, 1.0, 3.0]), np.array([5.0, 5.0, 5.0, 5.0, 5.0]))


def test_coincident_places_are_kept_merged_moved_or_refused():
    keep = spatial_weights(*SHARED, k=2, transform="B")
    assert neighbours(keep) == [{1, 2}, {0, 2}, {0, 1}, {0, 1}, {0, 3}]
    assert (keep.facts.n_coincident, keep.facts.max_coincident) == (3, 3)

    merge = spatial_weights(*SHARED, k=2, coincident="merge")
    third = [1 / 6, 1 / 6, 1 / 6]
    wanted = [[0, 0, 0, 0.5, 0.5]] * 3 + [[*third, 0, 0.5], [*third, 0.5, 0]]
    np.testing.assert_allclose(merge.matrix.toarray(), wanted)
    assert merge.facts.n_coincident == 3 and "merged" in merge.method

    jitter = spatial_weights(*SHARED, k=3, coincident="jitter", seed=1)
    assert neighbours(jitter)[0] == {1, 2, 3} and "jittered" in jitter.method
    with pytest.raises(UserError, match="got 3 that share theirs, as the places 0 and 1"):
        spatial_weights(*SHARED, k=2, coincident="raise")


def test_a_pole_is_one_point_at_every_longitude():
    lon, lat = np.array([0.0, 120.0, -180.0, 180.0, 0.0]), np.array([90.0, 90.0, 80.0, 80.0, 70.0])
    w = spatial_weights(lon, lat, k=1, coincident="merge", transform="B")
    assert (w.facts.n_coincident, w.facts.max_coincident) == (4, 2)
    np.testing.assert_array_equal(w.matrix.toarray()[0], [0, 0, 0.5, 0.5, 0])
    assert neighbours(w) == [{2, 3}, {2, 3}, {0, 1}, {0, 1}, {0, 1}]


def test_jitter_draws_the_neighbours_at_one_place_by_its_seed():
    lon, lat = np.append(np.zeros(40), 1.0), np.zeros(41)
    first, again, other = (
        neighbours(spatial_weights(lon, lat, k=3, coincident="jitter", seed=seed))
        for seed in (0, 0, 1)
    )
    assert first == again and first != other


def test_a_merged_band_shares_the_weight_of_a_location():
    w = spatial_weights(*SHARED, method="band", band_km=120, coincident="merge", transform="B")
    wanted = np.zeros((5, 5))
    wanted[:3, 3] = 1
    wanted[3, :3] = 1 / 3
    np.testing.assert_allclose(w.matrix.toarray(), wanted)
    kept = spatial_weights(*SHARED, method="band", band_km=120, transform="B")
    assert neighbours(kept)[0] == {1, 2, 3} and neighbours(kept)[3] == {0, 1, 2}


def test_islands_are_kept_linked_or_refused():
    lon, lat = np.array([0.0, 0.1, 5.0]), np.zeros(3)
    band = {"method": "band", "band_km": 20.0}
    keep = spatial_weights(lon, lat, **band)
    assert neighbours(keep) == [{1}, {0}, set()]
    assert (keep.facts.n_islands, keep.facts.n_components) == (1, 2)
    linked = spatial_weights(lon, lat, **band, islands="nearest")
    assert neighbours(linked) == [{1}, {0}, {1}] and linked.facts.n_islands == 0
    assert linked.facts.reciprocal_frac == pytest.approx(2 / 3)
    with pytest.raises(UserError, match="1 without, the first of them place 2"):
        spatial_weights(lon, lat, **band, islands="raise")


def test_groups_keep_to_themselves():
    lon, lat = scattered(60)
    labels = np.arange(60) % 3
    w = spatial_weights(lon, lat, k=5, groups=labels)
    assert not w.matrix.toarray()[labels[:, None] != labels[None]].any()
    assert w.facts.n_components == 3
    for label in range(3):
        own = np.flatnonzero(labels == label)
        alone = spatial_weights(lon[own], lat[own], k=5)
        np.testing.assert_array_equal(w.matrix[own][:, own].toarray(), alone.matrix.toarray())


def test_facts_are_those_of_the_links():
    lon, lat = scattered(80)
    w = spatial_weights(lon, lat, k=3, transform="B")
    dense, km = w.matrix.toarray(), all_km(lon, lat)
    assert w.facts.median_km == pytest.approx(np.median(km[dense > 0]))
    assert w.facts.max_km == pytest.approx(km[dense > 0].max())
    assert w.facts.reciprocal_frac == pytest.approx((dense * dense.T).sum() / dense.sum())
    assert (w.s0, w.facts.n_links) == (240, 240)
    assert w.s1 == pytest.approx(((dense + dense.T) ** 2).sum() / 2)
    assert w.s2 == pytest.approx(((dense.sum(0) + dense.sum(1)) ** 2).sum())
    assert w.facts.asdict()["n"] == w.n == 80


def test_rows_sum_to_one_and_the_lag_is_a_mean():
    lon, lat = scattered(40)
    w = spatial_weights(lon, lat, k=4)
    y = np.random.default_rng(0).standard_normal((40, 3))
    np.testing.assert_allclose(w.matrix.sum(axis=1), 1, atol=ROUNDING)
    of_first = y[sorted(neighbours(w)[0])].mean(axis=0)
    np.testing.assert_allclose(w.lag(y)[0], of_first)
    np.testing.assert_allclose(w.lag(y[:, 0]), w.lag(y)[:, 0])
    with pytest.raises(UserError, match="variable of 40 places, got the shape"):
        w.lag(y[:39])


# ---- other libraries ----


@pytest.fixture
def island() -> SpatialWeights:
    """Four places, ids not in order, the third without a neighbour, weights not symmetric."""
    return spatial_weights(
        [0.0, 0.1, 50.0, 0.15],
        np.zeros(4),
        method="band",
        band_km=12,
        row_id=np.array([40, 10, 30, 20]),
    )


@pytest.mark.parametrize("kind", ["to_graph", "to_w"])
def test_weights_come_back_from_libpysal_as_they_went(island: SpatialWeights, kind: str):
    pytest.importorskip("libpysal")
    back = as_weights(getattr(island, kind)(), island.row_id)
    np.testing.assert_array_equal(back.matrix.toarray(), island.matrix.toarray())
    np.testing.assert_array_equal(back.row_id, island.row_id)
    assert back.facts.n_islands == 1 and back.facts.median_km is None
    shuffled = np.array([10, 20, 30, 40])
    order = [1, 3, 2, 0]
    other = as_weights(getattr(island, kind)(), shuffled)
    np.testing.assert_array_equal(
        other.matrix.toarray(), island.matrix.toarray()[np.ix_(order, order)]
    )


def test_what_libpysal_gets_is_what_we_have(island: SpatialWeights):
    pytest.importorskip("libpysal")
    y = np.array([1.0, 2.0, 4.0, 8.0])
    np.testing.assert_allclose(island.to_graph().lag(y), island.lag(y))
    np.testing.assert_allclose(island.to_w().sparse @ y, island.lag(y))
    assert island.to_graph().isolates.tolist() == [30]


def test_a_sparse_matrix_has_the_order_of_the_places():
    matrix = sparse.coo_matrix(([1.0, 2.0, 0.0], ([0, 1, 2], [1, 2, 2])), shape=(3, 3))
    w = as_weights(matrix, np.array([7, 8, 9]))
    np.testing.assert_array_equal(w.matrix.toarray(), [[0, 1, 0], [0, 0, 2], [0, 0, 0]])
    assert w.row_id.tolist() == [7, 8, 9] and w.facts.n_links == 2
    assert as_weights(w) is w
    moved = as_weights(w, np.array([9, 7, 8]))
    np.testing.assert_array_equal(moved.matrix.toarray(), [[0, 0, 0], [0, 0, 1], [2, 0, 0]])


def test_text_ids_of_a_graph_are_numbered_unless_ids_are_asked_for():
    graph = pytest.importorskip("libpysal.graph").Graph.from_arrays(
        ["b", "a"], ["a", "b"], np.array([1.0, 3.0])
    )
    w = as_weights(graph)
    assert w.row_id.tolist() == [0, 1]
    np.testing.assert_array_equal(w.matrix.toarray(), [[0, 1], [3, 0]])
    with pytest.raises(UserError, match="none for row_id 5 and 1 more, but one for 'a'"):
        as_weights(graph, np.array([5, 6]))


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "at least 6 places for 5 neighbours, got 5"),
        ({"k": 3, "coincident": "merge"}, "at least 4 locations for 3 neighbours, got 3"),
        ({"k": 0}, "at least 1 neighbour, got 0"),
        ({"k": 2, "groups": [0, 0, 0, 1, 1]}, "3 places for 2 neighbours, got 2 in the group 1"),
        ({"k": 1, "groups": [0, 0, 0, 1, None]}, "none for place 4"),
        ({"k": 1, "groups": [0, 0]}, "group for each of 5 places, got 2"),
        ({"method": "queen"}, "method out of .*got 'queen'"),
        ({"metric": "cosine"}, "metric out of .*got 'cosine'"),
        ({"coincident": "drop"}, "coincident out of .*got 'drop'"),
        ({"islands": "drop"}, "islands out of .*got 'drop'"),
        ({"k": 2, "transform": "D"}, "R or B, got 'D'"),
        ({"method": "band"}, "band_km with method 'band'.*got None"),
        ({"band_km": 3.0}, "only there, got 3.0 with 'knn'"),
        ({"method": "band", "band_km": -1.0}, "above 0, got -1"),
        ({"method": "band", "band_km": 1.0, "groups": [0, 1, 2, 3, 4]}, "one link, got none"),
        ({"k": 2, "metric": "planar"}, "Expected a crs for metric 'planar', got none"),
        ({"k": 2, "metric": "planar", "crs": 4326}, "projected crs, got 'WGS 84'"),
        ({"k": 2, "metric": "planar", "crs": "no such"}, "pyproj knows, got 'no such'"),
        ({"k": 2, "crs": 25832}, "metric 'planar' only, got 25832"),
        ({"k": 2, "row_id": np.array([1, 1, 2, 3, 4])}, "every row_id once, got 1 2 times"),
        ({"k": 2, "row_id": np.arange(4)}, "5 row ids, got 4"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(change, message):
    if {"planar"} & set(map(str, change.values())):
        pytest.importorskip("pyproj")
    with pytest.raises(UserError, match=message):
        spatial_weights(*SHARED, **change)


def test_coordinates_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"latitude in \[-90, 90\] degrees, got 91.0 for row_id 1"):
        spatial_weights([0.0, 170.0], [0.0, 91.0])
    with pytest.raises(UserError, match="got 120.0 for row_id 0; are lat and lon swapped"):
        spatial_weights([0.0, 1.0], [120.0, 3.0])
    with pytest.raises(UserError, match="longitude.*got 181.0"):
        spatial_weights([0.0, 181.0], [0.0, 1.0])
    with pytest.raises(UserError, match="got nan for row_id 0"):
        spatial_weights([np.nan, 1.0], [0.0, 1.0])
    with pytest.raises(UserError, match="one length"):
        spatial_weights([0.0, 1.0], [0.0])
    with pytest.raises(UserError, match="two locations or more, got 9 at the same coordinates"):
        spatial_weights(np.full(9, 5.0), np.full(9, 5.0), k=2)
    with pytest.raises(UserError, match="two locations or more, got 3"):
        spatial_weights([180.0, -180.0, 180.0], [0.0, -0.0, 0.0], k=1)
    with pytest.raises(UserError, match="got no latitudes"):
        spatial_weights([0.0, 1.0])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(3), "own neighbour, got the weight 1.0 of place 0"),
        (np.zeros((3, 3)), "at least one link, got none"),
        (-np.ones((3, 3)), "above 0, got -1.0"),
        (np.full((3, 3), np.nan), "above 0, got nan"),
        (np.ones((2, 3)), r"square matrix of weights, got \(2, 3\)"),
    ],
)
def test_weights_that_cannot_be_are_refused(matrix, message: str):
    with pytest.raises(UserError, match=message):
        as_weights(sparse.csr_array(matrix))


def test_weights_of_another_size_or_with_other_ids_are_refused(island: SpatialWeights):
    with pytest.raises(UserError, match="weights of 3 places, got weights of 4"):
        as_weights(island, np.array([40, 10, 30]))
    with pytest.raises(UserError, match="row_id 5 and 0 more, but one for 20"):
        as_weights(island, np.array([40, 10, 30, 5]))
    with pytest.raises(UserError, match="got list"):
        as_weights([[0, 1], [1, 0]])


def test_a_band_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sae_apps.geospatial.neighbours.MAX_LINKS", 100)
    with pytest.raises(UserError, match="at most 100 links, got 400: take a shorter band"):
        spatial_weights(*scattered(20), method="band", band_km=30_000)
