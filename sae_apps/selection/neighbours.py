"""Exact search: blocks of queries pass over all rows, each query with a list of its best."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse

from sae_apps.selection import kernels
from sae_apps.selection.metrics import METRICS, measure_of, similarity_of, vector_norms
from sae_core.errors import UserError
from sae_core.features import shape_of

WIDTHS = (32, 128)  # queries of one compiled pass


class Lists(NamedTuple):
    """Candidates of a block of queries; the k best are among them."""

    block: slice
    """Of the queries."""
    scores: Float32[np.ndarray, "q m"]
    """-inf in a place without a row."""
    rows: Int64[np.ndarray, "q m"]
    """-1 in a place without a row."""


def search(
    acts: sparse.csr_array,
    queries: sparse.csr_array,
    k: int,
    metric: str,
    weights: Float[np.ndarray, "d_sae"] | None,
    device: str | torch.device | None,
) -> Iterator[Lists]:
    """Candidates of each block of queries; arguments as in ``similarity.nearest``, checked."""
    if device is None and kernels.has_numba():
        return _compiled(acts, queries, k, metric, weights)
    return _torch(acts, queries, k, metric, weights, device or "cpu")


def _dense(
    queries: sparse.csr_array, block: slice, weights: Float[np.ndarray, "d_sae"] | None
) -> Float32[np.ndarray, "q d_sae"]:
    rows: Any = queries[block]
    return rows.toarray() if weights is None else rows.toarray() * weights


def _compiled(
    acts: sparse.csr_array,
    queries: sparse.csr_array,
    k: int,
    metric: str,
    weights: Float[np.ndarray, "d_sae"] | None,
) -> Iterator[Lists]:
    from sae_apps.selection import compiled
    from sae_apps.selection.jit import MINIMUM, PRODUCT

    n_queries, n_threads = shape_of(queries)[0], kernels.threads()
    width = next((w for w in WIDTHS if w >= n_queries), WIDTHS[-1])
    blocks = [slice(i, min(i + width, n_queries)) for i in range(0, n_queries, width)]
    # few blocks: the rows are cut into stripes as well, so that every thread has work
    n_stripes = 1 if len(blocks) >= 2 * n_threads else -(-2 * n_threads // max(1, len(blocks)))
    stripes = kernels.row_blocks(acts.indptr, max(1, -(-int(acts.indptr[-1]) // n_stripes)))
    code = METRICS.index(metric)
    measure = MINIMUM if metric == "jaccard" else PRODUCT
    loop = compiled.nearest_rows(measure, width)

    def work(task: tuple[slice, tuple[int, int]]) -> Lists:
        block, (start, stop) = task
        dense = _dense(queries, block, weights)
        used = np.flatnonzero(dense.any(axis=0))
        slots = np.full(shape_of(acts)[1], -1, dtype=np.int32)
        slots[used] = np.arange(len(used))
        table = kernels.table_of(dense[:, used], width)
        scores = np.full((len(dense), k), -np.inf, dtype=np.float32)
        rows = np.full((len(dense), k), -1, dtype=np.int64)
        good = loop(
            code, acts.indptr, acts.indices, acts.data, weights, start, stop,
            table, slots, dense, vector_norms(dense, metric), scores, rows,
        )  # fmt: skip
        if not good:
            raise UserError(kernels.complaint(acts) or "Expected finite sums, got others.")
        return Lists(block, scores, rows)

    tasks = [(block, stripe) for block in blocks for stripe in stripes]
    found = kernels.in_threads(work, tasks)
    for _, parts in groupby(found, key=lambda part: part.block.start):
        every = list(parts)
        scores = np.concatenate([part.scores for part in every], axis=1)
        rows = np.concatenate([part.rows for part in every], axis=1)
        yield Lists(every[0].block, scores, rows)


def _torch(
    acts: sparse.csr_array,
    queries: sparse.csr_array,
    k: int,
    metric: str,
    weights: Float[np.ndarray, "d_sae"] | None,
    device: str | torch.device,
) -> Iterator[Lists]:
    for start in range(0, shape_of(queries)[0], kernels.WIDTHS[-1]):
        block = slice(start, min(start + kernels.WIDTHS[-1], shape_of(queries)[0]))
        dense = _dense(queries, block, weights)
        norms = vector_norms(dense, metric)
        scores = np.full((len(dense), k), -np.inf, dtype=np.float32)
        rows = np.full((len(dense), k), -1, dtype=np.int64)
        for part in kernels.row_sums(acts, dense, measure_of(metric), weights, device):
            new = similarity_of(part.sums, part.norms[:, None], norms, metric).T
            scores, rows = _merged(scores, rows, new.astype(np.float32), part.rows.start)
        yield Lists(block, scores, rows)


def _merged(
    scores: Float32[np.ndarray, "q k"],
    rows: Int[np.ndarray, "q k"],
    new: Float32[np.ndarray, "q m"],
    first: int,
) -> tuple[Float32[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """The k best of the lists and of the rows first, first + 1, ...; equal scores by row."""
    places = np.broadcast_to(np.arange(first, first + new.shape[1]), new.shape)
    scores, rows = np.hstack([scores, new]), np.hstack([rows, places])
    k = scores.shape[1] - new.shape[1]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
