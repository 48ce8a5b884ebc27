"""Hurdle histograms: how the values of every unit are distributed within each concept.

A sparse unit speaks by firing, so its distribution within concept i is an atom and a density,

    P(a = 0 | i) = 1 - r_i,      P(a in bin b | i) = r_i g_i(b),   b = 1 .. B,

with bins at the quantiles of the pooled positive values, the same for every concept. A unit that
takes both signs (a residual dimension, an MLP neuron) has B bins over its whole range and no atom.
Two passes: ``EdgeSketch`` finds the bins, ``HurdleCounts`` fills them. Memory is O(u c B) however
many tokens pass by; only the entries that fired are touched, and the atom follows by subtraction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.errors import UserError

from .bins import Entries, Values, bin_of, check_units, checked_labels, entries
from .sample import BottomK

__all__ = ["EdgeSketch", "Entries", "Histogram", "HurdleCounts", "Values", "bin_of", "entries"]


class EdgeSketch:
    """First pass: bin edges at the quantiles of each unit's values, from a sample of bounded size.

    Of every unit the ``per_unit`` values of the smallest random keys are kept: a uniform sample,
    exact while a unit has no more values than that. ``update`` and ``merge`` may come in any order.
    Sketches that are merged should have different seeds.
    """

    def __init__(
        self,
        n_units: int,
        n_bins: int = 16,
        seed: int = 0,
        *,
        has_atom: bool = True,
        per_unit: int = 512,
    ) -> None:
        if n_units < 1 or n_bins < 1 or per_unit < n_bins:
            raise UserError(
                "Expected at least one unit, one bin and a sample of at least the bins, got "
                f"{n_units} units, {n_bins} bins and {per_unit} values a unit."
            )
        self.n_bins, self.has_atom = n_bins, has_atom
        self._sample = BottomK(n_units, per_unit, seed)

    def update(self, values: Values) -> None:
        """Add the values of a batch of tokens."""
        found = entries(values, self.has_atom)
        check_units(found.n_units, self._sample.n_units)
        self._sample.update(found.unit, found.value)

    def merge(self, other: "EdgeSketch") -> None:
        """Add the sample of another process or shard."""
        check_units(other._sample.n_units, self._sample.n_units)
        self._sample.merge(other._sample)

    def compute(self) -> Float[np.ndarray, "u B_minus_1"]:
        """Edges, float32, ascending; infinite for a unit without values, whose bins stay empty."""
        unit, value = self._sample.compute()
        edges = np.full((self._sample.n_units, self.n_bins - 1), np.inf, dtype=np.float32)
        at = np.arange(1, self.n_bins) / self.n_bins
        order = np.lexsort((value, unit))
        starts = np.searchsorted(unit[order], np.arange(self._sample.n_units + 1))
        for j in np.flatnonzero(np.diff(starts)):
            mine = value[order[starts[j] : starts[j + 1]]]
            # the value at the quantile's rank: an edge is always a value that occurred
            edges[j] = mine[np.minimum((at * len(mine)).astype(np.int64), len(mine) - 1)]
        return edges


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of every unit, concept and bin; u units, c concepts, B bins beside the atom."""

    counts: Int[np.ndarray, "u c B_plus_1"]
    """Tokens, int64; bin 0 is the atom, empty for units of both signs."""
    n: Int[np.ndarray, "c"]
    """Tokens of each concept."""
    edges: Float[np.ndarray, "u B_minus_1"]
    """Edges between the bins of each unit, float32."""
    classes: tuple[str, ...]
    """Names of the concepts."""
    total: Float[np.ndarray, "u c"]
    """Sum of the values outside the atom."""
    square: Float[np.ndarray, "u c"]
    """Sum of their squares."""
    has_atom: bool = True
    """Whether the units are one-sided."""

    @property
    def n_units(self) -> int:
        return self.counts.shape[0]

    @property
    def n_bins(self) -> int:
        """Bins beside the atom."""
        return self.counts.shape[2] - 1

    @property
    def live(self) -> Bool[np.ndarray, "u"]:
        """Units that have left the atom at least once (two-sided units: all that vary)."""
        if self.has_atom:
            return self.counts[:, :, 1:].sum(axis=(1, 2)) > 0
        return (self.counts.sum(axis=1) > 0).sum(axis=1) > 1

    def mean(self) -> Float[np.ndarray, "u c"]:
        """Mean value of each unit within each concept, zeros counted."""
        return self.total / np.maximum(self.n, 1)

    def variance(self) -> Float[np.ndarray, "u c"]:
        """Variance of the values within each concept, zeros counted."""
        return np.maximum(self.square / np.maximum(self.n, 1) - self.mean() ** 2, 0.0)

    def index(self, concept: str) -> int:
        """Place of a concept in ``classes``.

        Raises:
            UserError: there is no such concept.
        """
        if concept not in self.classes:
            raise UserError(
                f"Expected one of the concepts {', '.join(self.classes)}, got {concept!r}."
            )
        return self.classes.index(concept)

    def select(self, concepts: Sequence[str]) -> "Histogram":
        """The same units and bins for some of the concepts, in that order."""
        where = [self.index(one) for one in concepts]
        return replace(
            self,
            counts=self.counts[:, where],
            n=self.n[where],
            classes=tuple(concepts),
            total=self.total[:, where],
            square=self.square[:, where],
        )

    def against_rest(self, concept: str, rest: str = "rest") -> "Histogram":
        """Two classes: one concept, and the tokens of all others together."""
        i = self.index(concept)

        def two(array: np.ndarray, axis: int) -> np.ndarray:
            mine = np.take(array, [i], axis=axis)
            return np.concatenate([mine, array.sum(axis=axis, keepdims=True) - mine], axis=axis)

        return replace(
            self,
            counts=two(self.counts, 1),
            n=two(self.n, 0),
            classes=(concept, rest),
            total=two(self.total, 1),
            square=two(self.square, 1),
        )


