"""Instruction data of any usual shape as one stream of prompts and responses.

A file, a ``datasets.Dataset`` or a list of dicts becomes an ``InstructionSource``: rows that can be
read again and again, one record in memory at a time, each with the id on which scores, picks and
features are joined.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sae_apps.selection.columns import Layout, choose_layout, no_such_column
from sae_apps.selection.parts import parts_of
from sae_apps.selection.templates import InstructionRow, Rendered, choose_form, render
from sae_core.download import sha256_file
from sae_core.errors import UserError
from sae_core.records import Record, read_records

__all__ = [
    "InstructionRow",
    "InstructionSource",
    "Rendered",
    "RowReader",
    "choose_form",
    "open_instructions",
    "render",
    "source_from_rows",
]

Read = Callable[[], Iterator[tuple[str, Record]]]
_MAX_ID = (1 << 63) - 1


@dataclass
class RowReader:
    """One pass over a source; counts as it goes."""

    rows: Iterator[InstructionRow | None]
    """None stands for a record without text."""
    n_records: int = field(default=0, init=False)
    """Records read so far."""
    n_textless: int = field(default=0, init=False)
    """Those of them that were left out because they hold no text."""

    def __iter__(self) -> "RowReader":
        return self

    def __next__(self) -> InstructionRow:
        for row in self.rows:
            self.n_records += 1
            if row is not None:
                return row
            self.n_textless += 1
        raise StopIteration


@dataclass(frozen=True)
class InstructionSource:
    """Rows that can be read again and again, in the same order."""

    id: str
    """Names the data and its columns in provenance: ``pool.jsonl@3bb7d7fdb62a#question>answer``."""
    open: Callable[[], RowReader]
    """Starts a pass; the reader counts the records without text."""

    def __iter__(self) -> Iterator[InstructionRow]:
        return self.open()


def open_instructions(
    spec: Any,
    *,
    prompt: str | Sequence[str] | None = None,
    response: str | None = None,
    messages: str | None = None,
    template: str | None = None,
    group: str | None = None,
    id_column: str | None = None,
    target: bool = False,
    name: str | None = None,
) -> InstructionSource:
    """Open instruction data. Without arguments the columns are recognised by their names:

    1. ``messages`` or ``conversations``: lists of role/content or from/value. What stands before
       the last assistant message is the prompt, the rest the response.
    2. one prompt (instruction, prompt, question, query, problem, input, ...) and one response
       (output, response, completion, answer, target, solution, ...); ``input`` or ``context``
       beside a prompt continues it, ``system_prompt`` precedes it; ``text`` with ``code``.
    3. ``text``, or the only column of strings: a prompt without response.

    A template names columns in braces, ``"Q: {question}\\nA: {response}{answer}"``. The response
    begins at ``{response}``: that is the column of this name where there is one, and nothing but
    the mark where there is none. Without it all of the text is prompt. ``{{`` is a brace.

    A record has no text where a prompt, response or template column is null, or all are blank.

    Args:
        spec: jsonl, json, csv, tsv, txt or parquet file (all but parquet also .gz); a
            ``datasets.Dataset`` or ``IterableDataset``; or a sequence of dicts.
        prompt: column of the prompt, or several, joined by newlines; only the first must hold text.
        response: column of the response; a prompt named without it has none.
        messages: column of chat messages.
        template: see above.
        group: column whose value, as a string, becomes ``row.group``.
        id_column: column of unique ids. Integers from 0 to 2^63 - 1 become ``row_id``; of other ids
            the row keeps its running number, and the id stays in ``row.record``.
        target: whether a record without text is refused at once; else it is left out and counted,
            and keeps its number.
        name: identity of the data, e.g. ``owner/name@commit``; None hashes the file, or reads all
            records of a dataset or sequence once to hash them.
    Returns:
        A source that streams; memory for one record (parquet: 256) at a time, and while it is
        opened with ``id_column`` 8 bytes a record.
    Raises:
        UserError: no such file, no records, none with text (at the end of a pass), a column that is
            not there or columns that fit several readings, duplicate or null ids, and, while
            reading, text that is none, an unknown role.
        CorruptFileError: a damaged file.
    """
    where, read, digest = _reader(spec)
    first = next(iter(read()), None)
    if first is None:
        raise UserError(f"{where} is empty: expected at least one record, got none.")
    layout = choose_layout(
        first[1], where, prompt=prompt, response=response, messages=messages, template=template
    )
    for column in (group, id_column):
        if column is not None and column not in first[1]:
            raise no_such_column(column, first[1], where)
    keep_ids = id_column is not None and _check_ids(read, id_column, where)
    labels = [
        layout.label,
        f"group={group}" if group else "",
        f"id={id_column}" if keep_ids else "",
    ]
    rows = partial(_rows, read, layout, group, id_column if keep_ids else None, target, where)
    source = InstructionSource(
        f"{name or digest()}#{','.join(filter(None, labels))}", partial(_start, rows)
    )
    if target:
        for _ in source:  # a target is small: what is wrong with it shows before any model runs
            pass
    return source


