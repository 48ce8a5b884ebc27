"""The same histograms under permuted labels, for all units at once and in the same pass.

Exchangeable are the items that were labelled (texts, or words), not their tokens: the tokens of one
text share its topic and author, and a permutation of tokens would take that for knowledge of the
concept. So P permutations of the items' labels are drawn before the pass, shared by all units, and
every batch adds to all P + 1 histograms. Per batch the counts are a sparse matrix A [unit and bin,
item] and the P labellings one matrix Y [item, P c], so that all permuted counts are one product
A Y. Memory is O(u B P c), however many tokens pass by, and there is no further pass of the model.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from sae_core.errors import UserError

from .bins import Values, bin_of, check_units, entries

LIMIT = 4 << 30  # bytes of permuted counts; beyond it fewer permutations are the better choice


def permuted_labels(
    codes: Int[np.ndarray, "n"],
    groups: Int[np.ndarray, "n"] | None,
    n_permutations: int,
    seed: int,
) -> Int[np.ndarray, "p n"]:
    """Labels that could have been, had the concept nothing to do with the texts.

    Without groups, all orders of the labels. Where every group has one label (chapters of a novel),
    the labels of whole groups are permuted. Where labels differ within some group (a text and its
    rewrite, the words of a sentence), labels move within groups, and the items that are alone in
    their group form one more.

    Args:
        codes: label of each item.
        groups: document of each item.
        n_permutations: P.
        seed: of all P.
    """
    random = np.random.default_rng(seed)
    if groups is None:
        return np.stack([random.permutation(codes) for _ in range(n_permutations)])
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    if (codes[first][group] == codes).all():
        return np.stack([random.permutation(codes[first])[group] for _ in range(n_permutations)])
    alone = np.bincount(group)[group] == 1
    stratum = np.where(alone, -1, group)
    place = np.argsort(stratum, kind="stable")
    found = np.empty((n_permutations, len(codes)), dtype=np.int64)
    for row in found:
        row[place] = codes[np.lexsort((random.random(len(codes)), stratum))]
    return found


@dataclass(frozen=True, eq=False)
class Permuted:
    """Histograms of u units under P permutations of the labels."""

    counts: Int[np.ndarray, "u B_plus_1 p c"]
    """Tokens; bin 0 is the atom."""
    n: Int[np.ndarray, "p c"]
    """Tokens of each concept in each permutation."""

    @property
    def n_permutations(self) -> int:
        return self.n.shape[0]

    def select(self, index: list[int]) -> "Permuted":
        """Some of the concepts, by place."""
        return Permuted(self.counts[..., index], self.n[:, index])

    def against_rest(self, index: int) -> "Permuted":
        """One concept, and the tokens of all others together."""

        def two(array: np.ndarray) -> np.ndarray:
            mine = array[..., [index]]
            return np.concatenate([mine, array.sum(axis=-1, keepdims=True) - mine], axis=-1)

        return Permuted(two(self.counts), two(self.n))


class PermutedCounts:
    """Counts of every unit, bin, permutation and concept."""

    def __init__(
        self,
        edges: Float[np.ndarray, "u B_minus_1"],
        labels: Int[np.ndarray, "p n"],
        n_classes: int,
        has_atom: bool = True,
    ) -> None:
        self.edges = np.ascontiguousarray(edges, dtype=np.float32)
        self.labels, self.n_classes, self.has_atom = labels, n_classes, has_atom
        rows, columns = edges.shape[0] * (edges.shape[1] + 2), labels.shape[0] * n_classes
        if rows * columns * 4 > LIMIT:
            raise UserError(
                f"Expected permuted counts of at most {LIMIT >> 30} GiB, got "
                f"{rows * columns * 4 / 2**30:.1f} GiB for {edges.shape[0]} units, "
                f"{edges.shape[1] + 1} bins, {n_classes} concepts and {len(labels)} permutations."
            )
        self._counts = np.zeros((rows, columns), dtype=np.int32)
        self._n = np.zeros(columns, dtype=np.int64)

    def update(self, values: Values, item: Int[np.ndarray, "n"]) -> None:
        """Add a batch of tokens.

        Args:
            values: of every unit, sparse or dense.
            item: place of each token's text in the labels.

        Raises:
            UserError: another number of units or items, or an item out of range.
        """
        found, item = entries(values, self.has_atom), np.asarray(item)
        check_units(found.n_units, self.edges.shape[0])
        n_items = self.labels.shape[1]
        if item.shape != (found.n,) or (found.n and not 0 <= item.min() <= item.max() < n_items):
            raise UserError(
                f"Expected for each of {found.n} tokens an item between 0 and {n_items - 1}, got "
                f"{item.shape[0]} items" + (f" up to {item.max()}." if item.size else ".")
            )
        some, local = np.unique(item, return_inverse=True)
        onehot = self._onehot(some)
        place = bin_of(found.value, found.unit, self.edges, self.has_atom)
        place += found.unit * (self.edges.shape[1] + 2)
        self._add(place, local[found.row], onehot)
        self._n += (np.bincount(local, minlength=len(some)) @ onehot).astype(np.int64)

    def _add(
        self, place: Int[np.ndarray, "nnz"], item: Int[np.ndarray, "nnz"], onehot: np.ndarray
    ) -> None:
        """A Y of one batch; exact in float32, since no count of one batch reaches 2^24."""
        k, t = len(self._counts), len(onehot)
        if k * t <= 4 * len(place):  # nearly full, as of units of both signs: no use in a sparse A
            full = np.bincount(place * t + item, minlength=k * t).reshape(k, t)
            self._counts += (full.astype(np.float32) @ onehot).astype(np.int32)
            return
        rows = np.flatnonzero(np.bincount(place, minlength=k))
        where = np.zeros(k, dtype=np.int64)
        where[rows] = np.arange(len(rows))
        counts = sparse.coo_array(
            (np.ones(len(place), np.float32), (where[place], item)), shape=(len(rows), t)
        ).tocsr()
        self._counts[rows] += cast("np.ndarray", counts @ onehot).astype(np.int32)

    def _onehot(self, items: Int[np.ndarray, "t"]) -> Float[np.ndarray, "t pc"]:
        """Y for some items."""
        p, c = self.labels.shape[0], self.n_classes
        onehot = np.zeros((len(items), p * c), dtype=np.float32)
        columns = self.labels[:, items].T + np.arange(p) * c
        np.put_along_axis(onehot, columns, 1.0, axis=1)
        return onehot

    def merge(self, other: "PermutedCounts") -> None:
        """Add what another process or shard counted with the same edges and labels."""
        if not np.array_equal(self.labels, other.labels) or not np.array_equal(
            self.edges, other.edges
        ):
            raise UserError("Expected counts of the same edges and permutations, got others.")
        self._counts += other._counts
        self._n += other._n

    def compute(self) -> Permuted:
        """A frozen copy, with the atom by subtraction."""
        u, p, c = self.edges.shape[0], self.labels.shape[0], self.n_classes
        counts = self._counts.copy().reshape(u, -1, p, c)
        n = self._n.reshape(p, c).copy()
        if self.has_atom:
            counts[:, 0] = n - counts[:, 1:].sum(axis=1)
        return Permuted(counts, n)
