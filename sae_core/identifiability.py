"""How well a dictionary agrees with the truth, or with the dictionary of another training run.

    MCS_i    = max_j cos(a_i, b_j)                          max cosine similarity of row i of a
    FRR(t)   = share of true features v_i with MCS_i >= t   feature recovery rate, arXiv 2506.14002
    MMCS     = mean_i MCS_i                                 mean max cosine
    share(t) = share of latents with MCS_i > t              arXiv 2506.14002, figure 5
    PW-MCC   = mean cosine of the best one-to-one matching  arXiv 2505.20254; see matching.py

Cosines are signed everywhere: latents are one-sided, and a latent's negative is another feature.
MCS lets many latents share one partner, PW-MCC does not: where a run splits one feature into many
copies, MCS stays high and PW-MCC falls. A raw cosine means little by itself, because the best of
many random directions is not at 0: `chance_mcs` and `chance_pw_mcc` say where chance is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.cosines import max_cosine
from sae_core.errors import UserError
from sae_core.matching import Matching, pw_mcc

__all__ = [
    "Agreement",
    "Matching",
    "agreement",
    "chance_mcs",
    "chance_pw_mcc",
    "consistency",
    "feature_recovery_rate",
    "max_cosine",
    "mcs_shares",
    "mean_max_cosine",
    "pw_mcc",
    "top_fraction",
]

THRESHOLDS = (0.6, 0.7, 0.8, 0.9)
FRACTIONS = (0.003, 0.0005)


def feature_recovery_rate(
    dictionary: Float[Tensor, "m _"], truth: Float[Tensor, "n d"], threshold: float
) -> float:
    """FRR: the share of true features that some latent's direction meets at cosine >= threshold.

    Raises:
        UserError: as `max_cosine`; a threshold outside [-1, 1].
    """
    _check_thresholds((threshold,))
    return float((max_cosine(truth, dictionary)[0] >= threshold).double().mean())


def mean_max_cosine(dictionary: Float[Tensor, "m _"], truth: Float[Tensor, "n d"]) -> float:
    """MMCS: the mean, over the true features, of the best latent's cosine.

    Raises:
        UserError: as `max_cosine`.
    """
    return float(max_cosine(truth, dictionary)[0].double().mean())


def mcs_shares(
    mcs: Float[Tensor, "n"], thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, float]:
    """threshold -> share of the latents whose max cosine similarity is above it.

    Raises:
        UserError: no latents; a threshold outside [-1, 1].
    """
    _check_thresholds(thresholds)
    if not len(mcs):
        raise UserError("Expected the similarity of at least 1 latent, got 0.")
    return {t: float((mcs > t).double().mean()) for t in thresholds}


def top_fraction(score: Float[Tensor, "n"], fraction: float) -> Bool[Tensor, "n"]:
    """True for the ceil(fraction * n) largest scores; of equal ones the first.

    Raises:
        UserError: a fraction outside (0, 1], no scores, or NaN among them.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"Expected a fraction in (0, 1], got {fraction}.")
    if not len(score) or score.isnan().any():
        raise UserError(
            f"Expected at least 1 score and no NaN, got {len(score)} scores, "
            f"{int(score.isnan().sum())} of them NaN."
        )
    # 1e-9: 0.07 * 100 is 7.000000000000001 in floating point and must be 7
    n = max(ceil(fraction * len(score) - 1e-9), 1)
    chosen = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    chosen[score.argsort(descending=True, stable=True)[:n]] = True
    return chosen


def consistency(
    dictionaries: Sequence[Float[Tensor, "_ _"]],
    alive: Sequence[Bool[Tensor, "_"]] | None = None,
    which: int = 0,
) -> Float[Tensor, "m"]:
    """For each latent of one run: the mean over the other runs of its max cosine there.

    Args:
        dictionaries: one [m_r, d] a run, of at least two runs.
        alive: which latents of each run count as partners; None: all. A latent of run `which` that
            is not alive gets 0.
        which: the run whose latents are scored.
    Raises:
        UserError: fewer than two runs, no run `which`, masks that do not fit or leave no latent;
            as `max_cosine`.
    """
    if len(dictionaries) < 2 or not 0 <= which < len(dictionaries):
        raise UserError(
            "Expected at least 2 runs and one of them to score, "
            f"got {len(dictionaries)} runs and number {which}."
        )
    if alive is not None and len(alive) != len(dictionaries):
        raise UserError(
            f"Expected a mask for each of {len(dictionaries)} runs, got {len(alive)} masks."
        )
    masks = [_mask(d, alive[r] if alive else None) for r, d in enumerate(dictionaries)]
    own, mask = dictionaries[which], masks[which]
    others = [d[m] for r, (d, m) in enumerate(zip(dictionaries, masks, strict=True)) if r != which]
    found = [max_cosine(own[mask], other)[0] for other in others]
    score = found[0].new_zeros(len(own))
    score[mask] = torch.stack(found).mean(dim=0)
    return score


