"""Parquet tables that say how they were made, written whole or not at all.

Beside ``how`` the schema's metadata holds a sha256 of the values, names and types: Parquet's own
checksums leave headers and the footer uncovered.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.disk import disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.errors import CorruptFileError, UserError
from sae_core.untrusted import read_table, reading

SEAL = b"sae_apps.sha256"


def write_described(
    path: str | os.PathLike[str], table: pa.Table, how: dict[str, Any], key: bytes
) -> Path:
    """Write a table as Parquet with ``how`` as JSON under ``key`` in the schema's metadata.

    Raises:
        UserError: the name does not end in .parquet, the disk is full, or it may not be written.
    """
    file = Path(path)
    if file.suffix != ".parquet":
        raise UserError(f"Expected a file name that ends in .parquet, got {file.name}.")
    text = json.dumps(how)
    seal = {key: text.encode(), SEAL: _digest(table, text).encode()}
    described = table.replace_schema_metadata(seal)
    temp = file.with_name(f".{file.name}.{owner_tag('tmp')}")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(file)
        with replaced_file(file, temp) as out:
            pq.write_table(described, out)
    return file


def read_described(
    path: str | os.PathLike[str], key: bytes, maker: str
) -> tuple[pa.Table, dict[str, Any]]:
    """Read what ``write_described`` wrote under the same key.

    Raises:
        UserError: the file is missing, or ``maker`` did not make it.
        CorruptFileError: it is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"Expected a file at {file}, got nothing.")
    table = read_table(file)
    metadata = table.schema.metadata or {}
    with reading("a table that says how it was made", file):
        text = metadata.get(key, b"").decode()
        how = dict(json.loads(text)) if text else None
    if how is None:
        raise UserError(f"Expected a table that `{maker}` made in {file}, got another.")
    table = table.replace_schema_metadata(None)
    if metadata.get(SEAL, found := _digest(table, text).encode()) != found:
        raise CorruptFileError(
            f"{file} was altered: expected values of sha256 {metadata[SEAL].decode()}, "
            f"got {found.decode()}."
        )
    return table, how


def _digest(table: pa.Table, how: str) -> str:
    """sha256 of names, types, values and ``how``; the same whatever the chunks."""
    digest = hashlib.sha256(how.encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"|{name}|{column.type}|".encode())
        digest.update(np.asarray(column.is_null()).tobytes())
        if pa.types.is_primitive(column.type) and not column.null_count:
            digest.update(column.to_numpy().tobytes())
        else:
            digest.update(repr(column.to_pylist()).encode())
    return digest.hexdigest()
