"""Steps and metrics of the selection suite: what is done to codes, and how they are compared."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy import sparse
from scipy.linalg import cholesky, solve_triangular

from sae_apps.selection.similarity import score
from sae_core.errors import UserError

Block = Float[np.ndarray, "n d"]
Step = Callable[[Any], Any]

BLOCK = 4096  # rows made dense at a time: 75 MB at 4,608 latents


def dense(matrix: Any, places: Int[np.ndarray, " n"]) -> Block:
    """Rows of a dense or sparse matrix, dense float32."""
    rows = matrix[places]
    return np.asarray(rows.toarray() if sparse.issparse(rows) else rows, dtype=np.float32)


def fit_step(name: str, blocks: Callable[[], Iterator[Block]]) -> Step:
    """A function of row blocks, fitted on the pool.

    idf           x_j log((N + 1) / (df_j + 1)), df_j rows with x_j > 0
    idf2          the same, squared weight
    centre        x - mean of the pool
    standardise   x_j / standard deviation of x_j
    whiten:S      (x - mean) L^(-T), L L^T = C + S tr(C) / d, C the pool's covariance; then `dot`
                  with a prototype is the linear discriminant of target against pool
    l1, unit      rows to sum 1, to Euclidean length 1
    excess        max(x - mean of the pool, 0)
    power:P       x_j^P; sqrt is power:0.5
    binary        1 where x_j > 0
    split         [max(x, 0), max(-x, 0)]: signed features for a metric that wants none
    topN          the N largest x_j of a row

    Raises:
        UserError: no such step.
    """
    if name in ("idf", "idf2"):
        df, n = _summed(blocks, lambda x: (x > 0).sum(0))
        weight = np.log((n + 1) / (df + 1)).astype(np.float32) ** (2 if name == "idf2" else 1)
        return lambda x: x * weight
    if name == "centre":
        mean = pool_mean(blocks)
        return lambda x: x - mean
    if name == "standardise":
        mean = pool_mean(blocks)
        square, n = _summed(blocks, lambda x: np.square(x - mean, dtype=np.float64).sum(0))
        spread = np.sqrt(square / n)
        inverse = np.where(spread > 0, 1 / np.maximum(spread, 1e-12), 0).astype(np.float32)
        return lambda x: x * inverse
    if name.startswith("whiten:"):
        return _whitening(blocks, float(name.partition(":")[2]))
    if name == "l1":
        return lambda x: x / np.maximum(np.abs(x).sum(1, keepdims=True), 1e-12)
    if name == "unit":
        return unit
    if name == "excess":
        mean = pool_mean(blocks)
        return lambda x: np.maximum(x - mean, 0)
    if name == "sqrt":
        return np.sqrt
    if name.startswith("power:"):
        power = float(name.partition(":")[2])
        return lambda x: x**power
    if name == "binary":
        return lambda x: (x > 0).astype(np.float32)
    if name == "split":
        return lambda x: np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], axis=1)
    if name.startswith("top") and name[3:].isdigit():
        return lambda x: _largest(x, int(name[3:]))
    raise UserError(f"Expected a step that fit_step lists, got {name!r}.")


def unit(x: Block) -> Block:
    """Rows at Euclidean length 1; rows of zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _summed(
    blocks: Callable[[], Iterator[Block]], function: Callable[[Block], Any]
) -> tuple[Float[np.ndarray, " d"], int]:
    """(sum of a function over the pool's blocks, rows of the pool)."""
    total, n = None, 0
    for block in blocks():
        part = np.asarray(function(block), dtype=np.float64)
        total = part if total is None else total + part
        n += len(block)
    if total is None:
        raise UserError("Expected a pool with rows, got none.")
    return total, n


def pool_mean(blocks: Callable[[], Iterator[Block]]) -> Float32[np.ndarray, " d"]:
    """Mean row of the pool."""
    total, n = _summed(blocks, lambda x: x.sum(0, dtype=np.float64))
    return (total / n).astype(np.float32)


def _whitening(blocks: Callable[[], Iterator[Block]], shrinkage: float) -> Step:
    mean = pool_mean(blocks)
    total, n = _summed(blocks, lambda x: (x - mean).T @ (x - mean))
    covariance = total / n
    covariance[np.diag_indices_from(covariance)] += max(
        shrinkage * float(np.trace(covariance)) / len(covariance), 1e-12
    )
    lower = cholesky(covariance, lower=True, overwrite_a=True)
    inverse = solve_triangular(lower, np.eye(len(lower)), lower=True).T.astype(np.float32)
    return lambda x: (x - mean) @ inverse


def _largest(x: Block, n: int) -> Block:
    if n >= x.shape[1]:
        return x
    bound = np.partition(x, -n, axis=1)[:, -n, None]
    return np.where(x >= bound, x, 0)


def cosine(x: Block, prototypes: Block, mean: Any = None) -> Block:
    """x.p / |x||p|."""
    return unit(x) @ unit(prototypes).T


def dot(x: Block, prototypes: Block, mean: Any = None) -> Block:
    """x.p"""
    return x @ prototypes.T


def l2(x: Block, prototypes: Block, mean: Any = None) -> Block:
    """Minus the squared Euclidean distance."""
    squares = np.square(x).sum(1)[:, None] + np.square(prototypes).sum(1)[None, :]
    return 2 * (x @ prototypes.T) - squares


def jaccard(x: Block, prototypes: Block, mean: Any = None) -> Block:
    """Generalised Jaccard, sum min / sum max: MONA eq. 9, as the application computes it.

    Raises:
        UserError: negative features.
    """
    return score(sparse.csr_array(x), prototypes, "jaccard")


def log_odds(x: Block, prototypes: Block, mean: Any) -> Block:
    """sum_j x_j log((p_j + m_j) / 2 m_j), m the pool's mean: DSIR's weight, half smoothed."""
    mean = np.maximum(mean, 1e-12)
    return x @ np.log((prototypes + mean) / (2 * mean)).T


METRICS = {"cosine": cosine, "dot": dot, "l2": l2, "jaccard": jaccard, "log_odds": log_odds}
