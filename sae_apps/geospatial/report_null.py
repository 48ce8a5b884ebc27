"""Nulls of a report on geography: thresholds, permutations, p adjusted for many features."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae_apps.geospatial.moran import MoranTable, moran
from sae_apps.geospatial.weights import SpatialWeights
from sae_core.errors import UserError

ADJUSTMENTS = ("bh", "by", None)


@dataclass(frozen=True)
class Nulls:
    """What is asked of a feature."""

    min_i: float = 0.3
    """Smallest Moran's I that counts."""
    alpha: float = 0.01
    """p and q must be below."""
    permutations: int = 999
    """Under free permutation, of every feature."""
    permutations_screened: int = 9999
    """Under the other two nulls, of the features with an I of at least min_i."""
    permutations_most: int = 99_999
    """Of those whose p is at its floor, so that q can be below alpha; see ``screened``."""
    min_active: int = 10
    """Places in which a feature must differ from 0 to be tested."""
    p_adjust: str | None = "bh"
    """bh, by or None, over all features tested."""
    seed: int = 0
    """Of the permutations."""
    device: str | None = None
    """Where dense features are permuted, e.g. cuda."""

    def __post_init__(self) -> None:
        if self.p_adjust not in ADJUSTMENTS:
            raise UserError(f"Expected p_adjust in {ADJUSTMENTS}, got {self.p_adjust!r}.")
        if not 0 < self.alpha < 1:
            raise UserError(f"Expected alpha between 0 and 1, got {self.alpha}.")
        for name in ("permutations", "permutations_screened"):
            if (1 + getattr(self, name)) * self.alpha <= 1:
                raise UserError(
                    f"Expected {name} above {1 / self.alpha - 1:g}, so that p can be below alpha "
                    f"{self.alpha:g}, got {getattr(self, name)}."
                )


class Null(NamedTuple):
    """The permuted I of each feature, NaN where it was not permuted."""

    p: Float[np.ndarray, " f"]
    p_refined: Float[np.ndarray, " f"]
    """Pearson III where p is at its floor and the tail valid, else p."""
    mean: Float[np.ndarray, " f"]
    deviation: Float[np.ndarray, " f"]
    at_floor: Float[np.ndarray, " f"]
    """1 where no permutation reached I and no tail says more, else 0."""

    @classmethod
    def of(cls, table: MoranTable) -> "Null":
        p, tail, seen = (column(table, name) for name in ("p_sim", "p_tail", "n_permutations"))
        is_floor = p * (1 + seen) < 1.5
        refined = np.where(is_floor & ~np.isnan(tail), np.fmin(p, tail), p)
        at_floor = (is_floor & np.isnan(tail)).astype(np.float64)
        return cls(p, refined, column(table, "EI_sim"), column(table, "seI_sim"), at_floor)


def screened(
    matrix: Any,
    w: SpatialWeights,
    value: Float[np.ndarray, " f"],
    nulls: Nulls,
    settings: dict[str, Any],
) -> tuple[Null, dict[str, Any]]:
    """The null of the features whose ``value`` reaches min_i.

    Features at the floor of p whose q that floor alone keeps from alpha get more permutations: as
    many as BH needs, at most ``nulls.permutations_most``.
    """
    kept = np.flatnonzero(np.nan_to_num(value, nan=-np.inf) >= nulls.min_i)
    whole = Null(*(np.full(len(value), np.nan) for _ in Null._fields))
    if not len(kept):
        return whole, {"n_permuted": 0}
    table = moran(matrix[:, kept], w, **settings)
    for to, found in zip(whole, Null.of(table), strict=True):
        to[kept] = found
    how = {**table.how, "n_permuted": len(kept)}
    tested = ~np.isnan(value)
    q = adjusted(whole.p_refined, tested, nulls.p_adjust)
    stuck = np.flatnonzero((whole.at_floor == 1) & (q >= nulls.alpha))
    if len(stuck):
        rank = (whole.p_refined <= whole.p[stuck[0]]).sum()  # of the floor, for BH
        wanted = min(int(tested.sum() / (nulls.alpha * rank)) + 1, nulls.permutations_most)
        if wanted > settings["permutations"]:
            table = moran(matrix[:, stuck], w, **{**settings, "permutations": wanted})
            for to, found in zip(whole, Null.of(table), strict=True):
                to[stuck] = found
            how |= {"n_permuted_longer": len(stuck), "permutations_longer": wanted}
    return whole, how


def adjusted(
    p: Float[np.ndarray, " f"], tested: Bool[np.ndarray, " f"], method: str | None
) -> Float[np.ndarray, " f"]:
    """Adjusted p-values over all tested features; a tested one without p counts as 1.

    Benjamini and Hochberg (1995), or Benjamini and Yekutieli (2001) for any dependence.

    Returns:
        q [F], NaN where p is.
    """
    if method is None:
        return p.copy()
    from scipy.stats import false_discovery_control

    q = np.full(len(p), np.nan)
    if tested.any():
        q[tested] = false_discovery_control(np.nan_to_num(p[tested], nan=1.0), method=method)
    q[np.isnan(p)] = np.nan
    return q


def column(table: MoranTable, name: str) -> Float[np.ndarray, " f"]:
    """A column of numbers, NaN where it is null."""
    return table.table[name].to_numpy().astype(np.float64)
