"""Group Bias Adaptation: each latent has a ceiling on how often it may fire, and its bias keeps it.

Chen, Sheen, Xiong, Wang and Yang, arXiv 2506.14002, Algorithms 1 and 2. With q_m the share of the
buffer's tokens on which latent m fired, r_m the largest pre-activation (0 if none), p_k the target
activation frequency (TAF) of the group of m, rbar_k the mean of the positive r_m of group k:

    q_m > p_k :  b_m <- max(b_m - gamma * r_m,    -1)
    q_m < eps :  b_m <- min(b_m + gamma * rbar_k,  0)

The printed algorithm shows "v 0" (max) in the second rule; only min keeps b in [-1, 0]. That is
`rule="published"`. The default, `rule="proportional"`, moves both ways at every step in proportion
to the error, so that a latent is held *at* its target:

    b_m <- b_m + gamma * (1 - q_m / p_k) * (rbar_k if q_m < p_k else r_m),  1 - q/p kept in [-4, 1]

At fixed weights that is stochastic approximation (Robbins and Monro, 1951) of a quantile: q_m falls
with the threshold -b_m, so the mean step has the sign of p_k - q_m and one root; decreasing steps
with sum gamma_t = inf, sum gamma_t^2 < inf converge to it, the constant gamma used here stays
within a neighbourhood of it that shrinks with gamma. Weights move, so gamma must not vanish. They
move most at the start, faster than a small gamma follows (L0 fell below half the target and took
80 steps to return), so update u = 0, 1, ... takes gamma_u = gamma (1 + (boost - 1) DECAY^u).

Other deviations, each a switch of `GBAConfig`: targets and groups come from the data (demand.py)
unless htf and ltf are given; biases start at the data's (1 - p_k) quantile, not at 0 (`start`);
after the last step biases are lowered to the ceiling measured with frozen weights
(`calibrate_tokens`). b may rise to 1 (`b_max`): with b <= 0 a learned b_dec strands latents that b
can no longer wake. With the gate relu training collapsed with a learned b_dec, so it is frozen.
benchmarks/LOG.md has the measurements behind each choice.
"""

from dataclasses import dataclass
from math import log
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.errors import UserError
from sae_core.firing import Firing

DECAY = 0.97  # of the larger steps at the start, an update
MAX_SHARE = 4.0  # a burst of firing in one buffer moves a bias by at most 4 steps
B_MIN = -1.0  # |w'u| <= 1 for unit vectors
EPS = 1e-6  # the paper's resurrection floor, value unknown: "did not fire in the buffer"


@dataclass(frozen=True)
class GBAConfig:
    """Groups, target frequencies and controller."""

    n_groups: int = 10
    """K, number of groups of equal size."""
    htf: float | None = None
    """Highest target frequency p_1, fraction of tokens (None: the targets sum to the SAE's k)."""
    ltf: float | None = None
    """Lowest target frequency p_K, fraction of tokens (None: with htf)."""
    ratio: float = 5.0
    """targets "fixed": htf / ltf; "data": mean target / least target, before all are scaled so that
    they sum to k."""
    targets: Literal["data", "fixed"] = "data"
    """Where htf and ltf are not given: targets measured on the data (see demand.py), or geometric
    with `ratio`; both sum to the SAE's k."""
    gamma: float = 0.03
    """Step of the controller, as a share of head-room: the latent's own downwards, the mean of
    its group upwards."""
    boost: float = 10.0
    """The first update's step over `gamma`; the excess falls by 3% an update (published: 1)."""
    rule: Literal["proportional", "published"] = "proportional"
    """Steps in proportion to 1 - q/p in both directions, or the published one-sided rule."""
    period: int = 1
    """Optimiser steps between controller updates."""
    b_max: float = 1.0
    """Largest bias (published: 0)."""
    start: Literal["quantile", "zero"] = "quantile"
    """Biases at the first step: the data's (1 - p_k) quantile, or 0 as published."""
    centre: Literal["auto", "learned", "mean"] = "auto"
    """b_dec: learned from the mean of the (normalised) data, or frozen there; auto: learned for
    the gate jumprelu, frozen for relu, where training collapsed with a learned one."""
    calibrate_tokens: int = 131072
    """Tokens for the final ceiling check at frozen weights (0: none)."""

    def __post_init__(self) -> None:
        asked = (self.ltf, self.htf)
        if asked != (None, None) and not 0 < (self.ltf or 0) <= (self.htf or 0) <= 1:
            raise UserError(
                "Target frequencies need both ltf and htf with 0 < ltf <= htf <= 1, or neither, "
                f"got ltf={self.ltf}, htf={self.htf}."
            )
        if self.ratio < 1:
            raise UserError(f"ratio must be at least 1, got {self.ratio}.")
        if self.n_groups < 1 or self.period < 1:
            raise UserError(
                f"n_groups and period must be at least 1, got {self.n_groups} and {self.period}."
            )
        if not 0 < self.gamma < 1:
            raise UserError(f"gamma must lie in (0, 1), got {self.gamma}.")
        if self.boost < 1:
            raise UserError(f"boost must be at least 1, got {self.boost}.")

    @property
    def follows_data(self) -> bool:
        """Are targets measured, not given?"""
        return self.targets == "data" and self.htf is None


