"""A training step's kernels on CUDA (Triton); `choice.kernels` hands this module out.

    active_codes      codes above a threshold: product and threshold fused, values exact
    matmul, matmul_t, sampled      the three products of eager.py
    reconstruction    decoder, residual, loss and the gradient of the codes in one pass
    adam_unit_rows    Adam's step and the return to unit norm in one pass

TopK and BatchTopK rank pre-activations and keep their dense product: a threshold found by a
histogram on the way would need the product twice, 2.8 ms on an H200 at 8,192 tokens and 65,536
latents, where writing and reading 1.1 GB takes 0.5 ms; and AuxK reads the dead latents' values. The
three products and the two other kernels serve them all the same.

Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, which is how they are tested where
there is no GPU. The host waits once a step, for the number of active entries, and the device for
the host only as long as it takes to hand over the next kernel.
"""

from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels.codes import Codes
from sae_core.kernels.triton_bits import dense_bits, product_bits
from sae_core.kernels.triton_entries import codes_from_bits
from sae_core.kernels.triton_loss import MOST_COLUMNS, reconstruction
from sae_core.kernels.triton_products import by_latent, matmul, matmul_t, sampled
from sae_core.kernels.triton_update import adam_unit_rows

__all__ = [
    "MOST_COLUMNS",
    "active_bits",
    "active_codes",
    "adam_unit_rows",
    "matmul",
    "matmul_t",
    "reconstruction",
    "sampled",
]

DENSE_BYTES = 1 << 28  # of pre-activations at once on the route through a library's product


def active_bits(
    x: Float[Tensor, "n d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    bound: Float[Tensor, "d_sae"],
    fused: bool = True,
) -> Tensor:
    """One bit an entry where x W_enc > bound; see triton_bits.py for the two routes."""
    if fused:
        return product_bits(x, w_enc, bound)
    rows = max(1, DENSE_BYTES // (w_enc.shape[1] * x.dtype.itemsize))
    return torch.cat([dense_bits(part @ w_enc, bound) for part in x.split(rows)])


@torch.no_grad()
def active_codes(
    x: Float[Tensor, "n d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    threshold: Float[Tensor, "d_sae"] | None,
    dtype: torch.dtype,
    room: int,
    low: float | None = 0.0,
    most: float = inf,
    fused: bool = True,
) -> Codes | None:
    """Entries whose pre-activation y = x W_enc + b_enc exceeds its threshold, with exact y.

    Reference, up to entries within rounding of the threshold:
    ``codes_where(x.to(dtype) @ w_enc.to(dtype) + b_enc > threshold, x @ w_enc + b_enc)``.

    Args:
        x: centred tokens, u - b_dec.
        threshold: None: 0.
        dtype: of the product that finds the entries.
        room: entries expected; a batch with more costs a second pass over the bits.
        low: entries whose exact y is not above it are left out; None: all stay.
        most: entries above which dense products are the better way: None is returned.
        fused: False: the product is a library's, a part of the tokens at a time.
    Returns:
        Codes by token, then by latent, which carry the order by latent as well.
    """
    bound = -b_enc if threshold is None else threshold - b_enc
    bits = active_bits(x.to(dtype), w_enc.to(dtype), bound, fused)

    def exact(codes: Codes) -> Tensor:
        return sampled(codes, x, w_enc.T) + b_enc.index_select(0, codes.col)

    codes = codes_from_bits(bits, w_enc.shape[1], room, exact, low, most)
    return None if codes is None else codes._replace(by_latent=by_latent(codes))
