"""Local Moran's I (LISA): where a feature clusters, for several features at once.

I_i = z_i sum_j w_ij z_j (n - 1) / n   with z standardised to mean 0 and variance 1 (divisor n).
Source: Anselin, Geographical Analysis 27(2), 1995, with the scaling, quadrants and labels of
esda.Moran_Local; analytic moments from Sokal, Oden and Thomson, Geographical Analysis 30(4), 1998,
eqs. A7 and A8. Differences from esda: the permutations are computed once for all places that have
the same weights (``local_null``); weights are used as they are and not row-standardised first;
islands are undefined, where esda gives them the smallest possible p-value; the default alternative
is a true two-sided one; p-values are adjusted for the number of places.
"""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.geospatial import local_null
from sae_apps.geospatial.local_result import LocalMoments, LocalMoran
from sae_apps.geospatial.moran_input import columns_of
from sae_apps.geospatial.weights import SpatialWeights, as_weights
from sae_core.errors import UserError

Alternative = Literal["two-sided", "greater", "less", "folded", "directed"]
Table = Float[np.ndarray, "n f"]

ALTERNATIVES = ("two-sided", "greater", "less", "folded", "directed")
CENTRE = 1e-12  # |z| up to which a place lies on the mean: all its simulated I are equal, to 0
_FIELDS = ("z", "lag", "Is", "is_defined", "p_sim", "EI_sim", "seI_sim", "EIc", "VIc")


def moran_local(
    features: Any,
    w: Any,
    *,
    permutations: int = 999,
    alternative: Alternative = "two-sided",
    p_adjust: Literal["bh", "by"] | None = "bh",
    alpha: float = 0.05,
    groups: Any = None,
    seed: int = 0,
    names: list[str] | None = None,
) -> LocalMoran:
    """Local Moran's I of every place, with conditional permutations and labels.

    The value of a place stays and its neighbours' values are drawn without replacement from all
    other places, B times. With #>= and #<= the numbers of simulated I_i at least and at most the
    observed one (equal within rounding counts for both), the alternatives are

    - "greater", "less": (#>= + 1) / (B + 1), (#<= + 1) / (B + 1);
    - "two-sided": twice the smaller of these, at most 1;
    - "folded": (# |I_i* - mean| >= |I_i - mean| + 1) / (B + 1), about the simulated mean;
    - "directed": (min(#>=, B - #>=) + 1) / (B + 1), the only one of esda.Moran_Local 2.9, here to
      repeat published results. The tail is chosen after looking and ties count in one tail alone.
      Where a feature is zero in most places nearly all draws tie, and the empty background comes
      out as significant; esda also leaves ties to rounding, so the two differ there.

    Args:
        features: SparseFeatures, scipy sparse or dense [n, f], or dense [n] for one feature.
        w: weights, anything that ``as_weights`` takes; rows in the order of the features. The rows
            of SparseFeatures are matched by row_id.
        permutations: B, at least 1. All features and places share the draws.
        alternative: see above.
        p_adjust: false discovery rate over the places of each feature, Benjamini-Hochberg or
            Benjamini-Yekutieli; None leaves p_sim. With B permutations the two-sided p is at least
            2 / (B + 1), so "bh" can reject only if a share of 2 / ((B + 1) alpha) of the places
            lies on that floor; more permutations cost little.
        alpha: level of the labels, in (0, 1); a place is labelled where p_adjusted < alpha.
        groups: one label per place. Mean, variance and draws are then taken within the place's
            group, one analysis per group; no link may join two groups. None pools all places: high
            and low are relative to the common mean, also where the weights fall into blocks.
        seed: of the draws; the same on any number of threads.
        names: of the features; their positions if None.
    Returns:
        a LocalMoran, with arrays [n] if ``features`` was [n].
    Raises:
        UserError: sizes, ids or values do not fit, or an option is unknown.
    """
    check_options(permutations, alternative, p_adjust, alpha)
    table, weights = _inputs(features, w)
    areas = _areas(groups, weights)
    parts = [
        (at, _one_area(table[at], _block(weights.matrix, at), permutations, alternative, seed))
        for at in areas
    ]
    found = {name: np.zeros(table.shape, parts[0][1][name].dtype) for name in _FIELDS}
    for at, part in parts:
        for name in _FIELDS:
            found[name][at] = part[name]
    adjusted = _adjust(found["p_sim"], found["is_defined"], p_adjust)
    how = {
        "statistic": "local Moran's I, esda scaling, conditional permutations",
        "alternative": alternative,
        "permutations": permutations,
        "seed": seed,
        "n_tests": [int(n) for n in found["is_defined"].sum(axis=0)],
        "correction": p_adjust or "none",
        "alpha": alpha,
        "groups": "pooled" if groups is None else f"mean and draws within {len(areas)} groups",
        "weights": weights.method,
        "weights_facts": weights.facts.asdict(),
        "s0": weights.s0,
    }
    arrays = {"values": table, "p_adjusted": adjusted, **found}
    if np.ndim(features) == 1:
        arrays = {name: value[:, 0] for name, value in arrays.items()}
    moments = LocalMoments(**{k: arrays.pop(k) for k in ("EI_sim", "seI_sim", "EIc", "VIc")})
    return LocalMoran(
        row_id=weights.row_id,
        names=_names(names, table.shape[1]),
        status=_status(table, areas),
        moments=moments,
        how=how,
        **arrays,
    )


