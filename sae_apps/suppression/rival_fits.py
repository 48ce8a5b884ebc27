"""Fit the rivals of APP from unit values and labels.

Unit j, concept c against the rest r, n samples of each:

    d'_j    = (mu_c - mu_r) / sqrt((var_c + var_r) / 2)
    AUROC_j = P(a_j of c > a_j of r) + P(equal) / 2
    range   = [mu_c - tau sd_c, mu_c + tau sd_c]
    AurA    : a_j' = alpha_j a_j,  alpha_j = 1 - 2 (AUROC_j - 1/2) if AUROC_j > 1/2 else 1

Masks and ranges as in NeuronLens (github MuhammadUmairHaider/NeuronLens: units by mean |a| over the
concept's samples, tau 2, replaced by 0), AurA as in github apple/ml-aura; LEACE is the package
``concept-erasure``. Deviation: samples are tokens, the population that edits act on, where
NeuronLens takes the last token of a prompt and AurA the maximum over a sentence.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from sae_apps.suppression.probes import check_labels
from sae_apps.suppression.rivals import EqualNormEdit, GateEdit, PlaneEdit
from sae_apps.suppression.units import Units
from sae_core.errors import UserError
from sae_core.extras import require

Values = sparse.csr_array | np.ndarray
TAU = 2.0  # half-width of a range in standard deviations: the default of NeuronLens
_INF = float("inf")


@dataclass(frozen=True, eq=False)
class UnitMoments:
    """Means and spreads of units over the concept and the rest, float64."""

    mean: Float[np.ndarray, "2 u"]
    """[rest, concept] means."""
    var: Float[np.ndarray, "2 u"]
    """[rest, concept] variances (divided by n)."""
    mean_abs: Float[np.ndarray, "2 u"]
    """[rest, concept] means of |a|."""
    mean_positive: Float[np.ndarray, " u"]
    """Of the concept's positive values; 0 where there are none."""
    sd_positive: Float[np.ndarray, " u"]
    """Spread of the concept's positive values."""

    @property
    def d_prime(self) -> Float[np.ndarray, " u"]:
        """Signed: positive where the concept's mean is larger; 0 for a constant unit."""
        pooled = np.sqrt(self.var.mean(axis=0))
        gap = self.mean[1] - self.mean[0]
        return np.divide(gap, pooled, out=np.zeros_like(gap), where=pooled > 0)


def moments(values: Values, is_concept: Bool[np.ndarray, " n"]) -> UnitMoments:
    """Moments of units [n, u], sparse or dense.

    Raises:
        UserError: one class only, or labels of another length.
    """
    rows: Any = sparse.csr_array(values).astype(np.float64)
    check_labels(np.empty(rows.shape[0]), is_concept)
    mean, var, mean_abs = [], [], []
    for chosen in (~is_concept, is_concept):
        part = rows[np.flatnonzero(chosen)]
        first = np.asarray(part.mean(axis=0)).ravel()
        # centred before squaring where it can be: var = E a^2 - mean^2 loses digits
        inner = part.copy()
        inner.data = (inner.data - first[inner.indices]) ** 2
        stored = np.bincount(part.indices, minlength=part.shape[1])
        total = np.asarray(inner.sum(axis=0)).ravel() + (part.shape[0] - stored) * first**2
        mean.append(first)
        var.append(total / part.shape[0])
        mean_abs.append(np.asarray(abs(part).mean(axis=0)).ravel())
    part = rows[np.flatnonzero(is_concept)]
    part.data = np.where(part.data > 0, part.data, 0.0)
    part.eliminate_zeros()
    n = np.maximum(np.bincount(part.indices, minlength=part.shape[1]), 1)
    positive = np.asarray(part.sum(axis=0)).ravel() / n
    part.data = (part.data - positive[part.indices]) ** 2
    spread = np.sqrt(np.asarray(part.sum(axis=0)).ravel() / n)
    return UnitMoments(np.stack(mean), np.stack(var), np.stack(mean_abs), positive, spread)


