"""One training step: gradient step, firing counts, bias step."""

import torch
from torch import Tensor

from sae_core import gba, loss, ranking, reweighting
from sae_core.firing import FiringStats
from sae_core.kernels import active, autograd, screen, sparse
from sae_core.kernels.adam import Adam
from sae_core.kernels.choice import kernels, products
from sae_core.kernels.codes import Codes
from sae_core.parallel import Layout
from sae_core.sae import SAE
from sae_core.state import TrainConfig, TrainState

RANKED = ("topk", "batch_topk")  # the others compare with a threshold known before the product
ROOM = 2  # times the entries asked for: place reserved for a batch's codes before they are counted


@torch.no_grad()
def _above_threshold(sae: SAE, u: Tensor, config: TrainConfig) -> Codes:
    """Active entries of a kind that needs no ranking: no pre-activations of a whole batch."""
    x, jump = u - sae.b_dec, sae.config.kind == "jumprelu"
    # entries just below the threshold of jumprelu carry its gradient
    threshold = sae.threshold - config.sparsity.bandwidth / 2 if jump else None
    low, dtype = None if jump else 0.0, config.product_type
    if (fast := kernels(u)) is not None:
        codes = fast.active_codes(
            x, sae.W_enc, sae.b_enc, threshold, dtype, room=ROOM * sae.config.k * len(u),
            low=low, most=sparse.DENSE_ABOVE * len(u) * sae.d_sae,
        )  # fmt: skip
        if codes is not None:
            return codes
    if config.precision == "int8" and screen.serves(x):
        codes = screen.active_codes(x, sae.W_enc, sae.b_enc, threshold)
    else:
        codes = active.active_codes(x, sae.W_enc, sae.b_enc, threshold, dtype)
    return codes if low is None else codes.keep(codes.values > low)


@torch.no_grad()
def _ranked(sae: SAE, u: Tensor, layout: Layout, config: TrainConfig) -> tuple[Codes, Tensor]:
    """Active entries of TopK and BatchTopK, and the pre-activations as they were multiplied."""
    pre = sae.pre_activations(u, config.product_type)
    codes = ranking.select(sae, pre, layout)
    if config.precision != "float32":
        codes = active.exact_values(u - sae.b_dec, sae.W_enc, sae.b_enc, codes)
        codes = codes.keep(codes.values > 0)
    return codes, pre


def _active_set(
    sae: SAE, u: Tensor, layout: Layout, config: TrainConfig
) -> tuple[Codes, Tensor | None]:
    """Active entries with exact pre-activations, and the dense pre-activations if there are any."""
    if sae.config.kind in RANKED:
        codes, pre = _ranked(sae, u, layout, config)
    else:
        codes, pre = _above_threshold(sae, u, config), None
    # on a GPU the kernels find the order by latent
    return codes if kernels(u) is not None else codes.grouped(), pre


