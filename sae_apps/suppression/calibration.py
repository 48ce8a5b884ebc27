"""Whether the posteriors are right: log-loss against the prior, and reliability, on held-out texts.

    loss_j = - sum_i pi_i mean_{tokens t of class i} log P_j(right side | a_jt)
    gate:    logit P(C | t) = logit pi + T sum_j (logit P_j(C | a_jt) - logit pi)

Every class counts as its prior says, whatever its number of tokens. The joint gate is a naive Bayes
of all units, tempered by the T of a grid that has the least loss on the held-out texts. Everything
is a sum over the tokens of a class, for each T of the grid: memory does not grow with them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_apps.suppression.bins import bin_of
from sae_apps.suppression.posterior import Tables, concept_mask, log_odds
from sae_apps.suppression.tokens import TokenValues

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


def calibration_of(
    blocks: Iterable[TokenValues],
    tables: Tables,
    index: Int[np.ndarray, " u"],
    labels: Int[np.ndarray, " n_texts"],
    concepts: Sequence[str],
) -> Calibration | None:
    """Calibration of chosen units; None without held-out tokens on both sides.

    Args:
        blocks: held-out tokens, iterated once.
        tables: of the chosen units.
        index: their numbers.
        labels: class of each text.
        concepts: what is suppressed.
    """
    evidence, place = log_odds(tables, concepts), np.arange(len(index))
    sums = CalibrationSums(len(index), tables.prior, concept_mask(tables.classes, concepts))
    for block in blocks:
        dense = block.of_units(index)
        unit = np.broadcast_to(place, dense.shape).ravel()
        bins = bin_of(dense.ravel(), unit, tables.edges, tables.has_atom)
        sums.update(evidence[unit, bins].reshape(dense.shape), labels[block.text])
    return sums.compute()


class CalibrationSums:
    """Losses of single units and of their joint gate, summed over the tokens of each class."""

    def __init__(
        self, n_units: int, prior: Float[np.ndarray, " c"], inside: Bool[np.ndarray, " c"]
    ) -> None:
        """Start with nothing.

        Args:
            n_units: chosen units.
            prior: of each class, sums to 1.
            inside: which classes are concepts.
        """
        self._prior, self._inside = prior, inside
        pi = prior[inside].sum()
        self._logit = np.log(pi / (1 - pi))
        c = len(prior)
        self._n = np.zeros(c, dtype=np.int64)
        self._loss = np.zeros((c, n_units + 1))  # the last: the prior alone
        self._gate = np.zeros((c, len(_GRID)))
        self._mass, self._p = (np.zeros((c, len(_GRID), _N_BINS)) for _ in range(2))

    def update(self, evidence: Float[np.ndarray, "n u"], label: Int[np.ndarray, " n"]) -> None:
        """Add tokens.

        Args:
            evidence: log-odds of each unit on each token, less those of the prior.
            label: class of each token.
        """
        padded = np.pad(evidence, ((0, 0), (0, 1)))
        joint = evidence.sum(axis=1, dtype=np.float64)
        for one in np.unique(label):
            mine = label == one
            sign = -1.0 if self._inside[one] else 1.0
            self._n[one] += mine.sum()
            self._loss[one] += np.logaddexp(0.0, sign * (self._logit + padded[mine])).sum(axis=0)
            for t, temperature in enumerate(_GRID):
                odds = self._logit + temperature * joint[mine]
                self._gate[one, t] += np.logaddexp(0.0, sign * odds).sum()
                p = 1 / (1 + np.exp(-np.clip(odds, -700, 700)))
                place = np.minimum((p * _N_BINS).astype(np.int64), _N_BINS - 1)
                self._mass[one, t] += np.bincount(place, minlength=_N_BINS)
                self._p[one, t] += np.bincount(place, p, _N_BINS)

    def compute(self) -> Calibration | None:
        """The result; None without tokens on both sides."""
        present, inside = self._n > 0, self._inside
        if not (present & inside).any() or not (present & ~inside).any():
            return None
        weight = class_weights(self._n, self._prior)
        loss, gate = weight @ self._loss, weight @ self._gate
        best = int(gate.argmin())
        mass = weight @ self._mass[:, best]
        safe = np.where(mass > 0, mass, 1.0)
        return Calibration(
            loss=loss[:-1],
            prior_loss=float(loss[-1]),
            gate_loss=float(gate[best]),
            temperature=float(_GRID[best]),
            predicted=weight @ self._p[:, best] / safe,
            observed=weight[inside] @ self._mass[inside, best] / safe,
            weight=mass,
            n_tokens=int(self._n.sum()),
        )


def class_weights(
    n: Int[np.ndarray, " c"], prior: Float[np.ndarray, " c"]
) -> Float[np.ndarray, " c"]:
    """Weight of a token of each class: classes get their prior, those without tokens nothing."""
    present = n > 0
    return np.where(present, prior / np.maximum(n, 1) / prior[present].sum(), 0.0)
