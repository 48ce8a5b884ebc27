"""Compiled loops that look for large numbers in a matrix; cpu.py calls them. Needs numba.

One comparison of vectors tells which of 64 numbers are above a floor, as the bits of an integer;
what is not is never looked at. The numbers are integers: the bits of a floating-point number, read
as one, have its sign and, above 0, its order. ``many`` is the number of threads, and what is done
to a row is a function of its own, as in loops.py.
"""

from typing import Any, no_type_check

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from sae_core.kernels.loops import MANY, ONE, jit

LANES = 64  # numbers compared at once, one bit each


@intrinsic
def _above(_: Any, row: Any, begin: Any, floor: Any) -> Any:
    """Bit j: is row[begin + j] above `floor`, of the row's type? A comparison of vectors."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0].dtype
        array = context.make_array(signature.args[0])(context, builder, args[0])
        vector = ir.VectorType(context.get_data_type(kind), LANES)
        place = builder.bitcast(builder.gep(array.data, [args[1]]), vector.as_pointer())
        compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
        lane, lanes = ir.IntType(32), ir.VectorType(ir.IntType(32), LANES)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], lane(0))
        floors = builder.shuffle_vector(one, one, ir.Constant(lanes, [0] * LANES))
        bits = compare(">", builder.load(place, align=1), floors)
        return builder.bitcast(bits, ir.IntType(LANES))

    return types.uint64(row, begin, row.dtype), emit


@intrinsic
def _ones(_: Any, bits: Any) -> Any:
    """How many bits are 1."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(bits), emit


@intrinsic
def _lowest(_: Any, bits: Any) -> Any:
    """Number of the lowest bit that is 1."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(bits), emit


@jit(**ONE)
@no_type_check
def _count_row(row, floor):
    count, whole = 0, len(row) - len(row) % LANES
    for begin in range(0, whole, LANES):
        count += _ones(_above(row, begin, floor))
    for j in range(whole, len(row)):
        count += row[j] > floor
    return count


@jit(**ONE)
@no_type_check
def _name_row(row, floor, columns):
    at, whole = 0, len(row) - len(row) % LANES
    for begin in range(0, whole, LANES):
        bits = _above(row, begin, floor)
        while bits:
            columns[at] = begin + _lowest(bits)
            at += 1
            bits &= bits - np.uint64(1)
    for j in range(whole, len(row)):
        if row[j] > floor:
            columns[at] = j
            at += 1


@jit(**MANY)
@no_type_check
def above(many, matrix, floor):
    """Rows and columns, ascending, of the integers above `floor`, one of their type."""
    starts = np.zeros(len(matrix) + 1, np.int64)
    for thread in prange(many):
        for i in range(len(matrix) * thread // many, len(matrix) * (thread + 1) // many):
            starts[i + 1] = _count_row(matrix[i], floor)
    for i in range(len(matrix)):
        starts[i + 1] += starts[i]
    rows, columns = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    for thread in prange(many):
        for i in range(len(matrix) * thread // many, len(matrix) * (thread + 1) // many):
            rows[starts[i] : starts[i + 1]] = i
            _name_row(matrix[i], floor, columns[starts[i] : starts[i + 1]])
    return rows, columns


@jit(**ONE)
@no_type_check
def _keep_largest(keys, columns, n, k):
    """Move the k largest of n keys to the front, in their order; returns the least of them."""
    low, high = keys[0], keys[0]
    for t in range(n):
        low, high = min(low, keys[t]), max(high, keys[t])
    while low < high:  # the largest number that at least k keys reach
        middle, count = low + (high - low + 1) // 2, 0
        for t in range(n):
            count += keys[t] >= middle
        if count >= k:
            low = middle
        else:
            high = middle - 1
    equal = k  # of the keys that equal the least, so many stay
    for t in range(n):
        equal -= keys[t] > low
    at = 0
    for t in range(n):
        if keys[t] > low or (keys[t] == low and equal > 0):
            equal -= keys[t] == low
            keys[at], columns[at] = keys[t], columns[t]
            at += 1
    return low


@jit(**ONE)
@no_type_check
def _top_row(row, k, keys, columns):
    """Columns, ascending, of the k largest positive integers; returns how many there are.

    Those above the floor are kept; when the place is full, the k largest are, and the floor rises.
    """
    n, floor, whole = 0, row.dtype.type(0), len(row) - len(row) % LANES
    for begin in range(0, whole, LANES):
        bits = _above(row, begin, floor)
        while bits:
            j = begin + _lowest(bits)
            keys[n], columns[n] = row[j], j
            n += 1
            bits &= bits - np.uint64(1)
        if n + LANES > len(keys):
            floor, n = row.dtype.type(_keep_largest(keys, columns, n, k)), k
    for j in range(whole, len(row)):
        if row[j] > floor:
            keys[n], columns[n] = row[j], j
            n += 1
    if n > k:
        _keep_largest(keys, columns, n, k)
    return min(n, k)


@jit(**MANY)
@no_type_check
def top(many, matrix, k):
    """Rows and columns, ascending, of the k largest positive integers of each row."""
    places = np.empty((len(matrix), k), np.int64)
    starts = np.zeros(len(matrix) + 1, np.int64)
    for thread in prange(many):
        keys, columns = np.empty(2 * k + 2 * LANES, np.int64), np.empty(2 * k + 2 * LANES, np.int64)
        for i in range(len(matrix) * thread // many, len(matrix) * (thread + 1) // many):
            n = _top_row(matrix[i], k, keys, columns)
            places[i, :n] = columns[:n]
            starts[i + 1] = n
    for i in range(len(matrix)):
        starts[i + 1] += starts[i]
    rows, found = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    for i in range(len(matrix)):
        rows[starts[i] : starts[i + 1]] = i
        found[starts[i] : starts[i + 1]] = places[i, : starts[i + 1] - starts[i]]
    return rows, found
