"""The theory's conditions judged: what was measured, the bound, and whether it holds.

arXiv 2506.14002: Definition 5.2 (H1 sparse rows, H2 nonzeros bounded away from 0, H3 co-occurrence
far below n^(-1/2), V1 incoherence) and Theorem 6.1 (width M >~ n p^(-s); target frequency
f <~ p <~ min(sqrt f, f d)). The paper states them up to constants; the constants here are choices:

    H1     L0 <= d_in / (2 ln d_sae): a latent's own value exceeds the interference of the others,
           whose largest of d_sae values is about sqrt(2 ln d_sae * L0 / d_in)
    H2     mean nonzero >= 1/4 of the median latent's
    H3     rho_2(j) <= n^(-1/2), n estimated from the latents in whose direction the data have an
           upper mode (copies counted once); on planted data this was 0.2 to 6 times the true n
    V1     nearest latent that is no copy no closer than the closest pair of a random dictionary
    band   freq within [f / 2, min(sqrt f, f d)], f the latent's `band_freq`
    width  log10 M >= log10(n p^(-s)), p the median frequency of alive latents, s the L0

A condition on latents holds where at least 90% of the measurable ones meet it, and nothing is said
where fewer than half of the alive ones can be measured.
"""

from dataclasses import dataclass
from math import log, log10, sqrt

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_core.conditions import Conditions
from sae_core.cooccurrence import COPY
from sae_core.errors import UserError

ENOUGH = 0.9  # share of the measurable latents that must meet a condition
MEASURABLE = 0.5  # share of the alive latents that must be measurable
SMALL = 0.25  # of the median latent's mean nonzero
EXPECTED = 5.0  # joint firings that the sample must let expect at the bound of H3
SLACK = 2.0  # of the lower end of the frequency band


@dataclass(frozen=True)
class Condition:
    """One condition with its measurement."""

    name: str
    """Short name."""
    measured: float | None
    """Measured value, of latents the median; None where undefined."""
    low: float | None
    """Bound from below, if there is one."""
    high: float | None
    """Bound from above, if there is one."""
    holds: bool | None
    """None: cannot be said."""
    met_frac: float | None
    """Share of the measurable latents that meet it; None for conditions on the whole SAE."""
    n_measurable: int | None
    """Latents that could be measured."""
    note: str
    """What the numbers are."""


def n_features(c: Conditions) -> float:
    """n: alive latents whose projection has an upper mode, each group of copies counted once."""
    found = c.is_alive & c.has_band
    return float((1 / (1 + c.n_copies[found].double())).sum())


def random_coherence(m: int, d: int) -> float:
    """The |cosine| that one pair of m random directions in R^d is expected to exceed.

    P(|cos| > c) = I_{1 - c^2}((d - 1) / 2, 1 / 2), and c solves m (m - 1) / 2 * P = 1.

    Raises:
        UserError: fewer than two directions, or d below 1.
    """
    if m < 2 or d < 1:
        raise UserError(f"Expected at least 2 directions and a width >= 1, got {m} and {d}.")
    if d == 1:
        return 1.0
    from scipy.special import betaincinv

    return sqrt(max(0.0, 1 - float(betaincinv((d - 1) / 2, 0.5, min(1.0, 2 / (m * (m - 1)))))))


def judge(c: Conditions) -> tuple[Condition, ...]:
    """H1, H2, H3, V1, target frequency and width, in this order."""
    return (_sparsity(c), _nonzeros(c), _cooccurrence(c), _coherence(c), _band(c), _width(c))


def _sparsity(c: Conditions) -> Condition:
    bound = c.d_in / (2 * log(max(c.d_sae, 2)))
    note = f"L0; 10% to 90% of the tokens: {c.l0_low} to {c.l0_high}; {c.d_sae} latents"
    return Condition("H1 sparsity", c.l0, None, bound, c.l0 <= bound, None, None, note)


def _nonzeros(c: Conditions) -> Condition:
    typical = _median(c.mean_act, c.is_alive)
    bound = None if typical is None else SMALL * typical
    met = c.mean_act >= (bound or 0.0)
    ratio = _median(c.mean_act / c.peak.clamp_min(1e-12), c.is_alive)
    note = "mean nonzero of the median latent, against a quarter of it"
    note += "" if ratio is None else f"; {ratio:.2f} of its peak"
    return _of_latents("H2 nonzeros", c, c.mean_act, met, c.is_alive, (bound, None), note)


def _cooccurrence(c: Conditions) -> Condition:
    n = n_features(c)
    bound = 1 / sqrt(n) if n >= 1 else None
    can = c.sample_count * (bound or 0.0) >= EXPECTED
    note = f"rho_2 of the median latent against n^(-1/2), n estimated as {n:.0f}"
    met = c.rho <= (bound or 0.0)
    return _of_latents("H3 co-occurrence", c, c.rho, met, can, (None, bound), note)


def _coherence(c: Conditions) -> Condition:
    n = int(c.is_alive.sum())
    bound = random_coherence(n, c.d_in) if n > 1 else None
    # where chance alone brings directions as close as copies are, nothing can be told apart
    can = c.is_alive & (bound is not None and bound < COPY)
    largest = float(c.max_cosine.max())
    note = f"nearest direction that is no copy; bound: closest pair of {n} random ones; "
    note += f"largest |cosine| with copies {largest:.2f}"
    met = c.coherence <= (bound or 0.0)
    return _of_latents("V1 coherence", c, c.coherence, met, can, (None, bound), note)


def _band(c: Conditions) -> Condition:
    f = c.band_freq.double()
    can = c.is_alive & c.has_band
    high = torch.minimum(f.sqrt(), f * c.d_in)
    met = (c.freq >= f / SLACK) & (c.freq <= high)
    ratio = c.freq / f.clamp_min(1e-12)
    top = _median(high / f.clamp_min(1e-12), can)
    note = "frequency over that of the feature, estimated from an upper mode"
    return _of_latents("target frequency", c, ratio, met, can, (1 / SLACK, top), note)


def _width(c: Conditions) -> Condition:
    n, p = n_features(c), _median(c.freq, c.is_alive)
    if n < 1 or not p:
        return Condition("width", None, None, None, None, None, None, "no features were found")
    bound, width = log10(n) - c.l0 * log10(p), log10(c.d_sae)
    note = "log10 of the number of latents, against n p^(-s), sufficient but seldom needed"
    return Condition("width", width, bound, None, width >= bound, None, None, note)


def _of_latents(
    name: str,
    c: Conditions,
    value: Tensor,
    met: Bool[Tensor, "d_sae"],
    can: Bool[Tensor, "d_sae"],
    bounds: tuple[float | None, float | None],
    note: str,
) -> Condition:
    n, n_alive = int(can.sum()), int(c.is_alive.sum())
    if not n:
        return Condition(name, None, *bounds, None, None, 0, note)
    share = int((met & can).sum()) / n
    holds = share >= ENOUGH if n >= MEASURABLE * n_alive else None
    return Condition(name, _median(value, can), *bounds, holds, share, n, note)


def _median(value: Tensor, mask: Bool[Tensor, "d_sae"]) -> float | None:
    return float(value[mask].median()) if mask.any() else None
