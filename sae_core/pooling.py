"""Pool token codes to rows: sparse, in pieces, mergeable.

A row may arrive in pieces, in any order and from any process, and nothing of the size
[n_rows, d_sae] is ever dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy import sparse
from torch import Tensor

from sae_core.errors import UserError
from sae_core.features import shape_of
from sae_core.kernels.codes import Codes

POOLINGS = ("max", "mean", "sum", "last")
_COMPACT_AFTER = 1 << 22  # entries that may wait before they are pooled: 64 MiB


@dataclass(frozen=True, eq=False)
class PooledRows:
    """Pools of the tokens seen so far, one per row; ``mean`` keeps the sum until the end."""

    pooling: str
    row_id: Int[np.ndarray, " r"]
    """Ascending, each once, [r] int64."""
    n_tokens: Int[np.ndarray, " r"]
    """Tokens pooled, the silent ones counted, [r] int64."""
    last: Int[np.ndarray, " r"]
    """Highest token position seen, [r] int64."""
    acts: sparse.csr_array
    """[r, d_sae]; float64 where activations are added up, else float32."""

    def merge(self, other: "PooledRows") -> "PooledRows":
        """The pools of both sets of tokens; associative and commutative (sums up to rounding)."""
        return _merged([self, other])


def pool_tokens(
    codes: Codes, row_id: Int[Tensor, " n"], position: Int[Tensor, " n"], pooling: str
) -> PooledRows:
    """Pool the codes of n tokens to the rows that they belong to.

        max_t acts[t, j] | mean_t acts[t, j] | sum_t acts[t, j] | acts[t*, j], t* = last token

    over the tokens t of a row. A token in which latent j is silent counts as 0: in the mean, and
    when it is the last one.

    Args:
        codes: activations of the tokens, [n, d_sae].
        row_id: [n] the row of each token, in any order.
        position: [n] place of each token in its row.
    Raises:
        UserError: the pooling is unknown, or the lengths differ.
    """
    if pooling not in POOLINGS:
        raise UserError(f"Expected a pooling of {POOLINGS}, got {pooling!r}.")
    if not codes.n == len(row_id) == len(position):
        raise UserError(
            f"Expected one row_id and one position for each of {codes.n} tokens, "
            f"got {len(row_id)} and {len(position)}."
        )
    ids, places = row_id.cpu().numpy(), position.cpu().numpy().astype(np.int64)
    ones = np.ones(len(ids), dtype=np.int64)
    return _pooled(pooling, ids, ones, places, codes.to_scipy())


def _pooled(
    pooling: str,
    row_id: Int[np.ndarray, " m"],
    n_tokens: Int[np.ndarray, " m"],
    position: Int[np.ndarray, " m"],
    acts: sparse.csr_array,
) -> PooledRows:
    """Pool m pieces (tokens, or pools of tokens) that share row ids into one piece per row."""
    ids, row = np.unique(row_id, return_inverse=True)
    last = np.full(len(ids), -1, dtype=np.int64)
    np.maximum.at(last, row, position)
    count = np.zeros(len(ids), dtype=np.int64)
    np.add.at(count, row, n_tokens)

    adds = pooling in ("mean", "sum")
    d_sae = shape_of(acts)[1]
    key = np.repeat(row, np.diff(acts.indptr)) * d_sae + acts.indices
    data = acts.data.astype(np.float64 if adds else np.float32, copy=False)
    if pooling == "last":
        kept = np.repeat(position == last[row], np.diff(acts.indptr))
        key, data = key[kept], data[kept]
    order = np.argsort(key, kind="stable")
    key = key[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    if len(starts):
        data = (np.add if adds else np.maximum).reduceat(data[order], starts)
    rows, columns = np.divmod(key[starts], d_sae)
    indptr = np.searchsorted(rows, np.arange(len(ids) + 1))
    pools = sparse.csr_array((data, columns, indptr), shape=(len(ids), d_sae))
    return PooledRows(pooling, ids, count, last, pools)


def _merged(parts: Sequence[PooledRows]) -> PooledRows:
    kinds = {(part.pooling, shape_of(part.acts)[1]) for part in parts}
    if len(kinds) > 1:
        raise UserError(f"Expected pools of one kind and one d_sae, got {sorted(kinds)}.")
    return _pooled(
        parts[0].pooling,
        np.concatenate([part.row_id for part in parts]),
        np.concatenate([part.n_tokens for part in parts]),
        np.concatenate([part.last for part in parts]),
        sparse.csr_array(sparse.vstack([part.acts for part in parts], format="csr")),
    )


class RowPooler:
    """Streaming pool: update with batches, merge with other poolers, compute once at the end."""

    def __init__(self, d_sae: int, pooling: str) -> None:
        none = np.empty(0, dtype=np.int64)
        empty = sparse.csr_array((0, d_sae), dtype=np.float32)
        self._parts = [_pooled(pooling, none, none, none, empty)]
        self._waiting = 0

    def update(self, codes: Codes, row_id: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> None:
        """Add the tokens of one batch; see :func:`pool_tokens`."""
        self._add(pool_tokens(codes, row_id, position, self._parts[0].pooling))

    def merge(self, other: "RowPooler") -> None:
        """Add the tokens that another pooler has seen."""
        self._add(other._pool())

    def compute(
        self, row_ids: Int[np.ndarray, " n_rows"]
    ) -> tuple[sparse.csr_array, Int[np.ndarray, " n_rows"]]:
        """The pooled activations of the rows asked for, in that order.

        Returns:
            acts [n_rows, d_sae] float32 in canonical CSR, and n_tokens [n_rows] int32; a row
            without tokens has an empty code and 0.
        Raises:
            UserError: a row id is asked for twice, or a pooled row is not asked for.
        """
        pools = self._pool()
        order = np.argsort(row_ids, kind="stable")
        place = np.searchsorted(row_ids, pools.row_id, sorter=order)
        found = place < len(order)
        found[found] = row_ids[order[place[found]]] == pools.row_id[found]
        if not found.all():
            raise UserError(
                f"Expected tokens of the {len(order)} rows given, "
                f"got row_id {pools.row_id[~found][0]}."
            )
        if (np.diff(row_ids[order]) == 0).any():
            double = row_ids[order][1:][np.diff(row_ids[order]) == 0][0]
            raise UserError(f"Expected every row_id once, got {double} more than once.")
        to = order[place]
        n_tokens = np.zeros(len(row_ids), dtype=np.int32)
        n_tokens[to] = pools.n_tokens
        data = pools.acts.data
        if pools.pooling == "mean":
            data = data / np.repeat(pools.n_tokens, np.diff(pools.acts.indptr))
        acts = _placed(pools.acts, data, to, len(row_ids))
        return acts, n_tokens

    def _add(self, part: PooledRows) -> None:
        self._parts.append(part)
        self._waiting += part.acts.nnz + len(part.row_id)
        # Pooling again only when as much waits as is pooled keeps the memory within twice the
        # result and the work within a logarithm of the stream.
        if self._waiting > max(_COMPACT_AFTER, self._parts[0].acts.nnz):
            self._pool()

    def _pool(self) -> PooledRows:
        if len(self._parts) > 1:
            self._parts = [_merged(self._parts)]
        self._waiting = 0
        return self._parts[0]


def _placed(
    acts: sparse.csr_array, data: np.ndarray, to: Int[np.ndarray, " r"], n_rows: int
) -> sparse.csr_array:
    """Rows of acts, with other values, at the places ``to`` among n_rows; what is 0 is left out."""
    row = np.repeat(to, np.diff(acts.indptr))
    data = data.astype(np.float32)
    kept = data != 0  # a mean may be too small for float32
    coo = (data[kept], (row[kept], acts.indices[kept]))
    placed = sparse.csr_array(coo, shape=(n_rows, shape_of(acts)[1]))
    placed.sort_indices()
    # scipy keeps the 64-bit places it is given: a third of the bytes that every reader then moves
    if max(placed.nnz, *shape_of(placed)) <= np.iinfo(np.int32).max:
        placed.indices = placed.indices.astype(np.int32)
        placed.indptr = placed.indptr.astype(np.int32)
    return placed