def auroc(values: Values, is_concept: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " u"]:
    """AUROC of each unit for the concept, ties counted half; exact."""
    from scipy.stats import rankdata

    columns: Any = sparse.csc_array(values)
    columns.eliminate_zeros()
    check_labels(np.empty(columns.shape[0]), is_concept)
    n_concept = int(is_concept.sum())
    n_rest = len(is_concept) - n_concept
    found = np.empty(columns.shape[1])
    for unit in range(columns.shape[1]):
        place = slice(columns.indptr[unit], columns.indptr[unit + 1])
        value, label = columns.data[place], is_concept[columns.indices[place]]
        n_zero = len(is_concept) - len(value)
        rank = rankdata(value) + n_zero * (value > 0)
        middle = int((value < 0).sum()) + (n_zero + 1) / 2
        total = rank[label].sum() + middle * (n_concept - int(label.sum()))
        found[unit] = (total - n_concept * (n_concept + 1) / 2) / (n_concept * n_rest)
    return found


def choose_units(
    stats: UnitMoments,
    n: int,
    by: Literal["mean_abs", "d_prime"] = "d_prime",
    *,
    two_sided: bool = False,
) -> Int[np.ndarray, " n"]:
    """The n units that speak most of the concept, best first; ties by number.

    Args:
        by: ``mean_abs``: mean |a| over the concept, as NeuronLens; ``d_prime``: separation.
        two_sided: with d_prime, also units that are lower for the concept (dense units); one-sided
            units that fire less for the concept cannot be what carries it.
    Raises:
        UserError: fewer units than asked for.
    """
    size = len(stats.mean_positive)
    if not 1 <= n <= size:
        raise UserError(f"Expected between 1 and {size} units, got {n}.")
    if by not in ("mean_abs", "d_prime"):
        raise UserError(f"Expected by to be 'mean_abs' or 'd_prime', got {by!r}.")
    score = stats.mean_abs[1] if by == "mean_abs" else stats.d_prime
    return np.argsort(-(np.abs(score) if two_sided else score), kind="stable")[:n]


def _gate(
    units: Units,
    chosen: Int[np.ndarray, " k"],
    weight: Float[np.ndarray, " u"] | float,
    low: Float[np.ndarray, " u"] | float = -_INF,
    high: Float[np.ndarray, " u"] | float = _INF,
    neutral: Float[np.ndarray, " u"] | float = 0.0,
) -> GateEdit:
    """A gate on the chosen units; values by number of the unit, or one for all."""

    def tensor(value: Any) -> Tensor:
        every = np.broadcast_to(value, (units.n_units,)).astype(np.float32)
        return torch.from_numpy(every[chosen])

    return GateEdit(
        _take(units, chosen), tensor(weight), tensor(low), tensor(high), tensor(neutral)
    )


def _take(units: Units, chosen: Int[np.ndarray, " k"]) -> Units:
    return units.take(torch.from_numpy(np.asarray(chosen, dtype=np.int64)))


def fit_mask(
    units: Units, stats: UnitMoments, chosen: Int[np.ndarray, " k"], *, to_rest: bool = False
) -> GateEdit:
    """Full masking of the chosen units.

    Args:
        units: all units of a place.
        stats: of all units.
        to_rest: draw to the rest's mean instead of 0 (two-sided units only).
    """
    return _gate(units, chosen, 1.0, neutral=stats.mean[0] if to_rest else 0.0)


def fit_range(
    units: Units,
    stats: UnitMoments,
    chosen: Int[np.ndarray, " k"],
    *,
    tau: float = TAU,
    positives: bool = False,
) -> GateEdit:
    """Range suppression: chosen units within mu +- tau sd of the concept's values become 0.

    Args:
        positives: mean and spread of the concept's positive values; else of all, zeros included,
            as published.
    Raises:
        UserError: a tau that is not positive.
    """
    if not tau > 0:
        raise UserError(f"Expected a positive tau, got {tau}.")
    mean = stats.mean_positive if positives else stats.mean[1]
    sd = stats.sd_positive if positives else np.sqrt(stats.var[1])
    return _gate(units, chosen, 1.0, mean - tau * sd, mean + tau * sd)


