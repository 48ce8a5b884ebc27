"""Values measured on data at the first step and the last: b_dec, variance, thresholds."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core import gba
from sae_core.firing import FiringStats
from sae_core.reweighting import start_weights
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState


def make_optimizer(sae: SAE, config: TrainConfig) -> torch.optim.Adam:
    """Fused Adam over what the gradient step owns: b_enc of kind gba is not among it."""
    centre = config.gba.centre
    if centre == "auto":
        centre = "learned" if sae.config.gate == "jumprelu" else "mean"
    sae.b_dec.requires_grad_(sae.config.kind != "gba" or centre == "learned")
    parameters = [p for p in sae.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, lr=0.0, fused=True)


@torch.no_grad()
def start(sae: SAE, sample: Float[Tensor, "n d_in"], config: TrainConfig) -> TrainState:
    """Set b_dec, variance, groups and starting thresholds from the first tokens."""
    u, _ = sae.normalise(sample)
    mean = u.mean(0)
    sae.b_dec.copy_(mean)
    state = TrainState(
        variance=float((u - mean).square().sum(1).mean().clamp_min(1e-30)), l1=config.sparsity.l1,
        firing=FiringStats(sae.d_sae, u.device),
        tokens_since=torch.zeros(sae.d_sae, dtype=torch.int64, device=u.device),
        weights=start_weights(u, sae.d_sae, config.weights),
    )  # fmt: skip
    if state.weights is not None:
        state.variance = state.weights.total
    if sae.config.kind == "gba":
        state.group = gba.assign_groups(sae.d_sae, config.gba.n_groups).to(u.device)
        state.taf = gba.group_targets(config.gba, sae.config.k, sae.d_sae).to(u.device)
        if config.gba.start == "quantile":
            threshold = data_thresholds(sae, u, state.taf[state.group])
            sae.b_enc.copy_((-threshold).clamp(gba.B_MIN, config.gba.b_max))
    elif sae.config.kind == "jumprelu":
        freq = torch.full((sae.d_sae,), min(0.5, sae.config.k / sae.d_sae), dtype=torch.float64)
        sae.threshold.copy_(data_thresholds(sae, u, freq.to(u.device)).clamp_min(0))
    state.optimizer = make_optimizer(sae, config)
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