def _published(n_groups: int, htf: float, ltf: float) -> GBAConfig:
    return GBAConfig(
        n_groups, htf, ltf, gamma=0.01, boost=1.0, rule="published", period=50, b_max=0.0,
        start="zero", centre="learned", calibrate_tokens=0,
    )  # fmt: skip


def paper_main() -> GBAConfig:
    """The paper's main runs: K=10, 0.1 -> 0.001, biases from 0, an update every 50 steps."""
    return _published(10, 0.1, 0.001)


def paper_recommended() -> GBAConfig:
    """The paper's recommendation after its ablation: highest target frequency 0.5."""
    return _published(10, 0.5, 0.001)


def ba(taf: float = 0.01) -> GBAConfig:
    """Bias adaptation with one group, the paper's BA baseline."""
    return _published(1, taf, taf)


def identifiable_k(d_in: int, d_sae: int) -> int:
    """Largest k with 2 k ln(d_sae / k) + 5 k / 4 <= d_in: 57 for 576 and 4,608.

    So many random measurements let convex methods recover a k-sparse code of length d_sae
    (Chandrasekaran, Recht, Parrilo and Willsky, 2012, proposition 3.10); denser codes need not be
    determined by the activation vector even where the dictionary is known. At least 1, at most
    d_sae / 4.
    """
    k = 1
    while 4 * (k + 1) <= d_sae and 2 * (k + 1) * log(d_sae / (k + 1)) + 1.25 * (k + 1) <= d_in:
        k += 1
    return k


def target_frequencies(htf: float, ltf: float, n_groups: int) -> Float[Tensor, "n_groups"]:
    """p_k = htf * (ltf / htf)^((k-1)/(K-1)), k = 1..K, float64; one group gets htf."""
    exponent = torch.linspace(0, 1, n_groups, dtype=torch.float64)
    return htf * (ltf / htf) ** exponent


def assign_groups(d_sae: int, n_groups: int) -> Int[Tensor, "d_sae"]:
    """Contiguous groups whose sizes differ by at most one (order is irrelevant at i.i.d. start)."""
    if n_groups > d_sae:
        raise UserError(f"n_groups must not exceed d_sae={d_sae}, got {n_groups}.")
    return torch.arange(d_sae) * n_groups // d_sae


def group_targets(config: GBAConfig, k: int, d_sae: int) -> Float[Tensor, "n_groups"]:
    """Target of each group: from htf and ltf, or of the given ratio and summing to k.

    The sum of the targets over all latents is the L0 that they are asked for together.

    Raises:
        UserError: so large a sum needs a target above 1.
    """
    if config.htf is not None and config.ltf is not None:
        return target_frequencies(config.htf, config.ltf, config.n_groups)
    shape = target_frequencies(1.0, 1 / config.ratio, config.n_groups)
    taf = shape * (k / float(shape[assign_groups(d_sae, config.n_groups)].sum()))
    if float(taf[0]) > 1:
        raise UserError(
            f"k={k} active latents a token need a highest target frequency of {float(taf[0]):.3g}, "
            f"above 1, at d_sae={d_sae}: ask for fewer, use more latents or a smaller ratio."
        )
    return taf


