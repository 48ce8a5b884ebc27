"""Exact scores of candidates, and how many of the true neighbours were among them.

The rows lie in parts, in memory or mapped from files, so that one part at a time is read. Recall
of a query is the share of its k results that score at least as much as the k-th best row of all.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from scipy import sparse

from sae_apps.selection import kernels
from sae_apps.selection.similarity import score
from sae_core.extras import require
from sae_core.features import shape_of
from sae_core.untrusted import map_array

_ARRAYS = ("indptr", "indices", "data")
_TASK_QUERIES = 16
_EXACT_QUERIES = 32


class Part(NamedTuple):
    """Rows as canonical CSR, the arrays in memory or mapped from files."""

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    @classmethod
    def of(cls, acts: sparse.csr_array) -> "Part":
        """The arrays of a matrix."""
        return cls(acts.indptr, acts.indices.astype(np.int32, copy=False), acts.data)

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    def matrix(self, d_sae: int) -> sparse.csr_array:
        """As scipy's matrix, without a copy."""
        return sparse.csr_array(
            (self.data, self.indices, self.indptr), shape=(self.n_rows, d_sae), copy=False
        )

    def save(self, folder: Path, number: int) -> None:
        """Three files into a folder."""
        for name, array in zip(_ARRAYS, self, strict=True):
            np.save(folder / f"part-{number:05d}-{name}.npy", array)

    def forget(self) -> None:
        """Give mapped pages back; they are read again, mostly from the system's cache, when used.

        Without this the resident memory of a pass grows to the size of all rows.
        """
        for array in self:
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    @classmethod
    def open(cls, folder: Path, number: int) -> "Part":
        """Mapped from the files of ``save``: read when used, and by as many processes as wish."""
        return cls(
            *(map_array(folder / f"part-{number:05d}-{name}.npy") for name in _ARRAYS)
        )


class Recall(NamedTuple):
    """Share of the exact neighbours that a search found, from a sample of the queries."""

    value: float
    low: float
    high: float
    """Bounds of the 95% interval."""
    n_queries: int
    """Sampled."""


def exact_scores(
    parts: Sequence[Part],
    queries: sparse.csr_array,
    rows: Int64[np.ndarray, "q c"],
) -> Float32[np.ndarray, "q c"]:
    """Jaccard of every query with its candidates, in one pass over the parts; -1 for row -1.

    Args:
        parts: all rows.
        queries: canonical CSR.
        rows: candidates of each query, ascending along each line.
    """
    require("numba", "cpu")
    from sae_apps.selection.index_loops import score_candidates

    n, d_sae = shape_of(queries)
    out = np.full(rows.shape, -1, dtype=np.float32)
    places = (rows < 0).sum(axis=1)
    tasks = [(start, min(start + _TASK_QUERIES, n)) for start in range(0, n, _TASK_QUERIES)]
    for offset, part in _with_offsets(parts):

        def work(span: tuple[int, int], part: Part = part, offset: int = offset) -> None:
            score_candidates(
                part.indptr, part.indices, part.data, offset,
                queries.indptr, queries.indices, queries.data,
                *span, rows, places, d_sae, out,
            )  # fmt: skip

        for _ in kernels.in_threads(work, tasks):
            pass
    return out


def best(
    rows: Int64[np.ndarray, "q c"], scores: Float32[np.ndarray, "q c"], k: int
) -> tuple[Int64[np.ndarray, "q k"], Float32[np.ndarray, "q k"]]:
    """The k highest scores of each line with their rows; equal scores by row."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def exact_bar(parts: Sequence[Part], queries: sparse.csr_array, k: int) -> Float32[np.ndarray, "q"]:
    """The k-th best score of each query over all rows, exactly."""
    n, d_sae = shape_of(queries)
    bars = []
    for start in range(0, n, _EXACT_QUERIES):
        dense = queries[start : start + _EXACT_QUERIES].toarray()
        top = np.full((len(dense), k), -1, dtype=np.float32)
        for _, part in _with_offsets(parts):
            found = score(part.matrix(d_sae), dense, "jaccard").T
            top = np.partition(np.concatenate([top, found], axis=1), -k, axis=1)[:, -k:]
        bars.append(top.min(axis=1))
    return np.concatenate(bars)


def recall_of(scores: Float32[np.ndarray, "q k"], bars: Float32[np.ndarray, "q"]) -> Recall:
    """Mean recall with its 95% interval.

    A result counts that reaches the bar or the float32 next below it, since the two passes add in
    different orders. The interval is Wilson's for n k / deff independent results: those of one
    query hang together, so deff is the variance of the queries' means over that of independent
    results, between 1 and k (k where all or none were found).
    """
    from scipy.stats import norm

    n, k = scores.shape
    each = (scores >= np.nextafter(bars, np.float32(-np.inf))[:, None]).mean(axis=1)
    p = float(each.mean())
    single = p * (1 - p) / k
    spread = float(each.var(ddof=1)) if n > 1 else 0.0
    deff = min(max(spread / single, 1.0), k) if single > 0 and n > 1 else k
    size = n * k / deff
    z2 = float(norm.ppf(0.975)) ** 2
    centre = (p + z2 / (2 * size)) / (1 + z2 / size)
    half = np.sqrt(z2 * (p * (1 - p) / size + z2 / (4 * size**2))) / (1 + z2 / size)
    low, high = float(centre - half), float(centre + half)
    return Recall(p, max(0.0, min(p, low)), min(1.0, max(p, high)), n)


def sample_rows(
    parts: Iterable[Part], d_sae: int, n: int, generator: np.random.Generator
) -> sparse.csr_array:
    """n rows drawn without replacement from all parts, or all of them where there are fewer.

    A part at a time is read: every row draws a key, and those with the smallest keys stay.
    """
    kept, keys = sparse.csr_array((0, d_sae), dtype=np.float32), np.empty(0)
    for _, part in _with_offsets(parts):
        new = generator.random(part.n_rows)
        few = np.sort(np.argsort(new)[:n])
        both = sparse.vstack([kept, part.matrix(d_sae)[few]], format="csr")
        keys = np.concatenate([keys, new[few]])
        order = np.sort(np.argsort(keys)[:n])
        kept, keys = sparse.csr_array(both)[order], keys[order]
    return sparse.csr_array(kept)


def _with_offsets(parts: Iterable[Part]) -> Iterator[tuple[int, Part]]:
    """Parts with their first rows, in one pass; each is forgotten behind it."""
    offset = 0
    for part in parts:
        yield offset, part
        offset += part.n_rows
        part.forget()


def n_rows_of(parts: Iterable[Part]) -> int:
    """Rows of all parts."""
    return sum(part.n_rows for part in parts)
