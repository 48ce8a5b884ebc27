"""Which form of the statistic serves which feature, and running it over permutations in blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_apps.geospatial.moran_dense import DenseStatistic, Pairs, pairs_of
from sae_apps.geospatial.moran_input import DENSE_FROM, Columns
from sae_apps.geospatial.moran_sparse import SparseStatistic
from sae_apps.geospatial.parallel import in_threads
from sae_apps.geospatial.permutation import MAIN, Strata, draw
from sae_apps.geospatial.residual import Projection
from sae_apps.geospatial.tally import Tally
from sae_apps.geospatial.weights import SpatialWeights

BLOCK = 16  # permutations at a time: their relabelled tables are all that grows with them
DENSE_COLUMNS = 512  # features at a time, n x 512 float64 residuals
CONSTANT = 1e-13  # of x'x: less variation than rounding of float32 leaves is none
Statistic = SparseStatistic | DenseStatistic


@dataclass(frozen=True, eq=False)
class Batch:
    """Features that are tested together, with the moments that do not depend on order."""

    index: Int[np.ndarray, "t"]
    """Which features."""
    statistic: Statistic
    observed: Float[np.ndarray, "t"]
    """I; 0 where nothing varies."""
    kurtosis: Float[np.ndarray, "t"]
    """n sum e^4 / (sum e^2)^2; 0 where nothing varies."""
    varies: Bool[np.ndarray, "t"]
    """Whether e'e is above rounding."""

    @property
    def n(self) -> int:
        """Places."""
        return len(self.statistic.weights.indptr) - 1


@dataclass(frozen=True, eq=False)
class Frame:
    """What all features share."""

    columns: Columns
    weights: SpatialWeights
    removed: Projection
    device: str | None

    @cached_property
    def pairs(self) -> Pairs:
        """The links for the dense form, made at the first use."""
        return pairs_of(self.weights.matrix)

    def batches(self, wanted: Int[np.ndarray, "t"]) -> Iterator[Batch]:
        """All ``wanted`` features: the sparse ones at once, the dense ones in blocks."""
        n, _ = self.columns.shape
        is_dense = self.columns.n_active()[wanted] >= DENSE_FROM * n
        if self.device is not None:
            is_dense[:] = True
        if not is_dense.all():
            yield self._sparse(wanted[~is_dense])
        rest = wanted[is_dense]
        for start in range(0, len(rest), DENSE_COLUMNS):
            yield self._dense(rest[start : start + DENSE_COLUMNS])

    def _sparse(self, index: Int[np.ndarray, "t"]) -> Batch:
        part = self.columns.sparse_part(index)
        statistic = SparseStatistic(part, self.weights.matrix, self.removed)
        squares = part.astype(np.float64).power(2).sum(axis=0)
        varies = statistic.sums > CONSTANT * squares
        return Batch(
            index,
            statistic,
            _observed(statistic, varies),
            _sparse_kurtosis(statistic, varies),
            varies,
        )

    def _dense(self, index: Int[np.ndarray, "t"]) -> Batch:
        values = self.columns.dense_part(index)
        residuals = self.removed.residual(values)
        statistic = DenseStatistic(
            residuals, self.weights.matrix, self.pairs, self.removed, self.device
        )
        squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
        varies = statistic.sums > CONSTANT * squares
        fourth = np.einsum("ij,ij->j", residuals**2, residuals**2)
        kurtosis = np.divide(
            len(values) * fourth, statistic.sums**2, out=np.zeros_like(fourth), where=varies
        )
        return Batch(index, statistic, _observed(statistic, varies), kurtosis, varies)


def _observed(statistic: Statistic, varies: Bool[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """I, by the same arithmetic as the permuted ones, so that equal values come out equal."""
    n = len(statistic.weights.indptr) - 1
    identity = np.arange(n, dtype=np.int32)[None]
    return np.where(varies, statistic(identity, np.arange(len(varies)))[:, 0], 0.0)


def _sparse_kurtosis(
    statistic: SparseStatistic, varies: Bool[np.ndarray, "t"]
) -> Float[np.ndarray, "t"]:
    """Kurtosis of x about its mean, whatever else is removed: how few values matter."""
    x: sparse.csc_array = statistic.features
    n = len(statistic.removed.groups)
    counts = np.diff(x.indptr)
    column = np.repeat(np.arange(len(counts)), counts)
    mean = np.bincount(column, x.data.astype(np.float64), len(counts)) / n
    z = x.data - mean[column]
    second = np.bincount(column, z**2, len(counts)) + (n - counts) * mean**2
    fourth = np.bincount(column, z**4, len(counts)) + (n - counts) * mean**4
    return np.divide(n * fourth, second**2, out=np.zeros(len(counts)), where=varies & (second > 0))


def simulate(
    batch: Batch,
    local: Int[np.ndarray, "u"],
    tally: Tally,
    strata: Strata,
    seed: int,
    permutations: int,
    stream: int = MAIN,
) -> Iterator[tuple[int, Float[np.ndarray, "l b"]]]:
    """Permute, add to the tally, and yield (number of the first permutation, permuted I).

    ``local`` are the columns of the batch that the tally counts, of which stopped ones are left
    out. Ends early when all have stopped.
    """
    for start in range(0, permutations, BLOCK):
        live = np.flatnonzero(tally.running)
        if not len(live):
            return
        numbers = range(start, min(start + BLOCK, permutations))
        perms = np.stack(in_threads(lambda b: draw(strata, seed, b, stream), numbers))
        values = batch.statistic(perms, local[live])
        tally.add(values, live)
        yield start, values