def check_options(permutations: int, alternative: str, p_adjust: str | None, alpha: float) -> None:
    """Raises:
    UserError: an option that ``moran_local`` does not know, or one out of its range.
    """
    if permutations < 1:
        raise UserError(f"Expected at least 1 permutation, got {permutations}.")
    if alternative not in ALTERNATIVES:
        raise UserError(f"Expected an alternative of {ALTERNATIVES}, got {alternative!r}.")
    if p_adjust not in ("bh", "by", None):
        raise UserError(f"Expected p_adjust 'bh', 'by' or None, got {p_adjust!r}.")
    if not 0 < alpha < 1:
        raise UserError(f"Expected alpha between 0 and 1, got {alpha}.")


def _inputs(features: Any, w: Any) -> tuple[Table, SpatialWeights]:
    columns = columns_of(features)
    weights = as_weights(w, row_id=columns.row_id)
    n, n_features = columns.shape
    if n != weights.n:
        raise UserError(f"Expected features of the {weights.n} places of the weights, got {n}.")
    return columns.dense_part(np.arange(n_features)).astype(np.float64), weights


def _names(names: list[str] | None, n_features: int) -> tuple[str, ...]:
    found = tuple(str(j) for j in range(n_features)) if names is None else tuple(map(str, names))
    if len(found) != n_features:
        raise UserError(f"Expected {n_features} names of features, got {len(found)}.")
    return found


def _areas(groups: Any, weights: SpatialWeights) -> list[Int[np.ndarray, " m"]]:
    """The places of each group, in the order of the labels."""
    if groups is None:
        return [np.arange(weights.n)]
    labels = np.array(["" if label is None else str(label) for label in groups])
    if labels.shape != (weights.n,):
        raise UserError(f"Expected {weights.n} labels of groups, got {labels.size}.")
    rows, columns = weights.matrix.nonzero()
    joined = np.flatnonzero(labels[rows] != labels[columns])
    if joined.size:
        i, j = int(rows[joined[0]]), int(columns[joined[0]])
        raise UserError(
            f"Expected weights without links between groups, got {joined.size}, one from "
            f"{str(labels[i])!r} to {str(labels[j])!r}: use spatial_weights(groups=...)."
        )
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _block(matrix: sparse.csr_array, at: Int[np.ndarray, " m"]) -> sparse.csr_array:
    """Weights among some places."""
    return matrix if len(at) == len(matrix.indptr) - 1 else sparse.csr_array(matrix[at][:, at])


def _status(table: Table, areas: list[Int[np.ndarray, " m"]]) -> tuple[str, ...]:
    flat = np.array([np.ptp(table[at], axis=0) == 0 for at in areas])
    names = np.where(flat.all(axis=0), "constant", "constant in some groups")
    return tuple(str(s) for s in np.where(flat.any(axis=0), names, "ok"))


