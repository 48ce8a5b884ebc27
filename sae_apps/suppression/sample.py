"""A uniform sample of bounded size for each of many units at once, from a stream.

Every value draws a uniform key, and a unit keeps the values of its k smallest keys: bottom-k
sampling (E. Cohen, H. Kaplan, PODC 2007). The union of two such samples, cut to k again, is the
sample of the union, so that shards merge.
"""

import numpy as np
from jaxtyping import Float, Int

_SLACK = 1 << 18  # entries that wait before the sample is cut: sorting is paid once for so many


class BottomK:
    """The values of the k smallest keys of each unit."""

    def __init__(self, n_units: int, k: int, seed: int) -> None:
        self.n_units, self.k = n_units, k
        self._random = np.random.default_rng(seed)
        self._limit = np.ones(n_units)  # keys at or above it cannot enter a unit's sample any more
        self._kept = (np.empty(0, np.int64), np.empty(0), np.empty(0, np.float32))
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

    def update(self, unit: Int[np.ndarray, "m"], value: Float[np.ndarray, "m"]) -> None:
        """Offer values; the keys follow the order in which values come, not their batches."""
        # multiples of 2^-32: unit + key is exact in float64 for a million units
        self._offer(unit, self._random.integers(0, 1 << 32, len(unit)) / (1 << 32), value)

    def merge(self, other: "BottomK") -> None:
        """Offer the sample of another stream with the keys it drew."""
        other._cut()
        self._offer(*other._kept)

    def compute(self) -> tuple[Int[np.ndarray, "s"], Float[np.ndarray, "s"]]:
        """Unit and value of everything in the samples."""
        self._cut()
        unit, _, value = self._kept
        return unit, value

    def _offer(self, unit: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        may = np.flatnonzero(key < self._limit[unit])
        self._waiting.append((unit[may], key[may], value[may]))
        self._n_waiting += len(may)
        if self._n_waiting > max(_SLACK, len(self._kept[0])):
            self._cut()

    def _cut(self) -> None:
        if not self._n_waiting:
            return
        parts = [self._kept, *self._waiting]
        unit, key, value = (np.concatenate([part[i] for part in parts]) for i in range(3))
        order = np.argsort(unit + key)  # keys lie in [0, 1)
        unit, key, value = unit[order], key[order], value[order]
        starts = np.searchsorted(unit, np.arange(self.n_units + 1))
        rank = np.arange(len(unit)) - starts[unit]
        full = np.flatnonzero(np.diff(starts) >= self.k)
        self._limit[full] = key[starts[full] + self.k - 1]
        kept = rank < self.k
        self._kept = (unit[kept], key[kept], value[kept])
        self._waiting, self._n_waiting = [], 0
