"""Beyond counting: the Pearson III tail, a scale for maxima, and corrections for many tests.

Pearson III is the gamma distribution, moved, with a given mean, standard deviation and skewness g:
P(Z >= s) = Q(4/g^2, 4/g^2 + 2 s/g) for g > 0 with Q the regularised upper incomplete gamma.
Wilson and Hilferty (PNAS 17, 1931) give its normal deviate,
y = (6/g) ((g s/2 + 1)^(1/3) - 1) + g/6.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

CORRECTIONS = ("bh", "by", "max")
TAIL_SPREAD, TAIL_PERMUTATIONS = 50, 999  # see ``tail_is_valid``


class Null(NamedTuple):
    """Moments of the permuted I of each feature."""

    mean: Float[np.ndarray, "f"]
    deviation: Float[np.ndarray, "f"]
    skew: Float[np.ndarray, "f"]

    def deviate(self, values: Float[np.ndarray, "f b"], alternative: str) -> np.ndarray:
        """Permuted I on a scale on which all features are about standard normal under the null.

        Larger is more extreme under the alternative; two-sided: its size. 0 where nothing varies.
        """
        varies = (self.deviation > 0)[:, None]
        unit = np.divide(
            values - self.mean[:, None], self.deviation[:, None],
            out=np.zeros_like(values), where=varies,
        )  # fmt: skip
        skew = np.where(np.abs(self.skew) < 1e-3, 1e-3, self.skew)[:, None]
        root = np.cbrt(np.maximum(skew * unit / 2 + 1, 0.0))
        normal = np.where(varies, 6 / skew * (root - 1) + skew / 6, 0.0)
        if alternative == "two-sided":
            return np.abs(normal)
        return normal if alternative == "greater" else -normal


def tail_p(
    observed: Float[np.ndarray, "f"], null: Null, alternative: str
) -> Float[np.ndarray, "f"]:
    """P-values from Pearson III; two-sided ones are twice the smaller tail. NaN where undefined."""
    from scipy.stats import pearson3

    unit = np.full_like(observed, np.nan)
    np.divide(observed - null.mean, null.deviation, out=unit, where=null.deviation > 0)
    above, below = pearson3.sf(unit, null.skew), pearson3.cdf(unit, null.skew)
    if alternative == "two-sided":
        p = np.minimum(1.0, 2 * np.minimum(above, below))
    else:
        p = above if alternative == "greater" else below
    return np.maximum(p, np.finfo(np.float64).tiny)


def tail_is_valid(
    spread: Float[np.ndarray, "f"], seen: Int[np.ndarray, "f"]
) -> Bool[np.ndarray, "f"]:
    """Where the Pearson III tail may be reported: ``spread`` >= 50 and 999 permutations.

    Measured on the weights of 18,973 places (GB, IT and four US states, 8 neighbours), fitted to
    999 permutations, against 200,000 or more of features whose active values are equal, uniform,
    half-normal, gamma or exponential. With spread >= 50 the fitted p at a true p of 1e-3 was 0.8 to
    1.3 times the true one (medians over fits), 0.6 to 1.5 times at 1e-4 and 0.3 to 1.9 times at
    1e-5, and one fit in ten was off by another factor of 2.5, 4 or 7. Below it, features of
    equal values come out 2 to 20 times too large, and those of unequal values up to 14 times too
    small at 1e-5.

    Args:
        spread: n / kurtosis, the number of places that carry the variance: m for a feature that is
            1 at m of many places, less where a few values dominate.
        seen: permutations drawn.
    """
    return (spread >= TAIL_SPREAD) & (seen >= TAIL_PERMUTATIONS)


def adjusted(p: Float[np.ndarray, "t"], correction: str) -> Float[np.ndarray, "t"]:
    """False discovery rate, Benjamini-Hochberg (``bh``) or Benjamini-Yekutieli (``by``)."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method=correction) if len(p) else p


def family_wise(
    observed: Float[np.ndarray, "t"], largest: Float[np.ndarray, "b"]
) -> Float[np.ndarray, "t"]:
    """(1 + #{largest of a permutation >= observed}) / (B + 1): P. Westfall, S. Young (1993)."""
    below = np.searchsorted(np.sort(largest), observed - 1e-9, side="left")
    return (1 + len(largest) - below) / (1 + len(largest))
