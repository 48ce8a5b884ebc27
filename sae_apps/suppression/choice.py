"""Which units speak of a concept: debiased separation with a test that permutes whole texts.

    JSD_j   = H(m) - (H(p) + H(q)) / 2        p, q: unit j's hurdle histogram within and without
    D_j     = sqrt(max(0, JSD_j - mean over permutations of JSD_j))
    z_j     = (JSD_j - mean) / sd             over the permutations and the true labels together
    p_j     = (1 + #{permutations: max_k z_k >= z_j}) / (1 + permutations)

Labels belong to texts, so texts are permuted, not tokens: tokens of one text are alike, and
permuting them would call everything significant. Texts of one document count as independent. The
maximum over all units (Westfall and Young, 1993) corrects for their number, however they depend on
one another. The true labels are one of the labellings behind mean and sd, as every permutation is:
held against moments that they have no part in, they come out as significant too often (in 45 of 60
trials with 400 units that know nothing, 39 permutations, p <= 0.05; tests/test_app.py). Among the
significant units the order is that of d' = (mean within - mean without) / pooled sd, one-sided for
latents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.posterior import concept_mask
from sae_apps.suppression.tokens import TokenValues

_CELLS = 1 << 24  # units x bins x permutations in one pass of the tokens: 64 MiB of int32
_CACHED = 1 << 16  # of these at once in float64, so that the temporaries stay in the cache
_ROUNDING = 1e-12  # bits: what sums of entropies in another order may differ by


@dataclass(frozen=True, eq=False)
class Separation:
    """Separation of the concepts from the other classes, unit by unit."""

    distance: Float[np.ndarray, " u"]
    """D, debiased, in [0, 1]."""
    p_value: Float[np.ndarray, " u"]
    """Corrected for the number of units; 1 for units that never vary."""
    d_prime: Float[np.ndarray, " u"]
    """Difference of means in pooled standard deviations."""
    permutations: int
    """Of texts."""

    def best(self, n: int, alpha: float, *, two_sided: bool) -> Int[np.ndarray, " k"]:
        """At most n units with p <= alpha, those with the largest d' first."""
        size = np.abs(self.d_prime) if two_sided else self.d_prime
        order = np.argsort(-size, kind="stable")
        return order[(self.p_value[order] <= alpha) & (size[order] > 0)][:n]


def separation(
    blocks: Iterable[TokenValues],
    histogram: Histogram,
    labels: Int[np.ndarray, " n_texts"],
    texts: Bool[np.ndarray, " n_texts"],
    concepts: Sequence[str],
    *,
    permutations: int,
    rng: np.random.Generator,
) -> Separation:
    """Test every unit for a difference between the concepts and the rest.

    Args:
        blocks: tokens of the texts that count, iterated again for every 2^24 cells.
        histogram: of these tokens; its edges are used.
        labels: class of every text.
        texts: the texts that count; labels are permuted among them.
        concepts: classes on one side.
        permutations: at least 1; no p-value is below 1 / (1 + permutations).
    """
    inside = concept_mask(histogram.classes, concepts)
    is_concept, members = inside[labels], np.flatnonzero(texts)
    drawn = np.zeros((permutations + 1, len(labels)), dtype=bool)
    drawn[0, members] = is_concept[members]
    for row in drawn[1:]:
        row[members] = is_concept[rng.permutation(members)]
    jsd = _divergence(blocks, histogram, drawn)
    sd = jsd.std(axis=1)
    varies = sd > _ROUNDING
    z = (jsd - jsd.mean(axis=1, keepdims=True)) / np.where(varies, sd, np.inf)[:, None]
    highest = z[:, 1:].max(axis=0)
    # equal labellings give equal counts, but their sums may differ in the last bits
    p = (1 + (highest[None] >= z[:, :1] - 1e-9).sum(axis=1)) / (1 + permutations)
    return Separation(
        np.sqrt(np.maximum(0.0, jsd[:, 0] - jsd[:, 1:].mean(axis=1))),
        np.where(varies, p, 1.0),
        _d_prime(histogram, inside),
        permutations,
    )