def step_size(update: int, config: GBAConfig) -> float:
    """gamma of an update, counted from 0; below 1."""
    return min(config.gamma * (1 + (config.boost - 1) * DECAY**update), 1 - EPS)


def bias_update(
    b: Float[Tensor, "d_sae"],
    freq: Float[Tensor, "d_sae"],
    peak: Float[Tensor, "d_sae"],
    group: Int[Tensor, "d_sae"],
    taf: Float[Tensor, "n_groups"],
    config: GBAConfig,
    gamma: float | None = None,
) -> Float[Tensor, "d_sae"]:
    """One controller update (Algorithm 2), pure.

    Args:
        b: biases.
        freq: q_m, fraction of the buffer's tokens with pre > 0.
        peak: largest pre-activation of the buffer (bias included).
        group: group of each latent, 0..K-1.
        taf: target frequency of each group.
        gamma: step; None: that of the configuration.
    Returns:
        New biases in [-1, b_max].
    """
    gamma = config.gamma if gamma is None else gamma
    r = peak.clamp_min(0).to(b.dtype)
    total = torch.zeros(len(taf), dtype=b.dtype, device=b.device).index_add_(0, group, r)
    n_live = torch.zeros_like(total).index_add_(0, group, (r > 0).to(b.dtype))
    rbar = total / n_live.clamp_min(1)  # a group in which nothing fired has rbar = 0
    ceiling = taf.to(freq.device)[group]
    if config.rule == "proportional":
        share = (1 - freq / ceiling).clamp(-MAX_SHARE, 1).to(b.dtype)
        step = torch.where(share < 0, r, rbar[group])
        return (b + gamma * share * step).clamp(B_MIN, config.b_max)
    down = (b - gamma * r).clamp_min(B_MIN)
    up = (b + gamma * rbar[group]).clamp_max(config.b_max)
    return torch.where(freq > ceiling, down, torch.where(freq < EPS, up, b))


def quantile_thresholds(pre: Float[Tensor, "n m"], freq: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """Threshold of each column exceeded by at most floor(freq * n) of its n values.

    Args:
        pre: pre-activations without bias.
        freq: wanted fraction of exceedances in [0, 1).
    """
    n = pre.shape[0]
    n_above = (freq.to(pre.device) * n).floor().long().clamp(0, n - 1)
    top = pre.topk(int(n_above.max()) + 1, dim=0).values
    return top.gather(0, n_above[None])[0]


@dataclass(frozen=True)
class GroupFrequency:
    """What one group was asked for and what it does."""

    group: int
    """Group number, 0 = most frequent."""
    taf: float
    """Requested ceiling, fraction of tokens."""
    n_latents: int
    """Latents in the group."""
    mean_freq: float
    """Mean achieved frequency."""
    median_freq: float
    """Median achieved frequency."""
    max_freq: float
    """Largest achieved frequency."""
    n_above: int
    """Latents that fire more than 1.1 times the ceiling."""
    n_dead: int
    """Latents that never fired on the measured tokens."""


def group_frequencies(
    freq: Float[Tensor, "d_sae"], group: Int[Tensor, "d_sae"], taf: Float[Tensor, "n_groups"]
) -> tuple[GroupFrequency, ...]:
    """Requested against achieved frequency of every group."""

    def one(k: int) -> GroupFrequency:
        achieved, asked = freq[group == k].double(), float(taf[k])
        return GroupFrequency(
            k, asked, len(achieved), float(achieved.mean()), float(achieved.median()),
            float(achieved.max()), int((achieved > 1.1 * asked).sum()), int((achieved == 0).sum()),
        )  # fmt: skip

    return tuple(one(k) for k in range(len(taf)))


def buffer_peak(b: Float[Tensor, "d_sae"], firing: Firing, gate: str) -> Float[Tensor, "d_sae"]:
    """max y_m of the buffer from the largest activation: the gate "jumprelu" left the bias out."""
    fired = firing.count > 0
    peak = firing.peak.to(b.dtype) + (b if gate == "jumprelu" else 0)
    return torch.where(fired, peak, torch.zeros_like(peak))
