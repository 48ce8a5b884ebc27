"""Compiled loops of a training step on the processor; cpu.py calls them. Needs numba.

A sum of rows reads four of them at a time and stays in the nearest cache; a dot product fills
vector registers because its terms may be added in another order. The order is the same in every run
and on any number of threads, ``many``. What is done to a row is a function of its own: with one
body written into the parallel loop, numba 0.68 left out two of its stores. Matrices are
C-contiguous, indices int64.
"""

from typing import Any, no_type_check

import numpy as np
from numba import prange

from sae_core.kernels.compiled import compiler

LEAST = 1e-30  # of a row's largest number, so that it can be divided by
jit = compiler("kernels")
# sums may be reordered and products fused; NaN and infinity keep their meaning
ONE: dict[str, Any] = {"fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
MANY = ONE | {"parallel": True}


@jit(**ONE)
@no_type_check
def _part_by_entries(starts, thread, many):
    """First and end of the rows of a thread: as many entries for each, as nearly as rows allow."""
    first, end = np.searchsorted(starts, starts[-1] * thread / many), len(starts) - 1
    if thread < many - 1:
        end = np.searchsorted(starts, starts[-1] * (thread + 1) / many)
    return first if thread else 0, end


@jit(**ONE)
@no_type_check
def _sum_row(order, place, weight, first, end, rows, total):
    """total += sum over e from first to end of weight[e] rows[place[e]], entries in `order`."""
    t = first
    while t + 4 <= end:
        e0, e1, e2, e3 = t, t + 1, t + 2, t + 3
        if order is not None:
            e0, e1, e2, e3 = order[t], order[t + 1], order[t + 2], order[t + 3]
        w0, w1, w2, w3 = weight[e0], weight[e1], weight[e2], weight[e3]
        r0, r1 = rows[place[e0]], rows[place[e1]]
        r2, r3 = rows[place[e2]], rows[place[e3]]
        for j in range(len(total)):
            total[j] += (w0 * r0[j] + w1 * r1[j]) + (w2 * r2[j] + w3 * r3[j])
        t += 4
    while t < end:
        e0 = t if order is None else order[t]
        w0, r0 = weight[e0], rows[place[e0]]
        for j in range(len(total)):
            total[j] += w0 * r0[j]
        t += 1


@jit(**ONE)
@no_type_check
def _dots_row(col, first, end, own, w, out):
    """out[e] = own'w[col[e]] for e from first to end."""
    for e in range(first, end):
        other, total = w[col[e]], own.dtype.type(0)
        for j in range(len(own)):
            total += own[j] * other[j]
        out[e] = total


@jit(**MANY)
@no_type_check
def sums(many, order, place, weight, starts, rows, out):
    """out[i] = sum over e from starts[i] to starts[i + 1] of weight[e] rows[place[e]].

    ``order`` names the entries; None: as they lie.
    """
    for thread in prange(many):
        for i in range(*_part_by_entries(starts, thread, many)):
            total = out[i]
            total[:] = 0
            _sum_row(order, place, weight, starts[i], starts[i + 1], rows, total)


@jit(**MANY)
@no_type_check
def dots(many, crow, col, g, w, out):
    """out[e] = g[i]'w[col[e]] for the entries e of each row i."""
    for thread in prange(many):
        for i in range(len(g) * thread // many, len(g) * (thread + 1) // many):
            _dots_row(col, crow[i], crow[i + 1], g[i], w, out)


@jit(**ONE)
@no_type_check
def _reconstruct_row(
    col, values, first, end, w, bias, x, squared, factor, x_hat, g, d_values,
):  # fmt: skip
    weighted, loss = len(squared) > 0, x.dtype.type(0)
    x_hat[:] = bias
    _sum_row(None, col, values, first, end, w, x_hat)
    for j in range(len(x)):
        r = x_hat[j] - x[j]
        pulled = r * squared[j] if weighted else r
        loss += r * pulled
        g[j] = 2 * factor * pulled
    _dots_row(col, first, end, g, w, d_values)
    return factor * loss


@jit(**MANY)
@no_type_check
def reconstruct(
    many, crow, col, values, w, bias, x, squared, factor, x_hat, g, d_values, loss,
):  # fmt: skip
    """Of each row: x_hat = sum of values w[col] + bias, r = x_hat - x, its loss, g and d_values.

    loss = factor sum_j squared_j r_j^2, g = 2 factor squared r, d_values = g'w[col]. ``squared``
    has no entries where all weights are 1.
    """
    for thread in prange(many):
        for i in range(len(x) * thread // many, len(x) * (thread + 1) // many):
            first, end = crow[i], crow[i + 1]
            loss[i] = _reconstruct_row(
                col, values, first, end, w, bias, x[i], squared, factor, x_hat[i], g[i], d_values
            )


@jit(**ONE)
@no_type_check
def _adam_unit_row(row, grad, mean, square, rate, root, eps, beta1, rest1, beta2, rest2):
    total = row.dtype.type(0)
    for j in range(len(row)):
        mean[j] = beta1 * mean[j] + rest1 * grad[j]
        square[j] = beta2 * square[j] + rest2 * grad[j] * grad[j]
        row[j] -= rate * mean[j] / (np.sqrt(square[j]) / root + eps)
        total += row[j] * row[j]
    factor = 1 / max(np.sqrt(total), row.dtype.type(1e-12))
    for j in range(len(row)):
        row[j] *= factor


@jit(**MANY)
@no_type_check
def adam_unit_rows(many, p, g, m, v, rate, root, eps, beta1, rest1, beta2, rest2):
    """Adam's step on the rows of p, each of which then gets unit norm; see triton_update.py.

    ``rate`` is lr / (1 - beta1^t), ``root`` sqrt(1 - beta2^t), ``rest`` 1 - beta.
    """
    for thread in prange(many):
        for i in range(len(p) * thread // many, len(p) * (thread + 1) // many):
            _adam_unit_row(p[i], g[i], m[i], v[i], rate, root, eps, beta1, rest1, beta2, rest2)


@jit(**ONE)
@no_type_check
def _round_row(row, bias, unit, most, columns, margin, out):
    largest, total = np.float32(LEAST), np.float32(0)
    for j in range(len(row)):
        largest = max(largest, abs(row[j]))
    step = max(largest / most, abs(bias) * unit / (most * columns))
    factor = np.float32(1 / step)
    for j in range(len(row)):
        rounded = np.rint(row[j] * factor)
        total += rounded * rounded
        out[j] = np.int32(rounded) + 128
    rest = int(np.ceil(bias * unit / step))
    for j in range(columns):
        digit = min(max(rest, -most), most)
        out[len(row) + j] = digit + 128
        rest -= digit
    out[len(row) + columns] = min(int(np.ceil(margin * np.sqrt(total))), most) + 128
    out[len(row) + columns + 1] = most + 128


@jit(**MANY)
@no_type_check
def round_latents(many, rows, bias, unit, most, columns, margin, out):
    """Of each row 128 + (p, T spread over columns, its margin, most); see screen.py."""
    for thread in prange(many):
        for i in range(len(rows) * thread // many, len(rows) * (thread + 1) // many):
            _round_row(rows[i], bias[i], unit, most, columns, margin, out[i])