class HurdleCounts:
    """Second pass: tokens of every unit, concept and bin."""

    def __init__(
        self,
        edges: Float[np.ndarray, "u B_minus_1"],
        classes: Sequence[str],
        has_atom: bool = True,
    ) -> None:
        if isinstance(classes, str) or len(classes) < 1 or len(set(classes)) != len(classes):
            raise UserError(f"Expected the names of concepts, each once, got {classes!r}.")
        self.edges = np.ascontiguousarray(edges, dtype=np.float32)
        self.classes, self.has_atom = tuple(classes), has_atom
        u, c, bins = self.edges.shape[0], len(self.classes), self.edges.shape[1] + 2
        self._counts = np.zeros((u, c, bins), dtype=np.int64)
        self._n = np.zeros(c, dtype=np.int64)
        self._total, self._square = np.zeros((u, c)), np.zeros((u, c))

    def update(self, values: Values, labels: Int[np.ndarray, "n"] | Tensor) -> None:
        """Add a batch of tokens.

        Args:
            values: of every unit, sparse or dense.
            labels: place in ``classes`` of each token's concept.

        Raises:
            UserError: another number of units or labels, or a label out of range.
        """
        found = entries(values, self.has_atom)
        u, c, bins = self._counts.shape
        check_units(found.n_units, u)
        label = checked_labels(labels, found.n, c)
        pair = found.unit * c + label[found.row]
        place = pair * bins + bin_of(found.value, found.unit, self.edges, self.has_atom)
        np.add.at(self._counts.reshape(-1), place, 1)
        value = found.value.astype(np.float64)
        # token after token: the sums do not depend on the batches, not even in the last bit
        np.add.at(self._total.reshape(-1), pair, value)
        np.add.at(self._square.reshape(-1), pair, value * value)
        self._n += np.bincount(label, minlength=c)

    def merge(self, other: "HurdleCounts") -> None:
        """Add what another process or shard counted with the same edges and concepts."""
        if self.classes != other.classes or not np.array_equal(self.edges, other.edges):
            raise UserError(
                f"Expected counts of the same edges and of {self.classes}, got {other.classes}."
            )
        self._counts += other._counts
        self._n += other._n
        self._total += other._total
        self._square += other._square

    def compute(self) -> Histogram:
        """A frozen copy; the atom holds the tokens that no other bin does."""
        counts = self._counts.copy()
        if self.has_atom:
            counts[:, :, 0] = self._n - counts[:, :, 1:].sum(axis=2)
        return Histogram(
            counts, self._n.copy(), self.edges, self.classes,
            self._total.copy(), self._square.copy(), self.has_atom,
        )  # fmt: skip
