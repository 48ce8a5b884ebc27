"""Records of jsonl, json, csv, tsv, txt and parquet files as one stream of ``(place, record)``.

Each reader holds one record (parquet: one batch) at a time. ``place`` says where the record stands,
e.g. ``reviews.csv line 3``, and opens every message about it.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from sae_core.errors import CorruptFileError, UserError
from sae_core.untrusted import may_repeat, refuse_bomb

Record = dict[str, Any]
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_CHUNK = 1 << 20
_BATCH_ROWS = 256
_MAX_RECORD = 1 << 26  # bytes: a long novel has a tenth; without a bound a small .gz fills memory
_SPACE = re.compile(r"[ \t\r\n]*")
_TAIL = 16  # a JSON error this near to the end of the buffer may only be a literal cut in two


def read_records(path: Path, *, nested: bool = False) -> Iterator[tuple[str, Record]]:
    """Stream the records of one file.

    Args:
        path: the file.
        nested: whether the lists and structures of a parquet file are read too, e.g. the messages
            of a conversation; JSON has them in any case.
    Raises:
        UserError: unknown suffix, undecodable bytes, invalid JSON or CSV (naming the line).
        CorruptFileError: a damaged gzip or parquet file.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet(path, nested)
    readers: dict[str, Callable[[BufferedIOBase, str], Iterator[tuple[str, Record]]]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": lambda handle, name: _table(handle, name, ","),
        ".tsv": lambda handle, name: _table(handle, name, "\t"),
        ".txt": _plain,
    }
    if suffix not in readers:
        raise UserError(
            f"Cannot read {path}: expected a file that ends in {', '.join(FORMATS)} "
            f"(all but parquet also with .gz), got {path.suffix or 'no suffix'!r}."
        )
    return _opened(path, readers[suffix])


def _opened(
    path: Path, reader: Callable[[BufferedIOBase, str], Iterator[tuple[str, Record]]]
) -> Iterator[tuple[str, Record]]:
    zipped = path.name.lower().endswith(".gz")
    try:
        with gzip.open(path, "rb") if zipped else open(path, "rb") as handle:
            yield from reader(handle, path.name)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorruptFileError(f"{path} is a damaged gzip file: {error}.") from error
    except PermissionError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error


def _undecodable(name: str, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{name} line {line}: expected UTF-8 text, got the byte 0x{byte:02x}.")


def _too_long(place: str) -> UserError:
    return UserError(f"{place}: expected a record of at most {_MAX_RECORD:,} bytes, got more.")


def _lines(handle: BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(iter(lambda: handle.readline(_MAX_RECORD + 1), b""), start=1):
        if len(raw) > _MAX_RECORD:
            raise _too_long(f"{name} line {number}")
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _undecodable(name, number, error) from error


def _plain(handle: BufferedIOBase, name: str) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(handle, name):
        if line := line.rstrip("\r\n"):
            if line.isspace():
                continue
            yield f"{name} line {number}", {"text": line}


def _as_record(value: Any, place: str) -> tuple[str, Record]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(value).__name__}.")
    return place, value


def _json_lines(handle: BufferedIOBase, name: str) -> Iterator[tuple[str, Record]]:
    for number, line in _lines(handle, name):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{place}: expected one JSON object, got invalid JSON: {error}."
            ) from error
        yield _as_record(value, place)


def _json(handle: BufferedIOBase, name: str) -> Iterator[tuple[str, Record]]:
    """An array of objects where the file starts with ``[``, else JSON lines."""
    head = handle.read(_CHUNK)
    handle.seek(0)
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _json_array(handle, name)
    else:
        yield from _json_lines(handle, name)


