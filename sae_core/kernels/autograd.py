"""Encoder and decoder as differentiable functions of the active entries only.

    encode:  y_ij = w_j'(x_i - b_dec) + b_j        at the active entries (i, j)
    decode:  x_hat = A W_dec

No dense [n, d_sae] gradient is formed: every gradient is one of the three products of the
kernels. All outputs and inputs are covered by float64 gradcheck in tests/test_kernels.py.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels import sparse
from sae_core.kernels.codes import Codes


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, codes: Codes,
        room: list[Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, w_enc, b_dec)
        ctx.room = room
        ctx.codes = codes.with_values(codes.values.detach())
        return ctx.codes.values.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_enc, b_dec = ctx.saved_tensors
        codes = ctx.codes.with_values(dy.contiguous())
        need_x, need_w, need_b, need_b_dec = ctx.needs_input_grad[:4]
        total = sparse.latent_sums(codes)
        dx = sparse.matmul(codes, w_enc.T) if need_x else None
        # .T: W_enc is stored column by column (see sae.py), so the gradient has its strides
        dw = sparse.matmul_t(codes, x - b_dec, ctx.room).T if need_w else None
        db_dec = -(w_enc @ total) if need_b_dec else None
        return dx, dw, total if need_b else None, db_dec, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, w_dec: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(values, w_dec)
        ctx.codes = codes.with_values(codes.values.detach())
        return sparse.matmul(ctx.codes.with_values(values), w_dec)

    @staticmethod
    def backward(ctx: Any, dx_hat: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, w_dec = ctx.saved_tensors
        codes, dx_hat = ctx.codes.with_values(values), dx_hat.contiguous()
        dvalues = sparse.sampled(codes, dx_hat, w_dec) if ctx.needs_input_grad[0] else None
        dw = sparse.matmul_t(codes, dx_hat) if ctx.needs_input_grad[1] else None
        return dvalues, dw, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_latent: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes.with_values(codes.values.detach())
        return per_latent.index_select(0, codes.col)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return sparse.latent_sums(ctx.codes.with_values(d.contiguous())), None


def lookup(per_latent: Float[Tensor, "d_sae"], codes: Codes) -> Float[Tensor, "nnz"]:
    """The number of each entry's latent; the gradient is the sum over the latent's entries."""
    return _Lookup.apply(per_latent, codes)


def encode(
    x: Float[Tensor, "n d_in"],
    w_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, "d_sae"],
    b_dec: Float[Tensor, "d_in"],
    codes: Codes,
    room: list[Tensor] | None = None,
) -> Codes:
    """Attach the gradient of y = (x - b_dec) W_enc + b_enc to codes that already hold its values.

    Args:
        codes: active set whose values are the pre-activations there, [nnz].
        room: memory for the gradient of w_enc' (see `sparse.matmul_t`).
    Returns:
        The same codes; their values depend on x, w_enc, b_enc and b_dec.
    """
    room = [] if room is None else room
    return codes.with_values(_Encode.apply(x, w_enc, b_enc, b_dec, codes, room))


def decode(codes: Codes, w_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "n d_in"]:
    """A W_dec, differentiable in the values of the codes and in w_dec."""
    return _Decode.apply(codes.values, w_dec, codes)