def _divergence(
    blocks: Iterable[TokenValues], histogram: Histogram, drawn: Bool[np.ndarray, "p n_texts"]
) -> Float[np.ndarray, "u p"]:
    """JSD of every unit under every labelling; the units in turn, so that the cells are bounded."""
    tokens = np.zeros(drawn.shape[1])
    for block in blocks:
        tokens += np.bincount(block.text, minlength=len(tokens))
    inside = np.array([tokens[row].sum() for row in drawn])
    outside = tokens.sum() - inside
    total = histogram.counts[:, :, 1:].sum(axis=1)
    n_units, n_bins = total.shape
    at_once, few = (max(1, n // (n_bins * len(drawn))) for n in (_CELLS, _CACHED))
    jsd = np.empty((n_units, len(drawn)))
    for first in range(0, n_units, at_once):
        last = min(first + at_once, n_units)
        counts = np.zeros(((last - first) * n_bins, len(drawn)), dtype=np.int32)
        for block in blocks:
            _count(counts, block, histogram.edges, first, drawn)
        whole = counts.reshape(last - first, n_bins, len(drawn))
        for a in range(first, last, few):
            b = min(a + few, last)
            jsd[a:b] = _jsd(whole[a - first : b - first], total[a:b], inside, outside)
    return jsd


def _count(
    counts: Int[np.ndarray, "cells p"],
    block: TokenValues,
    edges: Float[np.ndarray, "u B_minus_1"],
    first: int,
    drawn: Bool[np.ndarray, "p n_texts"],
) -> None:
    """Add a block's tokens of the concept to the cells [unit and bin] of the units from first."""
    n_bins = edges.shape[1] + 1
    cell = (block.unit.astype(np.int64) - first) * n_bins + block.bins(edges) - 1
    mine = (cell >= 0) & (cell < len(counts))
    texts, local = np.unique(block.text, return_inverse=True)
    table = sparse.coo_array(
        (np.ones(int(mine.sum()), np.float32), (cell[mine], local[block.token[mine]])),
        shape=(len(counts), len(texts)),
    ).tocsr()
    rows = np.flatnonzero(np.diff(table.indptr))
    onehot = np.ascontiguousarray(drawn[:, texts].T, dtype=np.float32)
    # exact in float32: no count of a block reaches 2^24
    counts[rows] += cast("np.ndarray", table[rows] @ onehot).astype(np.int32)


def _jsd(
    counts: Int[np.ndarray, "u B p"],
    total: Int[np.ndarray, "u B"],
    inside: Float[np.ndarray, " p"],
    outside: Float[np.ndarray, " p"],
) -> Float[np.ndarray, "u p"]:
    """Jensen-Shannon divergence in bits; the atom is what the bins leave."""
    mine, other = counts / inside, (total[:, :, None] - counts) / outside
    atoms = [np.maximum(0.0, 1 - part.sum(axis=1, keepdims=True)) for part in (mine, other)]
    mine, other = (np.concatenate(pair, axis=1) for pair in zip(atoms, (mine, other), strict=True))
    return _entropy((mine + other) / 2) - (_entropy(mine) + _entropy(other)) / 2


def _entropy(p: Float[np.ndarray, "u B p"]) -> Float[np.ndarray, "u p"]:
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=1)


def _d_prime(histogram: Histogram, inside: Bool[np.ndarray, " c"]) -> Float[np.ndarray, " u"]:
    means, variances = [], []
    for side in (inside, ~inside):
        n = histogram.n[side].sum()
        mean = histogram.total[:, side].sum(axis=1) / n
        square = histogram.square[:, side].sum(axis=1) / n
        means.append(mean)
        variances.append(np.maximum(square - mean**2, 0.0))
    sd = np.sqrt((variances[0] + variances[1]) / 2)
    return np.divide(means[0] - means[1], sd, out=np.zeros_like(sd), where=sd > 0)
