"""Experts whose use goes along with a score of the documents, e.g. how toxic they are.

    r_e = Pearson correlation, over documents, of the mean routing weight of e and the score

Experts with r_e >= threshold are chosen (arXiv 2412.04139, "correlation thresholds" of its toxicity
tables; 0.2, 0.1 and 0.05 there). Over what the paper correlates is not known; here over documents.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_apps.experts.use import ExpertUse
from sae_core.errors import UserError
from sae_core.features import shape_of

_CONSTANT = 1e-12  # of the squares: what float32 sums leave of equal use, with room


def correlated_experts(
    use: ExpertUse, score: Sequence[float], threshold: float, *, min_tokens: int = 20
) -> tuple[Int[np.ndarray, " e"], Float[np.ndarray, " E"]]:
    """Experts whose use correlates with the score, and every expert's correlation.

    Args:
        use: of n documents; those without tokens are left out.
        score: one number a document.
        threshold: least correlation, in (0, 1].
        min_tokens: fewest tokens an expert was active in; rarer ones, and those that are equally
            used everywhere, have correlation 0.
    Raises:
        UserError: scores that do not fit, are not finite or all equal, or a threshold out of range.
    """
    value = np.asarray(score, dtype=np.float64)
    kept = use.n_tokens > 0
    if value.shape != kept.shape or not np.isfinite(value).all():
        raise UserError(
            f"Expected one finite score for each of {len(kept)} documents, "
            f"got {value.size} of which {np.isfinite(value).sum()} finite."
        )
    if not 0 < threshold <= 1:
        raise UserError(f"Expected a threshold in (0, 1], got {threshold}.")
    value = value[kept] - value[kept].mean()
    if not value.any():
        raise UserError("Expected scores that differ, got equal ones.")
    n = int(kept.sum())
    mean = sparse.csr_array(sparse.diags_array(1 / use.n_tokens[kept]) @ use.weight[kept])
    total = np.asarray(mean.sum(0)).ravel()
    squares = np.asarray(mean.multiply(mean).sum(0)).ravel()
    around = np.maximum(squares - total**2 / n, 0)
    spread = np.sqrt(around * (value @ value))
    often = np.asarray(use.count.sum(0)).ravel() >= min_tokens
    defined = often & (around > _CONSTANT * squares)
    r = np.zeros(shape_of(use.weight)[1])
    np.divide(mean.T @ value, spread, out=r, where=defined)
    return np.flatnonzero(r >= threshold), r
