"""Compiled loops over the rows of a CSR matrix: sums of minima or of products with dense vectors.

s[i, q] = sum over the nonzeros k of row i of min(a[i, k], b[q, k])   or of   a[i, k] * b[q, k].

This module needs numba (extra ``cpu``) and is imported by ``kernels`` and ``neighbours`` only where
that is present. One vector b is gathered at the row's latents and summed in vector registers; every
index is clamped before it is used, so that a corrupt matrix is reported and never read out of
bounds. Several vectors lie interleaved as a table [d_sae, width], so that one nonzero needs one
contiguous read for all of them (``jit.add_row``). Threads are the caller's: every loop releases the
GIL, and numba's own thread pools abort the process when two Python threads enter them at once, or
after a fork.

Values are float32 and every sum that decides is float64.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from sae_apps.selection.jit import PRODUCT, REORDER, jit
from sae_apps.selection.jit import add_row as _add_row
from sae_apps.selection.jit import clamped as _clamped
from sae_apps.selection.jit import pick as _pick
from sae_apps.selection.metrics import EQUAL

BAD_INDEX, BAD_ORDER, BAD_VALUE = 1, 2, 4  # bits of what a loop found wrong


@jit(fastmath=REORDER)
def _entry(index, value, weights, n_latents):  # noqa: ANN001, ANN202
    """Latent, weighted value and complaint of one nonzero."""
    latent = _clamped(index, n_latents - 1)
    found = BAD_INDEX * np.int32(index != latent) | BAD_VALUE * np.int32(value < 0)
    if weights is not None:
        value *= _pick(weights, latent)
    return latent, value, found


@lru_cache
def one_vector(measure: int) -> Any:
    """The loop over rows for one dense vector, with the checks and the norms of the rows.

    It writes ``sums`` [stop - start, 1] and ``norms`` [stop - start] (sum of the values, or of
    their squares for products) and returns the BAD_ bits.
    """

    @jit(fastmath=REORDER)
    def loop(indptr, indices, data, weights, table, start, stop, sums, norms):  # noqa: ANN001, ANN202
        vector = table.ravel()
        found = np.int32(0)
        for row in range(start, stop):
            first, end = indptr[row], indptr[row + 1]
            index, value = indices[first:end], data[first:end]
            later = index[1:]
            total, norm = 0.0, 0.0
            for j in range(len(later)):
                latent, a, bad = _entry(index[j], value[j], weights, len(vector))
                found |= bad | BAD_ORDER * np.int32(later[j] <= index[j])
                total += _term(measure, a, _pick(vector, latent))
                norm += _term(measure, a, a)
            for j in range(len(later), len(index)):  # the last nonzero has none after it
                latent, a, bad = _entry(index[j], value[j], weights, len(vector))
                found |= bad
                total += _term(measure, a, _pick(vector, latent))
                norm += _term(measure, a, a)
            sums[row - start, 0] = total
            norms[row - start] = norm
        return found

    return loop


@jit(fastmath=REORDER)
def _term(measure, a, b):  # noqa: ANN001, ANN202
    if measure == PRODUCT:
        return np.float64(a) * np.float64(b)
    return np.float64(a if a < b else b)


@jit(fastmath=REORDER)
def _read_row(measure, index, value, weights, n_latents, latents, values):  # noqa: ANN001, ANN202
    """Copy one row's checked latents and weighted values; its norm and the complaints."""
    found, norm = np.int32(0), 0.0
    later = index[1:]
    for j in range(len(later)):
        found |= BAD_ORDER * np.int32(later[j] <= index[j])
    for j in range(len(index)):
        latent, a, bad = _entry(index[j], value[j], weights, n_latents)
        latents[j], values[j] = latent, a
        found |= bad
        norm += _term(measure, a, a)
    return norm, found


@jit()
def _longest(indptr, start, stop):  # noqa: ANN001, ANN202
    longest = 0
    for row in range(start, stop):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest


@lru_cache
def several_vectors(measure: int, width: int) -> Any:
    """The loop over rows for ``width`` interleaved vectors; arguments as in ``one_vector``."""

    @jit()
    def loop(indptr, indices, data, weights, table, start, stop, sums, norms):  # noqa: ANN001, ANN202
        longest = _longest(indptr, start, stop)
        latents, values = np.empty(longest, np.uint32), np.empty(longest, np.float32)
        found = np.int32(0)
        for row in range(start, stop):
            first, end = indptr[row], indptr[row + 1]
            norm, bad = _read_row(
                measure, indices[first:end], data[first:end], weights, len(table), latents, values
            )
            sums[row - start] = 0.0
            n = end - first
            _add_row(width, measure, sums[row - start], table, latents[:n], values[:n])
            norms[row - start] = norm
            found |= bad
        return found

    return loop


