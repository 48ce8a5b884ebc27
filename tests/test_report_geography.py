"""The map section: projections against PROJ, cutting against shapely, data, hostile names, size."""

import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_apps.report import (
    Geography,
    MapFeature,
    MapPlaces,
    Passing,
    build_page,
    geography_section,
)
from sae_apps.report import geography as module
from sae_apps.report.map_data import AROUND
from sae_apps.report.projection import (
    NEAR_DEG,
    Projection,
    Window,
    choose_projection,
    cut_lines,
    cut_rings,
)
from sae_core.errors import UserError

EVIL = """</script><script>alert(1)</script><!--"'&<img src=x onerror=alert(2)>\u2028"""
PLANE = 1e-9  # radii; both sides are float64 with a few dozen operations
STEP = 1 / 65535  # of a 16-bit number over its range


class Tags(HTMLParser):
    """Elements, and the text of the data element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside = self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = str(dict(attrs).get("id"))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "geography-data":
            self.data += data


def numbers(text: str, lo: float, hi: float) -> np.ndarray:
    levels = np.frombuffer(base64.b64decode(text), dtype="<u2").astype(float)
    return lo + levels / 65535 * (hi - lo)


def view(n: int = 40, n_features: int = 2, seed: int = 0, **more: object) -> Geography:
    """Places of a country, features of a corner of it."""
    rng = np.random.default_rng(seed)
    lon, lat = rng.uniform(7, 18, n), rng.uniform(37, 47, n)
    features = []
    for k in range(n_features):
        values = np.where(lon + k > 13, rng.gamma(2.0, 1.0, n), 0.0)
        z = (values - values.mean()) / values.std()
        features.append(
            MapFeature(
                f"latent {k}", values, 0.5 - 0.1 * k, {"free": 0.001, "within": None},
                rng.permutation(z), np.arange(n) % 5, "fires on “sul”" if k == 0 else "",
            )
        )  # fmt: skip
    places = MapPlaces(
        [f"Place {i}" for i in range(n)],
        lon,
        lat,
        [None if i % 7 == 0 else f"Region {i % 3}" for i in range(n)],
    )
    return Geography(places, features, **more)  # type: ignore[arg-type]


def data_of(geography: Geography) -> dict:
    return json.loads(Tags(build_page("t", "", [geography_section(geography)])).data)


# ---- projections ----


@pytest.mark.parametrize("centre", [(0.0, 0.0), (12.5, 42.0), (-170.0, 65.0), (30.0, -90.0)])
def test_lambert_is_that_of_proj(centre: tuple[float, float]) -> None:
    pyproj = pytest.importorskip("pyproj")
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-180, 180, 200), np.degrees(np.arcsin(rng.uniform(-1, 1, 200)))
    theirs = pyproj.Proj(proj="laea", R=1, lon_0=centre[0], lat_0=centre[1])
    ours = Projection(*centre, False)
    near = ours.angle_deg(lon, lat) < 170
    expected = np.stack(theirs(lon[near], lat[near]), axis=1)
    assert np.abs(ours(lon[near], lat[near]) - expected).max() < PLANE


def test_equal_earth_is_that_of_proj() -> None:
    pyproj = pytest.importorskip("pyproj")
    lon, lat = np.meshgrid(np.linspace(-179.9, 179.9, 25), np.linspace(-90, 90, 19))
    expected = np.stack(pyproj.Proj(proj="eqearth", R=1)(lon.ravel(), lat.ravel()), axis=1)
    ours = Projection(0.0, 0.0, True)(lon.ravel(), lat.ravel())
    assert np.abs(ours - expected).max() < PLANE


def test_places_across_the_antimeridian_stay_together() -> None:
    projection, window = choose_projection(np.array([178.0, -178.0]), np.array([-17.0, -18.0]))
    assert not projection.is_world and abs(abs(projection.lon0) - 180) < 1
    assert window.right - window.left < math.radians(6)
    projection, window = choose_projection(np.array([0.0, 120.0, -120.0]), np.zeros(3))
    assert projection.is_world  # no middle
    projection, _ = choose_projection(np.array([0.0, 2 * NEAR_DEG + 2]), np.zeros(2))
    assert projection.is_world
    projection, _ = choose_projection(np.array([0.0, 2 * NEAR_DEG - 2]), np.zeros(2))
    assert not projection.is_world


def test_window_of_one_place_is_not_empty() -> None:
    projection, window = choose_projection(np.array([12.0]), np.array([42.0]))
    assert window.right > window.left and window.top > window.bottom
    assert window.holds(projection(np.array([12.0]), np.array([42.0]))).all()


FINITE = st.floats(-3, 3)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=3, max_size=9))
def test_rings_are_cut_as_shapely_does(points: list[tuple[float, float]]) -> None:
    """In radians about the centre the projection is nearly the plane; hulls keep rings simple."""
    shapely = pytest.importorskip("shapely")
    hull = shapely.MultiPoint(points).convex_hull
    if hull.geom_type != "Polygon" or hull.area < 0.01:
        return
    ring = np.array(hull.exterior.coords)
    flat = Projection(0.0, 0.0, False)
    plane = shapely.Polygon(flat(ring[:, 0], ring[:, 1]))
    box = Window(*np.radians([-1.0, -2.0, 1.5, 1.0]))
    expected = plane.intersection(shapely.box(box.left, box.bottom, box.right, box.top)).area
    found = sum(shapely.Polygon(p).area for p in cut_rings([ring], flat, box))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_rings_of_the_world_end_at_the_antimeridian() -> None:
    world = Projection(0.0, 0.0, True)
    ring = np.array([[170.0, 10.0], [190.0, 10.0], [190.0, 20.0], [170.0, 20.0], [170.0, 10.0]])
    (cut,) = cut_rings([ring], world, Window(-4, -2, 4, 2))
    edge = world(np.array([180.0]), np.array([10.0]))[0, 0]
    assert cut[:, 0].max() == pytest.approx(edge, rel=1e-12)


def test_lines_reach_the_edge_and_are_cut_there() -> None:
    flat = Projection(0.0, 0.0, False)
    box = Window(*np.radians([-1.0, -1.0, 1.0, 1.0]))
    line = np.array([[x, 0.0] for x in (-3, -2, -0.5, 0, 0.5, 2, 3, 0.9, 3, 4)])
    found = [np.degrees(run[:, 0]).round(1).tolist() for run in cut_lines([line], flat, box)]
    assert found == [[-2.0, -0.5, 0.0, 0.5, 2.0, 3.0, 0.9, 3.0]]
    apart = np.array(
        [[-3, 0], [-2, 0], [0, 0], [2, 0], [3, 0], [3, 3], [2, 0.5], [0, 0.5], [3, 0.5]]
    )
    assert [len(run) for run in cut_lines([apart], flat, box)] == [3, 3]
    assert list(cut_lines([line + [0, 50]], flat, box)) == []
    assert list(cut_lines([line[:1]], flat, box)) == []


# ---- data ----


def test_data_are_the_places_and_their_values() -> None:
    geography = view(outlines=[np.array([[10.0, 40.0], [11.0, 41.0], [12.0, 40.0]])])
    data = data_of(geography)
    places = geography.places
    projection, window = choose_projection(places.lon, places.lat)
    wide = window.grown(AROUND)
    points = projection(places.lon, places.lat)
    span = max(wide.right - wide.left, wide.top - wide.bottom) * STEP
    assert np.abs(numbers(data["x"], wide.left, wide.right) - points[:, 0]).max() <= span
    assert np.abs(numbers(data["y"], wide.bottom, wide.top) - points[:, 1]).max() <= span
    left, right, bottom, top = data["window"]
    inside = (numbers(data["x"], 0, 1), numbers(data["y"], 0, 1))
    assert left < inside[0].min() and inside[0].max() < right
    assert bottom < inside[1].min() and inside[1].max() < top
    label = np.frombuffer(base64.b64decode(data["label"]), dtype="<u2")
    assert [data["labels"][k - 1] if k else None for k in label] == places.label
    assert data["names"] == places.name and data["lines"]["n"] == [3] and data["land"]["n"] == []
    for found, one in zip(data["features"], geography.features, strict=True):
        levels = np.frombuffer(base64.b64decode(found["values"]), dtype="<u2").astype(float)
        values = np.where(levels == 0, 0, found["lo"] + (levels - 1) / 65534 * np.ptp(one.values))
        assert np.abs(values - one.values).max() <= np.ptp(one.values) * STEP
        assert ((values == 0) == (one.values == 0)).all()  # silent stays silent
        lag = numbers(found["lag"], found["lagLo"], found["lagHi"])
        assert one.lag is not None
        assert np.abs(lag - one.lag).max() <= np.ptp(one.lag) * STEP
        assert found["lisa"] == "01234" * 8 and found["title"] == one.title
        assert (found["mean"], found["sd"]) == (one.values.mean(), one.values.std())


def test_a_small_value_is_not_taken_for_silence() -> None:
    values = np.array([0.0, 1e-9, 5.0, 0.0])
    places = MapPlaces(list("abcd"), np.arange(4.0), np.zeros(4), [None] * 4)
    (found,) = data_of(Geography(places, [MapFeature("f", values, 0.1)]))["features"]
    levels = np.frombuffer(base64.b64decode(found["values"]), dtype="<u2")
    assert levels.tolist() == [0, 1, 65535, 0]
    negative = np.array([-2.0, 0.0, 2.0, 1.0])
    (found,) = data_of(Geography(places, [MapFeature("f", negative, 0.1)]))["features"]
    levels = np.frombuffer(base64.b64decode(found["values"]), dtype="<u2")
    assert levels[[0, 1, 2]].tolist() == [1, 0, 65535]
    constant = data_of(Geography(places, [MapFeature("f", np.ones(4), 0.0)]))["features"][0]
    assert constant["sd"] == 1.0


def test_hostile_names_stay_text() -> None:
    geography = view(6, 1)
    places = MapPlaces([EVIL] * 6, geography.places.lon, geography.places.lat, [EVIL] * 6)
    one = geography.features[0]
    evil = MapFeature(EVIL, one.values, 0.5, {EVIL: 0.1}, one.lag, one.lisa, EVIL)
    rows = [Passing(EVIL, 3, {EVIL: 1})]
    bad = Geography(places, [evil], (), (), rows, EVIL, {EVIL: EVIL}, [EVIL])
    html = build_page("t", "", [geography_section(bad)])
    page = Tags(html)
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert [attrs.get("id") for tag, attrs in page.elements if tag == "script"] == [
        "geography-data",
        None,
    ]
    data = json.loads(page.data)
    assert data["names"] == [EVIL] * 6 and data["labels"] == [EVIL]
    assert "<" not in page.data and "\u2028" not in page.data
    assert not [a for _, attrs in page.elements for a in attrs if a.startswith("on")]


def test_table_passing_and_credits_can_be_read_without_a_script() -> None:
    geography = view(
        passing=[Passing("SAE latents", 2210, {"free": 41, "within": None})],
        rule="I >= 0.3 and q < 0.01",
        facts={"Neighbours": "8 nearest"},
        credits=("GeoNames, CC BY 4.0", "Natural Earth"),
    )
    html = str(geography_section(geography).html)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.split("<script")[0]))
    assert "SAE latents 2,210 41 —" in text and "I &gt;= 0.3 and q &lt; 0.01" in text
    best = np.argsort(-geography.features[0].values)[: module.N_TOP].tolist()
    assert ", ".join(geography.places.name[int(i)] for i in best) in text
    assert f"latent 0 0.50 0.0010 — {np.count_nonzero(geography.features[0].values)}" in text
    for words in ("fires on “sul”", "GeoNames, CC BY 4.0 · Natural Earth", "8 nearest"):
        assert words in text
    n_active = int(np.count_nonzero(geography.features[0].values))
    assert html.count("<circle") == n_active  # the drawing of the first feature
    assert "http" not in html


def test_nothing_to_map() -> None:
    html = str(geography_section(view(n_features=0)).html)
    assert "No feature could be mapped" in html and "geography-data" not in html


def test_many_places_and_features_fit() -> None:
    big = view(12_000, 10)
    size = len(build_page("t", "", [geography_section(big)]).encode())
    assert size < 2_500_000


def test_too_much_is_thinned_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    geography = view(400, 4)
    monkeypatch.setattr(module, "MAX_PLACES", 100)
    data = data_of(geography)
    html = str(geography_section(geography).html)
    assert len(data["names"]) == 100 and "100 of the 400 places" in html
    assert data["names"][0] == "Place 0" and data["names"][-1] == "Place 399"
    monkeypatch.setattr(module, "MAX_PLACES", 1000)
    monkeypatch.setattr(module, "BUDGET", 21_000)
    html = str(geography_section(geography).html)
    assert len(data_of(geography)["features"]) == 2
    assert "the first 2 of the 4 features" in html and "latent 3" in html
    assert html.count('name="geography-feature"') == 2
    monkeypatch.setattr(module, "BUDGET", 1000)
    with pytest.raises(UserError, match="below 1,000 bytes"):
        geography_section(geography)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": np.zeros(5)}, "values of 40 places"),
        ({"lag": np.zeros(41)}, "lags of 40 places"),
        ({"lisa": np.full(40, 5)}, "classes from 0 to 4, got 5 to 5"),
        ({"values": np.full(40, np.nan)}, "finite values"),
    ],
)
def test_refuses_features_that_do_not_fit(change: dict, words: str) -> None:
    geography = view()
    fields = {"title": "latent 7", "values": np.ones(40), "moran_i": 0.1} | change
    with pytest.raises(UserError, match=f"latent 7: expected {words}"):
        Geography(geography.places, [MapFeature(**fields)])


def test_refuses_places_that_are_none() -> None:
    with pytest.raises(UserError, match="latitude between -90 and 90, got 91.0 for 'b'"):
        MapPlaces(["a", "b"], np.zeros(2), np.array([0.0, 91.0]), [None] * 2)
    with pytest.raises(UserError, match="longitude between -180 and 180, got nan"):
        MapPlaces(["a"], np.array([np.nan]), np.zeros(1), [None])
    with pytest.raises(UserError, match="got 1, 2, 1 and 1"):
        MapPlaces(["a"], np.zeros(2), np.zeros(1), [None])
    with pytest.raises(UserError, match="at least one, got 0"):
        MapPlaces([], np.zeros(0), np.zeros(0), [])
