"""Text sources: rows of text with labels, from files or memory, read as a stream.

A ``TextSource`` can be iterated as often as needed and gives the same rows in the same order each
time; ``row_id`` is the running number of the record, the key on which everything later joins.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sae_core.download import sha256_file
from sae_core.errors import UserError
from sae_core.records import FORMATS, Record, read_records

MetaValue = str | int | float
Row = TypeVar("Row")
RESERVED = ("row_id", "text")
"""Columns that every row table has of its own; a file's column of that name gets a ``_`` behind."""
_MASK = (1 << 64) - 1


class TextRow(NamedTuple):
    """One text with its key and its labels."""

    row_id: int
    text: str
    meta: dict[str, MetaValue]


@dataclass(frozen=True)
class TextSource:
    """Rows that can be read again and again, in the same order."""

    id: str
    """Names the data in provenance, e.g. ``reviews.jsonl@3bb7d7fdb62a`` (sha256 of the file)."""
    open: Callable[[], Iterator[TextRow]]

    def __iter__(self) -> Iterator[TextRow]:
        return self.open()


def read_text_file(path: str | Path, *, column: str | None = None) -> TextSource:
    """Rows of a local file, streamed with memory for one record (parquet: one batch) at a time.

    ============  ==================================================================================
    .txt          one row a line, lines without text skipped (what `datasets` users expect)
    .jsonl        one object a line, blank lines skipped
    .json         an array of objects, or JSON lines
    .csv, .tsv    a header line, quotes as in spreadsheets; every value stays a string
    .parquet      flat columns
    ============  ==================================================================================

    All but parquet may be gzipped (``.jsonl.gz``); text is UTF-8, a byte-order mark is skipped.
    Besides the text, string, number, boolean and date columns go to ``meta``; nulls are left out
    there, and lists and objects are dropped.

    Args:
        path: the file.
        column: which column is the text; None takes ``text``, else the only string column.
    Returns:
        A source whose id is the file's name, the first 12 hex digits of its sha256, and
        ``#column`` where the column is not called ``text``.
    Raises:
        UserError: no such file, unknown suffix, no rows, a column that is not there, a null text,
            undecodable bytes or invalid JSON (the message names the line).
        CorruptFileError: a damaged gzip or parquet file.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"File not found: expected a text file at {path}, got {what}.")
    read = partial(read_records, path)
    column = pick_column(read(), column, str(path))
    base = f"{path.name}@{sha256_file(path)[:12]}"
    return source_from_records(base, read, column)


def is_text_path(name: str) -> bool:
    """Whether the name ends like a file that ``read_text_file`` reads."""
    return name.lower().removesuffix(".gz").endswith(FORMATS)


def source_from_records(
    name: str, read: Callable[[], Iterable[tuple[str, Record]]], column: str
) -> TextSource:
    """A source over ``(place, record)`` pairs; the place (``a.csv line 3``) is for messages."""
    suffix = "" if column == "text" else f"#{column}"
    return TextSource(name + suffix, partial(_rows, read, column))


def _rows(read: Callable[[], Iterable[tuple[str, Record]]], column: str) -> Iterator[TextRow]:
    for row_id, (place, record) in enumerate(read()):
        yield TextRow(row_id, _text_of(record, column, place), _meta_of(record, column))


def pick_column(records: Iterable[tuple[str, Record]], column: str | None, name: str) -> str:
    """The text column: the one asked for, else ``text``, else the only string column.

    Args:
        records: ``(place, record)`` pairs; only the first is read.
        column: what the user asked for.
        name: the file or dataset, for the message.
    Raises:
        UserError: no records; the column is absent; none or several string columns to choose from.
    """
    first = next(iter(records), None)
    if first is None:
        raise UserError(f"{name} is empty: expected at least one row of text, got none.")
    place, record = first
    have = ", ".join(map(str, record)) or "none"
    strings = [key for key, value in record.items() if isinstance(value, str)]
    if column is not None and column not in record:
        raise UserError(f"{name} has no column {column!r}; its columns are: {have}.")
    if column is None and "text" in record:
        column = "text"
    if column is None and len(strings) == 1:
        column = strings[0]
    if column is None:
        raise UserError(
            f"{name} has no column 'text' and {len(strings)} string columns, expected one: "
            f"name the text column; the columns are: {have}."
        )
    _text_of(record, column, place)
    return column


def _text_of(record: Mapping[str, Any], column: str, place: str) -> str:
    if column not in record:
        have = ", ".join(map(str, record)) or "none"
        raise UserError(f"{place} has no column {column!r}; its columns are: {have}.")
    text = record[column]
    if not isinstance(text, str):
        got = "null" if text is None else f"{type(text).__name__} {str(text)[:40]!r}"
        raise UserError(f"{place}: expected a string in column {column!r}, got {got}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: column {column!r} holds an unpaired surrogate.") from error
    return text


def _meta_of(record: Mapping[str, Any], column: str) -> dict[str, MetaValue]:
    meta: dict[str, MetaValue] = {}
    for key, value in record.items():
        if isinstance(value, date):  # datetime too
            value = value.isoformat()
        if key != column and isinstance(value, str | int | float):
            meta[f"{key}_" if key in RESERVED else key] = value
    return meta


def rows_from_texts(
    texts: Sequence[str], meta: Sequence[Mapping[str, MetaValue]] | None = None
) -> TextSource:
    """Rows from memory; the id holds a sha256 of the texts.

    Args:
        texts: n strings; ``row_id`` is the position.
        meta: n mappings of labels, or None.
    Raises:
        UserError: no texts, a text that is no string, or another number of labels than of texts.
    """
    if isinstance(texts, str):
        raise UserError("Expected a sequence of texts, got one string: put it into a list.")
    labels = [{} for _ in texts] if meta is None else [dict(one) for one in meta]
    if len(labels) != len(texts):
        raise UserError(f"Expected one meta for each of {len(texts)} texts, got {len(labels)}.")
    if not texts:
        raise UserError("Expected at least one text, got none.")
    digest = hashlib.sha256()
    rows: list[TextRow] = []
    for row_id, (text, label) in enumerate(zip(texts, labels, strict=True)):
        _text_of({"text": text}, "text", f"Text {row_id}")
        digest.update(f"{len(text)}:{text}".encode())
        rows.append(TextRow(row_id, text, label))
    return TextSource(f"texts@{digest.hexdigest()[:12]}", partial(iter, rows))


def windows(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Consecutive rows in lists of ``size``, the last one shorter."""
    stream = iter(rows)
    while window := list(islice(stream, size)):
        yield window


