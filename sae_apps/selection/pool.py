"""Features of a pool on disk: written once, shard by shard, read as a stream by everything else.

    POOL/pool.json          model, SAE, configuration, source and FVU, written before any shard
    POOL/shard-00000/       SparseFeatures of rows 0 to shard_rows - 1, and so on
    POOL/finished.json      numbers of rows and shards, written last

A shard is a fixed range of rows that is encoded on its own: whoever makes it, in whatever order,
makes the same one, and a kill loses at most the shards at work.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_apps.selection.embed import Encoder, check_fit, encode
from sae_apps.selection.instructions import InstructionRow, InstructionSource
from sae_core.disk import atomic_write_text
from sae_core.errors import CorruptFileError, UserError
from sae_core.features import SparseFeatures
from sae_core.provenance import Provenance
from sae_core.sealed import sealed, unsealed
from sae_core.store import load_features, recover_folder, save_features
from sae_core.text import windows
from sae_core.untrusted import read_object, read_table, reading

MANIFEST, FINISHED = "pool.json", "finished.json"
ROWS = "rows.parquet"
FORMAT, VERSION = "sae-apps-pool", 1
SHARD_ROWS = 4096
_FVU_ROWS = 256  # rows on which the SAE is tried before any is encoded for good


@dataclass(frozen=True, eq=False)
class PoolFeatures:
    """Features of many rows as a sequence of shards, on disk or in memory; one is held at a time.

    Iterating gives each shard as SparseFeatures, in the order of the rows.
    """

    shards: tuple[Path | SparseFeatures, ...]
    """Folders of SparseFeatures, or the features themselves."""
    manifest: dict[str, Any]
    """``source`` names the rows; for a pool on disk also ``identity`` (of the encoder),
    ``shard_rows``, ``fvu``, ``n_rows``, ``n_shards`` and ``without_text`` (records left out)."""

    @classmethod
    def of(cls, *features: SparseFeatures) -> "PoolFeatures":
        """Features in memory as a pool of one shard, or of several."""
        if not features:
            raise UserError("Expected features of at least one row, got none.")
        return cls(features, {"source": features[0].provenance.data_id})

    def __iter__(self) -> Iterator[SparseFeatures]:
        return (self.load(number) for number in range(len(self.shards)))

    def load(self, number: int) -> SparseFeatures:
        """One shard, read and checked."""
        shard = self.shards[number]
        return load_features(shard) if isinstance(shard, Path) else shard

    @property
    def source(self) -> str:
        """Name of the rows."""
        return self.manifest["source"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.load(0).d_sae

    @property
    def provenance(self) -> Provenance:
        """Origin of the first shard, which is that of all."""
        shard = self.shards[0]
        if isinstance(shard, SparseFeatures):
            return shard.provenance
        return Provenance(**_read_json(shard / "provenance.json"))

    def sizes(self) -> list[int]:
        """Rows of each shard."""
        return [
            shard.n_rows
            if isinstance(shard, SparseFeatures)
            else pq.read_metadata(shard / ROWS).num_rows
            for shard in self.shards
        ]

    def rows(self) -> pa.Table:
        """row_id and n_tokens (of the whole row, where the features know it) of all rows, in order.

        Raises:
            UserError: a row id stands in two shards.
        """
        table = pa.concat_tables(_row_table(shard) for shard in self.shards)
        values, counts = np.unique(table["row_id"].to_numpy(), return_counts=True)
        if (counts > 1).any():
            double = values[counts.argmax()]
            raise UserError(f"Expected every row_id once, got {double} {counts.max()} times.")
        return table


def write_pool(
    encoder: Encoder,
    rows: InstructionSource,
    folder: str | Path,
    *,
    shard_rows: int = SHARD_ROWS,
    progress: Callable[[int], None] | None = None,
    only: Collection[int] | None = None,
) -> PoolFeatures:
    """Encode a pool into a folder; shards that are there are kept, so a killed call is repeated.

    Before the first shard the SAE is tried on the first rows: an FVU above 1 means that it
    reconstructs them worse than their mean does, so it belongs to another place or model.

    Args:
        rows: the pool, read once, from its beginning.
        folder: new, empty, or holding this very pool.
        shard_rows: rows of a shard; memory for the text and codes of so many is needed.
        progress: called with numbers of rows as they are done, kept ones included.
        only: numbers of the shards to make, for one of several workers; the folder counts as
            finished after a call without it. An empty set writes ``pool.json`` alone.
    Returns:
        The pool; with ``only``, the part asked for as far as the rows reach.
    Raises:
        UserError: no rows, a row_id twice, an FVU above 1, a folder with another pool (names the
            first difference) or with other files.
    """
    folder = Path(folder)
    if shard_rows < 1:
        raise UserError(f"Expected shard_rows of at least 1, got {shard_rows}.")
    manifest = _claim(encoder, rows, folder, shard_rows)
    if (folder / FINISHED).is_file():
        pool = open_pool(folder)
        if only is None:
            return pool
        return PoolFeatures(_chosen(pool.shards, only), manifest)
    n_rows = number = 0
    reader = rows.open()
    for number, part in enumerate(_parts(reader, shard_rows, only)):
        n_rows += len(part)
        if only is None or number in only:
            write_shard(encoder, part, folder, number, rows.id, progress=progress)
    if only is not None:
        found = tuple(_shard(folder, i) for i in range(number + 1))
        return PoolFeatures(_chosen(found, only), manifest)
    pool = PoolFeatures(tuple(_shard(folder, i) for i in range(number + 1)), manifest)
    pool.rows()  # refuses one that stands in two shards
    finished = {"n_rows": n_rows, "n_shards": number + 1, "without_text": reader.n_textless}
    atomic_write_text(folder / FINISHED, json.dumps(sealed(finished)) + "\n")
    return PoolFeatures(pool.shards, manifest | finished)


def write_shard(
    encoder: Encoder,
    rows: Iterable[InstructionRow],
    folder: str | Path,
    number: int,
    data_id: str,
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode the rows of one shard into its folder, unless it is there.

    Args:
        rows: ``shard_rows`` rows from row ``number * shard_rows`` of the pool on.
        data_id: id of the pool's source.
    """
    place = _shard(Path(folder), number)
    recover_folder(place)
    if not place.is_dir():
        save_features(place, encode(encoder, rows, data_id=data_id, progress=progress))
    elif progress is not None:
        progress(pq.read_metadata(place / ROWS).num_rows)