def _one_area(
    table: Table, matrix: sparse.csr_array, permutations: int, alternative: str, seed: int
) -> dict[str, np.ndarray]:
    """The arrays of one area; every statistic of an undefined entry is 0 and its p-value 1."""
    n = len(table)
    sd = np.where(np.ptp(table, axis=0) > 0, table.std(axis=0), 0.0)
    centred = table - table.mean(axis=0)
    z = np.divide(centred, sd, out=np.zeros_like(table), where=sd > 0)
    lag = np.asarray(matrix @ z)
    sizes = np.diff(matrix.indptr)
    defined = (sizes > 0)[:, None] & (sd > 0) & (n > 2)
    found = {"z": z, "lag": lag, "is_defined": defined}
    reach = np.asarray(abs(matrix).sum(axis=1))[:, None] * np.abs(z).max(axis=0)
    tie = local_null.TIE * reach

    def limits(places: np.ndarray, columns: slice, mean: Table) -> tuple[Table, Table]:
        observed, near = lag[places, columns], tie[places, columns]
        if alternative == "folded":
            away = np.abs(observed - mean)
            return mean - away + near, mean + away - near
        return observed + near, observed - near

    if n > 2 and sizes.max() > 0:
        draws = local_null.draw_sequences(n, int(sizes.max()) + 1, permutations, seed)
        null = local_null.simulate(z, matrix, draws, limits)
    else:
        null = local_null.no_draws(z.shape)
    scale = z * (n - 1) / n
    found |= {"Is": scale * lag, "EI_sim": scale * null.mean, "seI_sim": np.abs(scale) * null.sd}
    found["EIc"], found["VIc"] = _analytic(z, matrix)
    found["p_sim"] = np.where(defined, _p_values(z, null, permutations, alternative), 1.0)
    for name in ("Is", "EI_sim", "seI_sim", "EIc", "VIc"):
        found[name] = np.where(defined, found[name], 0.0)
    return found


def _analytic(z: Table, matrix: sparse.csr_array) -> tuple[Table, Table]:
    """E = -z^2 w / (n-1), V = z^2 n/(n-2) (w2 - w^2/(n-1)) (1 - z^2/(n-1)); w, w2: row sums of
    the weights and of their squares (Sokal et al. 1998, A7 and A8, at m2 = 1).

    As in esda these lack the factor (n - 1)/n of Is.
    """
    n = len(z)
    if n < 3:
        return np.zeros_like(z), np.zeros_like(z)
    total = np.asarray(matrix.sum(axis=1))[:, None]
    squares = np.asarray((matrix * matrix).sum(axis=1))[:, None]
    mean = -(z**2) * total / (n - 1)
    spread = n / (n - 2) * (squares - total**2 / (n - 1)) * (1 - z**2 / (n - 1))
    return mean, np.maximum(z**2 * spread, 0.0)


def _p_values(z: Table, null: local_null.NullMoments, permutations: int, alternative: str) -> Table:
    """Counts of lags to p-values of I = z lag: where z is negative the tails change places."""
    on_mean = np.abs(z) <= CENTRE
    if alternative == "folded":
        outside = np.minimum(null.n_above + null.n_below, permutations)
        return (np.where(on_mean, permutations, outside) + 1) / (permutations + 1)
    above = np.where(z > 0, null.n_above, null.n_below)
    below = np.where(z > 0, null.n_below, null.n_above)
    above, below = (np.where(on_mean, permutations, count) for count in (above, below))
    if alternative == "directed":
        return (np.minimum(above, permutations - above) + 1) / (permutations + 1)
    greater, less = (above + 1) / (permutations + 1), (below + 1) / (permutations + 1)
    if alternative == "two-sided":
        return np.minimum(2 * np.minimum(greater, less), 1.0)
    return greater if alternative == "greater" else less


def _adjust(p_values: Table, defined: np.ndarray, method: str | None) -> Table:
    """False discovery rate over the defined places of each feature; 1 elsewhere."""
    if method is None:
        return p_values
    from scipy.stats import false_discovery_control

    adjusted = np.ones_like(p_values)
    for j in range(p_values.shape[1]):
        tested = defined[:, j]
        if tested.any():
            adjusted[tested, j] = false_discovery_control(
                p_values[tested, j], method="bh" if method == "bh" else "by"
            )
    return adjusted
