"""Exact scores for the candidates that can still be among the k best, not for all.

FAISS hands over the candidates of a query with an approximate similarity g each (inner product of
embeddings, or minus the Hamming distance of codes), best first. The exact Jaccard J costs a pass
over the candidate's row, so it is taken in two steps. First of the PROBE nearest by g and of SPREAD
more at equal steps through the rest, which give for every query a line

    J ~ a + b g,   a bar, the k-th best J so far, and residuals e = J - (a + b g);

then of the candidates with a + b g + m >= bar, where m is the (1 - MISS) quantile of the residuals
of all queries of the block. What is passed over here and ought to have been found lowers the recall
that the index measures, like what FAISS passes over. The rule is ours, from no source.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64
from scipy import sparse

from sae_apps.selection.rerank import Part, best, exact_scores

PROBE, SPREAD = 64, 32
MISS = 1e-3


class Found(NamedTuple):
    """The best candidates of every query, and how many were scored for it."""

    rows: Int64[np.ndarray, "q k"]
    scores: Float32[np.ndarray, "q k"]
    n_scored: int
    """Over all queries."""


def rerank(
    parts: Sequence[Part],
    queries: sparse.csr_array,
    rows: Int64[np.ndarray, "q c"],
    near: Float32[np.ndarray, "q c"],
    k: int,
) -> Found:
    """The k best candidates of every query by exact Jaccard.

    Args:
        parts: all rows.
        queries: canonical CSR.
        rows: candidates, by falling similarity along each line; -1 where there are fewer.
        near: approximate similarities of the same.
    """
    chosen = probes(rows.shape[1], k)
    first = np.sort(rows[:, chosen], axis=1)
    order = np.argsort(rows[:, chosen], axis=1, kind="stable")
    scores = exact_scores(parts, queries, first)
    rest = np.setdiff1d(np.arange(rows.shape[1]), chosen)
    if len(rest):
        known = np.take_along_axis(near[:, chosen], order, 1)
        kept = plausible(first, known, scores, near[:, rest], k)
        second = np.sort(np.where(kept, rows[:, rest], -1), axis=1)
        second = second[:, (second < 0).all(axis=0).sum() :]
        first = np.concatenate([first, second], axis=1)
        scores = np.concatenate([scores, exact_scores(parts, queries, second)], axis=1)
    return Found(*best(first, scores, k), int((first >= 0).sum()))


def probes(n: int, k: int) -> Int64[np.ndarray, " p"]:
    """Places among n candidates that are scored first; all where few would be left."""
    head = max(PROBE, 4 * k)
    if n <= 2 * (head + SPREAD):
        return np.arange(n)
    return np.concatenate([np.arange(head), np.linspace(head, n - 1, SPREAD).astype(np.int64)])


def plausible(
    rows: Int64[np.ndarray, "q p"],
    near: Float32[np.ndarray, "q p"],
    scores: Float32[np.ndarray, "q p"],
    rest: Float32[np.ndarray, "q r"],
    k: int,
) -> Bool[np.ndarray, "q r"]:
    """Which of the other candidates may reach the k-th best score of the probes.

    Args:
        rows: probes; -1 is none.
        near: their approximate similarities.
        scores: their exact scores.
        rest: approximate similarities of the others.
    """
    is_there = rows >= 0
    n = np.maximum(is_there.sum(axis=1, keepdims=True), 1)
    x, y = np.where(is_there, near, 0).astype(np.float64), np.where(is_there, scores, 0)
    x_mean, y_mean = x.sum(1, keepdims=True) / n, y.sum(1, keepdims=True, dtype=np.float64) / n
    dx, dy = np.where(is_there, x - x_mean, 0), np.where(is_there, y - y_mean, 0)
    spread = (dx * dx).sum(1, keepdims=True)
    slope = np.divide((dx * dy).sum(1, keepdims=True), spread, out=spread * 0, where=spread > 0)
    residuals = (dy - slope * dx)[is_there]
    margin = np.quantile(residuals, 1 - MISS) if len(residuals) else 0.0
    bar = np.sort(np.where(is_there, scores, -1), axis=1)[:, [-k]]
    reach = (bar - y_mean - margin).astype(np.float32)
    return slope.astype(np.float32) * (rest - x_mean.astype(np.float32)) >= reach
