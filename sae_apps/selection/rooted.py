"""Centred cosine of fourth roots: which latents a row has, rather than how loud they are.

    r_i = z_i^(1/4) / |z_i^(1/4)|          element by element; unit length
    score(i, p) = cos(r_i - m, p - m)      m the mean of r over the pool, p a mean of target r's

The root flattens the few large activations that rule a mean-pooled code: what a text is about shows
in which latents fire at all, and exponents from 1/2 down to 0 (presence alone) select better than
1. Subtracting the pool's mean takes out what all texts share. Both were measured, each on its own
(benchmarks/selection.py and benchmarks/LOG.md); the measure is this project's. With the square
root r.p would be the Bhattacharyya coefficient of two codes.

Only nonzeros are touched: (r - m).(p - m) = r.p - r.m - m.p + |m|^2 and |r - m|^2 = 1 - 2 r.m +
|m|^2. A row without an active latent scores 0.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Float32, Float64
from scipy import sparse

from sae_apps.selection import similarity
from sae_apps.selection.similarity import Share
from sae_core.errors import UserError
from sae_core.features import shape_of

POWER = 0.25


def rooted(acts: sparse.csr_array) -> sparse.csr_array:
    """Rows r: fourth roots, scaled to unit length; empty rows stay empty.

    Args:
        acts: [n, d_sae] float32 in canonical CSR, positive.
    """
    data = acts.data.astype(np.float64) ** POWER
    row = np.repeat(np.arange(shape_of(acts)[0]), np.diff(acts.indptr))
    norms = np.sqrt(np.bincount(row, data**2, minlength=shape_of(acts)[0]))
    data = (data / norms[row]).astype(np.float32)
    return sparse.csr_array((data, acts.indices, acts.indptr), shape=acts.shape)


def mean_of(shards: Iterable[sparse.csr_array]) -> Float32[np.ndarray, "d_sae"]:
    """The mean of r over all rows of a pool, in one pass; empty rows count as 0.

    Raises:
        UserError: no rows.
    """
    total: np.ndarray | None = None  # [d_sae] float64
    n = 0
    for acts in shards:
        r = rooted(acts)
        part = np.bincount(r.indices, r.data, minlength=shape_of(r)[1])
        total = part if total is None else total + part
        n += shape_of(r)[0]
    if total is None or n == 0:
        raise UserError("Expected at least one row to take the mean of, got none.")
    return (total / n).astype(np.float32)


def score(
    acts: sparse.csr_array,
    prototypes: Float[np.ndarray, "p d_sae"],
    centre: Float[np.ndarray, "d_sae"],
) -> Float32[np.ndarray, "n p"]:
    """Centred cosine of every row with every prototype, in [-1, 1].

    Args:
        acts: pooled codes, [n, d_sae] float32 in canonical CSR.
        prototypes: rows r, or means of them, not centred.
        centre: m, from ``mean_of``.
    Raises:
        UserError: the widths differ, or a value is negative or not finite.
    """
    r = rooted(acts)
    vectors = np.vstack([centre[None], prototypes]).astype(np.float32)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    # |r| = 1, so a cosine times the vector's length is the product
    products = similarity.score(r, vectors, "cosine").astype(np.float64) * lengths
    with_centre, products = products[:, :1], products[:, 1:]
    m, p = vectors[0].astype(np.float64), vectors[1:].astype(np.float64)
    above = products - with_centre - p @ m + m @ m
    left = np.maximum(1 - 2 * with_centre + m @ m, 0.0)
    right = ((p - m) ** 2).sum(axis=1)
    below = np.sqrt(left * right)
    found = np.divide(above, below, out=np.zeros(above.shape), where=below > 0)
    found[np.diff(r.indptr) == 0] = 0.0
    return found.astype(np.float32)


def directions(
    prototypes: Float[np.ndarray, "p d_sae"], centre: Float[np.ndarray, "d_sae"]
) -> Float64[np.ndarray, "p d_sae"]:
    """(p - m) / |p - m|: a score is the product of a row's own direction with one of these."""
    aims = prototypes.astype(np.float64) - centre
    norms = np.linalg.norm(aims, axis=1, keepdims=True)
    return np.divide(aims, norms, out=np.zeros_like(aims), where=norms > 0)


def explain(
    acts: sparse.csr_array,
    aims: Float[np.ndarray, "n d_sae"],
    centre: Float[np.ndarray, "d_sae"],
    *,
    top: int = 5,
) -> list[Share]:
    """The active latents that make each row similar: the parts (r_k - m_k) a_k of (r - m).a.

    With a the direction of a prototype, or the mean of several, the parts sum to the score (or the
    mean of the scores) times |r - m|. A latent that the row lacks has a part as well: it may be
    usual in the pool and rare among the targets. Shares are of the sum of all positive parts, so
    those of the active latents need not sum to 1.

    Args:
        acts: the rows to explain.
        aims: for each row what it was compared with, of ``directions``.
        centre: m.
        top: at most so many latents a row.
    """
    r = rooted(acts)
    found = []
    for i, aim in enumerate(aims.astype(np.float64)):
        span = slice(r.indptr[i], r.indptr[i + 1])
        latents = r.indices[span].astype(np.int64)
        parts = -centre.astype(np.float64) * aim
        parts[latents] += r.data[span] * aim[latents]
        whole = np.maximum(parts, 0).sum()
        order = np.argsort(-parts[latents], kind="stable")[:top]
        chosen = latents[order[parts[latents[order]] > 0]]
        found.append(Share(chosen, parts[chosen] / max(whole, np.finfo(float).tiny)))
    return found
