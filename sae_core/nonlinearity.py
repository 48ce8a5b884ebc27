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
from sae_core.kernels.active import above
from sae_core.kernels.choice import cpu_kernels
from sae_core.kernels.codes import Codes, codes_at, codes_where, row_starts


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
    if (fast := cpu_kernels(pre, pre.numel())) is not None:
        row, col = fast.top(pre.detach(), k)
        return Codes(row_starts(row, len(pre)), row, col, pre[row, col], pre.shape[1])
    values, col = pre.topk(k, dim=-1, sorted=False)
    return codes_at(col, values, pre.shape[1])


def batch_topk(pre: Float[Tensor, "n d_sae"], k: int) -> Codes:
    """The n*k largest pre-activations of the batch, of those the positive ones."""
    if not 1 <= k <= pre.shape[1]:
        raise UserError(f"k must lie between 1 and d_sae={pre.shape[1]}, got {k}.")
    n = k * len(pre)
    floor = exceeded(pre.flatten(), n).clamp_min(0)
    row, col = above(pre, floor)
    if len(row) < n:
        row, col = above(pre)
    values = pre[row, col]
    codes = Codes(row_starts(row, len(pre)), row, col, values, pre.shape[1])
    if len(row) <= n:
        return codes
    return codes.keep(values >= values.kthvalue(len(row) - n + 1).values)


def exceeded(values: Float[Tensor, "n"], k: int) -> Float[Tensor, ""]:
    """A number that about 1.5 k of n values exceed, guessed from a strided sample."""
    sample = values[::37]
    rank = max(1, sample.shape[0] - int(1.5 * k * sample.shape[0] / values.shape[0]))
    return sample.kthvalue(rank).values


def kth_largest(values: Float[Tensor, "n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest of n values, 1 <= k <= n.

    Only values above a guess are ranked: exact where at least k are, and several times cheaper than
    ranking all.
    """
    candidates = values[values > exceeded(values, k)]
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