@dataclass(frozen=True)
class Agreement:
    """How far the dictionary a of one run is found again in the dictionary b of another."""

    pw_mcc: float
    """Mean cosine of the best one-to-one matching of the alive latents of both, over
    min(n_alive_a, n_alive_b) pairs."""
    gap: float
    """The exact PW-MCC lies in [pw_mcc, pw_mcc + gap]; 0 when solved exactly."""
    mcs: Float[Tensor, "n_a"]
    """Max cosine similarity of each latent of a with the alive latents of b. 0 where `alive` is
    False; no number below counts these."""
    alive: Bool[Tensor, "n_a"]
    """Which latents of a were compared."""
    n_alive_a: int
    """How many latents of a were compared."""
    n_alive_b: int
    """How many latents of b they were compared with."""
    mean_mcs: float
    """Mean of `mcs` over the alive latents of a."""
    chance_mcs: float
    """What `mean_mcs` would be against n_alive_b random directions."""
    shares: dict[float, float]
    """threshold -> share of the alive latents of a with `mcs` above it."""
    top_shares: dict[float, dict[float, float]]
    """fraction -> threshold -> the same share among the latents of a with the largest peak; empty
    without peaks."""
    n_top: dict[float, int]
    """fraction -> number of latents in it: ceil(fraction * n_a), dead ones counted in n_a but never
    chosen."""


def agreement(
    a: Float[Tensor, "n_a d"],
    b: Float[Tensor, "n_b _"],
    *,
    alive_a: Bool[Tensor, "_"] | None = None,
    alive_b: Bool[Tensor, "_"] | None = None,
    peak_a: Float[Tensor, "_"] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Agreement:
    """PW-MCC and max cosine similarities of two runs, over alive latents only.

    PW-MCC is symmetric in a and b, the rest is not: it says of the latents of a whether b has them.

    Args:
        a, b: [n_a, d] and [n_b, d] directions (rows of W_dec).
        alive_a, alive_b: [n_a] and [n_b], which latents to compare; None: all.
        peak_a: [n_a] largest activation of each latent, which the top fractions are taken by.
        fractions: top fractions of all n_a latents, as in arXiv 2506.14002 (0.3% and 0.05%).
        thresholds: cosines in [-1, 1].
    Raises:
        UserError: masks or peaks that do not fit, no alive latent; as `pw_mcc`, `top_fraction`.
    """
    mask_a, mask_b = _mask(a, alive_a), _mask(b, alive_b)
    if peak_a is not None and len(peak_a) != len(a):
        raise UserError(f"Expected a peak for each of {len(a)} latents, got {len(peak_a)}.")
    kept_a, kept_b = a[mask_a], b[mask_b]
    matching = pw_mcc(kept_a, kept_b)
    found, _ = max_cosine(kept_a, kept_b)
    mcs = found.new_zeros(len(a))
    mcs[mask_a] = found
    tops = {}
    if peak_a is not None:
        score = peak_a.masked_fill(~mask_a, -torch.inf)
        tops = {f: top_fraction(score, f) & mask_a for f in fractions}
    return Agreement(
        pw_mcc=matching.mean,
        gap=matching.gap,
        mcs=mcs,
        alive=mask_a,
        n_alive_a=len(kept_a),
        n_alive_b=len(kept_b),
        mean_mcs=float(found.double().mean()),
        chance_mcs=chance_mcs(a.shape[1], len(kept_b)),
        shares=mcs_shares(found, thresholds),
        top_shares={f: mcs_shares(mcs[top], thresholds) for f, top in tops.items()},
        n_top={f: int(top.sum()) for f, top in tops.items()},
    )


def chance_mcs(d: int, m: int) -> float:
    """The expected max cosine of any direction with m independent random directions in R^d.

    (1 + cos) / 2 of a random direction follows Beta((d-1)/2, (d-1)/2); with F its distribution
    function, the largest of m has F^m, and its mean is the integral over v in (0, 1) of F's
    quantile at v^(1/m). In R^1 a cosine is 1 or -1.

    Raises:
        UserError: d or m below 1.
    """
    if min(d, m) < 1:
        raise UserError(f"Expected a width and a number of directions >= 1, got {d} and {m}.")
    if d == 1:
        return 1 - 2 * 0.5**m
    from scipy.integrate import quad
    from scipy.special import betaincinv

    shape = (d - 1) / 2

    def quantile(v: float) -> float:
        tail = -np.expm1(log(v) / m)  # 1 - v^(1/m), without losing its digits for large m
        return float(1 - 2 * betaincinv(shape, shape, tail))

    return float(quad(quantile, 0, 1, epsabs=1e-9)[0])


def chance_pw_mcc(n: int, d: int, m: int, seed: int) -> float:
    """PW-MCC of two independent dictionaries of n and m random directions in R^d: one draw.

    There is no closed form for it. The draw varies little: the mean is over min(n, m) pairs.

    Raises:
        UserError: a size below 1.
    """
    if min(n, d, m) < 1:
        raise UserError(f"Expected sizes n, d and m >= 1, got {n}, {d} and {m}.")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, d, generator=generator) for size in (n, m))
    return pw_mcc(a, b).mean


def _mask(x: Float[Tensor, "n d"], alive: Bool[Tensor, "_"] | None) -> Bool[Tensor, "n"]:
    if alive is None:
        alive = torch.ones(len(x), dtype=torch.bool)
    if len(alive) != len(x) or not alive.any():
        raise UserError(
            f"Expected a mask of {len(x)} latents with at least one alive, "
            f"got {len(alive)} with {int(alive.sum())}."
        )
    return alive.to(x.device)


def _check_thresholds(thresholds: Sequence[float]) -> None:
    if not all(-1 <= t <= 1 for t in thresholds):
        raise UserError(f"Expected thresholds in [-1, 1], got {list(thresholds)}.")
