"""Decoder, residual and loss in one pass over the tokens, with the gradient of the codes.

    x_hat = A W_dec + b_dec,   r = x_hat - x,   loss = factor * sum_ij gamma_j^2 r_ij^2
    d loss / d x_hat = g = 2 factor gamma^2 r,    d loss / d a_ij = g_i'w_j at the active entries

The products of triton_products.py read the rows of W_dec that a token names twice, forward and
backward, from memory each time, and the residual is written and read by every operation in
between. A program here keeps its token's x_hat and g in registers and gathers the same rows again
at once. 64 rows of 2,048 are 512 KB in float32 and a GPU works on hundreds of tokens, so the L2
cache (50 MB) still holds those that many tokens share, not all; programs of many warps, of which
few run at a time, leave more of them there. What is saved for certain are the passes over the
residual.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_core.kernels import triton_products
from sae_core.kernels.codes import Codes
from sae_core.kernels.reconstruction import differentiable
from sae_core.kernels.triton_launch import launch

CELLS = 8192  # numbers gathered at once, 32 to a thread
MOST_COLUMNS = 8192  # a token must fit into the registers of one program


@triton.jit
@no_type_check
def _reconstruct(
    crow, col, values, w, bias, x, squared, x_hat, g, d_values, loss, d, twice,
    HAS_WEIGHTS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    wide = column < d
    lane = tl.arange(0, ENTRIES)
    begin, end = tl.load(crow + i), tl.load(crow + i + 1)
    total = tl.load(bias + column, mask=wide, other=0.0).to(SUM)
    for start in range(begin, end, ENTRIES):
        inside = start + lane < end
        latent = tl.load(col + start + lane, mask=inside, other=0)
        value = tl.load(values + start + lane, mask=inside, other=0.0).to(SUM)
        at = w + latent[:, None] * d + column[None, :]
        rows = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0).to(SUM)
        total += tl.sum(value[:, None] * rows, 0)
    residual = total - tl.load(x + i * d + column, mask=wide, other=0.0).to(SUM)
    pull = residual
    if HAS_WEIGHTS:
        pull = residual * tl.load(squared + column, mask=wide, other=0.0).to(SUM)
    tl.store(loss + i, tl.sum(residual * pull, 0))
    pull *= tl.load(twice)
    tl.store(x_hat + i * d + column, total, mask=wide)
    tl.store(g + i * d + column, pull, mask=wide)
    for start in range(begin, end, ENTRIES):
        inside = start + lane < end
        latent = tl.load(col + start + lane, mask=inside, other=0)
        at = w + latent[:, None] * d + column[None, :]
        rows = tl.load(at, mask=inside[:, None] & wide[None, :], other=0.0).to(SUM)
        tl.store(d_values + start + lane, tl.sum(pull[None, :] * rows, 1), mask=inside)


def _run(
    codes: Codes, w_dec: Tensor, b_dec: Tensor, x: Tensor, factor: float, squared: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], x_hat and d loss / d x_hat [n, d], d loss / d values [nnz]."""
    dtype, sum_type = triton_products.sum_types(codes.values, w_dec, x)
    n, d = x.shape
    b = triton_products.block(d, MOST_COLUMNS, CELLS)
    x, w = x.contiguous(), w_dec.contiguous()
    x_hat, g = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    loss, d_values = x.new_zeros(n, dtype=dtype), x.new_zeros(codes.col.shape[0], dtype=dtype)
    twice = torch.full((1,), 2 * factor, dtype=dtype, device=x.device)
    launch(
        _reconstruct, (n,), codes.crow, codes.col, codes.values, w, b_dec, x,
        b_dec if squared is None else squared, x_hat, g, d_values, loss, d, twice,
        HAS_WEIGHTS=squared is not None, ENTRIES=b.entries, COLUMNS=b.columns, SUM=sum_type,
        num_warps=b.warps,
    )  # fmt: skip
    return loss.sum() * factor, x_hat, g, d_values


reconstruction = differentiable(_run, triton_products.matmul_t)
