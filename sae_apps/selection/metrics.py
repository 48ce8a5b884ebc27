"""The metrics as functions of one sum over a pair of codes and of the norms of both.

jaccard = m / (|a|_1 + |b|_1 - m),  m = sum_k min(a_k, b_k)     (MONA, arXiv 2503.15573, equation 9)
cosine  = a.b / (|a| |b|)
l2      = -|a - b| = -sqrt(|a|^2 + |b|^2 - 2 a.b)
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

METRICS = ("jaccard", "cosine", "l2")
EQUAL = 1e-13  # of |a|^2 + |b|^2: what rounding leaves of the squared distance of equal codes
Measure = Literal["minimum", "product"]


def measure_of(metric: str) -> Measure:
    """What a metric sums over the nonzeros."""
    return "minimum" if metric == "jaccard" else "product"


def vector_norms(vectors: Float[np.ndarray, "p d_sae"], metric: str) -> Float[np.ndarray, "p"]:
    """|b|_1 for the Jaccard, |b|^2 for the others, in float64."""
    wide = vectors.astype(np.float64)
    return (wide if metric == "jaccard" else wide**2).sum(axis=1)


def similarity_of(sums: np.ndarray, left: np.ndarray, right: np.ndarray, metric: str) -> np.ndarray:
    """The score from the sum over a pair and the norms of both sides, all float64, broadcast.

    The squared distance |a|^2 + |b|^2 - 2 a.b loses digits where a and b are close. With exact
    products summed in float64 up to 1e-13 of |a|^2 + |b|^2 may be rounding (n / 2^53 for n = 1,000
    nonzeros); what lies below is given as 0, so that a code is at distance 0 from itself.
    """
    if metric == "l2":
        square = left + right - 2 * sums
        return -np.sqrt(np.where(square > EQUAL * (left + right), square, 0.0)) + 0.0  # no -0.0
    below = left + right - sums if metric == "jaccard" else np.sqrt(left * right)
    return np.divide(sums, below, out=np.zeros(np.broadcast(sums, below).shape), where=below > 0)
