"""Two passes over a stream: bins first, then counts under the true and under permuted labels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from .bins import Values
from .concepts import LabelledTexts, require_classes
from .histogram import EdgeSketch, Histogram, HurdleCounts
from .permuted import Permuted, PermutedCounts, permuted_labels

Stream = Callable[[], Iterable[tuple[Values, Int[np.ndarray, "n"]]]]
"""Starts a pass: batches of values with the place of each token's text in the data."""


@dataclass(frozen=True)
class MeasureConfig:
    """How a stream is counted."""

    n_bins: int = 16
    """Bins beside the atom: 16 for fewer than about 1,000 tokens a concept, 64 with many more."""
    n_permutations: int = 20
    """Label permutations, shared by all units; p cannot fall below 1 / (n_permutations + 1)."""
    min_texts: int = 8
    """Fewest texts of a concept."""
    seed: int = 0
    """Of the sample behind the bins, and of the permutations."""


def measure(
    stream: Stream,
    data: LabelledTexts,
    n_units: int,
    *,
    has_atom: bool = True,
    config: MeasureConfig | None = None,
) -> tuple[Histogram, Permuted]:
    """Histograms of every unit under the true labels of the texts and under permuted ones.

    Args:
        stream: is called twice, and must yield the same both times.
        data: the labelled texts; their groups decide what is permuted (see ``permuted_labels``).
        n_units: width of the values.
        has_atom: whether the units are one-sided.
        config: bins, permutations, seed; None: the defaults.

    Raises:
        UserError: one concept only, fewer texts of one than the minimum, or values that do not fit.
    """
    config = config or MeasureConfig()
    require_classes(data, config.min_texts)
    sketch = EdgeSketch(n_units, config.n_bins, config.seed, has_atom=has_atom)
    for values, _ in stream():
        sketch.update(values)
    edges, codes = sketch.compute(), data.codes
    labels = permuted_labels(codes, data.groups, config.n_permutations, config.seed)
    counts = HurdleCounts(edges, data.classes, has_atom)
    permuted = PermutedCounts(edges, labels, len(data.classes), has_atom)
    for values, item in stream():
        counts.update(values, codes[item])
        permuted.update(values, item)
    return counts.compute(), permuted.compute()
