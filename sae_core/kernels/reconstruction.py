"""The reconstruction loss as a differentiable function; triton_loss.py and cpu.py compute it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.kernels.codes import Codes


class _Reconstruction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, w_dec: Tensor, b_dec: Tensor, x: Tensor, codes: Codes,
        factor: float, squared: Tensor | None, room: list[Tensor], run: Callable,
        matmul_t: Callable,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.codes, ctx.matmul_t, ctx.room = codes.with_values(values.detach()), matmul_t, room
        loss, x_hat, g, d_values = run(ctx.codes, w_dec, b_dec, x, factor, squared)
        ctx.save_for_backward(g, d_values)
        ctx.mark_non_differentiable(x_hat)
        return loss, x_hat

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, d_values = ctx.saved_tensors
        need_values, need_w, need_b, need_x = ctx.needs_input_grad[:4]
        if d_loss.is_cuda or d_loss != 1:  # the host does not wait for a GPU
            g, d_values = g * d_loss, d_values * d_loss
        taken = [ctx.room.pop()] if need_w and ctx.room else []  # by the first of several backwards
        dw = ctx.matmul_t(ctx.codes, g, *taken) if need_w else None
        db = g.sum(0) if need_b else None
        dx = -g if need_x else None
        return d_values if need_values else None, dw, db, dx, *[None] * 6


def differentiable(
    run: Callable, matmul_t: Callable
) -> Callable[..., tuple[Float[Tensor, ""], Float[Tensor, "n d_in"]]]:
    """The function `reconstruction(codes, w_dec, b_dec, x, factor, squared_weights, room)`.

    It gives factor * sum (A W_dec + b_dec - x)^2 gamma^2 and x_hat, which carries no gradient.
    Reference: ``factor * ((codes.to_dense() @ w_dec + b_dec - x).square() * gamma**2).sum()``.
    Differentiable in the values of the codes, w_dec, b_dec and x. Its factor is 1 / (n * variance),
    as `loss.reconstruction_loss` divides; its weights are gamma^2 of every dimension, None: all 1.

    Args:
        run: from (codes, w_dec, b_dec, x, factor, squared weights) the loss, x_hat, and the
            gradients of the loss in x_hat [n, d_in] and in the values [nnz].
        matmul_t: A' G.
    """

    def reconstruction(
        codes: Codes, w_dec: Tensor, b_dec: Tensor, x: Tensor, factor: float,
        squared_weights: Tensor | None = None, room: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        room = [] if room is None else room
        arguments = (w_dec, b_dec, x, codes, factor, squared_weights, room, run, matmul_t)
        return _Reconstruction.apply(codes.values, *arguments)

    return reconstruction
