"""Values of all units on some labelled tokens, and the histogram of many such blocks.

Values that are zero are not kept. A block is what is in memory at a time; everything that a fit
counts is a sum over blocks, so that neither their size nor their number changes a result.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae_apps.suppression.bins import bin_of
from sae_apps.suppression.histogram import EdgeSketch, Histogram, HurdleCounts
from sae_core.errors import UserError
from sae_core.kernels.codes import Codes, row_starts


@dataclass(frozen=True, eq=False)
class TokenValues:
    """Non-zero values of every unit on n tokens."""

    token: Int[np.ndarray, " nnz"]
    """Number of the token in the block, ascending."""
    unit: Int[np.ndarray, " nnz"]
    """Number of the unit."""
    value: Float[np.ndarray, " nnz"]
    """float32."""
    text: Int[np.ndarray, " n"]
    """Text of each token."""
    n_units: int
    """Number of units."""
    has_atom: bool
    """Whether the units are one-sided."""

    def select(self, keep: Bool[np.ndarray, " n"]) -> "TokenValues":
        """Some of the tokens, numbered anew."""
        number, mine = np.cumsum(keep) - 1, keep[self.token]
        return TokenValues(
            number[self.token[mine]], self.unit[mine], self.value[mine], self.text[keep],
            self.n_units, self.has_atom,
        )  # fmt: skip

    def of_units(self, index: Int[np.ndarray, " u"]) -> Float[np.ndarray, "n u"]:
        """Dense values of chosen units."""
        place = np.full(self.n_units, -1)
        place[index] = np.arange(len(index))
        mine = place[self.unit] >= 0
        dense = np.zeros((len(self.text), len(index)), dtype=np.float32)
        dense[self.token[mine], place[self.unit[mine]]] = self.value[mine]
        return dense

    def bins(self, edges: Float[np.ndarray, "u B_minus_1"]) -> Int[np.ndarray, " nnz"]:
        """Bin of each value."""
        return bin_of(self.value, self.unit.astype(np.int64), edges, self.has_atom)


def histogram_of(
    blocks: Iterable[TokenValues],
    labels: Int[np.ndarray, " n_texts"],
    classes: Sequence[str],
    *,
    n_bins: int,
    seed: int,
) -> Histogram:
    """Hurdle histogram of all units over tokens that inherit the label of their text.

    Args:
        blocks: the tokens; iterated twice, for the bins and for the counts.
        labels: class of each text.
        classes: their names.
        n_bins: beside the atom.
        seed: of the sample behind the edges: 512 values of a unit, exact while it has no more.

    Raises:
        UserError: no tokens of a class.
    """
    sketch = None
    for block in blocks:
        if sketch is None:
            sketch = EdgeSketch(block.n_units, n_bins, seed, has_atom=block.has_atom)
        sketch.update(_as_values(block))
    if sketch is None:
        raise UserError(f"Expected tokens of every class, got none of {', '.join(classes)}.")
    counts = HurdleCounts(sketch.compute(), classes, sketch.has_atom)
    for block in blocks:
        counts.update(_as_values(block), labels[block.text])
    found = counts.compute()
    if not found.n.all():
        lacking = classes[int(found.n.argmin())]
        raise UserError(f"Expected tokens of every class, got none of {lacking}.")
    return found


def _as_values(block: TokenValues) -> Codes | np.ndarray:
    if not block.has_atom:
        return block.of_units(np.arange(block.n_units))
    row = torch.from_numpy(block.token.astype(np.int64))
    col = torch.from_numpy(block.unit.astype(np.int64))
    crow = row_starts(row, len(block.text))
    return Codes(crow, row, col, torch.from_numpy(block.value), block.n_units)
