"""Entries of x W + b above a threshold, a block of tokens at a time: torch's triton.active_codes.

The product of a block is read while it is in the cache and never kept, so memory is that of a
block. torch's own comparison and `nonzero` on a matrix of bfloat16 take a third of the product's
time. Here the numbers are read as integers, which have the same sign, and four of them (or eight
booleans) as one word: few words of a sparse matrix differ from 0, and only those are looked into.
"""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sae_core.kernels import sparse
from sae_core.kernels.choice import cpu_kernels, products
from sae_core.kernels.codes import Codes, row_starts

# of a block's product: 2% quicker than half of it, and most last caches hold it
BLOCK_BYTES = 20_000_000
LEAST_ROWS = 256  # shorter blocks slow the product down
REACH = 0.0085  # 2 u + u^2 = 0.0078 with u = 2^-8, and room for the sums, which are in float32
BFLOAT16 = ("avx512_bf16", "amx_tile")  # instructions, as torch.cpu names them
UP = 2.0**-7  # what is this much larger is not below the number after rounding to 8 bits


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
    is_exact = dtype == x.dtype and threshold is None
    product = _product(x, w, b if threshold is None else b - threshold, dtype)
    codes = _positive_codes(product, x, w.shape[1], block_rows(w.shape[1], dtype), is_exact)
    return codes if is_exact else exact_values(x, w, b, codes)


@torch.no_grad()
def exact_codes(
    x: Float[Tensor, "n d_in"], w: Float[Tensor, "d_in d_sae"], b: Float[Tensor, "d_sae"]
) -> Codes:
    """Entries of y = x W + b above 0, each decided by its own dot product in the type of x.

    A product in bfloat16 proposes those for which, x' and w' being x and w rounded to u = 2^-8,

        x''w' + b + REACH ||x|| ||w|| > 0,    |x''w' - x'w| <= (2 u + u^2) ||x|| ||w||,

    so none is passed over (Cauchy-Schwarz): the codes are those of a look at every entry. Unless
    they are dense (see ``sparse``), they depend on nothing but the token, while the last bits of a
    whole product depend on its batch.
    """
    reach = x.norm(dim=1) * (REACH * (1 + UP)), w.norm(dim=0) * (1 + UP)
    product = _product(x, w, b + b.abs() * UP, torch.bfloat16, reach)
    size = block_rows(w.shape[1], torch.bfloat16)
    codes = exact_values(x, w, b, _positive_codes(product, x, w.shape[1], size, False))
    return codes.keep(codes.values > 0)


def is_exact_quicker(x: Float[Tensor, "n d_in"], d_sae: int) -> bool:
    """Whether `exact_codes` takes less time here than a product in float32.

    Without the loops of numba its last step would take what the first one saves.
    """
    is_served = x.dtype == torch.float32 and len(x) >= LEAST_ROWS
    return is_served and not x.is_cuda and _has_bfloat16() and products(x, d_sae) is not None


@cache
def _has_bfloat16() -> bool:
    """Does this processor have instructions for products in bfloat16?"""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in BFLOAT16)
    return any(check is not None and check() for check in checks)


def _positive_codes(
    product: Callable[[slice], Tensor], x: Tensor, d_sae: int, size: int, with_values: bool
) -> Codes:
    """Where a product of the tokens x, `size` of them at a time, is above 0."""
    nothing = torch.zeros(0, dtype=torch.int64, device=x.device)
    rows, cols, values = [nothing], [nothing], [x.new_zeros(0)]
    for first in range(0, len(x), size):
        pre = product(slice(first, first + size))
        row, col = above(pre)
        rows.append(row + first)
        cols.append(col)
        values.append(pre[row, col] if with_values else x.new_empty(len(row)))
    row = torch.cat(rows)
    return Codes(row_starts(row, len(x)), row, torch.cat(cols), torch.cat(values), d_sae)


def _product(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    further: tuple[Tensor, Tensor] | None = None,
) -> Callable[[slice], Float[Tensor, "block d_sae"]]:
    """x[block] W + b in `dtype`; `further` is one more column of x and one of W.

    addmm copies b to every row before it multiplies, at 18,432 latents a tenth of a step. Where the
    operands are converted anyway, b becomes one more column of W instead, and 1 one of x; a second,
    of zeros if not `further`, keeps the width even, as instructions take pairs of bfloat16. (In
    float32 that gains nothing.)
    """
    if dtype == x.dtype:
        return lambda block: torch.addmm(b, x[block], w)
    rows, weights = (t.new_zeros(len(t), len(w) + 2, dtype=dtype) for t in (x, w.T))
    rows[:, : len(w)], weights[:, : len(w)] = x, w.T
    rows[:, len(w)], weights[:, len(w)] = 1, b
    if further is not None:
        rows[:, -1], weights[:, -1] = further
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
