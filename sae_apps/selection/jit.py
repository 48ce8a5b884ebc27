"""How loops over sparse rows are compiled: where the code is kept, and four pieces of LLVM.

numba (extra ``cpu``) compiles; the modules that use this one are imported only where it is present.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sae_core.download import sha256_file
from sae_core.kernels.compiled import compiler

MINIMUM, PRODUCT = 0, 1  # what a loop sums
# Sums may be reordered, so that they fill vector registers; NaN and infinity keep their meaning,
# since they are how bad values are noticed.
REORDER = {"reassoc", "nsz", "contract"}
# Named after the text of this file, because its pieces are compiled into loops of other files.
jit = compiler(sha256_file(Path(__file__))[:8])


def _emit_row(width: int, minimum: bool, is_double: bool) -> Callable:
    """Code that adds sum_j min(v[j], table[i[j]]) or sum_j v[j] * table[i[j]] to ``sums``."""
    narrow = ir.VectorType(ir.FloatType(), width)
    wide = ir.VectorType(ir.DoubleType(), width) if is_double else narrow

    def widened(builder: Any, vector: Any) -> Any:
        return builder.fpext(vector, wide) if is_double else vector

    def spread(builder: Any, value: Any) -> Any:
        lane = ir.Constant(ir.IntType(32), 0)
        first = builder.insert_element(ir.Constant(narrow, ir.Undefined), value, lane)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
        return builder.shuffle_vector(first, first, zeros)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, table, index, value = (
            context.make_array(kind)(context, builder, arg)
            for kind, arg in zip(signature.args[2:], args[2:], strict=True)
        )
        place = builder.bitcast(sums.data, wide.as_pointer())
        total = cgutils.alloca_once_value(builder, builder.load(place, align=4))
        with cgutils.for_range(builder, index.nitems) as loop:
            j, kind = loop.index, loop.index.type
            column = builder.zext(builder.load(builder.gep(index.data, [j])), kind)
            start = builder.gep(table.data, [builder.mul(column, ir.Constant(kind, width))])
            there = builder.load(builder.bitcast(start, narrow.as_pointer()), align=4)
            here = spread(builder, builder.load(builder.gep(value.data, [j])))
            if minimum:
                less = builder.fcmp_ordered("<", here, there)
                term = widened(builder, builder.select(less, here, there))
            else:
                term = builder.fmul(widened(builder, here), widened(builder, there))
            builder.store(builder.fadd(builder.load(total), term), total)
        builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return emit


def _type_row(typing_context, width, measure, sums, table, index, value):  # noqa: ANN001, ANN202
    """sums[q] += sum_j f(value[j], table[index[j], q]) for q < width; the first two are constants.

    ``index`` has 32 bits and is below the length of the table; all arrays are contiguous. The
    additions are in the type of ``sums``. Emitted as vectors because the optimiser, left alone,
    gathers along the nonzeros, one query at a time, and is four times slower at width 32.
    """
    signature = types.void(width, measure, sums, table, index, value)
    is_minimum, is_double = measure.literal_value == MINIMUM, sums.dtype == types.float64
    return signature, _emit_row(width.literal_value, is_minimum, is_double)


add_row: Any = intrinsic(prefer_literal=True)(_type_row)


def _type_clamped(typing_context, index, last):  # noqa: ANN001, ANN202
    """min(index, last) as 32 bits, where a negative index counts as a huge one."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        smaller = builder.select(builder.icmp_unsigned("<", *args), *args)
        is_wide = signature.args[0].bitwidth > 32
        return builder.trunc(smaller, ir.IntType(32)) if is_wide else smaller

    return types.int32(index, index), emit


def _type_pick(typing_context, array, place):  # noqa: ANN001, ANN202
    """array[place] without a look for negative places, so that it becomes a 32-bit gather."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load(builder.gep(data, [builder.sext(args[1], ir.IntType(64))]))

    return array.dtype(array, types.int32), emit


def _type_prefetch(typing_context, array, place):  # noqa: ANN001, ANN202
    """Ask for the cache line of array[place], which need not be there, before it is used."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        start = builder.bitcast(builder.gep(data, [args[1]]), byte)
        builder.call(ask, [start, flag(0), flag(3), flag(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


clamped: Any = intrinsic(_type_clamped)
prefetch: Any = intrinsic(_type_prefetch)
pick: Any = intrinsic(_type_pick)