def splitmix64(x: Any) -> Any:
    """A bijective hash of 64-bit integers, the same in every process and on every machine.

    ``z = x + g; z = (z ^ z>>30) * c1; z = (z ^ z>>27) * c2; z ^ z>>31`` (modulo 2^64): one output
    of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; the
    constants are those of Vigna's C version) with x as its state.

    Args:
        x: a non-negative int below 2^64, or a numpy array of uint64 (one hash per element).
    """
    z = (x + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _check_frac(held_out_frac: float) -> None:
    if not (math.isfinite(held_out_frac) and 0 <= held_out_frac < 1):
        raise UserError(f"held_out_frac must be in [0, 1), got {held_out_frac}.")


def is_held_out(row_id: int, held_out_frac: float = 0.05, seed: int = 0) -> bool:
    """Whether a row belongs to the held-out part: ``splitmix64(row_id + splitmix64(seed)) / 2^64 <
    held_out_frac``. It depends on nothing else, so a growing file keeps its split.
    """
    _check_frac(held_out_frac)
    hashed = splitmix64((row_id + splitmix64(seed & _MASK)) & _MASK)
    return (hashed >> 11) * 2.0**-53 < held_out_frac  # 53 bits: exact in a float


def held_out_mask(row_ids: np.ndarray, held_out_frac: float = 0.05, seed: int = 0) -> np.ndarray:
    """``is_held_out`` for an array of row ids [n] at once; returns bool [n]."""
    _check_frac(held_out_frac)
    ids = np.asarray(row_ids).astype(np.uint64)
    hashed = splitmix64(ids + np.uint64(splitmix64(seed & _MASK)))
    return (hashed >> np.uint64(11)) * 2.0**-53 < held_out_frac


def split_rows(
    source: TextSource, held_out_frac: float = 0.05, seed: int = 0
) -> tuple[TextSource, TextSource]:
    """Two disjoint sources that together hold every row: (train, held_out); row ids stay.

    Raises:
        UserError: held_out_frac is not in [0, 1).
    """
    _check_frac(held_out_frac)

    def part(held_out: bool, name: str) -> TextSource:
        chosen = partial(_part, source, held_out_frac, seed, held_out)
        return TextSource(f"{source.id}[{name}, held out {held_out_frac}, seed {seed}]", chosen)

    return part(False, "train"), part(True, "held-out")


def _part(source: TextSource, frac: float, seed: int, held_out: bool) -> Iterator[TextRow]:
    return (row for row in source if is_held_out(row.row_id, frac, seed) == held_out)
