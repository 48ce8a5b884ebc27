"""Values measured on data at the first step and the last: b_dec, variance, thresholds."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core import gba
from sae_core.firing import FiringStats
from sae_core.kernels.adam import Adam
from sae_core.parallel import ALONE, Layout
from sae_core.reweighting import start_weights
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState

SPREAD = 0.59
"""The least spread of tokens among the layers at which default_lr's rates were used unchanged
(SmolLM2, layers 6 to 28: 0.59 to 0.71). Below it the rate of the offsets falls with the square."""
OFFSETS = ("b_dec", "b_enc", "threshold")


def make_optimizer(sae: SAE, config: TrainConfig, spread: float) -> Adam:
    """Adam over what the gradient step owns: b_enc of kind gba is not among it.

    A step of Adam is about as long as its rate, whatever the gradient. The offsets have the unit of
    the tokens, so where these hardly vary, as behind the massive dimensions of Gemma-3-270m (0.21
    behind block 7), a step that serves directions throws b_dec past the data: with one rate for all
    the FVU there was 60 after 524,288 tokens, with a rate in proportion to the spread 355 after
    262,144, with its square 0.07.

    Args:
        spread: root mean squared distance of the normalised tokens from their mean.
    """
    centre = config.gba.centre
    if centre == "auto":
        centre = "learned" if sae.config.gate == "jumprelu" else "mean"
    sae.b_dec.requires_grad_(sae.config.kind != "gba" or centre == "learned")
    trained = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    offsets = [trained.pop(name) for name in OFFSETS if name in trained]
    groups = [{"params": list(trained.values()), "factor": 1.0}]
    if offsets:
        groups.append({"params": offsets, "factor": min(1.0, (spread / SPREAD) ** 2)})
    return Adam(groups)


@torch.no_grad()
def start(
    sae: SAE, sample: Float[Tensor, "n d_in"], config: TrainConfig, layout: Layout = ALONE
) -> TrainState:
    """Set b_dec, variance, groups and starting thresholds from the first tokens.

    Args:
        sample: the same on all processes.
    """
    d_sae = sae.d_sae * layout.parts("latents")
    u, _ = sae.normalise(sample)
    mean = u.mean(0)
    sae.b_dec.copy_(mean)
    variance = max(float(u.var(0, correction=0).sum()), 1e-30)
    state = TrainState(
        variance=variance, spread=variance**0.5, l1=config.sparsity.l1,
        firing=FiringStats(sae.d_sae, u.device),
        tokens_since=torch.zeros(sae.d_sae, dtype=torch.int64, device=u.device),
        weights=start_weights(u, sae.d_sae, config.weights), layout=layout,
    )  # fmt: skip
    if state.weights is not None:
        state.variance = state.weights.total
    if sae.config.kind == "gba":
        group = gba.assign_groups(d_sae, config.gba.n_groups)
        state.group = layout.own_latents(group).to(u.device)
        state.taf = gba.group_targets(config.gba, sae.config.k, d_sae).to(u.device)
        if config.gba.start == "quantile":
            threshold = data_thresholds(sae, u, state.taf[state.group])
            sae.b_enc.copy_((-threshold).clamp(gba.B_MIN, config.gba.b_max))
    elif sae.config.kind == "jumprelu":
        freq = torch.full((sae.d_sae,), min(0.5, sae.config.k / d_sae), dtype=torch.float64)
        sae.threshold.copy_(data_thresholds(sae, u, freq.to(u.device)).clamp_min(0))
    state.optimizer = make_optimizer(sae, config, state.spread)
    return state


@torch.no_grad()
def data_thresholds(sae: SAE, u: Tensor, freq: Tensor, chunk: int = 256) -> Tensor:
    """Data thresholds at the wanted frequencies, `chunk` latents at a time to bound memory."""
    centred = u - sae.b_dec
    return torch.cat([
        gba.quantile_thresholds(centred @ sae.W_enc[:, j : j + chunk], freq[j : j + chunk])
        for j in range(0, sae.d_sae, chunk)
    ])  # fmt: skip


@torch.no_grad()
def calibrate(sae: SAE, x: Float[Tensor, "n d_in"], state: TrainState) -> None:
    """Lower each bias to the ceiling measured on x with frozen weights (never raise one)."""
    u, _ = sae.normalise(x)
    ceiling = data_thresholds(sae, u, state.taf[state.group])
    sae.b_enc.copy_(torch.minimum(sae.b_enc, -ceiling.clamp_max(-gba.B_MIN)))