def dead_after_tokens(config: TrainConfig) -> int:
    """Tokens of silence after which a latent counts as dead: as asked, or a tenth of the run."""
    asked = config.sparsity.dead_after_tokens
    return asked or min(10_000_000, config.steps * config.batch_size // 10)


def _reconstruction(sae: SAE, u: Tensor, codes: Codes, state: TrainState) -> tuple[Tensor, Tensor]:
    """Reconstruction loss and u_hat of gated codes."""
    weights = None if state.weights is None else state.weights.squared
    is_whole = state.layout.parts("latents") == 1 and codes.density <= sparse.DENSE_ABOVE
    fast = products(u, sae.d_sae) if is_whole else None
    if fast is not None and sae.d_in <= fast.MOST_COLUMNS:
        factor = 1 / (u.shape[0] * state.variance)
        return fast.reconstruction(
            sae.scaled(codes), sae.W_dec, sae.b_dec, u, factor, weights, _room(state, sae.W_dec)
        )
    u_hat = state.layout.summed(autograd.decode(sae.scaled(codes), sae.W_dec)) + sae.b_dec
    return loss.reconstruction_loss(u_hat, u, state.variance, weights), u_hat


def _room(state: TrainState, parameter: Tensor) -> list[Tensor]:
    """Memory for the gradient of a matrix of latents."""
    return [] if state.optimizer is None else state.optimizer.room(parameter)


def _losses(
    sae: SAE, u: Tensor, state: TrainState, config: TrainConfig
) -> tuple[Tensor, Codes, Tensor]:
    """Total loss, the codes that fired, and u_hat."""
    layout = state.layout
    codes, pre = _active_set(sae, u, layout, config)
    b_dec, room = layout.shared(sae.b_dec), _room(state, sae.encoder)
    codes = autograd.encode(u, sae.W_enc, sae.b_enc, b_dec, codes, room)
    if sae.config.kind == "jumprelu":
        codes, extra = loss.jump(sae, codes, config.sparsity, layout)
        fired = codes.keep(codes.values > 0)
    else:
        codes = fired = sae.gate(codes)
        extra = u.new_zeros(())
    error, u_hat = _reconstruction(sae, u, codes, state)
    if sae.config.kind == "relu":
        extra = state.l1 * loss.l1_penalty(codes)
    if sae.config.kind in RANKED and config.sparsity.auxk:
        dead = state.tokens_since >= dead_after_tokens(config)
        if pre is not None and layout.add(dead.sum(), "latents") > 0:
            k = config.sparsity.auxk_k or sae.d_in // 2
            extra = config.sparsity.auxk * loss.auxk_loss(sae, u, u_hat, pre, dead, k, layout)
    return error + extra, fired, u_hat


def _average_gradients(optimizer: Adam, layout: Layout) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                layout.average(parameter.grad, "tokens")


def _update(sae: SAE, optimizer: Adam) -> None:
    """Adam's step, then unit norm where the kind asks for it."""
    fast = products(sae.W_dec, sae.d_sae)
    if fast is not None and sae.d_in <= fast.MOST_COLUMNS:
        for matrix in sae.unit_matrices():
            fast.adam_unit_rows(optimizer, matrix)
        optimizer.step()  # those without a gradient are passed over
    else:
        for matrix in sae.unit_matrices():
            optimizer.unit_rows(matrix)
        optimizer.step()
    if sae.config.kind == "jumprelu":
        sae.threshold.data.clamp_min_(0)


def gradient_step(
    sae: SAE, u: Tensor, state: TrainState, config: TrainConfig, lr: float
) -> tuple[Codes, Tensor]:
    """One step of Adam on everything but the biases of gba; returns detached codes and u_hat."""
    assert state.optimizer is not None
    state.optimizer.zero_grad()
    total, codes, u_hat = _losses(sae, u, state, config)
    total.backward()
    _average_gradients(state.optimizer, state.layout)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    _update(sae, state.optimizer)
    return codes.with_values(codes.values.detach()), u_hat.detach()


def count_firing(sae: SAE, codes: Codes, state: TrainState, config: TrainConfig) -> None:
    """Merge the batch's firing into the state: of all tokens, and into the age of every latent."""
    batch, layout = FiringStats(sae.d_sae, codes.col.device), state.layout
    batch.update(codes)
    batch.all_reduce(layout)
    state.firing.merge(batch)
    state.tokens_since += batch.n_tokens
    state.tokens_since[batch.count > 0] = 0
    state.step += 1
    state.tokens += batch.n_tokens
    if sae.config.kind == "relu":
        l0 = float(layout.add(batch.count.sum(), "latents")) / batch.n_tokens
        state.l1 = loss.adapt_l1(state.l1, l0, sae.config.k, config.sparsity)
    if sae.config.kind == "batch_topk":
        _track_threshold(sae, codes, state)
    if state.weights is not None and config.weights.kind == "frobenius":
        state.weights.energy += layout.add(reweighting.energy(codes), "tokens")
        if state.step % config.weights.refresh == 0:
            directions = sae.W_dec.detach() * sae.scale.detach()[:, None]
            reweighting.refresh_weights(state.weights, directions, config.weights)
            state.variance = state.weights.total


@torch.no_grad()
def _track_threshold(sae: SAE, codes: Codes, state: TrainState, rate: float = 0.01) -> None:
    """BatchTopK's inference threshold: running mean of the smallest active value of each batch."""
    found = codes.values
    smallest = found.min() if found.numel() else found.new_full((), torch.inf)
    state.layout.smallest(smallest, "tokens", "latents")
    smallest = torch.where(smallest < torch.inf, smallest, sae.threshold[0])
    weight = max(rate, 1 / state.step)
    sae.threshold.add_(weight * (smallest - sae.threshold))


@torch.no_grad()
def bias_step(sae: SAE, state: TrainState, config: gba.GBAConfig) -> None:
    """The controller's turn: b_enc from the buffer's firing, then an empty buffer."""
    firing, layout = state.firing.compute(), state.layout
    peak = gba.buffer_peak(sae.b_enc, firing, sae.config.gate)
    gamma = gba.step_size(state.step // config.period - 1, config)
    # of all latents, since a group's mean head-room is that of its latents wherever they are
    b, freq, peak, group = map(layout.all_latents, (sae.b_enc, firing.freq, peak, state.group))
    new = gba.bias_update(b, freq, peak, group, state.taf, config, gamma)
    sae.b_enc.copy_(layout.own_latents(new))
    state.firing.clear()