def open_pool(folder: str | Path) -> PoolFeatures:
    """A pool that :func:`write_pool` has finished.

    Raises:
        UserError: no pool there, or an unfinished one; CorruptFileError: a damaged file.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if not (folder / FINISHED).is_file():
        n_shards = len(list(folder.glob("shard-*")))
        raise UserError(
            f"Expected a finished pool at {folder}, got one with {n_shards} shards and without "
            f"{FINISHED}: repeat the call that began it."
        )
    finished = _read_json(folder / FINISHED)
    n_shards = finished.get("n_shards")
    if not isinstance(n_shards, int) or n_shards < 1:
        raise CorruptFileError(f"{folder / FINISHED}: expected n_shards of 1, got {n_shards!r}.")
    shards = []
    for number in range(n_shards):
        shards.append(_shard(folder, number))
        recover_folder(shards[-1])
        if not shards[-1].is_dir():  # before a claim of 2^60 is counted through
            raise CorruptFileError(
                f"{shards[-1]} is missing: expected {n_shards} shards in {folder}."
            )
    return PoolFeatures(tuple(shards), manifest | finished)


def is_pool(folder: str | Path) -> bool:
    """Whether a pool was begun there."""
    return (Path(folder) / MANIFEST).is_file()


def _claim(
    encoder: Encoder, rows: InstructionSource, folder: Path, shard_rows: int
) -> dict[str, Any]:
    """Write ``pool.json``, or check that the folder holds this very pool."""
    wanted: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": rows.id,
        "shard_rows": shard_rows,
        "identity": encoder.identity(),
    }
    if is_pool(folder):
        held = _read_manifest(folder)
        if difference := _difference(held, wanted):
            raise UserError(
                f"{folder} already holds another pool: {difference}; choose another folder."
            )
        return held
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = "a folder with other files" if folder.is_dir() else "a file"
        raise UserError(f"Expected a new, empty or pool folder at {folder}, got {found}.")
    first = list(islice(iter(rows), _FVU_ROWS))
    if not first:
        raise UserError(f"Expected at least one row in the pool {rows.id}, got none.")
    manifest = wanted | {"fvu": check_fit(encoder, first)}
    atomic_write_text(folder / MANIFEST, json.dumps(sealed(manifest), indent=1) + "\n")
    return manifest


def _parts(
    rows: Iterable[InstructionRow], size: int, only: Collection[int] | None
) -> Iterator[list[InstructionRow]]:
    """Rows shard by shard; behind the last shard of ``only`` nothing is read."""
    n = None if only is None else (max(only) + 1) * size if only else 0
    return windows(islice(iter(rows), n), size)


def _chosen(
    shards: tuple[Path | SparseFeatures, ...], only: Collection[int]
) -> tuple[Path | SparseFeatures, ...]:
    return tuple(shard for number, shard in enumerate(shards) if number in only)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


def _row_table(shard: Path | SparseFeatures) -> pa.Table:
    if isinstance(shard, SparseFeatures):
        return _row_columns(shard.rows)
    with reading("a table of rows", shard / ROWS):
        return _row_columns(read_table(shard / ROWS))


def _row_columns(table: pa.Table) -> pa.Table:
    # features made elsewhere know the pooled tokens at most
    name = next((name for name in ("length", "n_tokens") if name in table.column_names), None)
    tokens = np.ones(table.num_rows) if name is None else table[name].to_numpy()
    return pa.table({"row_id": table["row_id"], "n_tokens": pa.array(tokens, pa.int64())})


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not is_pool(folder):
        found = "a folder without it" if folder.is_dir() else "nothing"
        raise UserError(f"Expected a pool with a {MANIFEST} at {folder}, got {found}.")
    manifest = read_object(folder / MANIFEST)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{folder / MANIFEST} must be {FORMAT} version {VERSION}, "
            f"got {manifest.get('format')} version {manifest.get('version')}."
        )
    return unsealed(manifest, folder / MANIFEST)


def _read_json(file: Path) -> dict[str, Any]:
    return unsealed(read_object(file), file)


def _difference(held: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first setting that differs, with both values."""
    old, new = ({**one, **one["identity"]} for one in (held, wanted))
    for name in dict.fromkeys([*new, *old["identity"]]):
        if name not in ("identity", "fvu") and old.get(name) != new.get(name):
            return f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
    return None
