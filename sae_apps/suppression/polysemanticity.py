"""Polysemanticity: how far different concepts speak through the same units.

The units of the largest mean value within a concept are its salient ones (arXiv 2508.15094, 50 of
them); the overlap of two concepts is |S_a and S_b| / q. Two random sets share q / m of m units,
which a wide SAE makes tiny by width alone, so that chance stands beside the overlap, and so does a
share that does not depend on width: of the live units, those that fire more than the permutation
threshold allows for more than one concept.
"""

from itertools import combinations
from typing import Any

import numpy as np

from sae_core.errors import UserError

from .histogram import Histogram
from .permuted import Permuted

THRESHOLD = 3.0  # standard deviations of the firing rate under permuted labels


def polysemanticity(
    histogram: Histogram, permuted: Permuted | None = None, q: int = 50
) -> dict[str, Any]:
    """Overlap of the salient units of all pairs of concepts.

    Args:
        histogram: counts under the true labels.
        permuted: counts under permuted ones, for the share that does not depend on width.
        q: salient units a concept; at most the live units.

    Returns:
        q, overlap (mean over pairs, in [0, 1]), chance (q / live units), and shared: the share of
        live units with an excess of firing in more than one concept; None for units of both signs,
        fewer than three concepts (two cannot both exceed their common rate) or no permutations.

    Raises:
        UserError: q is not positive, or no unit is live.
    """
    live = np.flatnonzero(histogram.live)
    if q < 1 or not len(live):
        raise UserError(
            f"Expected q of at least 1 and a live unit, got q={q} and {len(live)} live units."
        )
    q = min(q, len(live))
    mean = np.abs(histogram.mean()[live])
    salient = np.argsort(-mean, axis=0, kind="stable")[:q].T
    pairs = list(combinations(salient, 2))
    overlap = [len(np.intersect1d(a, b)) / q for a, b in pairs]
    shared = None
    if permuted is not None and histogram.has_atom and len(histogram.classes) > 2:
        rate = 1 - histogram.counts[live, :, 0] / histogram.n
        null = 1 - permuted.counts[live, 0] / permuted.n
        limit = null.mean(axis=1) + THRESHOLD * null.std(axis=1, ddof=1)
        shared = float(((rate > limit).sum(axis=1) > 1).mean())
    return {
        "q": q,
        "overlap": float(np.mean(overlap)) if overlap else None,
        "chance": q / len(live),
        "shared": shared,
    }
