"""The three products of a sparse autoencoder as one-line dense references.

With A the [n, d_sae] matrix of codes, G and X [n, d] and W [d_sae, d]:

    matmul(A, W) = A W              decoder, and the gradient of the encoder's input
    matmul_t(A, G) = A' G           gradients of both weight matrices
    sampled(A, G, W) = (G W')_ij    at the active entries (i, j) only: gradient of the codes
"""

from jaxtyping import Float
from torch import Tensor

from sae_core.kernels.codes import Codes


def matmul(codes: Codes, w: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """A W."""
    return codes.to_dense() @ w


def matmul_t(codes: Codes, g: Float[Tensor, "n d"]) -> Float[Tensor, "d_sae d"]:
    """A' G."""
    return codes.to_dense().T @ g


def sampled(
    codes: Codes, g: Float[Tensor, "n d"], w: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "nnz"]:
    """(G W') at the active entries, in the order of the codes."""
    return (g @ w.T)[codes.row, codes.col]
