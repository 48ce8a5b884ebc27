"""A user's places: csv, tsv, parquet, GeoParquet, GeoJSON and data frames as one Arrow table.

Nothing is repaired silently. Two things are read as what they can only be: a byte-order mark, and a
delimiter that stands in the header line. A file that is not UTF-8 (or UTF-16 with its mark) is
refused: names are what a language model reads, and a wrong guess would spoil them without a trace.
"""

import codecs
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sae_core.errors import UserError
from sae_core.extras import require
from sae_core.untrusted import refuse_bomb

CSV, PARQUET, JSON = (".csv", ".tsv", ".txt"), (".parquet", ".geoparquet"), (".geojson", ".json")
SUFFIXES = CSV + PARQUET + JSON
DELIMITERS = ",;\t|"
SOURCE_KEY = b"sae_apps.places.source"
"""Where a saved table keeps the sentence on its origin."""
GEO_KEY = b"geo"
"""Where GeoParquet says which columns are geometries."""


def looks_like_file(spec: str) -> bool:
    """Whether a text names a file: it ends as one, has a folder in it, or exists."""
    path = Path(spec)
    return path.suffix.lower() in SUFFIXES or "/" in spec or path.exists()


def read_table(
    spec: Any, columns: dict[str, str], text_columns: Sequence[str]
) -> tuple[pa.Table, str]:
    """The table behind a path, a GeoDataFrame, a pandas DataFrame or an Arrow table.

    Args:
        spec: as above.
        columns: the user's names of ``lat`` and ``lon``; where neither is there, they are taken
            from point geometries.
        text_columns: columns of a csv file that are read as text, so that a name such as ``007``
            stays and a bad number can be named; the types of the others are inferred.
    Returns:
        the table with the user's own column names, and a sentence on its origin.
    Raises:
        UserError: there is no such file, its kind is unknown, or it cannot be read.
    """
    if isinstance(spec, pa.Table):
        kept = (spec.schema.metadata or {}).get(SOURCE_KEY, b"a table").decode()
        return spec, kept
    if hasattr(spec, "to_crs"):
        return _from_geopandas(spec, columns), "a GeoDataFrame"
    if hasattr(spec, "iloc"):
        return _from_pandas(spec), "a DataFrame"
    if not isinstance(spec, str | Path):
        raise UserError(
            "Expected places as a request such as 'IT', a file, a GeoDataFrame, a DataFrame "
            f"or a pyarrow Table, got {type(spec).__name__}."
        )
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"Expected a file of places, got {path}, which does not exist.")
    suffix = path.suffix.lower()
    if suffix in CSV:
        return _read_csv(path, text_columns), path.name
    if suffix in PARQUET:
        return _read_parquet(path, columns)
    if suffix in JSON:
        return _read_geometry_file(path, columns), path.name
    raise UserError(f"Expected a file that ends in {', '.join(SUFFIXES)}, got {path}.")


def _read_csv(path: Path, text_columns: Sequence[str]) -> pa.Table:
    from pyarrow import csv

    text = _decoded(path)
    header = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=header.count)
    if not text.strip():
        raise UserError(f"Expected a header line and places, got an empty file {path}.")
    try:
        table = csv.read_csv(
            io.BytesIO(text.encode()),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(text_columns, pa.string()),
                strings_can_be_null=False,  # "NA" is Namibia
            ),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"Expected a table in {path}, got: {_one_line(error)}") from error
    return table


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as error:
            raise UserError(f"Expected {path} in UTF-16, got: {error.reason}.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"Expected {path} in UTF-8, got the byte 0x{raw[error.start]:02x} in line {line}: "
            "save it as UTF-8."
        ) from error


def _read_parquet(path: Path, columns: dict[str, str]) -> tuple[pa.Table, str]:
    import pyarrow.parquet as pq

    try:
        refuse_bomb(pq.read_metadata(path), path)
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        source = metadata.get(SOURCE_KEY, path.name.encode()).decode()
        if GEO_KEY not in metadata:
            return table, source
        geometries = list(json.loads(metadata[GEO_KEY])["columns"])
        has_degrees = all(name in table.column_names for name in columns.values())
        frame = None if has_degrees else require("geopandas", "geo").read_parquet(path)
    except UserError:
        raise
    except Exception as error:  # the readers' errors have no common class
        raise UserError(f"Expected a parquet file, got {path}: {_one_line(error)}") from error
    if frame is not None:
        return _from_geopandas(frame, columns), source
    return table.drop_columns([c for c in table.column_names if c in geometries]), source


def _read_geometry_file(path: Path, columns: dict[str, str]) -> pa.Table:
    geopandas = require("geopandas", "geo")
    try:
        frame = geopandas.read_file(path)
    except Exception as error:  # the reader's errors have no common class
        raise UserError(f"Expected GeoJSON, got {path}: {_one_line(error)}") from error
    return _from_geopandas(frame, columns)


def _from_geopandas(frame: Any, columns: dict[str, str]) -> pa.Table:
    """Columns and, where the frame has no lat and lon of its own, those of its points."""
    import pandas as pd

    geometry = getattr(frame, "_geometry_column_name", None)
    has_degrees = all(name in frame.columns for name in columns.values())
    if not has_degrees:
        if geometry not in frame.columns:
            raise UserError(
                f"Expected a GeoDataFrame with a geometry, got the columns {list(frame.columns)}."
            )
        if frame.crs is None:
            raise UserError(
                "Expected a GeoDataFrame with a CRS, got one without: set_crs(4326) if its "
                "coordinates are degrees."
            )
        kinds = set(frame.geometry.geom_type.fillna("nothing")) - {"Point"}
        if kinds or bool(frame.geometry.is_empty.any()):
            kind = min(kinds) if kinds else "an empty Point"
            raise UserError(f"Expected a Point for every place, got {kind}: use centroids.")
        points = frame.geometry.to_crs(4326)
        frame = frame.assign(**{columns["lon"]: points.x, columns["lat"]: points.y})
    drop = [name for name in frame.columns if str(frame.dtypes[name]) == "geometry"]
    return _from_pandas(pd.DataFrame(frame.drop(columns=drop)))


def _from_pandas(frame: Any) -> pa.Table:
    """The frame with its index where that is called ``row_id``."""
    keep = frame.index.name == "row_id" and "row_id" not in frame.columns
    try:
        table = pa.Table.from_pandas(frame.reset_index() if keep else frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"Expected one type in every column, got: {_one_line(error)}") from error
    return table.replace_schema_metadata(None)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