def fit_aura(
    units: Units,
    values: Values,
    is_concept: Bool[np.ndarray, " n"],
    chosen: Int[np.ndarray, " k"] | None = None,
) -> GateEdit:
    """AurA: every unit is damped by its own constant, weight 1 - alpha = max(0, 2 AUROC - 1).

    Args:
        chosen: units to be damped; None: all that are above 1/2, as published.
    Raises:
        UserError: no unit is above 1/2.
    """
    weight = np.maximum(0.0, 2 * (auroc(values, is_concept) - 0.5))
    if chosen is None:
        chosen = np.flatnonzero(weight)
    if not weight[chosen].any():
        raise UserError("Expected a unit whose AUROC is above 0.5, got none.")
    return _gate(units, chosen, weight)


def _space(values: Values, units: Units | None, chosen: Any) -> tuple[np.ndarray, Units | None]:
    """Dense float64 values of the space that a plane is in, and its units."""
    if (units is None) != (chosen is None):
        raise UserError("Expected units and chosen together, got one of them alone.")
    some: Any = values if chosen is None else sparse.csr_array(values)[:, chosen]
    dense = some if isinstance(some, np.ndarray) else some.toarray()
    taken = None if units is None or chosen is None else _take(units, chosen)
    return dense.astype(np.float64), taken


def fit_direction(
    hook_point: str,
    values: Values,
    is_concept: Bool[np.ndarray, " n"],
    *,
    center: Literal["origin", "rest"] = "origin",
    units: Units | None = None,
    chosen: Int[np.ndarray, " k"] | None = None,
) -> PlaneEdit:
    """Ablation of the difference of means: v' = v - s (d . (v - c)) d, d = (mu_c - mu_r) / ||..||.

    Args:
        values: [n, d] activations at the hook point, or values of all units where ``units`` is
            given.
        center: ``origin`` projects the direction out; ``rest`` keeps what the rest has of it.
        units: the direction is one in the space of these units...
        chosen: ... of those with these numbers.
    Raises:
        UserError: one class only, or equal means.
    """
    dense, space = _space(values, units, chosen)
    check_labels(dense, is_concept)
    rest = dense[~is_concept].mean(axis=0)
    gap = dense[is_concept].mean(axis=0) - rest
    norm = float(np.linalg.norm(gap))
    if norm == 0:
        raise UserError("Expected means that differ between concept and rest, got equal ones.")
    direction = torch.from_numpy((gap / norm).astype(np.float32))[:, None]
    middle = torch.from_numpy(rest.astype(np.float32))
    if center == "origin":
        middle = torch.zeros_like(middle)
    return PlaneEdit(hook_point, direction, direction, middle, units=space)


def fit_leace(
    hook_point: str,
    values: Values,
    is_concept: Bool[np.ndarray, " n"],
    *,
    units: Units | None = None,
    chosen: Int[np.ndarray, " k"] | None = None,
) -> PlaneEdit:
    """LEACE with the package ``concept-erasure``: no linear probe beats chance on the fitted rows.

    Args: as ``fit_direction``.

    Raises:
        MissingExtraError: the package is not installed.
        UserError: one class only.
    """
    with warnings.catch_warnings():
        # the package is compiled by torch.jit.script while it is imported, which warns
        warnings.simplefilter("ignore", DeprecationWarning)
        package = require("concept_erasure", "rivals")
    dense, space = _space(values, units, chosen)
    check_labels(dense, is_concept)
    labels = torch.from_numpy(is_concept.astype(np.float64))[:, None]
    # float64 while fitting: the whitening inverts a covariance
    eraser = package.LeaceEraser.fit(torch.from_numpy(dense), labels)
    left, right = eraser.proj_left.float(), eraser.proj_right.T.float().contiguous()
    return PlaneEdit(hook_point, left, right, eraser.bias.float(), units=space)


def random_units(
    reference: Any, units: Units, live: Bool[np.ndarray, " u"], n: int, seed: int
) -> EqualNormEdit:
    """The control of a reference edit: n units drawn by lot, the same size of change.

    Args:
        live: [u] units to draw from.
        n: how many.
    Raises:
        UserError: fewer units to draw from.
    """
    places = np.flatnonzero(live)
    if not 1 <= n <= len(places):
        raise UserError(f"Expected between 1 and {len(places)} random units, got {n}.")
    rng = np.random.default_rng(seed)
    drawn = rng.choice(places, n, replace=False)
    signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), n)
    return EqualNormEdit(reference, _take(units, drawn), torch.from_numpy(signs))
