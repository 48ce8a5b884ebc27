"""SparseIndex: nearest rows of many queries under the generalised Jaccard, without reading all.

FAISS finds candidates by short codes (``codes``), then those that may be among the nearest are
scored exactly on their sparse rows (``cascade``, ``rerank``); how many of the true neighbours came
through is measured on a sample of the queries and stands in every result. The index is built once,
saved, extended and queried.
"""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from scipy import sparse

from sae_apps.selection.cascade import Found, rerank
from sae_apps.selection.codes import Codes, IndexConfig
from sae_apps.selection.index_shards import Rows, ShardReader, distinct
from sae_apps.selection.rerank import (
    Part,
    Recall,
    exact_bar,
    n_rows_of,
    recall_of,
    sample_rows,
)
from sae_apps.selection.sketch import check_rows
from sae_core.errors import CorruptFileError, UserError
from sae_core.features import shape_of
from sae_core.store import atomic_folder, verify_folder
from sae_core.untrusted import MAX_D_SAE, read_array, read_object, reading

FORMAT, VERSION = "sae-apps-index", 1
_BLOCK_PAIRS = 16_000_000  # candidates of queries at once: 12 bytes each


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The k best rows of every query among its candidates, by exact score."""

    row_ids: Int64[np.ndarray, "q k"]
    """Best first, equal scores in the order of the index; -1 where fewer candidates were found."""
    scores: Float32[np.ndarray, "q k"]
    """Generalised Jaccard, exact; 0 beside -1."""
    recall: Recall | None
    """Share of the exact k nearest that were found, with its interval; None if not asked for."""
    n_candidates: int
    """Rows that FAISS handed over for each query."""
    n_scored: float
    """Of these, rows scored exactly, on average; the others could not have been among the k best,
    as far as the scored ones tell (``cascade``)."""
    n_empty: int
    """Queries without an active latent: every score is 0, so any k rows are nearest."""


class SparseIndex:
    """Rows, their codes and their ids. Make one with :meth:`build` or :meth:`load`."""

    def __init__(
        self, config: IndexConfig, codes: Codes, parts: list[Part],
        row_ids: Int64[np.ndarray, "n"], d_sae: int, sae_hash: str,
    ) -> None:  # fmt: skip
        self.config = config
        self.codes = codes
        self.parts = parts
        self.row_ids = row_ids
        self.d_sae = d_sae
        self.sae_hash = sae_hash

    def __len__(self) -> int:
        return len(self.row_ids)

    @classmethod
    def build(
        cls,
        rows: Rows,
        config: IndexConfig | None = None,
        *,
        folder: str | Path | None = None,
        fit_on: sparse.csr_array | None = None,
    ) -> "SparseIndex":
        """Encode rows into a new index.

        Args:
            rows: shards of features (a pool, a list, a generator), or CSR. Rows of CSR get running
                numbers as ids. Read once.
            config: method and settings.
            folder: new folder for the index; its rows are then mapped from there, and memory holds
                the codes and one shard. None: everything in memory.
            fit_on: rows to fit on in place of a random sample of the rows.
        Raises:
            UserError: no rows, shards of another d_sae or SAE, a row id twice, or bad settings.
            MissingExtraError: faiss or numba is not installed.
        """
        config = config or IndexConfig()
        with ExitStack() as stack:
            temp = stack.enter_context(atomic_folder(folder)) if folder is not None else None
            reader = ShardReader(0)
            parts = [_kept(part, temp, number) for number, part in enumerate(reader.parts(rows))]
            if not n_rows_of(parts):
                raise UserError("Expected at least one row to index, got none.")
            d_sae = reader.width
            if fit_on is None:
                generator = np.random.default_rng(config.seed)
                fit_on = sample_rows(parts, d_sae, config.fit_rows, generator)
            check_rows(fit_on, d_sae)
            codes = Codes.fit(fit_on, config)
            for part in parts:
                codes.add(part.matrix(d_sae))
                part.forget()
            row_ids = distinct(np.concatenate(reader.row_ids))
            index = cls(config, codes, parts, row_ids, d_sae, reader.sae_hash)
            if temp is not None:
                index._write_head(temp)
        return index

    def add(self, rows: Rows) -> None:
        """Append rows, encoded as the index was fitted; rows of CSR go on counting.

        Raises:
            UserError: another d_sae or SAE, no rows, or a row id that is there already.
        """
        reader = ShardReader(int(self.row_ids.max()) + 1, self.d_sae, self.sae_hash)
        parts = list(reader.parts(rows))
        if not n_rows_of(parts):
            raise UserError("Expected at least one row to add, got none.")
        row_ids = distinct(np.concatenate([self.row_ids, *reader.row_ids]))
        for part in parts:
            self.codes.add(part.matrix(self.d_sae))
        self.parts = [*self.parts, *parts]
        self.row_ids = row_ids

    def query(
        self,
        queries: sparse.csr_array,
        k: int,
        *,
        n_candidates: int | None = None,
        recall_sample: int = 0,
    ) -> SearchResult:
        """The k nearest rows of every query.

        One pass over the rows serves some thousands of queries, so ask for many at once.

        Args:
            queries: [q, d_sae], canonical CSR in float32.
            n_candidates: rows that FAISS hands over for each query, of which those are scored
                exactly that may be among the k best; None: 50 k, at least 2,000. More find more of
                the true neighbours.
            recall_sample: queries whose exact neighbours are searched as well, for the recall;
                each costs a pass over all rows. Drawn with the seed of the index.
        Raises:
            UserError: another d_sae, no queries, k below 1 or above the number of rows, fewer
                candidates than k.
        """
        check_rows(queries, self.d_sae)
        n = len(self)
        if not shape_of(queries)[0]:
            raise UserError("Expected at least one query, got none.")
        if not 1 <= k <= n:
            raise UserError(f"Expected k between 1 and {n}, the rows of the index, got {k}.")
        wanted = max(2000, 50 * k) if n_candidates is None else n_candidates
        if wanted < k:
            raise UserError(f"Expected n_candidates of at least k = {k}, got {wanted}.")
        wanted = min(wanted, n)
        block = max(1, _BLOCK_PAIRS // wanted)
        found = [
            self._search(sparse.csr_array(queries[start : start + block]), k, wanted)
            for start in range(0, shape_of(queries)[0], block)
        ]
        places = np.concatenate([one.rows for one in found])
        scores = np.concatenate([one.scores for one in found])
        recall = self._recall(queries, scores, k, recall_sample) if recall_sample > 0 else None
        return SearchResult(
            np.where(places < 0, -1, self.row_ids[places]),
            np.where(places < 0, np.float32(0), scores),
            recall,
            wanted,
            sum(one.n_scored for one in found) / len(places),
            int((np.diff(queries.indptr) == 0).sum()),
        )

    def _search(self, queries: sparse.csr_array, k: int, n_candidates: int) -> Found:
        rows, near = self.codes.candidates(queries, n_candidates, self.config)
        return rerank(self.parts, queries, rows, near, k)

    def _recall(
        self, queries: sparse.csr_array, scores: Float32[np.ndarray, "q k"], k: int, sample: int
    ) -> Recall:
        n = shape_of(queries)[0]
        generator = np.random.default_rng(self.config.seed)
        drawn = np.sort(generator.choice(n, min(sample, n), replace=False))
        bars = exact_bar(self.parts, sparse.csr_array(queries[drawn]), k)
        return recall_of(scores[drawn], bars)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write everything into a folder, atomically; the rows are copied.

        Raises:
            UserError: the folder is taken, the disk is full, or it may not be written.
        """
        with atomic_folder(folder, overwrite=overwrite) as temp:
            for number, part in enumerate(self.parts):
                part.save(temp, number)
            self._write_head(temp)

    def _write_head(self, folder: Path) -> None:
        head = {
            "format": FORMAT, "version": VERSION, "d_sae": self.d_sae, "sae_hash": self.sae_hash,
            "n_rows": len(self), "n_parts": len(self.parts), "config": asdict(self.config),
        }  # fmt: skip
        (folder / "index.json").write_text(json.dumps(head, indent=1), encoding="utf-8")
        np.save(folder / "row_ids.npy", self.row_ids)
        self.codes.save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "SparseIndex":
        """An index from its folder: checksums are verified, the rows are mapped, not read.

        Raises:
            UserError: no such folder, or an index of another version.
            CorruptFileError: a file is missing, altered, or not of an index.
        """
        folder = Path(folder)
        if "index.json" not in verify_folder(folder)["files"]:
            raise CorruptFileError(f"{folder} holds no index: expected index.json in its manifest.")
        head = read_object(folder / "index.json")
        if (head.get("format"), head.get("version")) != (FORMAT, VERSION):
            raise UserError(
                f"Expected {FORMAT} version {VERSION}, got {head.get('format')} version "
                f"{head.get('version')} at {folder}: build the index anew."
            )
        with reading("an index", folder):
            return cls._read(folder, head)

    @classmethod
    def _read(cls, folder: Path, head: dict[str, Any]) -> "SparseIndex":
        config, d_sae = IndexConfig(**head["config"]), int(head["d_sae"])
        if not 0 < d_sae <= MAX_D_SAE:
            raise ValueError(f"d_sae = {d_sae}")
        codes = Codes.load(folder, config, d_sae)
        parts = [Part.open(folder, number) for number in range(int(head["n_parts"]))]
        for part in parts:  # compiled loops trust them
            check_rows(part.matrix(d_sae), d_sae)
            part.forget()
        row_ids = read_array(folder / "row_ids.npy")
        if row_ids.dtype != np.int64 or row_ids.ndim != 1:
            raise TypeError(f"row ids as {row_ids.dtype} of shape {row_ids.shape}")
        if not codes.n_rows == n_rows_of(parts) == len(row_ids) == head["n_rows"]:
            raise CorruptFileError(
                f"{folder}: expected {head['n_rows']} rows, got {codes.n_rows} codes, "
                f"{n_rows_of(parts)} rows and {len(row_ids)} ids."
            )
        return cls(config, codes, parts, row_ids, d_sae, str(head["sae_hash"]))


def _kept(part: Part, folder: Path | None, number: int) -> Part:
    """The part itself, or written and mapped."""
    if folder is None:
        return part
    part.save(folder, number)
    return Part.open(folder, number)
