"""Which features know where places are, once labels and the length of names are accounted for.

Moran's I of every feature is tested several times. A p-value under free permutation says little,
since names carry their region; De Sabbata, Mizzaro and Roitero (arXiv 2505.03368) select by
I >= 0.3 and p < 0.01 under the first alone:

    free      I >= min_i, and p < alpha when values are permuted over all places
    within    I >= min_i, and p < alpha when they are permuted only among places of one label
    after     I of the residuals >= min_i, and p < alpha when the residuals are permuted over all
              places (Freedman-Lane); regressed on the tokens and characters of the name
    beyond    the same with the means of the labels removed too, permuted within labels: structure
              that no label has

A feature survives where it passes the first three; ``beyond`` is stricter than all of them together
and stands beside them. Passes are counted with p, (1 + exceedances) / (1 + permutations), and with
q, which is p adjusted over all features that were tested; where p is at its floor and the Pearson
III tail is valid (``moran``), q is computed from the tail. Features below ``min_i`` cannot pass,
whatever their p: under all nulls but the first they are not permuted and count as p = 1 in the
adjustment, which can only raise the q of the others.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy import sparse

from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.report_null import Null, Nulls, adjusted, column, screened
from sae_apps.geospatial.report_result import (
    NULLS,
    GeoReport,
    leading_table,
    summary_table,
    verdict,
)
from sae_apps.geospatial.weights import SpatialWeights, as_weights
from sae_core.errors import UserError
from sae_core.features import SparseFeatures

if TYPE_CHECKING:
    from sae_apps.geospatial.places import Places


def geo_report(
    features: Any,
    places: "Places",
    w: Any,
    *,
    baselines: Mapping[str, Any] | None = None,
    covariates: Mapping[str, Any] | None = None,
    labels: Sequence[Any] | None = None,
    nulls: Nulls = Nulls(),  # noqa: B008 - frozen
    n_leading: int = 10,
) -> GeoReport:
    """Moran's I of features and of baselines under four nulls, and which of them survive.

    Args:
        features: SparseFeatures of the places, or a matrix [n, F], sparse or dense.
        places: n places, in the order of the rows.
        w: weights, as ``moran`` takes them.
        baselines: name to a matrix [n, F'] of the same places, e.g. raw units.
        covariates: further numbers a place, beside ``n_tokens`` (where the features have it) and
            ``n_chars``, the length of the name.
        labels: one a place; None takes ``places.label``. Fewer than two labels are none: then
            ``within`` and ``beyond`` are left out.
        nulls: thresholds, permutations, correction, seed.
        n_leading: features described, those of the largest I.
    Raises:
        UserError: rows, weights and places that are not of the same places.
    """
    w = as_weights(w, row_id=places.row_id)
    if "features" in (baselines or {}):
        raise UserError("Expected baselines with names of their own, got one called 'features'.")
    sets = {"features": features, **(baselines or {})}
    matrices = {name: _matrix(values, places, name) for name, values in sets.items()}
    strata = _labels(labels if labels is not None else places.label, places.n)
    removed = _covariates(features, places, covariates or {})
    tables, how = [], {}
    for name, matrix in matrices.items():
        table, how[name] = _tested(matrix, w, strata, removed, nulls)
        tables.append(table.add_column(0, "set", pa.array([name] * len(table), pa.string())))
    table = pa.concat_tables(tables)
    leading = leading_table(tables[0], matrices["features"], places, strata, n_leading)
    return GeoReport(
        table=table,
        summary=summary_table(table),
        leading=leading,
        how={
            "places": places.source,
            "n_places": places.n,
            "min_i": nulls.min_i,
            "alpha": nulls.alpha,
            "p_adjust": nulls.p_adjust,
            "n_labels": len(set(strata or ())),
            "covariates": sorted(removed),
            "sets": how,
        },
    )


def _tested(
    matrix: Any,
    w: SpatialWeights,
    strata: list[Any] | None,
    removed: dict[str, Float[np.ndarray, " n"]],
    nulls: Nulls,
) -> tuple[pa.Table, dict[str, Any]]:
    """One row a feature: I, p and q under each null, whether it passes, and a verdict."""
    common = {"alternative": "greater", "min_active": nulls.min_active, "p_adjust": None,
              "seed": nulls.seed, "device": nulls.device}  # fmt: skip
    free = moran(matrix, w, permutations=nulls.permutations, **common)
    tested = free.column("status") == "ok"
    removals: dict[str, dict[str, Any]] = {"after": {"covariates": removed}}
    strata_of: dict[str, Any] = {"within": strata, "beyond": strata}
    if strata is not None:
        removals |= {"within": {}, "beyond": {"covariates": removed, "strata_means": True}}
    columns: dict[str, Any] = {
        "feature": free.table["feature"],
        "n_active": free.table["n_active"],
        "status": free.table["status"],
        "I": column(free, "I"),
    }
    how, found = {"free": free.how}, {"free": (column(free, "I"), Null.of(free))}
    for name in (one for one in NULLS if one in removals):
        settings = {**common, **removals[name], "strata": strata_of.get(name)}
        value = columns["I"]
        if removals[name]:
            # one permutation, the fewest: only its I is used, to choose the features worth many
            value = column(moran(matrix, w, permutations=1, **settings), "I")
            columns[f"I_{name}"] = value
        value = np.where(tested, value, np.nan)
        many = {**settings, "permutations": nulls.permutations_screened}
        null, how[name] = screened(matrix, w, value, nulls, many)
        found[name] = value, null
    passes = {}
    for name, (value, null) in found.items():
        q = adjusted(null.p_refined, tested, nulls.p_adjust)
        columns |= {f"p_{name}": null.p, f"q_{name}": q}
        columns |= {f"EI_{name}": null.mean, f"seI_{name}": null.deviation}
        large = np.nan_to_num(value, nan=-np.inf) >= nulls.min_i
        for kind, values in (("p", null.p), ("q", q)):
            passes[f"{name}_{kind}"] = large & (np.nan_to_num(values, nan=1.0) < nulls.alpha)
    for kind in ("p", "q"):
        every = [passes[f"{name}_{kind}"] for name in found if name != "beyond"]
        passes[f"survives_{kind}"] = np.logical_and.reduce(every)
    columns |= {f"passes_{name}": values for name, values in passes.items()}
    table = pa.table({name: _nulls(values) for name, values in columns.items()})
    return table.append_column("verdict", pa.array(verdict(table, nulls.alpha), pa.string())), how


def _nulls(values: Any) -> Any:
    """NaN is null: a result holds no NaN."""
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        return pa.array(values, pa.float64(), from_pandas=True)
    return values


def _matrix(values: Any, places: "Places", name: str) -> Any:
    """CSC or dense [n, F] in the order of the places."""
    if isinstance(values, SparseFeatures):
        if not np.array_equal(values.row_ids, places.row_id):
            if set(values.row_ids.tolist()) != set(places.row_id.tolist()):
                raise UserError(
                    f"Expected {name} of the {places.n} places, got features of "
                    f"{values.n_rows} rows with other row ids."
                )
            return sparse.csc_array(values.acts[values.row_index(places.row_id)])
        return sparse.csc_array(values.acts)
    matrix = sparse.csc_array(values) if sparse.issparse(values) else np.asarray(values)
    shape = tuple(matrix.shape or ())
    if len(shape) != 2 or shape[0] != places.n:
        raise UserError(f"Expected {name} as a matrix of {places.n} rows, got the shape {shape}.")
    return matrix


def _labels(labels: Sequence[Any], n: int) -> list[Any] | None:
    if len(labels) != n:
        raise UserError(f"Expected one label for each of {n} places, got {len(labels)}.")
    return list(labels) if len({one for one in labels if one is not None}) > 1 else None


def _covariates(
    features: Any, places: "Places", further: Mapping[str, Any]
) -> dict[str, Float[np.ndarray, " n"]]:
    found: dict[str, Any] = {"n_chars": [len(name) for name in places.name]}
    if isinstance(features, SparseFeatures):
        order = features.row_index(places.row_id)
        for name in ("n_tokens", "n_pooled"):
            if name in features.rows.column_names:
                found[name] = features.rows[name].to_numpy()[order]
    found |= dict(further)
    return {name: np.asarray(values, dtype=np.float64) for name, values in found.items()}
