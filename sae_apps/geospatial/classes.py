"""Class breaks for maps of a value: natural breaks and quantiles.

Natural breaks are the classes of least within-class sum of squares (Fisher, JASA 53, 1958; in
cartography after Jenks), found by dynamic programming over the sorted values.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float

from sae_core.errors import UserError

Scheme = Literal["natural", "quantiles", "continuous"]

MOST_VALUES = 512  # distinct values up to which natural breaks are exact; above, means of runs


def class_breaks(
    values: Float[np.ndarray, " n"], n_classes: int, scheme: Scheme
) -> Float[np.ndarray, " k_plus_1"]:
    """Ascending edges of at most ``n_classes`` classes, from the least value to the largest.

    A class holds lower < value <= upper, the first one its lower edge too. Fewer classes come back
    where there are fewer distinct values, and a single distinct value v gives [v, v].

    Args:
        values: [n] finite, n at least 1.
        n_classes: at least 1.
        scheme: "natural" or "quantiles"; "continuous" has no classes and gives the two ends.
    Raises:
        UserError: no values, no classes, or an unknown scheme.
    """
    values = np.sort(np.asarray(values, dtype=np.float64))
    if values.size == 0 or n_classes < 1:
        raise UserError(
            f"Expected at least one value and one class, got {values.size} values and "
            f"{n_classes} classes."
        )
    if scheme == "continuous":
        return values[[0, -1]]
    if scheme == "quantiles":
        upper = np.quantile(values, np.arange(1, n_classes + 1) / n_classes, method="inverted_cdf")
    elif scheme == "natural":
        upper = _natural(values, n_classes)
    else:
        raise UserError(
            f"Expected the scheme 'natural', 'quantiles' or 'continuous', got {scheme!r}."
        )
    return np.concatenate([values[:1], np.unique(upper)])


def classify(values: Float[np.ndarray, " n"], breaks: Float[np.ndarray, " k_plus_1"]) -> np.ndarray:
    """The class of each value, from 0."""
    return np.searchsorted(breaks[1:-1], values, side="left")


def _natural(values: Float[np.ndarray, " n"], n_classes: int) -> Float[np.ndarray, " k"]:
    """Upper edges of the classes of least within-class sum of squares."""
    level, weight = np.unique(values, return_counts=True)
    last = np.arange(len(level))  # of each run of levels, the place of its largest
    total = level * weight
    square = level**2 * weight
    if len(level) > MOST_VALUES:
        starts = np.unique(np.linspace(0, len(level), MOST_VALUES + 1)[:-1].astype(np.int64))
        weight, total, square = (np.add.reduceat(x, starts) for x in (weight, total, square))
        last = np.append(starts[1:], len(level)) - 1
    m, k = len(last), min(n_classes, len(last))
    sums = [np.concatenate([[0.0], np.cumsum(x)]) for x in (weight, total, square)]
    count, first, second = (x[None, 1:] - x[:-1, None] for x in sums)  # [start, end]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(np.tri(m, k=-1, dtype=bool), np.inf, second - first**2 / count)
    best, origin = cost[0].copy(), np.zeros((k, m), dtype=np.int64)
    for j in range(1, k):
        paths = best[:-1, None] + cost[1:]  # the last class starts at i + 1
        origin[j] = paths.argmin(axis=0) + 1
        best = paths.min(axis=0)
    edges, end = [], m - 1
    for j in range(k - 1, -1, -1):
        edges.append(level[last[end]])
        end = origin[j, end] - 1
    return np.array(edges[::-1])