JACCARD, COSINE, L2 = 0, 1, 2
_UNIT, _TINY = 2.0**-23, 2.0**-126  # twice the rounding of float32; its least normal number


@jit()
def _similarity(metric, total, left, right):  # noqa: ANN001, ANN202
    """The same arithmetic as ``metrics.similarity_of``, for one pair."""
    if metric == L2:
        square = left + right - 2 * total
        return -np.sqrt(square) if square > EQUAL * (left + right) else 0.0
    below = left + right - total if metric == JACCARD else np.sqrt(left * right)
    return total / below if below > 0 else 0.0


@jit()
def _bar(metric, worst, right):  # noqa: ANN001, ANN202
    """(c, e) so that a score above ``worst`` needs a sum above c * x + e.

    x is |a|_1 for the Jaccard, |a| for the cosine, |a|^2 for the distance.
    """
    if worst == -np.inf:
        return 0.0, -np.inf
    if metric == JACCARD:  # m > w (|a| + |b| - m)
        return worst / (1 + worst), worst / (1 + worst) * right
    if metric == COSINE:
        return worst * np.sqrt(right), 0.0
    # |a|^2 + |b|^2 - 2 a.b < w^2, or counted as equal
    near = 0.5 * (1 - EQUAL)
    return near, near * right - 0.5 * worst * worst


@jit()
def _insert(scores, rows, score, row):  # noqa: ANN001, ANN202
    """Put a pair into a list of falling scores, behind its equals; the last one falls out."""
    place = len(scores) - 1
    while place > 0 and scores[place - 1] < score:
        scores[place], rows[place] = scores[place - 1], rows[place - 1]
        place -= 1
    scores[place], rows[place] = score, row


@lru_cache
def nearest_rows(measure: int, width: int) -> Any:
    """The loop over rows that keeps the best ones of up to ``width`` queries.

    The latents that any query has lie in ``table`` [., width], at ``slots[latent]``, else -1. The
    sums are made in float32 there. A row whose sum could reach a query's list if the rounding went
    its way (n additions of non-negative numbers err by at most n / 2^24 of the sum) is summed again
    in float64 over ``queries`` [q, d_sae], and only that sum decides: the result is exact. Rows
    come in ascending order, so among equal scores the first stays.

    ``scores`` [q, k] and ``rows`` [q, k] hold the lists. Returns False where a row is bad.
    """

    @jit()
    def loop(  # noqa: ANN202
        metric, indptr, indices, data, weights, start, stop,  # noqa: ANN001
        table, slots, queries, norms, scores, rows,  # noqa: ANN001
    ):  # fmt: skip
        longest = _longest(indptr, start, stop)
        latents, entries = np.empty(longest, np.uint32), np.empty(longest, np.float32)
        slot, entry = np.empty(longest, np.uint32), np.empty(longest, np.float32)
        sums = np.empty(width, np.float32)
        slope, base = np.zeros(width), np.full(width, np.inf)
        base[: len(scores)] = -np.inf
        for row in range(start, stop):
            first, end = indptr[row], indptr[row + 1]
            norm, bad = _read_row(
                measure, indices[first:end], data[first:end], weights, len(slots), latents, entries
            )
            if bad or not np.isfinite(norm):
                return False
            n = 0
            for j in range(end - first):
                if slots[latents[j]] >= 0:
                    slot[n], entry[n] = slots[latents[j]], entries[j]
                    n += 1
            sums[:] = 0.0
            _add_row(width, measure, sums, table, slot[:n], entry[:n])
            x = np.sqrt(norm) if metric == COSINE else norm
            slack, least = 1 + (n + 8) * _UNIT, (n + 1) * _TINY
            hits = np.int32(0)
            for q in range(width):
                hits |= np.int32(sums[q] * slack + least >= slope[q] * x + base[q])
            if hits == 0:
                continue
            for q in range(len(scores)):
                if sums[q] * slack + least >= slope[q] * x + base[q]:
                    total = 0.0
                    for j in range(end - first):
                        total += _term(measure, entries[j], queries[q, latents[j]])
                    score = np.float32(_similarity(metric, total, norm, norms[q]))
                    if score > scores[q, -1]:
                        _insert(scores[q], rows[q], score, row)
                        slope[q], base[q] = _bar(metric, np.float64(scores[q, -1]), norms[q])
        return True

    return loop
