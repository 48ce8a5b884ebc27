"""Relational alignment of features with a semantic space: second-order isomorphism.

    rho = rank correlation over pairs a < b of D_F(a, b) and D_Y(a, b)
    p   = (1 + #{rho* >= rho}) / (B + 1),  rho*: labels of the items of Y permuted
    delta = rho(features) - rho(baseline): does the dictionary keep the relations of its input?

If meaning is relational (Arsiwalla, arXiv 2405.01148, of which the abstract alone was readable), a
code means what a space says as far as relations among codes match relations among meanings. That is
a measurement with a history (Shepard and Chipman 1970; Mantel 1967; Kriegeskorte et al. 2008), and
it is all that is measured here: agreement with the given space.

What it cannot do. Permuting labels assumes that items are exchangeable: where both spaces follow a
common structure (space, time, topic), p is too small (Guillot and Rousset 2013): give ``strata``,
and do not use a partial Mantel test. Disjoint sparse codes all lie at distance 1: with many such
ties take ``tau-a``. rho mixes structure between and within categories.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.alignment.distances import (
    check_distances,
    check_finite,
    code_distances,
    has_code,
)
from sae_apps.alignment.ranks import (
    METHODS,
    Weighted,
    correlation,
    null,
    pairs,
    weighted_correlation,
)
from sae_apps.alignment.ranks import unit as _unit
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

MIN_ITEMS = 4
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Alignment:
    """How far two spaces agree about the same items."""

    rho: float
    """Rank correlation of the distances."""
    p: float
    """One-sided, from permuted labels."""
    ci: tuple[float, float] | None
    """95% percentile interval over resampled items; None without resamples."""
    n_items: int
    """Items compared."""
    n_dropped: int
    """Items without an active unit in some space, which have no cosine."""
    n_fixed: int
    """Items alone in their stratum, which no permutation moves."""
    null_mean: float
    """Of the permuted correlations."""
    null_sd: float
    """Of the permuted correlations."""
    kept: Int[np.ndarray, " n_items"]
    """Places of the compared items in the input."""
    per_item: Float[np.ndarray, " n_items"]
    """rho of each item's row: which items are placed well. 0 where a row does not vary."""
    baseline_rho: float | None = None
    """The same of the baseline."""
    delta: float | None = None
    """rho - baseline_rho."""
    delta_ci: tuple[float, float] | None = None
    """Its interval, over the same resamples."""
    how: dict[str, Any] = field(default_factory=dict)
    """Metric, method, alternative, permutations, resamples, seed, strata."""


