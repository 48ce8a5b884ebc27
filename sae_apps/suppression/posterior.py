"""How probable each concept is, given the value of one unit: look-up tables from histograms.

    f_ij(b) = r_ij g_ij(b),      f_ij(0) = 1 - r_ij
    r_ij    = (n_ij+ + 1/2) / (n_i + 1)                                  (Jeffreys)
    g_ij(b) = (smooth(count_ij)(b) + alpha q_j(b)) / (n_ij+ + alpha)     (q_j: all classes pooled)
    P(i | a_j in b) = pi_i f_ij(b) / sum_k pi_k f_kj(b)

The idea is that of APP, attenuation based on posterior probabilities (arXiv 2508.15094); its exact
equations were not to be had, so these are this project's. The bins of a unit are the same in every
class, so that their widths cancel. A class with few positive values leans on the pooled density.
``excess`` takes the prior off, so that a unit that tells nothing is left alone; ``posterior`` is
the literal form, which weakens every unit by the prior.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae_apps.suppression.histogram import Histogram
from sae_core.errors import UserError

MODES = ("excess", "posterior")


@dataclass(frozen=True, eq=False)
class Tables:
    """Log-likelihoods of every bin under every class, and the prior."""

    log_mass: Float[np.ndarray, "u c B_plus_1"]
    """log f_ij(b), float32; 0 in the unused atom of two-sided units."""
    edges: Float[np.ndarray, "u B_minus_1"]
    """As in the histogram."""
    classes: tuple[str, ...]
    """Names of the classes."""
    prior: Float[np.ndarray, " c"]
    """pi, sums to 1."""
    has_atom: bool
    """Whether bin 0 is the atom at zero."""


def posterior_tables(
    histogram: Histogram, prior: Mapping[str, float] | None = None, *, alpha: float = 1.0
) -> Tables:
    """Tables of all units of a histogram.

    Args:
        histogram: counts by unit, class and bin.
        prior: base rate of every class, normalised here; None: uniform.
        alpha: pseudo-tokens of the pooled density in each class.
    Raises:
        UserError: alpha not positive, fewer than two classes, or a prior of other classes.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise UserError(f"Expected a positive alpha, got {alpha}.")
    if len(histogram.classes) < 2:
        raise UserError(f"Expected at least two classes, got {', '.join(histogram.classes)}.")
    positive = histogram.counts[:, :, 1:]
    fired = positive.sum(axis=2, dtype=np.float64)
    pooled = smooth(positive.sum(axis=1))
    total = pooled.sum(axis=1, keepdims=True)
    flat = np.full_like(pooled, 1 / pooled.shape[1])
    pooled = np.divide(pooled, total, out=flat, where=total > 0)
    mass = (smooth(positive) + alpha * pooled[:, None]) / (fired[:, :, None] + alpha)
    log_mass = np.zeros(histogram.counts.shape)
    log_mass[:, :, 1:] = np.log(np.maximum(mass, np.finfo(np.float64).tiny))
    if histogram.has_atom:
        rate = (fired + 0.5) / (histogram.n + 1)
        log_mass[:, :, 1:] += np.log(rate)[:, :, None]
        log_mass[:, :, 0] = np.log1p(-rate)
    return Tables(
        log_mass.astype(np.float32),
        histogram.edges,
        histogram.classes,
        check_prior(histogram.classes, prior),
        histogram.has_atom,
    )


def smooth(counts: Int[np.ndarray, "... B"]) -> Float[np.ndarray, "... B"]:
    """Kernel 1-2-1 over neighbouring bins, reflected at both ends: the sum stays."""
    padded = np.concatenate([counts[..., :1], counts, counts[..., -1:]], axis=-1)
    return (padded[..., :-2] + 2.0 * padded[..., 1:-1] + padded[..., 2:]) / 4.0


