"""Counting permuted statistics as they come: p-values, moments, the largest of each permutation.

p = (1 + #{I* >= I}) / (B + 1): B. Phipson, G. Smyth, Permutation p-values should never be zero,
Stat. Appl. Genet. Mol. Biol. 9 (2010). The sequential test stops a feature at its h-th exceedance,
after l permutations, with p = h / l: J. Besag, P. Clifford, Sequential Monte Carlo p-values,
Biometrika 78 (1991).
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

TIE = 1e-9  # of the null's standard deviation: values nearer than this are equal
STOP_AT = 20  # exceedances after which a sequential test stops


@dataclass(eq=False)
class Tally:
    """Counts and power sums of f features; permutations are added one at a time, in order."""

    observed: Float[np.ndarray, "f"]
    """I."""
    center: Float[np.ndarray, "f"]
    """About where the null lies; sums are of (I* - center) / scale."""
    scale: Float[np.ndarray, "f"]
    """About its standard deviation; also the unit of ties."""
    alternative: str
    """``greater``, ``less`` or ``two-sided``."""
    stop: int | None = None
    """Exceedances after which a feature stops; None for never."""
    seen: Int[np.ndarray, "f"] = field(init=False)
    above: Int[np.ndarray, "f"] = field(init=False)
    below: Int[np.ndarray, "f"] = field(init=False)
    powers: Float[np.ndarray, "3 f"] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.observed)
        self.seen, self.above, self.below = (np.zeros(n, dtype=np.int64) for _ in range(3))
        self.powers = np.zeros((3, n))

    def add(self, values: Float[np.ndarray, "l b"], live: Int[np.ndarray, "l"]) -> None:
        """Permuted I of the features ``live``, all of which are still running."""
        scale, center = self.scale[live], self.center[live]
        above = values >= (self.observed[live] - TIE * scale)[:, None]
        below = values <= (self.observed[live] + TIE * scale)[:, None]
        for b in range(values.shape[1]):
            on = self.running[live]
            now = live if on.all() else live[on]
            self.seen[now] += 1
            self.above[now] += above[on, b]
            self.below[now] += below[on, b]
            unit = (values[on, b] - center[on]) / scale[on]
            self.powers[:, now] += np.stack([unit, unit**2, unit**3])

    @property
    def running(self) -> Bool[np.ndarray, "f"]:
        """Features that have not stopped."""
        if self.stop is None:
            return np.ones(len(self.observed), dtype=bool)
        return self.exceedances < self.stop

    @property
    def exceedances(self) -> Int[np.ndarray, "f"]:
        """Permutations at least as extreme; two-sided: those of the rarer tail."""
        if self.alternative == "greater":
            return self.above
        return self.below if self.alternative == "less" else np.minimum(self.above, self.below)

    def p(self) -> Float[np.ndarray, "f"]:
        """p-values; two-sided ones are twice the smaller tail."""
        count, seen = self.exceedances, self.seen
        p = (1 + count) / (1 + seen)
        if self.stop is not None:
            p = np.where(self.running, p, count / np.maximum(seen, 1))
        return np.minimum(1.0, 2 * p) if self.alternative == "two-sided" else p

    def moments(self) -> tuple[Float[np.ndarray, "f"], Float[np.ndarray, "f"], np.ndarray]:
        """Mean, standard deviation (divided by B, as esda does) and skewness of the I*.

        The skewness is 0 where the standard deviation is 0.
        """
        first, second, third = self.powers / np.maximum(self.seen, 1)
        variance = np.maximum(second - first**2, 0.0)
        deviation = np.sqrt(variance)
        deviation[deviation < TIE] = 0.0
        central = third - 3 * first * second + 2 * first**3
        skew = np.divide(central, deviation**3, out=np.zeros_like(central), where=deviation > 0)
        return self.center + self.scale * first, self.scale * deviation, skew
