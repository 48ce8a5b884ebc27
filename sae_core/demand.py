"""Target frequencies taken from the data: how often latents would fire at one common threshold.

The groups of arXiv 2506.14002 have targets p_1 > ... > p_K chosen in advance, and latents belong to
a group for good. Where the range does not fit the data's features, recovery fails (its own ablation
and ours). Here, with w_m the encoder direction of latent m and every `EVERY` steps:

    demand_m = P(w_m'(u - b_dec) > theta),     theta such that  sum_m demand_m = k
    group    : latents in the order of their demand, the K equal parts of that order
    p_k      = max(mean demand of group k,  k / (ratio d_sae)),  scaled so that sum_m p_m = k

A latent whose direction finds large projections often is asked to fire often. Were the encoder the
decoder and the firing latents orthogonal, each firing would be worth at least theta^2 of squared
error and the demands would divide k where it reduces the error most: the idea, not a proof. The
floor keeps latents that found nothing yet at work. Groups are
fixed for the last part of the training, when the learning rate is falling. This is this project's
rule; benchmarks/recovery.py and benchmarks/LOG.md compare it with given targets.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.gba import assign_groups
from sae_core.kernels.active import above
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState

EVERY = 10  # steps between two looks
FIXED_FROM = 0.7  # share of the steps after which the targets stay
MEMORY = 0.9  # of the running means of demand and threshold
TOKENS = 512  # of the batch; at 1,024 tokens a twentieth of the encoder's products
MOST = 0.9  # largest target


def asks(state: TrainState, config: TrainConfig) -> bool:
    """Is it time to look at the demand?"""
    return (
        config.gba.follows_data
        and state.step % EVERY == 0
        and state.step <= FIXED_FROM * config.steps
    )


@torch.no_grad()
def follow_demand(
    sae: SAE, u: Float[Tensor, "n d_in"], state: TrainState, config: TrainConfig
) -> None:
    """Measure the demand on a batch and give groups and targets of the state anew."""
    layout, dtype = state.layout, config.product_type
    shares = _shares(len(u), layout.parts("tokens"))
    u, n = u[: shares[layout.part("tokens")]], sum(shares)
    raw = (u - sae.b_dec).to(dtype) @ sae.W_enc.to(dtype)
    d_sae = sae.d_sae * layout.parts("latents")
    kth = layout.kth_largest(raw.flatten(), min(d_sae, sae.config.k) * n).float()
    memory = MEMORY if len(state.demand) else 0.0
    state.threshold = memory * state.threshold + (1 - memory) * float(kth)
    _, latent = above(raw.sub_(state.threshold))
    share = layout.add(torch.bincount(latent, minlength=sae.d_sae), "tokens").double() / n
    state.demand = memory * state.demand + (1 - memory) * share if memory else share
    demand = layout.all_latents(state.demand)
    order = demand.argsort(descending=True, stable=True)
    groups = assign_groups(len(demand), config.gba.n_groups).to(u.device)
    group = torch.empty_like(groups)
    group[order] = groups
    state.group = layout.own_latents(group)
    state.taf = targets(demand[order], groups, sae.config.k, config.gba.ratio)


def _shares(n_own: int, parts: int) -> list[int]:
    """How many of its n_own tokens each process looks at: the first `TOKENS` of the whole batch,
    which was dealt out token by token, and one at least."""
    return [min(n_own, max(1, -(-(TOKENS - part) // parts))) for part in range(parts)]


def targets(
    demand: Float[Tensor, "d_sae"], group: Tensor, k: int, ratio: float
) -> Float[Tensor, "n_groups"]:
    """Target of each group from the demand of its latents, which counts as k / (ratio d_sae) at
    least before all are scaled.

    Returns:
        Targets in (0, 0.9], float64, that sum to k over all latents as far as 0.9 allows.
    """
    size = torch.bincount(group).double()
    taf = torch.zeros_like(size).index_add_(0, group, demand.double()) / size
    taf = taf.clamp_min(k / (ratio * len(demand)))
    return (taf * (k / float((taf * size).sum()))).clamp_max(MOST)