def source_from_rows(name: str, rows: Sequence[InstructionRow]) -> InstructionSource:
    """A source over rows in memory, with the id ``name``."""
    return InstructionSource(name, partial(_start, partial(iter, rows)))


def _start(rows: Callable[[], Iterator[InstructionRow | None]]) -> RowReader:
    return RowReader(rows())


def _rows(
    read: Read, layout: Layout, group: str | None, id_column: str | None, target: bool, where: str
) -> Iterator[InstructionRow | None]:
    has_text = False
    for number, (place, record) in enumerate(read()):
        parts = parts_of(record, layout, place)
        if parts is None:
            if target:
                raise UserError(f"{place}: expected a target with text, got a target without text.")
            yield None
            continue
        has_text = True
        row_id = number if id_column is None else record[id_column]
        label = None if group is None else _group(record, group, place)
        prompt, response, turns, joint = parts
        yield InstructionRow(row_id, prompt, response, label, record, turns, joint)
    if not has_text:
        raise UserError(f"{where}: expected records with text, got none in {layout.label}.")


def _group(record: Record, column: str, place: str) -> str:
    value = record.get(column)
    if not isinstance(value, str | int | float):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{place}: expected a group in column {column!r}, got {kind}.")
    return str(value)


# Where records come from


def _reader(spec: Any) -> tuple[str, Read, Callable[[], str]]:
    """(name for messages, function that starts a pass, function that gives the identity)."""
    if isinstance(spec, str | Path):
        path = Path(spec).expanduser()
        if not path.is_file():
            what = "a folder" if path.is_dir() else "nothing"
            raise UserError(f"File not found: expected instruction data at {path}, got {what}.")
        read = partial(read_records, path, nested=True)
        return str(path), read, lambda: f"{path.name}@{sha256_file(path)[:12]}"
    is_dataset = hasattr(spec, "features") and hasattr(spec, "with_format")
    if is_dataset:
        spec = spec.with_format(None)  # plain Python values, not tensors
    if isinstance(spec, Mapping) or not isinstance(spec, Iterable):
        raise UserError(
            "Expected a file, a dataset or a sequence of dicts as instruction data, got "
            f"{type(spec).__name__}."
        )
    if iter(spec) is spec:
        raise UserError(
            "Expected instruction data that can be read more than once, got an iterator "
            f"({type(spec).__name__}): make it a list."
        )
    what = "dataset" if is_dataset else "records"
    read = partial(_numbered, spec, what)
    where = "The dataset" if is_dataset else "The list of records"
    return where, read, partial(_hashed, read, what)


def _numbered(spec: Iterable[Any], what: str) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(spec):
        place = f"{what} row {number}"
        if not isinstance(record, Mapping):
            raise UserError(f"{place}: expected a dict, got {type(record).__name__}.")
        yield place, dict(record)


def _hashed(read: Read, what: str) -> str:
    digest = hashlib.sha256()
    for _, record in read():
        line = json.dumps(record, sort_keys=True, default=str)  # ASCII, surrogates escaped
        digest.update(line.encode())
        digest.update(b"\n")
    return f"{what}@{digest.hexdigest()[:12]}"


# Ids


def _check_ids(read: Read, column: str, where: str) -> bool:
    """Refuse null, mixed and duplicate ids; whether they are integers that can serve as row ids."""
    keys, kind = array("Q"), None
    for place, record in read():
        value = record.get(column)
        if isinstance(value, bool) or not isinstance(value, int | str):
            got = "null" if value is None else type(value).__name__
            raise UserError(
                f"{place}: expected an integer or a string as id in column {column!r}, got {got}."
            )
        kind = kind or type(value)
        if not isinstance(value, kind):
            raise UserError(
                f"{place}: expected ids of one kind in column {column!r}, got {kind.__name__} "
                f"before and {type(value).__name__} here."
            )
        if isinstance(value, int) and not 0 <= value <= _MAX_ID:
            raise UserError(f"{place}: expected an id from 0 to 2^63 - 1, got {value}.")
        keys.append(_key(value))
    ordered = np.sort(np.frombuffer(keys, dtype=np.uint64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if repeated:
        _refuse_duplicates(read, column, repeated, where)
    return kind is int


def _key(value: int | str) -> int:
    if isinstance(value, int):
        return value
    data = value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _refuse_duplicates(read: Read, column: str, repeated: set[int], where: str) -> None:
    """Look again at the ids whose 64-bit keys coincide: equal keys of different strings pass."""
    seen: dict[int | str, str] = {}
    for place, record in read():
        value = record[column]
        if _key(value) not in repeated:
            continue
        if value in seen:
            raise UserError(
                f"{where}: expected unique ids in column {column!r}, got {value!r} at "
                f"{seen[value]} and at {place}."
            )
        seen[value] = place
