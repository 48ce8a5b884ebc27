"""Which units speak of a concept: debiased separation with a test that permutes whole texts.

    JSD_j   = H(m) - (H(p) + H(q)) / 2        p, q: unit j's hurdle histogram within and without
    D_j     = sqrt(max(0, JSD_j - mean over permutations of JSD_j))
    z_j     = (JSD_j - mean) / sd             over the permutations
    p_j     = (1 + #{permutations: max_k z_k >= z_j}) / (1 + permutations)

Labels belong to texts, so texts are permuted, not tokens: tokens of one text are alike, and
permuting them would call everything significant. The maximum over all units (Westfall and Young,
1993) corrects for their number, however they depend on one another. Among the significant units
the order is that of d' = (mean within - mean without) / pooled sd, one-sided for latents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.tokens import TokenValues

_CELLS = 1 << 24  # units x bins x permutations at once: 128 MiB of float64


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
    values: TokenValues,
    histogram: Histogram,
    texts: Bool[np.ndarray, " n_texts"],
    is_concept: Bool[np.ndarray, " n_texts"],
    *,
    permutations: int,
    rng: np.random.Generator,
) -> Separation:
    """Test every unit for a difference between the concepts and the rest.

    Args:
        values: tokens of the texts that count.
        histogram: of these tokens; its edges are used.
        texts: the texts that count; labels are permuted among them.
        is_concept: label of every text.
        permutations: at least 1; no p-value is below 1 / (1 + permutations).
    """
    members = np.flatnonzero(texts)
    labels = np.zeros((values.n_texts, permutations + 1))
    labels[members, 0] = is_concept[members]
    for one in range(1, permutations + 1):
        labels[members, one] = is_concept[rng.permutation(members)]
    tokens = np.bincount(values.text, minlength=values.n_texts).astype(np.float64)
    inside = tokens @ labels
    outside = tokens.sum() - inside
    parts = [_jsd(counts, total, inside, outside) for counts, total in
             _counts(values, histogram, labels)]  # fmt: skip
    jsd = np.concatenate(parts)
    mean, sd = jsd[:, 1:].mean(axis=1), jsd[:, 1:].std(axis=1)
    z = (jsd - mean[:, None]) / np.where(sd > 0, sd, np.inf)[:, None]
    highest = z[:, 1:].max(axis=0)
    p = (1 + (highest[None] >= z[:, :1]).sum(axis=1)) / (1 + permutations)
    concept = np.zeros(len(tokens), dtype=bool)
    concept[members] = is_concept[members]
    return Separation(
        np.sqrt(np.maximum(0.0, jsd[:, 0] - mean)),
        np.where(sd > 0, p, 1.0),
        _d_prime(values, concept),
        permutations,
    )


def _counts(
    values: TokenValues, histogram: Histogram, labels: Float[np.ndarray, "n_texts p"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens [units, bins, p] of the concept and [units, bins] of all, for units in turn."""
    order = np.argsort(values.unit, kind="stable")
    text, unit = values.text[values.token[order]], values.unit[order]
    place = values.bins(histogram.edges)[order] - 1
    n_bins, p = histogram.n_bins, labels.shape[1]
    step = max(1, _CELLS // (n_bins * p))
    for first in range(0, values.n_units, step):
        last = min(first + step, values.n_units)
        a, b = np.searchsorted(unit, [first, last])
        cell = (unit[a:b].astype(np.int64) - first) * n_bins + place[a:b]
        shape = ((last - first) * n_bins, values.n_texts)
        table = sparse.csr_array((np.ones(b - a), (cell, text[a:b])), shape=shape)
        total = np.asarray(table.sum(axis=1)).reshape(last - first, n_bins)
        yield (table @ labels).reshape(last - first, n_bins, p), total


def _jsd(
    counts: Float[np.ndarray, "u B p"],
    total: Float[np.ndarray, "u B"],
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


def _d_prime(
    values: TokenValues, is_concept: Bool[np.ndarray, " n_texts"]
) -> Float[np.ndarray, " u"]:
    mine = is_concept[values.text]
    at = mine[values.token]
    value = values.value.astype(np.float64)
    means, variances = [], []
    for n, chosen in ((mine.sum(), at), ((~mine).sum(), ~at)):
        total = np.bincount(values.unit[chosen], value[chosen], values.n_units)
        square = np.bincount(values.unit[chosen], value[chosen] ** 2, values.n_units)
        means.append(total / n)
        variances.append(np.maximum(square / n - (total / n) ** 2, 0.0))
    sd = np.sqrt((variances[0] + variances[1]) / 2)
    return np.divide(means[0] - means[1], sd, out=np.zeros_like(sd), where=sd > 0)
