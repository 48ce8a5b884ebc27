"""The three products of sparse codes: Triton's kernels, numba's (cpu.py), or torch's own.

The references are in eager.py, the choice is in choice.py.

Without numba, weighted sums of rows are what `embedding_bag` makes; at 4,608 latents it takes half
the time of MKL's sparse product, at 18,432 a quarter (benchmarks/LOG.md). A' is formed by a stable
sort of the columns, which codes may carry. Above `DENSE_ABOVE` the dense references are faster, so
the first steps of a run that starts dense do not crawl.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.kernels import eager
from sae_core.kernels.choice import kernels, products
from sae_core.kernels.codes import Codes, by_latent

DENSE_ABOVE = 0.15
"""Density above which dense products win (measured on 2 cores at d=576, d_sae=4608)."""


def _sums(
    place: Int[Tensor, "nnz"], starts: Tensor, weight: Float[Tensor, "nnz"], rows: Tensor
) -> Tensor:
    """Row i: sum of weight_e rows[place_e] over the entries e from starts_i to starts_(i+1)."""
    return torch.nn.functional.embedding_bag(
        place, rows, starts, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def csr_tensor(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """torch's own CSR matrix, with 32-bit indices: 64-bit ones cost MKL 3 to 5 times as much."""
    with warnings.catch_warnings():
        # torch calls its CSR layout beta once per process; the products are tested against eager.py
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            crow.int(), col.int(), values, size=shape, check_invariants=False
        )


def matmul(codes: Codes, w: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """A W."""
    if codes.density > DENSE_ABOVE:
        return eager.matmul(codes, w)
    if (fast := products(w, codes.d_sae)) is not None:
        return fast.matmul(codes, w)
    return _sums(codes.col, codes.crow, codes.values, w)


def matmul_t(
    codes: Codes, g: Float[Tensor, "n d"], room: list[Tensor] | None = None
) -> Float[Tensor, "d_sae d"]:
    """A' G.

    Args:
        room: memory that the compiled loops may take for the result, a matrix [d_sae, d] or none;
            what was taken is taken out.
    """
    if codes.density > DENSE_ABOVE:
        return eager.matmul_t(codes, g)
    if (fast := products(g, codes.d_sae)) is not None:
        return fast.matmul_t(codes, g, *([room.pop()] if room else []))
    order, starts = codes.by_latent or by_latent(codes.col, codes.d_sae)
    return _sums(codes.row[order], starts, codes.values[order], g)


def sampled(
    codes: Codes, g: Float[Tensor, "n d"], w: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """(G W') at the active entries, in the order of the codes."""
    if codes.density > DENSE_ABOVE:
        return eager.sampled(codes, g, w)
    if (fast := products(g, codes.d_sae)) is not None:
        return fast.sampled(codes, g, w)
    pattern = csr_tensor(
        codes.crow, codes.col, torch.zeros_like(codes.values, dtype=g.dtype), (codes.n, codes.d_sae)
    )
    return torch.sparse.sampled_addmm(pattern, g, w.T, beta=0.0).values()


def latent_sums(codes: Codes) -> Float[Tensor, "d_sae"]:
    """Sum of the values of each latent, A' 1; always in one order, which atomic adds are not."""
    if (fast := kernels(codes.values)) is not None:
        if codes.density > DENSE_ABOVE:
            return codes.to_dense().sum(0)
        return fast.matmul_t(codes, codes.values.new_ones(codes.n, 1))[:, 0]
    return codes.values.new_zeros(codes.d_sae).index_add_(0, codes.col, codes.values)
