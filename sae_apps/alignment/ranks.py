"""Rank correlation of two sets of pairwise distances, plain, permuted and resampled.

    spearman   Pearson correlation of the mid-ranks of the n(n-1)/2 pairs
    tau-a      (concordant - discordant pairs of pairs) / all of them: for many ties

Permuting the labels of the items permutes rows and columns together, so ranks are computed once.
With items drawn w_a times, a pair counts w_a w_b times, and mid-ranks come from running sums of
these weights; pairs of copies of one item never occur among the n(n-1)/2.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from sae_core.errors import UserError

METHODS = ("spearman", "tau-a")


def pairs(distances: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " m"]:
    """Distances of the n(n-1)/2 pairs a < b."""
    return distances[np.triu_indices(len(distances), 1)]


def correlation(
    x: Float[np.ndarray, " m"], y: Float[np.ndarray, " m"], method: str = "spearman"
) -> float:
    """Rank correlation of paired values.

    Raises:
        UserError: unknown method, or values that are all equal.
    """
    if method not in METHODS:
        raise UserError(f"Expected a method of {METHODS}, got {method!r}.")
    for values in (x, y):
        if values.min() == values.max():
            raise UserError("Expected distances that differ, got equal ones for all pairs.")
    if method == "spearman":
        from scipy.stats import rankdata

        return float(np.dot(unit(rankdata(x)), unit(rankdata(y))))
    return _tau_a(x, y)


def unit(values: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Centred, of length 1."""
    centred = values - values.mean()
    return centred / np.sqrt(np.dot(centred, centred))


def _tau_a(x: Float[np.ndarray, " m"], y: Float[np.ndarray, " m"]) -> float:
    """tau-b times sqrt((1 - ties of x)(1 - ties of y)), ties as shares of the pairs of pairs."""
    from scipy.stats import kendalltau

    total = len(x) * (len(x) - 1) / 2
    free = 1.0
    for values in (x, y):
        counts = np.unique(values, return_counts=True)[1]
        free *= 1 - (counts * (counts - 1) / 2).sum() / total
    tau_b: Any = kendalltau(x, y)
    return float(tau_b.statistic * np.sqrt(free))


def null(
    x: Float[np.ndarray, "n n"],
    y: Float[np.ndarray, "n n"],
    method: str,
    draws: Callable[[], Int[np.ndarray, " n"]],
    n_draws: int,
) -> Float[np.ndarray, " b"]:
    """Correlations after the items of y were permuted: ``draws`` gives one permutation a call."""
    above = np.triu_indices(len(x), 1)
    if method == "tau-a":
        return np.array([_tau_a(x[above], _permuted(y, draws())[above]) for _ in range(n_draws)])
    from scipy.stats import rankdata

    ranks = []
    for one in (x, y):
        square = np.zeros_like(one)
        square[above] = unit(rankdata(one[above]))
        ranks.append(torch.from_numpy(square + square.T))  # zero on the diagonal: not a pair
    found = np.empty(n_draws)
    for i in range(n_draws):
        place = torch.from_numpy(draws())
        moved = ranks[1].index_select(0, place).index_select(1, place)
        found[i] = float(torch.dot(ranks[0].view(-1), moved.view(-1))) / 2
    return found


def _permuted(y: Float[np.ndarray, "n n"], order: Int[np.ndarray, " n"]) -> np.ndarray:
    return y[np.ix_(order, order)]


class Weighted:
    """Mid-ranks of fixed values under changing weights: sorted once, then running sums."""

    def __init__(self, values: Float[np.ndarray, " m"]) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        self.first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.tie = np.repeat(np.arange(len(self.first)), np.diff(np.r_[self.first, len(values)]))

    def ranks(self, weight: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
        """Mean rank of each value among copies, as often as its weight says."""
        inside = np.add.reduceat(weight[self.order], self.first)
        middle = np.cumsum(inside) - inside / 2 + 0.5
        found = np.empty(len(self.order))
        found[self.order] = middle[self.tie]
        return found


def weighted_correlation(
    x: Float[np.ndarray, " m"], y: Float[np.ndarray, " m"], weight: Float[np.ndarray, " m"]
) -> float:
    """Pearson correlation with weights; 0 where one side does not vary."""
    total = weight.sum()
    dx, dy = x - (weight @ x) / total, y - (weight @ y) / total
    square = (weight @ (dx * dx)) * (weight @ (dy * dy))
    return float(weight @ (dx * dy) / np.sqrt(square)) if square > 0 else 0.0
