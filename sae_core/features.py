"""SparseFeatures: what every application reads. A sparse matrix, a row table, and their origin."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import sparse

from sae_core.errors import UserError
from sae_core.provenance import Provenance

Top = tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """Latent activations of rows, F[i, j] = activation of latent j in row i, with the row table.

    Everything joins on ``row_id``, never on position. Token-level features (pooling ``none``) carry
    a running ``row_id`` per token and the columns ``source_row_id`` and ``position`` beside it.

    Args:
        acts: [n_rows, d_sae] float32 in canonical CSR: latents ascending within a row, none twice,
            no stored zero; every value finite and positive.
        rows: one table row per row of acts; column ``row_id`` is int64, unique, without nulls.
        provenance: model, hook point, SAE, data, seed and versions.
    Raises:
        UserError: any of that does not hold; the sentence says what was found and where.
    """

    acts: sparse.csr_array
    rows: pa.Table
    provenance: Provenance

    def __post_init__(self) -> None:
        _check_structure(self.acts)
        _check_rows(self.rows, self.n_rows)
        _check_values(self.acts, self.row_ids)

    @property
    def n_rows(self) -> int:
        return shape_of(self.acts)[0]

    @property
    def d_sae(self) -> int:
        return shape_of(self.acts)[1]

    @cached_property
    def row_ids(self) -> Int[np.ndarray, " n_rows"]:
        """The column ``row_id``, in the order of the rows of ``acts``."""
        return self.rows["row_id"].to_numpy()

    @cached_property
    def freq(self) -> Float[np.ndarray, " d_sae"]:
        """Share of rows in which each latent is active, in [0, 1]."""
        return np.bincount(self.acts.indices, minlength=self.d_sae) / self.n_rows

    def row_index(self, row_ids: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
        """Places of row ids in ``acts`` and ``rows``.

        Raises:
            UserError: a row id is not in the table; the sentence gives the range of those that are.
        """
        wanted = np.asarray(row_ids, dtype=np.int64)
        order = self._row_order
        place = np.searchsorted(self.row_ids, wanted, sorter=order).clip(max=self.n_rows - 1)
        index = order[place]
        unknown = wanted[self.row_ids[index] != wanted]
        if unknown.size:
            low, high = self.row_ids[order[0]], self.row_ids[order[-1]]
            raise UserError(
                f"Expected one of the {self.n_rows} row ids between {low} and {high}, "
                f"got {unknown[0]}."
            )
        return index

    def top_rows(self, latent: int, n: int) -> Top:
        """The rows in which a latent is most active.

        Args:
            latent: column, in [0, d_sae).
            n: at most so many rows; fewer come back where the latent is active in fewer.
        Returns:
            row ids and activations, the largest first; equal ones in the order of the table.
        Raises:
            UserError: the latent is out of range, or n is negative.
        """
        if not 0 <= latent < self.d_sae:
            raise UserError(f"Expected a latent between 0 and {self.d_sae - 1}, got {latent}.")
        columns = self._columns
        span = slice(columns.indptr[latent], columns.indptr[latent + 1])
        best = _largest(columns.data[span], n)
        return self.row_ids[columns.indices[span][best]], columns.data[span][best]

    def top_latents(self, row_id: int, n: int) -> Top:
        """The latents most active in a row.

        Args:
            row_id: as in the row table.
            n: at most so many latents; fewer come back where fewer are active.
        Returns:
            latents and activations, the largest first; equal ones in ascending order of latent.
        Raises:
            UserError: the row id is unknown, or n is negative.
        """
        (i,) = self.row_index(np.array([row_id]))
        span = slice(self.acts.indptr[i], self.acts.indptr[i + 1])
        best = _largest(self.acts.data[span], n)
        return self.acts.indices[span][best].astype(np.int64), self.acts.data[span][best]

    @cached_property
    def _columns(self) -> sparse.csc_array:
        """The same matrix by columns: built at the first question, then every answer is a slice."""
        return self.acts.tocsc()

    @cached_property
    def _row_order(self) -> Int[np.ndarray, " n_rows"]:
        return np.argsort(self.row_ids, kind="stable")


def shape_of(acts: sparse.csr_array) -> tuple[int, int]:
    """``acts.shape`` with its type, which scipy does not declare."""
    return cast("tuple[int, int]", acts.shape)


def _largest(values: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " k"]:
    """Places of the n largest values, largest first, equal values by place."""
    if n < 0:
        raise UserError(f"Expected a number of results of at least 0, got {n}.")
    if n == 0 or values.size == 0:
        return np.empty(0, dtype=np.int64)
    kept = np.arange(values.size)
    if n < values.size:
        # Everything that ties with the n-th goes into the sort, so that the place decides.
        kept = np.flatnonzero(values >= np.partition(values, values.size - n)[values.size - n])
    return kept[np.argsort(-values[kept], kind="stable")][:n]


def _check_structure(acts: sparse.csr_array) -> None:
    if not isinstance(acts, sparse.csr_array):
        raise UserError(f"Expected activations as scipy csr_array, got {type(acts).__name__}.")
    if acts.dtype != np.float32:
        raise UserError(f"Expected activations in float32, got {acts.dtype}.")
    n_rows, d_sae = shape_of(acts)
    if n_rows == 0 or d_sae == 0:
        raise UserError(f"Expected at least one row and one latent, got {n_rows} x {d_sae}.")
    indptr, indices = acts.indptr, acts.indices
    nnz = len(indices)
    if len(indptr) != n_rows + 1 or indptr[0] != 0 or indptr[-1] != nnz or len(acts.data) != nnz:
        raise UserError(
            f"Expected row pointers from 0 to {nnz} for {n_rows} rows, got {len(indptr)} pointers "
            f"from {indptr[0]} to {indptr[-1]} over {len(acts.data)} values."
        )
    if (np.diff(indptr) < 0).any():
        raise UserError("Expected row pointers that never fall, got a falling one.")
    if nnz and not 0 <= indices.min() <= indices.max() < d_sae:
        raise UserError(
            f"Expected latents between 0 and {d_sae - 1}, got {indices.min()} to {indices.max()}."
        )
    rises = np.diff(indices) > 0
    starts = indptr[1:-1]
    rises[starts[(starts > 0) & (starts < nnz)] - 1] = True  # the next row may start anywhere
    if not rises.all():
        place = np.searchsorted(indptr, np.flatnonzero(~rises)[0], side="right") - 1
        raise UserError(
            f"Expected latents in ascending order and none twice, got others in line {place}."
        )


def _check_rows(rows: pa.Table, n_rows: int) -> None:
    if "row_id" not in rows.column_names:
        raise UserError(f"Expected a column row_id, got the columns {rows.column_names}.")
    if rows.num_rows != n_rows:
        raise UserError(f"Expected a row table of {n_rows} rows, got {rows.num_rows}.")
    column = rows["row_id"]
    if column.type != pa.int64() or column.null_count:
        raise UserError(
            f"Expected row_id as int64 without nulls, got {column.type} "
            f"with {column.null_count} nulls."
        )
    values, counts = np.unique(column.to_numpy(), return_counts=True)
    if (counts > 1).any():
        double = values[counts.argmax()]
        raise UserError(f"Expected every row_id once, got {double} {counts.max()} times.")


def _check_values(acts: sparse.csr_array, row_ids: Int[np.ndarray, " n_rows"]) -> None:
    good = np.isfinite(acts.data) & (acts.data > 0)
    if good.all():
        return
    place = np.flatnonzero(~good)[0]
    row = np.searchsorted(acts.indptr, place, side="right") - 1
    raise UserError(
        f"Expected stored activations finite and above 0, got {acts.data[place]} "
        f"for latent {acts.indices[place]} in the row with row_id {row_ids[row]}."
    )
