"""The three products on CSR: MKL on the CPU; on CUDA Triton, or cuSPARSE where that is missing.

The references are in eager.py.

MKL's fast path takes 32-bit indices (64-bit ones cost 3 to 5 times as much); A' is formed by a
stable sort of the columns because the library's own transposed product is slower than sort plus
product. Above `DENSE_ABOVE` the dense references are faster, so the first steps of a run that
starts dense do not crawl.
"""

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels import eager
from sae_core.kernels.choice import kernels
from sae_core.kernels.codes import Codes

DENSE_ABOVE = 0.15
"""Density above which dense products win (measured on 2 cores at d=576, d_sae=4608)."""


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
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
    if (fast := kernels(w)) is not None:
        return fast.matmul(codes, w)
    return _csr(codes.crow, codes.col, codes.values, (codes.n, codes.d_sae)) @ w


def matmul_t(codes: Codes, g: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """A' G."""
    if codes.density > DENSE_ABOVE:
        return eager.matmul_t(codes, g)
    if (fast := kernels(g)) is not None:
        return fast.matmul_t(codes, g)
    order = codes.col.argsort(stable=True)
    starts = torch.zeros(codes.d_sae + 1, dtype=torch.int64, device=codes.col.device)
    torch.cumsum(torch.bincount(codes.col, minlength=codes.d_sae), 0, out=starts[1:])
    transposed = _csr(starts, codes.row[order], codes.values[order], (codes.d_sae, codes.n))
    return transposed @ g


def sampled(
    codes: Codes, g: Float[Tensor, "n d"], w: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """(G W') at the active entries, in the order of the codes."""
    if codes.density > DENSE_ABOVE:
        return eager.sampled(codes, g, w)
    if (fast := kernels(g)) is not None:
        return fast.sampled(codes, g, w)
    pattern = _csr(
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
