"""Entries of x W + b above a threshold, a block of tokens at a time: torch's triton.active_codes.

The product of a block is read while it is in the cache and never kept, so memory is that of a
block. torch's own comparison and `nonzero` on a matrix of bfloat16 take a third of the product's
time. Here the numbers are read as integers, which have the same sign, and four of them (or eight
booleans) as one word: few words of a sparse matrix differ from 0, and only those are looked into.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae_core.kernels import sparse
from sae_core.kernels.choice import cpu_kernels
from sae_core.kernels.codes import Codes, row_starts

# of a block's product: 2% quicker than half of it, and most last caches hold it
BLOCK_BYTES = 20_000_000
LEAST_ROWS = 256  # shorter blocks slow the product down


def block_rows(d_sae: int, dtype: torch.dtype) -> int:
    """Tokens of a block."""
    return max(LEAST_ROWS, BLOCK_BYTES // (d_sae * dtype.itemsize))


@torch.no_grad()
def active_codes(
    x: Float[Tensor, "n d_in"],
    w: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, "d_sae"],
    threshold: Float[Tensor, "d_sae"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Codes:
    """Entries whose pre-activation y = x W + b exceeds its threshold, with exact y.

    Args:
        threshold: None for 0.
        dtype: of the product that decides; the values are in the type of x.
    """
    n, d_sae = len(x), w.shape[1]
    size = block_rows(d_sae, dtype)
    is_exact = dtype == x.dtype and threshold is None
    product = _product(x, w, b if threshold is None else b - threshold, dtype)
    nothing = torch.zeros(0, dtype=torch.int64, device=x.device)
    rows, cols, values = [nothing], [nothing], [x.new_zeros(0)]
    for first in range(0, n, size):
        pre = product(slice(first, first + size))
        row, col = above(pre)
        rows.append(row + first)
        cols.append(col)
        values.append(pre[row, col] if is_exact else x.new_empty(len(row)))
    row = torch.cat(rows)
    codes = Codes(row_starts(row, n), row, torch.cat(cols), torch.cat(values), d_sae)
    return codes if is_exact else exact_values(x, w, b, codes)


def _product(
    x: Tensor, w: Tensor, b: Tensor, dtype: torch.dtype
) -> Callable[[slice], Float[Tensor, "block d_sae"]]:
    """x[block] W + b in `dtype`.

    addmm copies b to every row before it multiplies, at 18,432 latents a tenth of a step. Where the
    operands are converted anyway, b becomes one more column of W instead, and 1 one of x; a second
    of zeros keeps the width even, as instructions take pairs of bfloat16. (In float32 that gains
    nothing.)
    """
    if dtype == x.dtype:
        return lambda block: torch.addmm(b, x[block], w)
    rows, weights = (t.new_zeros(len(t), len(w) + 2, dtype=dtype) for t in (x, w.T))
    rows[:, : len(w)], weights[:, : len(w)] = x, w.T
    rows[:, len(w)], weights[:, len(w)] = 1, b
    return lambda block: rows[block] @ weights.T


def exact_values(
    x: Float[Tensor, "n d_in"],
    w: Float[Tensor, "d_in d_sae"],
    b: Float[Tensor, "d_sae"],
    codes: Codes,
) -> Codes:
    """Codes with y = x W + b computed anew at the active entries, in the type of x."""
    return codes.with_values(sparse.sampled(codes, x, w.T) + b.index_select(0, codes.col))


def above(
    matrix: Float[Tensor, "n m"] | UInt8[Tensor, "n m"], floor: Float[Tensor, ""] | None = None
) -> tuple[Int[Tensor, "nnz"], Int[Tensor, "nnz"]]:
    """Rows and columns, ascending, of what is above `floor` in a contiguous matrix.

    Without numba and a floor, numbers of two bytes below 0 become 0 in place.

    Args:
        floor: 0 or more; None: 0.
    """
    if (fast := cpu_kernels(matrix, matrix.numel())) is not None:
        return fast.above(matrix, floor)
    place = _positive(matrix if floor is None else matrix > floor)
    row = place // max(1, matrix.shape[1])
    return row, place - row * matrix.shape[1]


def _positive(matrix: Tensor) -> Int[Tensor, "nnz"]:
    """Flat places of what is above 0, by torch."""
    if matrix.dtype == torch.uint8:
        small = matrix.view(-1)
    elif matrix.element_size() == 2:
        small = matrix.view(torch.int16).view(-1).clamp_min_(0)
    else:
        small = (matrix > 0).view(-1)
    each = 8 // small.element_size()
    if small.shape[0] % each or small.storage_offset() % each:
        return small.nonzero()[:, 0]
    words = small.view(torch.int64)
    word = words.nonzero()[:, 0]
    inside, slot = words[word].view(small.dtype).view(-1, each).nonzero(as_tuple=True)
    return word[inside] * each + slot
