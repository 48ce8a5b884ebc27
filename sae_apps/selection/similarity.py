"""Similarity of sparse codes with prototypes: generalised Jaccard, cosine, Euclidean; exact.

J(a, b) = sum_k min(a_k, b_k) / sum_k max(a_k, b_k)           (MONA, arXiv 2503.15573, equation 9)
        = m / (|a|_1 + |b|_1 - m)   with   m = sum_k min(a_k, b_k),

because min + max = a + b. For non-negative codes m runs over the nonzeros of a alone, so a score
costs one pass over the stored entries, whatever the width. Cosine and distance come from the same
pass with products in place of minima. Two empty codes have no Jaccard and no cosine: the score is 0
there (the paper leaves it open).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse

from sae_apps.selection import kernels, neighbours
from sae_apps.selection.metrics import METRICS, measure_of, similarity_of, vector_norms
from sae_core.errors import UserError
from sae_core.features import shape_of

Vector = Float[np.ndarray, "d_sae"]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The rows most similar to each query, the best first; equal scores by row."""

    index: Int64[np.ndarray, "q k"]
    """Rows; -1 where there are fewer than k."""
    score: Float32[np.ndarray, "q k"]
    """As ``score`` gives them; 0 where there is no row."""


class Share(NamedTuple):
    """Why a row is similar to a prototype: its latents, the largest share first."""

    latents: Int[np.ndarray, "k"]
    """Latents active in both; equal shares in ascending order of latent."""
    shares: Float[np.ndarray, "k"]
    """Part of the numerator of the score that each brings; over all latents they sum to 1."""


NOTHING = Share(np.empty(0, dtype=np.int64), np.empty(0))


def score(
    acts: sparse.csr_array,
    prototypes: Float[np.ndarray, "p d_sae"],
    metric: str = "jaccard",
    *,
    weights: Vector | None = None,
    device: str | torch.device | None = None,
) -> Float32[np.ndarray, "n p"]:
    """Exact similarity of every row with every prototype, larger is more similar.

    ``jaccard`` as above; ``cosine`` = a.b / (|a| |b|); ``l2`` = -|a - b|. Weights multiply both
    sides first, so ``idf`` gives the weighted Jaccard.

    Args:
        acts: [n, d_sae] float32 in canonical CSR, non-negative, finite.
        prototypes: one a line, non-negative, finite.
        metric: one of METRICS.
        weights: non-negative factors of the latents; None for ones.
        device: torch device to compute on; None takes the CPU, in compiled loops where numba is
            installed.
    Raises:
        UserError: the widths differ, the metric is unknown, or a value is negative or not finite.
    """
    factors, vectors = _prepared(acts, prototypes, metric, weights)
    norms = vector_norms(vectors, metric)
    out = np.empty((shape_of(acts)[0], len(vectors)), dtype=np.float32)
    for block in kernels.row_sums(acts, vectors, measure_of(metric), factors, device):
        out[block.rows, block.columns] = similarity_of(
            block.sums, block.norms[:, None], norms[block.columns], metric
        )
    return out


def nearest(
    acts: sparse.csr_array,
    queries: sparse.csr_array,
    k: int,
    metric: str = "jaccard",
    *,
    weights: Vector | None = None,
    device: str | torch.device | None = None,
) -> Neighbours:
    """The k rows most similar to each query, exactly: every pair is looked at.

    Blocks of queries pass over the rows with a running list each, so memory is that of the result
    and of one block of dense queries a thread (128 x d_sae float32), never n x q.

    Args:
        acts: rows to search, as in ``score``.
        queries: rows to search for, [q, d_sae], of the same kind.
        k: neighbours of each query.
        metric: one of METRICS.
        weights: as in ``score``.
        device: as in ``score``.
    Raises:
        UserError: as ``score``; k is below 1.
    """
    if k < 1:
        raise UserError(f"Expected at least 1 neighbour, got {k}.")
    factors = _factors(acts, metric, weights)
    _check_queries(queries, shape_of(acts)[1])
    n_queries = shape_of(queries)[0]
    index = np.full((n_queries, k), -1, dtype=np.int64)
    found = np.zeros((n_queries, k), dtype=np.float32)
    for block, scores, rows in neighbours.search(acts, queries, k, metric, factors, device):
        best = np.lexsort((rows, -scores))[:, :k]  # of several stripes, the empty places last
        scores, rows = (np.take_along_axis(a, best, axis=1) for a in (scores, rows))
        index[block], found[block] = rows, np.where(rows < 0, 0, scores)
    return Neighbours(index, found)