def _json_array(handle: BufferedIOBase, name: str) -> Iterator[tuple[str, Record]]:
    """Objects of one JSON array, decoded one after the other from a buffer that slides along."""
    chunks = _decoded_chunks(handle, name)
    buffer = next(chunks)
    pos = buffer.index("[") + 1
    line = 1 + buffer.count("\n", 0, pos)  # of the character at `pos`
    first, closed = True, False
    while not closed:
        try:
            start, value, end, closed = _array_item(buffer, pos, first)
        except (ValueError, RecursionError) as error:
            if len(buffer) - pos > _MAX_RECORD:
                raise _too_long(f"{name} line {line}") from error
            more = next(chunks, "") if _may_be_cut(error, len(buffer)) else ""
            if not more:
                line += buffer.count("\n", pos, getattr(error, "pos", pos))
                raise UserError(
                    f"{name} line {line}: expected an array of JSON objects, got invalid JSON: "
                    f"{getattr(error, 'msg', error)}."
                ) from error
            buffer, pos = buffer[pos:] + more, 0
            continue
        is_empty = closed and end == start + 1
        if not is_empty:
            yield _as_record(value, f"{name} line {line + buffer.count(chr(10), pos, start)}")
        line += buffer.count("\n", pos, end)
        pos, first = end, False
    if buffer[pos:].strip() or any(chunk.strip() for chunk in chunks):
        raise UserError(
            f"{name}: expected one JSON array, got more text behind its closing bracket."
        )


def _array_item(buffer: str, pos: int, first: bool) -> tuple[int, Any, int, bool]:
    """(start, value, index behind the comma or bracket, whether the bracket closed the array)."""
    start = _end_of_space(buffer, pos)
    if first and buffer[start : start + 1] == "]":
        return start, None, start + 1, True
    value, end = json.JSONDecoder().raw_decode(buffer, start)
    end = _end_of_space(buffer, end)
    if buffer[end : end + 1] not in (",", "]"):  # also where the buffer ends
        raise json.JSONDecodeError("Expecting ',' or ']'", buffer, end)
    return start, value, end + 1, buffer[end] == "]"


def _end_of_space(text: str, pos: int) -> int:
    found = _SPACE.match(text, pos)
    return found.end() if found else pos


def _may_be_cut(error: Exception, length: int) -> bool:
    """Whether more input could mend the error: an open string, or an error at the buffer's end."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= length - _TAIL


def _decoded_chunks(handle: BufferedIOBase, name: str) -> Iterator[str]:
    """The pieces of a UTF-8 file as text, none of them empty."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while raw := handle.read(_CHUNK):
        try:
            text = decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise _undecodable(
                name, line + error.object.count(b"\n", 0, error.start), error
            ) from error
        line += text.count("\n")
        if text:
            yield text
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _undecodable(name, line, error) from error


def _table(handle: BufferedIOBase, name: str, delimiter: str) -> Iterator[tuple[str, Record]]:
    """Rows of a table with a header line; the place is the line on which the row ends."""
    if csv.field_size_limit() < _MAX_RECORD:
        csv.field_size_limit(_MAX_RECORD)  # the csv module has one limit for the process
    size = 0

    def lines() -> Iterator[str]:
        nonlocal size
        for number, text in _lines(handle, name):
            size += len(text)
            if size > _MAX_RECORD:  # a quoted field may span many lines
                raise _too_long(f"{name} line {number}")
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{name} line {reader.line_num}: invalid table row: {error}."
            ) from error
        place, size = f"{name} line {reader.line_num}", 0
        if not row:
            continue
        if header is None:
            header = row
            if len(set(header)) < len(header):
                raise UserError(f"{place}: a column name appears twice: {', '.join(header)}.")
            continue
        if len(row) != len(header):
            raise UserError(f"{place}: expected {len(header)} fields, got {len(row)}.")
        yield place, dict(zip(header, row, strict=True))


def _parquet(path: Path, nested: bool) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            refuse_bomb(file.metadata, path)
            fields = list(file.schema_arrow)
            names = [one.name for one in fields if nested or not pa.types.is_nested(one.type)]
            number = 0
            at_once = 1 if may_repeat(file.metadata, path) else _BATCH_ROWS
            for batch in file.iter_batches(batch_size=at_once, columns=names):
                for record in batch.to_pylist():
                    yield f"{path.name} row {number}", record
                    number += 1
    except PermissionError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except CorruptFileError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorruptFileError(f"{path} is not a whole parquet file: {text}") from error
