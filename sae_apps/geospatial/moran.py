"""Global Moran's I of many features at once, with the exact randomisation null.

I = (n / S0) z'Wz / z'z,   z = x - mean,   S0 = sum of all weights;   E[I] = -1/(n - 1).

P. A. P. Moran, Notes on continuous stochastic phenomena, Biometrika 37 (1950); moments under
randomisation: A. Cliff, J. Ord, Spatial Processes (1981), as `esda.Moran` computes them. A
permutation moves the values to other places, thus rows and columns of W together, and is shared by
all features. Unlike esda this names the alternative, seeds, counts ties, and corrects for many
tests; unlike the published study (arXiv 2505.03368) it permutes within strata and after covariates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sae_apps.geospatial.moran_input import Columns, columns_of
from sae_apps.geospatial.moran_null import Frame
from sae_apps.geospatial.moran_run import Found, Plan, run_test
from sae_apps.geospatial.moran_table import MoranTable
from sae_apps.geospatial.permutation import Strata, strata_of
from sae_apps.geospatial.residual import covariate_table, projection
from sae_apps.geospatial.tails import CORRECTIONS
from sae_apps.geospatial.tally import STOP_AT
from sae_apps.geospatial.weights import SpatialWeights, as_weights
from sae_core.errors import UserError

ALTERNATIVES = ("greater", "two-sided", "less")


def moran(
    features: Any,
    w: Any,
    *,
    permutations: int = 999,
    alternative: str = "greater",
    strata: Sequence[Any] | np.ndarray | None = None,
    strata_means: bool = False,
    covariates: Any = None,
    min_active: int = 10,
    p_adjust: str | None = "bh",
    adaptive: bool = False,
    seed: int = 0,
    device: str | None = None,
    names: Sequence[str] | None = None,
) -> MoranTable:
    """Test every feature for spatial autocorrelation.

    Columns of the result: feature; n_active, places with a value other than 0; I; EI, VI_rand and
    z_rand, analytic under free permutation, null with strata or covariates; EI_sim, seI_sim and
    z_sim from the permutations; p_sim = (1 + #) / (B + 1) with # permuted I at least as extreme;
    p_tail, the Pearson III tail, null where it is not valid (``tails.tail_is_valid``); q, p_sim
    adjusted over the features with status ok; n_permutations, those that were drawn; status: dead
    (active nowhere), constant (nothing varies after what is removed), rare (fewer than
    ``min_active`` places), else ok. Only ok features are permuted.

    Args:
        features: SparseFeatures, scipy sparse [n, F], or dense [n, F] or [n].
        w: SpatialWeights, libpysal Graph or W, or scipy sparse; used as they are. SparseFeatures
            find their places by row_id.
        permutations: B; with ``adaptive`` the most of a feature.
        alternative: ``greater`` (positive autocorrelation), ``less``, or ``two-sided``: twice the
            smaller of both p, at most 1 (esda's p_sim folds without doubling).
        strata: a label a place; values move only within a label. Places without label, and those
            of labels with fewer than three places, stay where they are, and ``how`` counts them.
        strata_means: remove the mean of each stratum first, so that I is that of the deviations.
        covariates: [n] or [n, c], a mapping or a table: x is regressed on them (and on the means),
            residuals are permuted and regressed again (Freedman-Lane); I is that of the residuals.
        min_active: fewer active places make a feature rare, which is listed but not tested.
        p_adjust: ``bh``, ``by``, ``max`` (family-wise, from the largest statistic of each
            permutation over all features, each on the scale of ``tails.Null.deviate``, so that
            features with a long tail do not set the bar for the rest), or None.
        adaptive: stop a feature after 20 exceedances (Besag-Clifford), which gives the permutations
            to those that need them.
        seed: of the permutations; the same seed gives the same numbers, whatever the threads.
        device: a device of torch to compute on; None takes the CPU, in compiled loops where numba
            is installed.
        names: of the features, an additional column.
    Raises:
        UserError: a size, a label, a value or an option is not what it should be.
    """
    check_options(permutations, alternative, min_active, p_adjust, adaptive, seed)
    columns = columns_of(features)
    n, n_features = columns.shape
    weights = _weights(w, columns)
    _check_names(names, n_features)
    groups = strata_of(strata, n)
    if strata_means and strata is None:
        raise UserError("Expected strata with strata_means=True, got none.")
    table, covariate_names = covariate_table(covariates, n)
    removed = projection(groups.codes if strata_means else None, table, n)
    if removed.rank >= n - 1:
        raise UserError(f"Expected fewer than {n - 1} means and covariates, got {removed.rank}.")
    frame = Frame(columns, weights, removed, device)
    plan = Plan(permutations, alternative, min_active, p_adjust, adaptive, seed, groups)
    is_free = groups.is_free and table is None
    found = run_test(frame, plan, is_free)
    how = _describe(weights, plan, covariate_names, removed.rank, strata_means, found)
    return MoranTable(_table(found, n, names, is_free), how)


def check_options(
    permutations: int,
    alternative: str,
    min_active: int,
    p_adjust: str | None,
    adaptive: bool,
    seed: int,
) -> None:
    """Raises:
    UserError: an option that ``moran`` does not know, or one out of its range.
    """
    if alternative not in ALTERNATIVES:
        raise UserError(f"Expected alternative as one of {ALTERNATIVES}, got {alternative!r}.")
    if p_adjust is not None and p_adjust not in CORRECTIONS:
        raise UserError(f"Expected p_adjust as one of {CORRECTIONS} or None, got {p_adjust!r}.")
    for name, value, least in (
        ("permutations", permutations, 1), ("min_active", min_active, 1), ("seed", seed, 0),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise UserError(f"Expected {name} as a whole number of at least {least}, got {value}.")
    if adaptive and p_adjust == "max":
        raise UserError(
            "Expected every feature under every permutation for p_adjust='max', got adaptive=True."
        )


def _weights(w: Any, columns: Columns) -> SpatialWeights:
    n, _ = columns.shape
    weights = as_weights(w, row_id=columns.row_id)
    if weights.n != n:
        raise UserError(f"Expected weights of {n} places, got weights of {weights.n}.")
    if n < 4:
        raise UserError(f"Expected at least 4 places, got {n}.")
    return weights


def _check_names(names: Sequence[str] | None, n_features: int) -> None:
    if names is not None and len(names) != n_features:
        raise UserError(f"Expected {n_features} names of features, got {len(names)}.")


def _table(found: Found, n: int, names: Sequence[str] | None, is_free: bool) -> pa.Table:
    """Columns in the order of the documentation; NaN becomes null."""
    f = len(found.n_active)
    floats = {
        name: pa.array(values, mask=~np.isfinite(values)) for name, values in found.floats.items()
    }
    undefined = np.isnan(found.floats["I"]) | (not is_free)
    expected = pa.array(np.full(f, -1 / (n - 1)), mask=undefined)
    columns = {"feature": pa.array(np.arange(f, dtype=np.int64))}
    if names is not None:
        columns["name"] = pa.array([str(name) for name in names])
    columns |= {"n_active": pa.array(found.n_active), "I": floats.pop("I"), "EI": expected}
    columns |= floats
    columns["n_permutations"] = pa.array(found.drawn)
    columns["status"] = pa.array(found.status.tolist(), pa.string())
    return pa.table(columns)


def _describe(
    weights: SpatialWeights,
    plan: Plan,
    covariates: list[str],
    rank: int,
    strata_means: bool,
    found: Found,
) -> dict[str, Any]:
    """How the numbers were made, as plain values."""
    return {
        "statistic": "Moran's I",
        "alternative": plan.alternative,
        "null": "values permuted among all places"
        if plan.strata.is_free
        else "values permuted within strata",
        "permutations": plan.permutations,
        "adaptive": f"stopped after {STOP_AT} exceedances" if plan.adaptive else None,
        "seed": plan.seed,
        "min_active": plan.min_active,
        "n_tests": len(found.tested),
        "correction": plan.p_adjust,
        "strata": _strata_facts(plan.strata, strata_means),
        "covariates": covariates,
        "removed_dimensions": rank,
        "weights": weights.method,
        "weights_facts": weights.facts.asdict(),
    }


def _strata_facts(strata: Strata, strata_means: bool) -> dict[str, Any] | None:
    if strata.is_free:
        return None
    return {
        "n_permuted": strata.n_permuted,
        "n_places_fixed_in_small_strata": strata.n_small,
        "n_places_fixed_without_label": strata.n_unlabelled,
        "means_removed": strata_means,
    }
