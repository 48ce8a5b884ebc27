"""Losses of one training step; all are ratios to the data's variance, so weights have no units.

reconstruction = mean_i ||u_hat_i - u_i||^2 / variance,  variance = mean_i ||u_i - mean||^2
                 (both with weights gamma^2 of the dimensions where asked; see reweighting.py)
relu:      + l1 * mean_i sum_j acts_ij                   (decoder rows have unit norm)
jumprelu:  + penalty * (L0 / k - 1)^2                    (straight-through L0, 2407.14435; the
                                                          target form is dictionary_learning's)
(batch_)topk: + auxk * ||e - e_hat||^2 / ||e||^2         (AuxK, arXiv 2406.04093, app. A.2)
gba:       nothing: sparsity is the controller's
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core import nonlinearity
from sae_core.errors import UserError
from sae_core.kernels import autograd
from sae_core.kernels.codes import Codes
from sae_core.sae import SAE


@dataclass(frozen=True)
class SparsityConfig:
    """Sparsity terms of the kinds other than gba."""

    l1: float = 0.01
    """relu: weight of the L1 term at the first step."""
    l1_rate: float = 0.02
    """relu: the weight grows by the factor (L0 / k)^l1_rate each step (0: it stays)."""
    penalty: float = 1.0
    """jumprelu: weight of (L0 / k - 1)^2."""
    bandwidth: float = 0.05
    """jumprelu: width of the rectangle kernel, in units of the pre-activation."""
    auxk: float = 1 / 32
    """topk kinds: weight of the AuxK term (0: none)."""
    auxk_k: int | None = None
    """topk kinds: dead latents used a token (None: d_in / 2)."""
    dead_after_tokens: int | None = None
    """Tokens of silence that make a latent dead (None: a tenth of the run, at most 10M)."""

    def __post_init__(self) -> None:
        if self.bandwidth <= 0:
            raise UserError(f"bandwidth must be positive, got {self.bandwidth}.")


def reconstruction_loss(
    u_hat: Float[Tensor, "n d"],
    u: Float[Tensor, "n d"],
    variance: float,
    squared_weights: Float[Tensor, "d"] | None = None,
) -> Float[Tensor, ""]:
    """mean_i sum_j gamma_j^2 (u_hat_ij - u_ij)^2 / variance.

    Args:
        variance: of the data, weighted likewise: sum_j gamma_j^2 var_j.
        squared_weights: gamma^2 of every dimension; None: all 1.
    """
    if squared_weights is None:
        total = torch.nn.functional.mse_loss(u_hat, u, reduction="sum")
    else:
        total = ((u_hat - u).square() * squared_weights).sum()
    return total / (u.shape[0] * variance)


def l1_penalty(codes: Codes) -> Float[Tensor, ""]:
    """mean_i sum_j acts_ij."""
    return codes.values.sum() / codes.n


def adapt_l1(l1: float, l0: float, k: int, config: SparsityConfig) -> float:
    """The L1 weight after a step with this L0: larger while L0 is above k."""
    return l1 * min(max(l0 / k, 1e-2), 1e2) ** config.l1_rate


def jump(sae: SAE, codes: Codes, config: SparsityConfig) -> tuple[Codes, Float[Tensor, ""]]:
    """JumpReLU activations and the L0 penalty, both with a gradient into the thresholds."""
    threshold = autograd.lookup(sae.threshold, codes)
    acts, on = nonlinearity.jump_straight_through(codes.values, threshold, config.bandwidth)
    l0 = on.sum() / codes.n
    return codes.with_values(acts), config.penalty * (l0 / sae.config.k - 1).square()


def auxk_loss(
    sae: SAE,
    u: Float[Tensor, "n d_in"],
    u_hat: Float[Tensor, "n d_in"],
    pre: Float[Tensor, "n d_sae"],
    dead: Bool[Tensor, "d_sae"],
    k: int,
) -> Float[Tensor, ""]:
    """||e - e_hat||^2 / ||e||^2: the dead latents explain what the others left, e = u - u_hat.

    e carries no gradient and e_hat no b_dec (adding b_dec twice is a known bug elsewhere).
    """
    index = dead.nonzero()[:, 0]
    values, slot = pre[:, index].topk(min(k, len(index)), dim=-1, sorted=False)
    codes = nonlinearity.codes_at(index[slot], values.float(), sae.d_sae)
    codes = autograd.encode(u, sae.W_enc, sae.b_enc, sae.b_dec, codes)
    error = (u - u_hat).detach()
    missing = error - autograd.decode(codes, sae.W_dec)
    return missing.square().sum() / error.square().sum().clamp_min(torch.finfo(u.dtype).tiny)
