"""Weights of the input dimensions in the reconstruction loss (WSAE, arXiv 2506.15963).

    L = sum_i gamma_i^2 E (u_hat_i - u_i)^2 / sum_i gamma_i^2 var_i        i = 1..d_in

    variance, kurtosis   gamma_i = (s_i / mean s)^alpha, s the statistic of dimension i of the data
    frobenius            gamma^2 = argmin_{g >= 0} || W' diag(g) W - I ||_F,  W [d_in, d_sae] the
                         decoder's directions, each times its latent's rms activity
    user                 gamma as given

The paper uses variance with alpha 1/2 or 1. How its statistic is scaled and clipped is not known
to us; here s is divided by its mean, gamma clipped and gamma^2 divided by its mean. Dividing the
loss by the weighted variance keeps it a ratio: a common factor of all weights does nothing.
The Frobenius weights are not the paper's: they minimise the middle matrix of its gap between the
loss and the error of the codes (theorem 5). Where the rows of W are orthogonal they are
gamma_i = 1 / ||row i||. Where the cross moments of different latents cancel, ||row i||^2 is the
second moment of u_i - b_dec_i, and they are the variance weights with alpha = -1/2: the sign
opposite to the paper's. benchmarks/reweighting.py measures both against permuted controls.

Weights act on the gradient of the reconstruction alone: the encoder reads unweighted data, AuxK
stays as it is, and every reported FVU is unweighted.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import UserError
from sae_core.kernels.codes import Codes

WeightKind = Literal["none", "variance", "kurtosis", "frobenius", "user"]


@dataclass(frozen=True)
class WeightConfig:
    """Weights gamma of the input dimensions in the reconstruction loss."""

    kind: WeightKind = "none"
    """none: the plain loss. variance, kurtosis: that statistic of each dimension, to the power
    alpha. frobenius: least interference between the decoder's directions. user: values."""
    alpha: float = 0.5
    """variance, kurtosis: exponent; 0 weighs all dimensions alike, -0.5 with variance divides
    each dimension by its standard deviation."""
    floor: float = 0.1
    """Smallest gamma (not for user), relative to mean s = 1, or to rms gamma = 1 for frobenius."""
    ceiling: float = 10.0
    """Largest gamma, likewise."""
    refresh: int = 100
    """frobenius: optimiser steps between two solutions; before the first, all weights are 1."""
    values: tuple[float, ...] | None = None
    """user: gamma of every dimension, not negative; their common scale is free."""
    permute: bool = False
    """Control: the same weights, handed to the dimensions in a random order (frobenius: those of
    the decoder that trains under that order, always the same one)."""
    seed: int = 0
    """Of that order."""

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1 <= self.ceiling:
            raise UserError(
                f"floor and ceiling must hold 1 between them and be positive, got {self.floor} "
                f"and {self.ceiling}."
            )
        if self.refresh < 1:
            raise UserError(f"refresh must be at least 1 step, got {self.refresh}.")
        if (self.kind == "user") != (self.values is not None):
            given = "none" if self.values is None else f"{len(self.values)}"
            raise UserError(
                f"values are expected with kind='user' and only there, got {given} with "
                f"kind={self.kind!r}."
            )
        if self.values is not None and not (
            all(0 <= v < float("inf") for v in self.values) and max(self.values, default=0) > 0
        ):
            raise UserError(
                "values must be finite, not negative and not all 0, got a smallest of "
                f"{min(self.values, default=None)} and a largest of "
                f"{max(self.values, default=None)}."
            )


@dataclass
class Weights:
    """The weights of a run, and what their refresh counts."""

    squared: Float[Tensor, "d_in"]
    """gamma^2, of mean 1."""
    variance: Float[Tensor, "d_in"]
    """Variance of each dimension of the data."""
    energy: Float[Tensor, "d_sae"]
    """Sum of squared activations since the last refresh, float64."""

    @property
    def total(self) -> float:
        """sum_i gamma_i^2 var_i, what the loss is divided by."""
        return float((self.squared * self.variance).sum().clamp_min(1e-30))


def start_weights(u: Float[Tensor, "n d_in"], d_sae: int, config: WeightConfig) -> Weights | None:
    """The weights that a run begins with, from its first tokens; None for the plain loss.

    Args:
        u: the first tokens as the loss sees them (normalised where the SAE normalises).
    Raises:
        UserError: user weights of another width.
    """
    if config.kind == "none":
        return None
    variance = u.double().var(0, correction=0)
    match config.kind:
        case "variance" | "kurtosis":
            gamma = power_weights(dimension_statistic(u, config.kind), config)
        case "frobenius":
            gamma = torch.ones_like(variance)
        case "user":
            gamma = torch.tensor(config.values, dtype=torch.float64, device=u.device)
            if len(gamma) != u.shape[1]:
                raise UserError(
                    f"weights.values must hold one number for each of the {u.shape[1]} "
                    f"dimensions, got {len(gamma)}."
                )
    return Weights(
        squared=squared_weights(gamma, config).to(u.dtype),
        variance=variance.to(u.dtype),
        energy=torch.zeros(d_sae, dtype=torch.float64, device=u.device),
    )


