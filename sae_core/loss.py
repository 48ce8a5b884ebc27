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
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core import nonlinearity, ranking
from sae_core.errors import UserError
from sae_core.kernels import autograd
from sae_core.kernels.codes import Codes
from sae_core.parallel import ALONE, Layout
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
        if not 0 < self.bandwidth < inf:
            raise UserError(f"bandwidth must be positive, got {self.bandwidth}.")
        for name in ("l1", "l1_rate", "penalty", "auxk"):
            if not 0 <= getattr(self, name) < inf:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("auxk_k", "dead_after_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")


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


def jump(
    sae: SAE, codes: Codes, config: SparsityConfig, layout: Layout = ALONE
) -> tuple[Codes, Float[Tensor, ""]]:
    """JumpReLU activations and the L0 penalty, both with a gradient into the thresholds.

    The penalty is that of the L0 of all processes, its gradient that of this process's share.
    """
    threshold = autograd.lookup(sae.threshold, codes)
    acts, on = nonlinearity.jump_straight_through(codes.values, threshold, config.bandwidth)
    own = on.sum() / codes.n
    everyone = layout.average(layout.add(own.detach().clone(), "latents"), "tokens")
    l0 = own + (everyone - own.detach())
    return codes.with_values(acts), config.penalty * (l0 / sae.config.k - 1).square()


def auxk_loss(
    sae: SAE,
    u: Float[Tensor, "n d_in"],
    u_hat: Float[Tensor, "n d_in"],
    pre: Float[Tensor, "n d_sae"],
    dead: Bool[Tensor, "d_sae"],
    k: int,
    layout: Layout = ALONE,
) -> Float[Tensor, ""]:
    """||e - e_hat||^2 / ||e||^2: the dead latents explain what the others left, e = u - u_hat.

    e carries no gradient and e_hat no b_dec (adding b_dec twice is a known bug elsewhere). ||e||^2
    is the mean of the processes', so that the mean of their gradients is that of one ratio.
    """
    index = dead.nonzero()[:, 0]
    values, slot = pre[:, index].topk(min(k, len(index)), dim=-1, sorted=False)
    codes = nonlinearity.codes_at(index[slot], values.float(), sae.d_sae)
    codes = ranking.best_of_all(codes, k, layout)
    codes = autograd.encode(u, sae.W_enc, sae.b_enc, layout.shared(sae.b_dec), codes)
    error = (u - u_hat).detach()
    missing = error - layout.summed(autograd.decode(codes, sae.W_dec))
    size = layout.average(error.square().sum(), "tokens")
    return missing.square().sum() / size.clamp_min(torch.finfo(u.dtype).tiny)