def relational_alignment(
    features: SparseFeatures | sparse.csr_array | Float[np.ndarray, "n p"],
    space: Float[np.ndarray, "n q"],
    *,
    distances: bool = False,
    metric: str = "cosine",
    method: str = "spearman",
    permutations: int = 9999,
    strata: Sequence[Hashable] | None = None,
    baseline: sparse.csr_array | Float[np.ndarray, "n r"] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Alignment:
    """Compare the relations among codes with those in a space.

    Args:
        features: codes of n items.
        space: an embedding of the same items in the same order, or with ``distances`` the n x n
            matrix of their distances (e.g. ``great_circle``).
        metric: of codes, embedding and baseline: cosine or euclidean.
        method: spearman, or tau-a for heavy ties (slow, and without intervals).
        permutations: B, of the labels of ``space``.
        strata: group of each item: permutations move items within groups only.
        baseline: other codes of the items, such as the raw activations.
        n_boot: resamples of the items; 0: no intervals.
        seed: of permutations and resamples.
    Raises:
        UserError: other numbers of items, fewer than four, values that are not finite, a matrix
            that is no distance, unknown metric or method, strata of another length or that leave
            nothing to permute.
    """
    codes = features.acts if isinstance(features, SparseFeatures) else features
    _check(codes, space, baseline, strata, method, permutations, n_boot)
    kept = _kept(codes, None if distances else space, baseline, metric)
    if len(kept) < MIN_ITEMS:
        raise UserError(f"Expected at least {MIN_ITEMS} items with codes, got {len(kept)}.")
    mine = code_distances(codes[kept], metric)
    if distances:
        theirs = check_distances(space)[np.ix_(kept, kept)]
    else:
        theirs = code_distances(np.asarray(space)[kept], metric)
    rng = np.random.default_rng(seed)
    labels = None if strata is None else list(strata)
    groups = None if labels is None else [labels[i] for i in kept]
    draw, n_fixed = _shuffler(len(kept), groups, rng)
    x, y = pairs(mine), pairs(theirs)
    rho = correlation(x, y, method)
    permuted = null(mine, theirs, method, draw, permutations)
    reached = int((permuted >= rho - 1e-12).sum())
    other = None if baseline is None else pairs(code_distances(baseline[kept], metric))
    base = None if other is None else correlation(other, y, method)
    draws = _bootstrap(x, y, other, len(kept), n_boot if method == "spearman" else 0, rng)
    return Alignment(
        rho=rho,
        p=(1 + reached) / (permutations + 1),
        ci=_interval(draws[0]),
        n_items=len(kept),
        n_dropped=len(space) - len(kept),
        n_fixed=n_fixed,
        null_mean=float(permuted.mean()),
        null_sd=float(permuted.std()),
        kept=kept,
        per_item=_per_item(mine, theirs),
        baseline_rho=base,
        delta=None if base is None else rho - base,
        delta_ci=None if base is None else _interval(draws[0] - draws[1]),
        how={
            "metric": metric, "method": method, "alternative": "greater",
            "permutations": permutations, "n_boot": n_boot, "seed": seed,
            "is_stratified": strata is not None,
        },
    )  # fmt: skip


def _check(
    codes: Any, space: Any, baseline: Any, strata: Any, method: str, permutations: int, n_boot: int
) -> None:
    n = codes.shape[0]
    for name, other in (("rows of the space", space), ("rows of the baseline", baseline),
                        ("strata", strata)):  # fmt: skip
        if other is not None and _length(other) != n:
            raise UserError(f"Expected {n} {name}, one for each item, got {_length(other)}.")
    if method not in METHODS:
        raise UserError(f"Expected a method of {METHODS}, got {method!r}.")
    if permutations < 1 or n_boot < 0:
        raise UserError(
            "Expected at least 1 permutation and no negative number of resamples, got "
            f"{permutations} and {n_boot}."
        )


def _length(values: Any) -> int:
    return values.shape[0] if hasattr(values, "shape") else len(values)


def _kept(codes: Any, space: Any, baseline: Any, metric: str) -> Int[np.ndarray, " k"]:
    kept = np.ones(codes.shape[0], dtype=bool)
    if metric == "cosine":
        for one in (codes, space, baseline):
            if one is not None:
                check_finite(one)  # NaN is no silence: such an item is not to be left out
                kept &= has_code(one)
    return np.flatnonzero(kept)


def _shuffler(
    n: int, strata: Sequence[Hashable] | None, rng: np.random.Generator
) -> tuple[Callable[[], Int[np.ndarray, " n"]], int]:
    """A function that draws permutations, and the number of items that none of them moves."""
    if strata is None:
        return lambda: rng.permutation(n), 0
    place: dict[Hashable, int] = {}
    group = np.array([place.setdefault(one, len(place)) for one in strata])
    order = np.argsort(group, kind="stable")
    n_fixed = int((np.bincount(group)[group] == 1).sum())
    if n_fixed == n:
        raise UserError(f"Expected a stratum of two items or more, got {n} of one item each.")

    def draw() -> Int[np.ndarray, " n"]:
        # sorted by stratum, and at random inside
        shuffled = np.lexsort((rng.random(n), group))
        found = np.empty(n, dtype=np.int64)
        found[order] = shuffled
        return found

    return draw, n_fixed


def _bootstrap(
    x: Float[np.ndarray, " m"],
    y: Float[np.ndarray, " m"],
    other: Float[np.ndarray, " m"] | None,
    n: int,
    n_boot: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "2 b"]:
    """rho, and that of the baseline, on resampled items."""
    ranked = [Weighted(one) for one in (x, y, *(() if other is None else (other,)))]
    above = np.triu_indices(n, 1)
    found = np.zeros((2, n_boot))
    for i in range(n_boot):
        times = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        weight = times[above[0]] * times[above[1]]
        ranks = [one.ranks(weight) for one in ranked]
        found[0, i] = weighted_correlation(ranks[0], ranks[1], weight)
        if other is not None:
            found[1, i] = weighted_correlation(ranks[2], ranks[1], weight)
    return found


def _interval(draws: Float[np.ndarray, " b"]) -> tuple[float, float] | None:
    if not len(draws):
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _per_item(
    mine: Float[np.ndarray, "n n"], theirs: Float[np.ndarray, "n n"]
) -> Float[np.ndarray, " n"]:
    from scipy.stats import rankdata

    n = len(mine)
    off = ~np.eye(n, dtype=bool)
    ranks = [rankdata(one[off].reshape(n, n - 1), axis=1) for one in (mine, theirs)]
    found = np.zeros(n)
    for i, (a, b) in enumerate(zip(*ranks, strict=True)):
        if a.min() < a.max() and b.min() < b.max():
            found[i] = np.dot(_unit(a), _unit(b))
    return found
