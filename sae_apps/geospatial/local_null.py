"""The null distribution of local Moran's I: conditional permutations that all places share.

For place i the values of its c neighbours are replaced by those of c others, drawn without
replacement; L_b = sum_p w_p z[s_bp] is the lag that draw b would give (Anselin, Geographical
Analysis 27(2), 1995). Draw b is one sequence of c + 1 distinct places s_b0 ... s_bc. Where i is
not among the first c, those serve; where it is, its position takes s_bc. By symmetry that is a
uniform sample from the others, exactly.

So L_b is the same number for all places with the same weights except where the draw hits the place
itself, c/n of the draws on average. It is computed and sorted once per set of weights, and a
place's counts are two binary searches and the few draws that hit it: O(B c + n log B) per feature
in place of the O(n B c) of a loop over places. esda shares one table of draws among places too; the
difference is that it copies and sums them for each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

Lags = Float[np.ndarray, "n f"]
Counts = Int[np.ndarray, "n f"]

TIE = 1e-12  # share of the largest possible lag within which two lags count as equal
_BLOCK = 8_000_000  # float64 of drawn values held at once: 64 MB


@dataclass(frozen=True, eq=False)
class NullMoments:
    """Simulated lags of each place, summarised; [n, f] each."""

    mean: Lags
    """Mean of the simulated lags."""
    sd: Lags
    """Their standard deviation (divisor B)."""
    n_above: Counts
    """Draws whose lag is at least the upper bound."""
    n_below: Counts
    """Draws whose lag is at most the lower bound."""


# (places, columns, mean of their simulated lags) -> (lower, upper)
Limits = Callable[[Int[np.ndarray, " m"], slice, Lags], tuple[Lags, Lags]]


@dataclass(frozen=True, eq=False)
class Draws:
    """Sequences of distinct places, and where each place occurs in them."""

    ids: Int[np.ndarray, "b length"]
    """The sequences."""
    order: Int[np.ndarray, " b_length"]
    """Flat positions of ``ids``, sorted by the place that stands there."""
    starts: Int[np.ndarray, " n_plus_1"]
    """order[starts[i] : starts[i + 1]] are the positions of place i."""

    def hits(
        self, places: Int[np.ndarray, " m"], c: int
    ) -> tuple[Int[np.ndarray, " h"], Int[np.ndarray, " h"], Int[np.ndarray, " h"]]:
        """(which of ``places``, draw, position) wherever one is among the first c of a draw."""
        first, counts = self.starts[places], self.starts[places + 1] - self.starts[places]
        which = np.repeat(np.arange(len(places)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        draw, position = np.divmod(self.order[first[which] + within], self.ids.shape[1])
        kept = position < c
        return which[kept], draw[kept], position[kept]


def draw_sequences(n: int, length: int, permutations: int, seed: int) -> Draws:
    """Independent uniform sequences of ``length`` distinct numbers below ``n``.

    Sequences with a repetition are drawn again as a whole, which leaves every sequence of distinct
    numbers equally likely; where most would have one, each is drawn by a shuffle.
    """
    generator = np.random.default_rng(seed)
    if length * length > n:
        rows = [generator.choice(n, size=length, replace=False) for _ in range(permutations)]
        ids = np.array(rows, dtype=np.int64).reshape(permutations, length)
    else:
        ids = generator.integers(n, size=(permutations, length))
        bad = np.arange(permutations)
        while (bad := bad[_repeats(ids[bad])]).size:
            ids[bad] = generator.integers(n, size=(bad.size, length))
    order = np.argsort(ids.ravel(), kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(ids.ravel(), minlength=n))])
    return Draws(ids, order, starts)


def simulate(z: Lags, matrix: sparse.csr_array, draws: Draws, limits: Limits) -> NullMoments:
    """Summaries of the simulated lags of every place and feature; zero for islands.

    Args:
        z: [n, f] standardised features.
        matrix: [n, n] weights with an empty diagonal.
        draws: of length (largest number of neighbours) + 1.
        limits: given places, columns and the mean of their lags, the bounds (lower, upper) of the
            tails to count.
    """
    n, n_features = z.shape
    result = no_draws(z.shape)
    groups = same_weights(matrix)
    width = max(1, _BLOCK // draws.ids.size)
    for first in range(0, n_features, width):
        columns = slice(first, min(first + width, n_features))
        drawn = z[:, columns][draws.ids.T]
        for places, weights in groups:
            _simulate_group(drawn, draws, places, weights, columns, limits, result)
    return result


def no_draws(shape: tuple[int, ...]) -> NullMoments:
    """Zeros: the summaries of places that have no neighbours to draw."""
    return NullMoments(*(np.zeros(shape, kind) for kind in (float, float, int, int)))


def same_weights(
    matrix: sparse.csr_array,
) -> list[tuple[Int[np.ndarray, " m"], Float[np.ndarray, " c"]]]:
    """Places whose weights are the same numbers in any order: (places, weights), islands left out.

    The order of the weights is immaterial because the drawn places are exchangeable.
    """
    sizes = np.diff(matrix.indptr)
    found = []
    for c in np.unique(sizes[sizes > 0]):
        places = np.flatnonzero(sizes == c)
        at = matrix.indptr[places][:, None] + np.arange(c)
        rows, member = np.unique(np.sort(matrix.data[at], axis=1), axis=0, return_inverse=True)
        order = np.argsort(member.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(member.ravel(), minlength=len(rows)))
        found += list(zip(np.split(places[order], ends[:-1]), rows, strict=True))
    return found


def _simulate_group(
    drawn: Float[np.ndarray, "length b f"],
    draws: Draws,
    places: Int[np.ndarray, " m"],
    weights: Float[np.ndarray, " c"],
    columns: slice,
    limits: Limits,
    result: NullMoments,
) -> None:
    """Fill in the rows ``places`` and the columns ``columns`` of ``result``."""
    _, n_draws, n_features = drawn.shape
    c, m = len(weights), len(places)
    lags = (weights @ drawn[:c].reshape(c, -1)).reshape(n_draws, n_features)
    which, b, p = draws.hits(places, c)
    hit = lags[b]
    moved = hit + weights[p, None] * (drawn[c, b] - drawn[p, b])
    # About the mean of all draws, so that the squares lose no digits.
    middle = lags.mean(axis=0)
    old, new = hit - middle, moved - middle
    shift = _sum_at(which, new - old, m) / n_draws
    squares = ((lags - middle) ** 2).sum(axis=0) + _sum_at(which, new**2 - old**2, m)
    result.mean[places, columns] = middle + shift
    result.sd[places, columns] = np.sqrt(np.maximum(squares / n_draws - shift**2, 0.0))
    lower, upper = limits(places, columns, middle + shift)
    above = _sum_at(which, (moved >= upper[which]) * 1.0 - (hit >= upper[which]), m)
    below = _sum_at(which, (moved <= lower[which]) * 1.0 - (hit <= lower[which]), m)
    ordered = np.sort(lags.T, axis=1)
    for j in range(n_features):
        above[:, j] += n_draws - np.searchsorted(ordered[j], upper[:, j], side="left")
        below[:, j] += np.searchsorted(ordered[j], lower[:, j], side="right")
    result.n_above[places, columns] = above
    result.n_below[places, columns] = below


def _repeats(ids: Int[np.ndarray, "m length"]) -> np.ndarray:
    """Which sequences hold a number twice."""
    ordered = np.sort(ids, axis=1)
    return (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)


def _sum_at(
    index: Int[np.ndarray, " h"], values: Float[np.ndarray, "h f"], n: int
) -> Float[np.ndarray, "n f"]:
    """Sum of the rows of ``values`` that go to each of n places."""
    total = np.zeros((n, values.shape[1]))
    for j in range(values.shape[1]):
        total[:, j] = np.bincount(index, weights=values[:, j], minlength=n)
    return total
