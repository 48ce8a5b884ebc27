"""The columns of a user's places under their standard names and types; which places are kept."""

import difflib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from sae_core.errors import UserError

TYPES = {
    "row_id": pa.int64(),
    "name": pa.string(),
    "lat": pa.float64(),
    "lon": pa.float64(),
    "country": pa.string(),
    "admin": pa.string(),
    "population": pa.int64(),
}
REQUIRED = ("row_id", "name", "lat", "lon")
# No longitude has thousands, so a comma among its digits can only be the decimal sign.
DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")


def standard_table(table: pa.Table, columns: Mapping[str, str], source: str) -> pa.Table:
    """The table under the standard names and types, required columns first.

    Args:
        table: as the user has it.
        columns: standard name to the user's name.
        source: what to call the table in a message.
    Raises:
        UserError: a column is missing (the nearest is named) or comes twice, the table is empty,
            or an entry is not a number where one is needed.
    """
    if not table.num_rows:
        raise UserError(f"Expected at least one place in {source}, got none.")
    renamed = {found_column(theirs, table.column_names): ours for ours, theirs in columns.items()}
    names = [renamed.get(column, column) for column in table.column_names]
    if double := sorted({str(column) for column in names if names.count(column) > 1}):
        raise UserError(f"Expected every column once, got {', '.join(double)} more than once.")
    table = table.rename_columns(names)
    who = [f"row {i} ({name})" for i, name in enumerate(table["name"].to_pylist())]
    if "row_id" not in names:
        table = table.append_column("row_id", pa.array(np.arange(table.num_rows)))
    for column, kind in TYPES.items():
        if column in table.column_names:
            place = table.column_names.index(column)
            table = table.set_column(place, column, _typed(table[column], column, kind, who))
    return table.select([*REQUIRED, *[c for c in table.column_names if c not in REQUIRED]])


def _typed(
    column: pa.ChunkedArray, what: str, kind: pa.DataType, who: Sequence[str]
) -> pa.Array | pa.ChunkedArray:
    if kind == pa.string():
        if pa.types.is_nested(column.type):
            raise UserError(f"Expected texts as {what}, got {column.type}.")
        texts = [text if text is None else text.strip() for text in column.cast(kind).to_pylist()]
        # an empty cell of a csv file is no label; an empty name is refused where places are made
        return pa.array(texts if what == "name" else [text or None for text in texts], kind)
    if column.type == kind:
        return column
    # Python's numbers: a large id in a text would not survive a float
    read = _whole if kind == pa.int64() else _real
    values = []
    for i, value in enumerate(column.to_pylist()):
        value = value.strip() or None if isinstance(value, str) else value
        if value is None and what not in ("population", "lat", "lon"):
            raise UserError(f"Expected a {what} for every place, got nothing for {who[i]}.")
        try:
            values.append(None if value is None else read(value))
        except (ValueError, TypeError, OverflowError) as error:
            number = "whole number" if read is _whole else "number"
            raise UserError(
                f"Expected a {number} as {what}, got {value!r} for {who[i]}."
            ) from error
    return pa.array(values, kind)


def _real(value: object) -> float:
    text = str(value).strip()
    comma = DECIMAL_COMMA.fullmatch(text)
    return float(f"{comma[1]}.{comma[2]}" if comma else text)


def _whole(value: object) -> int:
    text = str(value).strip()
    try:
        number = int(text)
    except ValueError:
        real = float(text)
        number = int(real)
        if number != real:
            raise ValueError(text) from None
    if not -(2**63) <= number < 2**63:
        raise OverflowError(text)
    return number


def populous(table: pa.Table, source: str, least: int | None) -> tuple[pa.Table, str]:
    """Places with at least so many inhabitants, and the source that says so.

    Raises:
        UserError: there is no column population, or nothing is left.
    """
    if least is None:
        return table, source
    if "population" not in table.column_names:
        raise UserError(f"Expected a column population in {source}, to keep those >= {least}.")
    kept = table.filter(pa.array(_population(table) >= least))
    if not kept.num_rows:
        raise UserError(f"Expected a place with population >= {least} in {source}, got none.")
    return kept, f"{source}, population >= {least}"


def first_places(table: pa.Table, source: str, limit: int | None) -> tuple[pa.Table, str]:
    """The most populous places where populations are known, else the first; order unchanged."""
    if limit is None or limit >= table.num_rows:
        return table, source
    if "population" not in table.column_names:
        return table.slice(0, limit), f"{source}, the first {limit}"
    largest = np.sort(np.argsort(-_population(table), kind="stable")[:limit])
    return table.take(pa.array(largest)), f"{source}, the {limit} most populous"


def _population(table: pa.Table) -> np.ndarray:
    """Inhabitants, -1 where unknown."""
    known = table["population"].to_pylist()
    return np.array([-1 if value is None else value for value in known], dtype=np.int64)


def found_column(name: str, names: Sequence[str]) -> str:
    """The name if it is among the names.

    Raises:
        UserError: it is not; the sentence lists the names and the nearest.
    """
    if name in names:
        return name
    lower = {str(other).lower(): str(other) for other in names}
    near = difflib.get_close_matches(name.lower(), lower, 1, cutoff=0.3)
    hint = f"; the nearest is {lower[near[0]]!r}." if near else "."
    raise UserError(f"Expected a column {name!r}, got the columns {', '.join(names)}{hint}")