def explain(
    acts: sparse.csr_array,
    prototype: Vector,
    metric: str = "jaccard",
    *,
    weights: Vector | None = None,
    top: int = 5,
) -> list[Share]:
    """The latents that make each row similar: the parts of the numerator, which is a sum.

    Jaccard: min(a_k, b_k) / sum_j min(a_j, b_j); cosine: a_k b_k / sum_j a_j b_j. A row that shares
    no latent with the prototype has an empty explanation.

    Args:
        acts: the rows to explain, usually the picks.
        prototype: what they were compared with.
        metric: jaccard or cosine; a distance is no such sum.
        weights: as given to ``score``.
        top: at most so many latents a row.
    Raises:
        UserError: as ``score``; the metric is l2; top is below 1.
    """
    factors, vectors = _prepared(acts, np.asarray(prototype)[None], metric, weights)
    if metric == "l2":
        raise UserError("Expected metric 'jaccard' or 'cosine' to explain, got 'l2'.")
    if top < 1:
        raise UserError(f"Expected at least 1 latent per explanation, got {top}.")
    if message := kernels.complaint(acts):
        raise UserError(message)
    return [_share(acts, i, vectors[0], metric, factors, top) for i in range(shape_of(acts)[0])]


def _share(
    acts: sparse.csr_array, row: int, vector: Vector, metric: str, factors: Vector | None, top: int
) -> Share:
    span = slice(acts.indptr[row], acts.indptr[row + 1])
    latents = acts.indices[span].astype(np.int64)
    values = acts.data[span] if factors is None else acts.data[span] * factors[latents]
    ours, theirs = values.astype(np.float64), vector[latents].astype(np.float64)
    parts = np.minimum(ours, theirs) if metric == "jaccard" else ours * theirs
    order = np.argsort(-parts, kind="stable")[:top]
    order = order[parts[order] > 0]
    return Share(latents[order], parts[order] / max(parts.sum(), np.finfo(float).tiny))


def idf(df: Int[np.ndarray, "d_sae"], n_rows: int) -> Float[np.ndarray, "d_sae"]:
    """log((N + 1) / (df_k + 1)): the weight of a latent that df_k of N rows activate.

    It is 0 for a latent active in every row, which says nothing about a row.

    Raises:
        UserError: a count is negative or above n_rows.
    """
    if len(df) and not 0 <= df.min() <= df.max() <= n_rows:
        raise UserError(f"Expected counts between 0 and {n_rows}, got {df.min()} to {df.max()}.")
    return np.log((n_rows + 1) / (df + 1.0))


def _prepared(
    acts: sparse.csr_array,
    vectors: Float[np.ndarray, "p d_sae"],
    metric: str,
    weights: Vector | None,
) -> tuple[Vector | None, Float[np.ndarray, "p d_sae"]]:
    """Weights and weighted vectors in float32, after checks."""
    factors = _factors(acts, metric, weights)
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] != shape_of(acts)[1]:
        raise UserError(
            f"Expected prototypes of width {shape_of(acts)[1]} as the activations, one a line, "
            f"got the shape {vectors.shape}."
        )
    _check_values(vectors, "prototypes")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    return factors, vectors if factors is None else vectors * factors


def _factors(acts: sparse.csr_array, metric: str, weights: Vector | None) -> Vector | None:
    """The weights in float32, after checks of the metric and of the matrix's frame."""
    if metric not in METRICS:
        raise UserError(f"Expected a metric of {METRICS}, got {metric!r}.")
    kernels.check_pointers(acts)
    if weights is None:
        return None
    weights, d_sae = np.asarray(weights), shape_of(acts)[1]
    if weights.shape != (d_sae,):
        raise UserError(f"Expected {d_sae} weights, got the shape {weights.shape}.")
    _check_values(weights, "weights")
    return np.ascontiguousarray(weights, dtype=np.float32)


def _check_queries(queries: sparse.csr_array, d_sae: int) -> None:
    kernels.check_pointers(queries)
    if shape_of(queries)[1] != d_sae:
        raise UserError(
            f"Expected queries of width {d_sae} as the activations, got {shape_of(queries)[1]}."
        )
    if message := kernels.complaint(queries):
        raise UserError(message)


def _check_values(values: np.ndarray, what: str) -> None:
    good = np.isfinite(values) & (values >= 0)
    if not good.all():
        raise UserError(f"Expected finite {what} of at least 0, got {values[~good].flat[0]}.")
