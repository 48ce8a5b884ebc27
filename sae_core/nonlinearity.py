"""Which latents are active: ReLU, JumpReLU, TopK and BatchTopK as functions of the pre-activations.

Each function takes pre [n, d_sae] and returns Codes whose values are the pre-activations of the
active entries. Sources: JumpReLU, arXiv 2407.14435; TopK, arXiv 2406.04093; BatchTopK,
arXiv 2412.06410.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.kernels.codes import Codes, codes_at, codes_where


def relu(pre: Float[Tensor, "n d_sae"]) -> Codes:
    """Entries with pre > 0."""
    return codes_where(pre > 0, pre)


def jumprelu(pre: Float[Tensor, "n d_sae"], threshold: Float[Tensor, "d_sae"]) -> Codes:
    """Entries with pre_ij > threshold_j; the value keeps the part below the threshold."""
    return codes_where(pre > threshold, pre)


def topk(pre: Float[Tensor, "n d_sae"], k: int) -> Codes:
    """The k largest pre-activations of each token, of those the positive ones."""
    if not 1 <= k <= pre.shape[1]:
        raise UserError(f"k must lie between 1 and d_sae={pre.shape[1]}, got {k}.")
    values, col = pre.topk(k, dim=-1, sorted=False)
    return codes_at(col, values, pre.shape[1])


def batch_topk(pre: Float[Tensor, "n d_sae"], k: int) -> Codes:
    """The n*k largest pre-activations of the batch, of those the positive ones."""
    if not 1 <= k <= pre.shape[1]:
        raise UserError(f"k must lie between 1 and d_sae={pre.shape[1]}, got {k}.")
    smallest = kth_largest(pre.flatten(), k * pre.shape[0])
    return codes_where(pre >= smallest.clamp_min(torch.finfo(pre.dtype).tiny), pre)


def kth_largest(values: Float[Tensor, "n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest of n values, 1 <= k <= n.

    A strided sample guesses a bound that about 1.5 k exceed; ranking only those is exact where at
    least k do, and several times cheaper than ranking all.
    """
    n = values.shape[0]
    sample = values[::37]
    rank = max(1, sample.shape[0] - int(1.5 * k * sample.shape[0] / n))
    candidates = values[values > sample.kthvalue(rank).values]
    if candidates.shape[0] < k:
        candidates = values
    return candidates.kthvalue(candidates.shape[0] - k + 1).values


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y, threshold)
        ctx.bandwidth = bandwidth
        on = (y > threshold).to(y.dtype)
        return y * on, on

    @staticmethod
    def backward(ctx: Any, d_value: Tensor, d_on: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, threshold = ctx.saved_tensors
        near = ((y - threshold).abs() < ctx.bandwidth / 2).to(y.dtype) / ctx.bandwidth
        return d_value * (y > threshold), -near * (threshold * d_value + d_on), None


def jump_straight_through(
    y: Float[Tensor, "nnz"], threshold: Float[Tensor, "nnz"], bandwidth: float
) -> tuple[Float[Tensor, "nnz"], Float[Tensor, "nnz"]]:
    """y H(y - threshold) and H(y - threshold), with a rectangle kernel as the threshold's gradient.

    d value / d threshold = -(threshold / eps) K((y - threshold) / eps),
    d H / d threshold = -(1 / eps) K((y - threshold) / eps), K = 1 on [-1/2, 1/2]
    (arXiv 2407.14435, equations 11 and 12). Entries farther than eps/2 below the threshold have
    neither value nor gradient and may be left out of y.
    """
    return _Jump.apply(y, threshold, bandwidth)
