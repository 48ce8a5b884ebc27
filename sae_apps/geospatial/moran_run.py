"""One test of Moran's I from features to columns: analytic moments, permutations, corrections."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae_apps.geospatial.moran_null import Batch, Frame, simulate
from sae_apps.geospatial.permutation import PILOT, Strata
from sae_apps.geospatial.tails import Null, adjusted, family_wise, tail_is_valid, tail_p
from sae_apps.geospatial.tally import STOP_AT, Tally
from sae_apps.geospatial.weights import SpatialWeights

PILOT_PERMUTATIONS = 199  # for the scales of the max control
FLOATS = ("I", "VI_rand", "z_rand", "EI_sim", "seI_sim", "z_sim", "p_sim", "p_tail", "q")


@dataclass(frozen=True, eq=False)
class Plan:
    """The options of one test."""

    permutations: int
    alternative: str
    min_active: int
    p_adjust: str | None
    adaptive: bool
    seed: int
    strata: Strata


@dataclass(eq=False)
class Found:
    """Columns as they fill up; NaN where undefined."""

    n_active: Int[np.ndarray, "f"]
    status: np.ndarray
    drawn: Int[np.ndarray, "f"]
    floats: dict[str, Float[np.ndarray, "f"]]
    largest: Float[np.ndarray, "b"]
    """Of each permutation, over all features; -inf where there is none."""
    deviate: Float[np.ndarray, "f"]
    """The observed I on the scale of ``largest``."""

    def put(self, index: Int[np.ndarray, "t"], **values: Float[np.ndarray, "t"]) -> None:
        """Write some columns of some features."""
        for name, column in values.items():
            self.floats[name][index] = column

    @property
    def tested(self) -> Int[np.ndarray, "t"]:
        """Features with status ok."""
        return np.flatnonzero(self.status == "ok")


def run_test(frame: Frame, plan: Plan, is_free: bool) -> Found:
    """Test every feature; ``is_free`` where the analytic moments are those of the null."""
    n_active = frame.columns.n_active()
    f = len(n_active)
    status = np.where(n_active == 0, "dead", np.where(n_active < plan.min_active, "rare", "ok"))
    found = Found(
        n_active, status.astype(object), np.zeros(f, dtype=np.int64),
        {name: np.full(f, np.nan) for name in FLOATS},
        np.full(plan.permutations, -np.inf), np.full(f, np.nan),
    )  # fmt: skip
    for batch in frame.batches(np.flatnonzero(n_active > 0)):
        _describe_batch(frame, batch, found, is_free)
        _permute_batch(frame, plan, batch, found)
    p = found.floats["p_sim"][found.tested]
    if plan.p_adjust == "max":
        q = family_wise(found.deviate[found.tested], found.largest)
        found.put(found.tested, q=q)
    elif plan.p_adjust is not None:
        found.put(found.tested, q=adjusted(p, plan.p_adjust))
    return found


def _describe_batch(frame: Frame, batch: Batch, found: Found, is_free: bool) -> None:
    """I and, under free permutation, its analytic moments."""
    found.status[batch.index[~batch.varies]] = "constant"
    index = batch.index[batch.varies]
    observed, kurtosis = batch.observed[batch.varies], batch.kurtosis[batch.varies]
    found.put(index, I=observed)
    if is_free:
        variance = randomisation_variance(frame.weights, kurtosis)
        mean = -1 / (frame.weights.n - 1)
        z = np.divide(
            observed - mean, np.sqrt(np.maximum(variance, 0)),
            out=np.full_like(observed, np.nan), where=variance > 0,
        )  # fmt: skip
        found.put(index, VI_rand=variance, z_rand=z)


def _permute_batch(frame: Frame, plan: Plan, batch: Batch, found: Found) -> None:
    """p-values and moments of the features with status ok."""
    local = np.flatnonzero(found.status[batch.index] == "ok")
    if not len(local) or not plan.permutations:
        return
    index, observed = batch.index[local], batch.observed[local]
    center = np.full(len(local), -1 / (frame.weights.n - 1))
    variance = randomisation_variance(frame.weights, batch.kurtosis[local])
    # where strata or covariates make this another null, it still has the size of the numbers
    scale = np.sqrt(np.where(variance > 0, variance, 1 / frame.weights.n))

    def tally(stop: int | None) -> Tally:
        return Tally(observed, center, scale, plan.alternative, stop)

    if plan.p_adjust == "max":
        pilot = tally(None)
        for _ in simulate(batch, local, pilot, plan.strata, plan.seed, PILOT_PERMUTATIONS, PILOT):
            pass
        gauge = Null(*pilot.moments())
        found.deviate[index] = gauge.deviate(observed[:, None], plan.alternative)[:, 0]
    else:
        gauge = None
    count = tally(STOP_AT if plan.adaptive else None)
    for start, values in simulate(batch, local, count, plan.strata, plan.seed, plan.permutations):
        if gauge is not None:
            here = slice(start, start + values.shape[1])
            top = gauge.deviate(values, plan.alternative).max(axis=0)
            found.largest[here] = np.maximum(found.largest[here], top)
    _put_counts(found, plan, batch, local, count)


def _put_counts(
    found: Found, plan: Plan, batch: Batch, local: Int[np.ndarray, "t"], count: Tally
) -> None:
    index, observed = batch.index[local], batch.observed[local]
    null = Null(*count.moments())
    z = np.full(len(local), np.nan)
    np.divide(observed - null.mean, null.deviation, out=z, where=null.deviation > 0)
    spread = batch.n / np.maximum(batch.kurtosis[local], 1e-300)
    valid = tail_is_valid(spread, count.seen) & (null.deviation > 0)
    tail = np.where(valid, tail_p(observed, null, plan.alternative), np.nan)
    found.put(
        index, EI_sim=null.mean, seI_sim=null.deviation, z_sim=z, p_sim=count.p(), p_tail=tail
    )
    found.drawn[index] = count.seen


def randomisation_variance(
    weights: SpatialWeights, kurtosis: Float[np.ndarray, "f"]
) -> Float[np.ndarray, "f"]:
    """Var[I] over all orders of the values (Cliff & Ord 1981; esda's VI_rand), n > 3."""
    n, s0, s1, s2 = weights.n, weights.s0, weights.s1, weights.s2
    a = n * ((n**2 - 3 * n + 3) * s1 - n * s2 + 3 * s0**2)
    b = kurtosis * ((n**2 - n) * s1 - 2 * n * s2 + 6 * s0**2)
    return (a - b) / ((n - 1) * (n - 2) * (n - 3) * s0**2) - 1 / (n - 1) ** 2
