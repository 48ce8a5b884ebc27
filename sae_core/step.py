"""One training step: gradient step, firing counts, bias step."""

import torch
import torch.distributed as dist
from torch import Tensor

from sae_core import gba, loss, nonlinearity, reweighting
from sae_core.firing import FiringStats
from sae_core.kernels import autograd
from sae_core.kernels.codes import Codes
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState


def _active_set(sae: SAE, u: Tensor, config: TrainConfig) -> tuple[Codes, Tensor]:
    """Active entries with exact pre-activations, and the pre-activations they were chosen from."""
    pre = sae.pre_activations(u, getattr(torch, config.precision))
    if sae.config.kind in ("topk", "batch_topk"):
        pre = pre.float()  # ranked in the type of the values
    if sae.config.kind == "jumprelu":  # entries just below the threshold carry its gradient
        codes = nonlinearity.jumprelu(pre, sae.threshold - config.sparsity.bandwidth / 2)
    else:
        codes = sae.select(pre)
    if config.precision != "float32":
        codes = sae.exact_values(u, codes)
        codes = codes if sae.config.kind == "jumprelu" else codes.keep(codes.values > 0)
    return codes, pre


def dead_after_tokens(config: TrainConfig) -> int:
    """Tokens of silence after which a latent counts as dead: as asked, or a tenth of the run."""
    asked = config.sparsity.dead_after_tokens
    return asked or min(10_000_000, config.steps * config.batch_size // 10)


def _losses(
    sae: SAE, u: Tensor, state: TrainState, config: TrainConfig
) -> tuple[Tensor, Codes, Tensor]:
    """Total loss, the codes that fired, and u_hat."""
    codes, pre = _active_set(sae, u, config)
    if sae.config.kind == "jumprelu":
        codes = autograd.encode(u, sae.W_enc, sae.b_enc, sae.b_dec, codes)
        codes, extra = loss.jump(sae, codes, config.sparsity)
        u_hat = sae.decode_sparse(codes)
        fired = codes.keep(codes.values > 0)
    else:
        codes, u_hat = sae.autoencode(u, codes)
        fired, extra = codes, u_hat.new_zeros(())
    if sae.config.kind == "relu":
        extra = state.l1 * loss.l1_penalty(codes)
    if sae.config.kind in ("topk", "batch_topk") and config.sparsity.auxk:
        dead = state.tokens_since >= dead_after_tokens(config)
        if dead.any():
            k = config.sparsity.auxk_k or sae.d_in // 2
            extra = config.sparsity.auxk * loss.auxk_loss(sae, u, u_hat, pre, dead, k)
    weights = None if state.weights is None else state.weights.squared
    return loss.reconstruction_loss(u_hat, u, state.variance, weights) + extra, fired, u_hat


def _average_gradients(optimizer: torch.optim.Adam) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def gradient_step(
    sae: SAE, u: Tensor, state: TrainState, config: TrainConfig, lr: float
) -> tuple[Codes, Tensor]:
    """One step of Adam on everything but the biases of gba; returns detached codes and u_hat."""
    assert state.optimizer is not None
    total, codes, u_hat = _losses(sae, u, state, config)
    state.optimizer.zero_grad()
    total.backward()
    if dist.is_initialized():
        _average_gradients(state.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    state.optimizer.step()
    sae.project()
    if sae.config.kind == "jumprelu":
        sae.threshold.data.clamp_min_(0)
    return codes.with_values(codes.values.detach()), u_hat.detach()


def count_firing(sae: SAE, codes: Codes, state: TrainState, config: TrainConfig) -> None:
    """Merge the batch's firing into the state: over ranks, and into the age of every latent."""
    batch = FiringStats(sae.d_sae, codes.col.device)
    batch.update(codes)
    if dist.is_initialized():
        batch.all_reduce()
    state.firing.merge(batch)
    state.tokens_since += batch.n_tokens
    state.tokens_since[batch.count > 0] = 0
    state.step += 1
    state.tokens += batch.n_tokens
    if sae.config.kind == "relu":
        l0 = float(batch.count.sum()) / batch.n_tokens
        state.l1 = loss.adapt_l1(state.l1, l0, sae.config.k, config.sparsity)
    if sae.config.kind == "batch_topk":
        _track_threshold(sae, codes, state)
    if state.weights is not None and config.weights.kind == "frobenius":
        reweighting.count_energy(state.weights, codes)
        if state.step % config.weights.refresh == 0:
            directions = sae.W_dec.detach() * sae.scale.detach()[:, None]
            reweighting.refresh_weights(state.weights, directions, config.weights)
            state.variance = state.weights.total


@torch.no_grad()
def _track_threshold(sae: SAE, codes: Codes, state: TrainState, rate: float = 0.01) -> None:
    """BatchTopK's inference threshold: running mean of the smallest active value of each batch."""
    smallest = codes.values.min() if codes.values.numel() else sae.threshold[0]
    weight = max(rate, 1 / state.step)
    sae.threshold.add_(weight * (smallest - sae.threshold))


@torch.no_grad()
def bias_step(sae: SAE, state: TrainState, config: gba.GBAConfig) -> None:
    """The controller's turn: b_enc from the buffer's firing, then an empty buffer."""
    firing = state.firing.compute()
    peak = gba.buffer_peak(sae.b_enc, firing, sae.config.gate)
    sae.b_enc.copy_(gba.bias_update(sae.b_enc, firing.freq, peak, state.group, state.taf, config))
    state.firing.clear()