def check_prior(
    classes: Sequence[str], prior: Mapping[str, float] | None
) -> Float[np.ndarray, " c"]:
    """The prior as an array that sums to 1; uniform for None.

    Raises:
        UserError: other classes, or rates that are not positive.
    """
    if prior is None:
        return np.full(len(classes), 1 / len(classes))
    if set(prior) != set(classes):
        raise UserError(
            f"Expected a prior for each of {', '.join(classes)}, got {', '.join(map(str, prior))}."
        )
    rates = np.array([float(prior[name]) for name in classes])
    if not (np.isfinite(rates).all() and (rates > 0).all()):
        raise UserError(f"Expected positive rates as prior, got {dict(prior)}.")
    return rates / rates.sum()


def posterior(tables: Tables) -> Float[np.ndarray, "u c B_plus_1"]:
    """P(class | unit, bin): sums to 1 over the classes."""
    joint = _likelihood(tables) * tables.prior[:, None]
    return joint / joint.sum(axis=1, keepdims=True)


def attenuation(
    tables: Tables, concepts: Sequence[str], mode: str = "excess"
) -> Float[np.ndarray, "u B_plus_1"]:
    """Share of a unit's value that is taken away in each bin, float32 in [0, 1].

        posterior:  w = P,          P = sum of the posteriors of the concepts
        excess:     w = max(0, (P - pi) / (1 - pi))
                      = max(0, sum_{c in C, i not in C} pi_c pi_i (f_c - f_i) / (m (1 - pi)))

    with pi the prior of the concepts together and m = sum_i pi_i f_i. The second form of excess is
    exactly 0 where the classes agree. Several concepts make one weight, so that nothing is taken
    twice. The atom of one-sided units has weight 0.

    Raises:
        UserError: an unknown mode or concept, no concept, or all classes.
    """
    if mode not in MODES:
        raise UserError(f"Expected a mode of {MODES}, got {mode!r}.")
    inside = concept_mask(tables.classes, concepts)
    f, pi = _likelihood(tables), tables.prior
    m = (f * pi[:, None]).sum(axis=1)
    if mode == "posterior":
        w = (f * pi[:, None])[:, inside].sum(axis=1) / m
    else:
        w = np.zeros_like(m)
        for c in np.flatnonzero(inside):
            for i in np.flatnonzero(~inside):
                w += pi[c] * pi[i] * (f[:, c] - f[:, i])
        w = np.clip(w / (m * pi[~inside].sum()), 0.0, 1.0)
    if tables.has_atom:
        w[:, 0] = 0.0
    return w.astype(np.float32)


def log_odds(tables: Tables, concepts: Sequence[str]) -> Float[np.ndarray, "u B_plus_1"]:
    """Evidence of each bin for the concepts: log P/(1 - P) less its value at the prior; float32."""
    inside = concept_mask(tables.classes, concepts)
    joint = _likelihood(tables) * tables.prior[:, None]
    odds = np.log(joint[:, inside].sum(axis=1)) - np.log(joint[:, ~inside].sum(axis=1))
    pi = tables.prior[inside].sum()
    return (odds - np.log(pi / (1 - pi))).astype(np.float32)


def concept_mask(classes: Sequence[str], concepts: Sequence[str]) -> np.ndarray:
    """Which classes are concepts to be suppressed, bool [c].

    Raises:
        UserError: an unknown concept, none, or all classes.
    """
    unknown = [name for name in concepts if name not in classes]
    if unknown or not concepts:
        got = repr(unknown[0]) if unknown else "none"
        raise UserError(f"Expected a concept of {', '.join(classes)}, got {got}.")
    mask = np.array([name in concepts for name in classes])
    if mask.all():
        raise UserError(f"Expected at least one class besides {', '.join(concepts)}, got none.")
    return mask


def _likelihood(tables: Tables) -> Float[np.ndarray, "u c B_plus_1"]:
    """f up to a factor of each unit and bin: the largest class has 1, so nothing underflows."""
    log_mass = tables.log_mass.astype(np.float64)
    return np.exp(np.maximum(log_mass - log_mass.max(axis=1, keepdims=True), -700.0))
