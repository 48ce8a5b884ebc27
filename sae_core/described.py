"""Parquet tables that say how they were made, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.disk import disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.errors import UserError


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
    described = table.replace_schema_metadata({key: json.dumps(how).encode()})
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
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"Expected a file at {file}, got nothing.")
    table = pq.read_table(file)
    found = (table.schema.metadata or {}).get(key)
    if found is None:
        raise UserError(f"Expected a table that `{maker}` made in {file}, got another.")
    return table.replace_schema_metadata(None), json.loads(found)