def dimension_statistic(
    u: Float[Tensor, "n d_in"], kind: Literal["variance", "kurtosis"]
) -> Float[Tensor, "d_in"]:
    """s: variance, or kurtosis E(u - mean)^4 / var^2, of every dimension, in float64.

    A constant dimension has no kurtosis; it is given the mean of the others.
    """
    centred = u.double() - u.double().mean(0)
    variance = centred.square().mean(0)
    if kind == "variance":
        return variance
    varies = variance > 0
    found = centred.pow(4).mean(0) / torch.where(varies, variance, 1.0).square()
    typical = found[varies].mean() if varies.any() else found.new_ones(())
    return torch.where(varies, found, typical)


def power_weights(s: Float[Tensor, "d_in"], config: WeightConfig) -> Float[Tensor, "d_in"]:
    """gamma_i = (s_i / mean s)^alpha, clipped to [floor, ceiling]."""
    mean = s.mean()
    if mean <= 0:
        raise UserError(f"Weights need data that vary, got a mean statistic of {float(mean)}.")
    return (s / mean).pow(config.alpha).clamp(config.floor, config.ceiling)


def squared_weights(gamma: Float[Tensor, "d_in"], config: WeightConfig) -> Float[Tensor, "d_in"]:
    """gamma^2 of mean 1; with `permute` in the random order of the seed, the same every time."""
    if config.permute:
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(gamma), generator=generator)
        gamma = gamma[order.to(gamma.device)]
    squared = gamma.square()
    return squared / squared.mean()


def frobenius_weights(w: Float[Tensor, "d_in m"]) -> Float[Tensor, "d_in"]:
    """g = gamma^2 = argmin_{g >= 0} || W' diag(g) W - I ||_F, in float64.

    With Gram = W W' the stationary point solves sum_j Gram_ij^2 g_j = Gram_ii; where it has
    negative entries, the bounded least squares problem is solved instead. A dimension that W does
    not reach (row 0) is left free by the problem; it is given the mean of the others.
    """
    gram = (w @ w.T).double().cpu()
    diagonal = gram.diagonal()
    reached = diagonal > 0
    if not reached.any():
        return torch.ones_like(diagonal).to(w.device)
    scale = diagonal[reached].mean()  # solved in units of the mean: g is about 1
    matrix, right = (gram[reached][:, reached] / scale).square(), diagonal[reached] / scale
    # matrix = root' root, and the right side lies in its range, since a null vector v of it gives
    # sum_i v_i w_i w_i' = 0, whose trace is v . diagonal
    value, vector = torch.linalg.eigh(matrix)
    kept = value > value[-1] * len(value) * torch.finfo(value.dtype).eps
    root = value[kept].sqrt()[:, None] * vector[:, kept].T
    aim = (vector[:, kept].T @ right) / value[kept].sqrt()
    found = vector[:, kept] @ (aim / value[kept].sqrt())
    if (found < 0).any():
        from scipy.optimize import lsq_linear

        solution = lsq_linear(root.numpy(), aim.numpy(), (0, float("inf")), method="bvls")
        found = torch.from_numpy(solution.x).clamp_min(0)
    g = (found.mean() / scale).expand(len(diagonal)).clone()
    g[reached] = found / scale
    return g.to(w.device)


def frobenius_distance(
    w: Float[Tensor, "d_in m"], squared: Float[Tensor, "d_in"]
) -> Float[Tensor, ""]:
    """|| W' diag(g) W - I ||_F through the [d_in, d_in] Gram matrix, in float64."""
    gram, g = (w @ w.T).double(), squared.double()
    square = g @ gram.square() @ g - 2 * g @ gram.diagonal() + w.shape[1]
    return square.clamp_min(0).sqrt()


@torch.no_grad()
def energy(codes: Codes) -> Float[Tensor, "d_sae"]:
    """Sum of each latent's squared activations, float64: what the next refresh reads."""
    squares = codes.values.double().square()
    return squares.new_zeros(codes.d_sae).index_add_(0, codes.col, squares)


@torch.no_grad()
def refresh_weights(
    weights: Weights, directions: Float[Tensor, "d_sae d_in"], config: WeightConfig
) -> None:
    """New Frobenius weights from the decoder and the activity since the last refresh.

    Args:
        directions: decoder rows, each times its latent's output scale.
    """
    # rms times the root of the number of tokens, a common factor that falls out below
    rms = weights.energy.sqrt().to(directions.dtype)
    gamma = frobenius_weights((directions * rms[:, None]).T).sqrt()
    gamma = gamma / gamma.square().mean().sqrt()
    gamma = gamma.clamp(config.floor, config.ceiling)
    weights.squared.copy_(squared_weights(gamma, config))
    weights.energy.zero_()
