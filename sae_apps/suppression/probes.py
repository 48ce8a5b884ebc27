"""Linear probes: can a line still tell the concept from the rest, after an edit?

    p(concept | x) = sigmoid(w . (x - mean) / sd + b),   w penalised by ||w||^2 / (2 C)

A *fixed* probe was fitted on the plain model's activations and asks whether an edit moves the texts
across the line that the model had; a *refitted* one is fitted on edited activations and asks
whether the information is still there. Accuracies are balanced: the mean of the two classes'.
Standard logistic regression (scikit-learn, Newton's method); no source of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from sae_core.errors import UserError

_ROUNDING = 3e-6  # of activations in float32, whose last digit depends on the batch
CHANCE = 0.5  # balanced accuracy of a probe that knows nothing


@dataclass(frozen=True, eq=False)
class Probe:
    """A line between concept and rest."""

    weights: Float[np.ndarray, " d"]
    """Of the activations as they are, [d]."""
    bias: float
    """Added to the weighted sum; the concept is on the positive side."""

    def log_odds(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Log-odds of the concept [nats] for activations [n, d]."""
        if x.ndim != 2 or x.shape[1] != len(self.weights):
            raise UserError(
                f"Expected activations [n, {len(self.weights)}], got shape {list(x.shape)}."
            )
        return x.astype(np.float64) @ self.weights + self.bias

    def is_right(
        self, x: Float[np.ndarray, "n d"], is_concept: Bool[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Whether each row falls on the side of its label; log-odds of exactly 0 are the rest's."""
        return (self.log_odds(x) > 0) == is_concept


def fit_probe(
    x: Float[np.ndarray, "n d"], is_concept: Bool[np.ndarray, " n"], *, penalty: float = 0.05
) -> Probe:
    """Fit a probe.

    Args:
        x: [n, d] activations, one row a text.
        is_concept: [n] labels; the classes are weighted to count alike.
        penalty: 1 / C: strength of the penalty on standardised inputs, times the number of rows,
            so that it does not fade as rows are added.
    Raises:
        UserError: one class only, different lengths, or values that are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    check_labels(x, is_concept)
    if not np.isfinite(x).all():
        raise UserError("Expected finite activations for a probe, got NaN or infinity.")
    if penalty <= 0:
        raise UserError(f"Expected a positive penalty, got {penalty}.")
    x = x.astype(np.float64)
    mean, sd = x.mean(axis=0), x.std(axis=0)
    # what varies by no more than the rounding of float32 is constant and gets no weight
    floor = _ROUNDING * (np.abs(mean) + np.sqrt(np.mean(x**2)))
    sd = np.where(sd > floor, sd, np.inf)
    model: Any = LogisticRegression(
        C=1 / (penalty * len(x)), class_weight="balanced", solver="newton-cholesky"
    )
    model.fit((x - mean) / sd, is_concept)
    weights = model.coef_[0] / sd
    return Probe(weights, float(model.intercept_[0] - mean @ weights))


def balanced_accuracy(
    is_right: Bool[np.ndarray, " n"], is_concept: Bool[np.ndarray, " n"]
) -> float:
    """Mean of the two classes' share of right answers, in [0, 1]."""
    check_labels(is_right, is_concept)
    return float((is_right[is_concept].mean() + is_right[~is_concept].mean()) / 2)


def check_labels(x: np.ndarray, is_concept: np.ndarray) -> None:
    """Refuse labels of another length or type, or of one class.

    Raises:
        UserError: names what came.
    """
    if is_concept.dtype != np.bool_ or is_concept.ndim != 1:
        raise UserError(
            f"Expected a boolean label for each row, got {is_concept.dtype} of shape "
            f"{list(is_concept.shape)}."
        )
    if len(x) != len(is_concept):
        raise UserError(f"Expected one label for each of {len(x)} rows, got {len(is_concept)}.")
    n = int(is_concept.sum())
    if n == 0 or n == len(is_concept):
        raise UserError(
            f"Expected rows of both classes, got {n} of the concept and {len(is_concept) - n} "
            "others."
        )
