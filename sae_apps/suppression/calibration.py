"""Whether the posteriors are right: log-loss against the prior, and reliability, on held-out texts.

    loss_j = - sum_i pi_i mean_{tokens t of class i} log P_j(right side | a_jt)
    gate:    logit P(C | t) = logit pi + T sum_j (logit P_j(C | a_jt) - logit pi)

Every class counts as its prior says, whatever its number of tokens. The joint gate is a naive Bayes
of all units, tempered by the T that has the least loss on the held-out texts.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_GRID = np.geomspace(0.01, 2.0, 40)
_N_BINS = 10


@dataclass(frozen=True, eq=False)
class Calibration:
    """Measured on texts that the tables were not fitted on; the units were chosen with them."""

    loss: Float[np.ndarray, " u"]
    """Log-loss of each chosen unit alone, nats a token."""
    prior_loss: float
    """Log-loss of the prior."""
    gate_loss: float
    """Log-loss of the joint gate; the temperature was fitted on the same tokens."""
    temperature: float
    """T of the joint gate."""
    predicted: Float[np.ndarray, " bins"]
    """Joint gate: mean probability in each tenth of [0, 1]; 0 where no token is."""
    observed: Float[np.ndarray, " bins"]
    """Joint gate: share of concept tokens there."""
    weight: Float[np.ndarray, " bins"]
    """Share of the tokens there, sums to 1."""
    n_tokens: int
    """Held-out tokens."""


def token_weights(
    label: Int[np.ndarray, " n"], prior: Float[np.ndarray, " c"]
) -> Float[np.ndarray, " n"]:
    """Weights that give each class its prior and sum to 1; classes without tokens are left out."""
    n = np.bincount(label, minlength=len(prior))
    weight = (prior / np.maximum(n, 1))[label]
    return weight / weight.sum()


def calibrate(
    evidence: Float[np.ndarray, "n u"],
    is_concept: Bool[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    prior: float,
) -> Calibration:
    """Losses of single units and of their joint gate.

    Args:
        evidence: log-odds of each unit on each held-out token, less those of the prior.
        is_concept: whether the token is of a concept.
        weight: of each token, sums to 1.
        prior: of the concepts together.
    """
    logit = np.log(prior / (1 - prior))
    sign = np.where(is_concept, -1.0, 1.0)

    def loss(log_odds: np.ndarray) -> np.ndarray:
        return weight @ np.logaddexp(0.0, sign[:, None] * (logit + log_odds))

    joint = evidence.sum(axis=1, dtype=np.float64)[:, None]
    losses = np.array([float(loss(t * joint)[0]) for t in _GRID])
    best = int(losses.argmin())
    p = 1 / (1 + np.exp(-np.clip(logit + _GRID[best] * joint[:, 0], -700, 700)))
    place = np.minimum((p * _N_BINS).astype(np.int64), _N_BINS - 1)
    mass = np.bincount(place, weight, _N_BINS)
    safe = np.where(mass > 0, mass, 1.0)
    return Calibration(
        loss=loss(evidence),
        prior_loss=float(loss(np.zeros_like(joint))[0]),
        gate_loss=float(losses[best]),
        temperature=float(_GRID[best]),
        predicted=np.bincount(place, weight * p, _N_BINS) / safe,
        observed=np.bincount(place, weight * is_concept, _N_BINS) / safe,
        weight=mass,
        n_tokens=len(weight),
    )
