"""Split an SAE and its training state by latents, and put them together again (DTensor).

A process of a layout whose latents are split holds the rows of its own latents of W_enc' and W_dec,
their biases, scales and thresholds, Adam's moments of all these, and their counters; b_dec is on
all of them. DTensor deals the tensors out from the first process (which also makes all processes
begin alike) and joins them; in between, a step works on the local tensors (see parallel.py).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sae_core.errors import UserError
from sae_core.firing import FiringStats
from sae_core.parallel import Layout
from sae_core.reweighting import Weights
from sae_core.sae import SAE, SAEConfig
from sae_core.start import make_optimizer
from sae_core.state import TrainConfig, TrainState
from sae_core.step import RANKED

Move = Callable[[Tensor, bool], Tensor]
WHOLE = "b_dec"  # the one parameter that has no latents' axis


def shard_of(
    sae: SAE, state: TrainState, config: TrainConfig, layout: Layout
) -> tuple[SAE, TrainState]:
    """This process's part of a whole SAE and of its state; every process of the layout calls it.

    What counts is what the first process passes; the others need the same shapes.

    Raises:
        UserError: d_sae is no multiple of the parts, a kind that ranks has fewer latents a part
            than k, or a loss needs all latents in one place.
    """
    if layout.mesh is None:
        return sae, state
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, parts = layout.mesh, layout.parts("latents")
    check_split(sae.config, config, parts)

    def deal_out(tensor: Tensor, is_of_latents: bool) -> Tensor:
        places = [Replicate(), Shard(0) if is_of_latents else Replicate()]
        whole = tensor.detach().to(mesh.device_type)
        return distribute_tensor(whole, mesh, places).to_local().clone()

    return _moved(sae, state, config, deal_out, sae.d_sae // parts, layout)


def whole_of(sae: SAE, state: TrainState, config: TrainConfig) -> tuple[SAE, TrainState] | None:
    """The whole SAE and its state, on the CPU of the first process; None for the others.

    Every process calls it. Each holds one matrix as a whole for a moment.
    """
    layout = state.layout
    if layout.parts("latents") == 1:
        return (sae, state) if layout.is_first else None
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def join(tensor: Tensor, is_of_latents: bool) -> Tensor:
        places = [Replicate(), Shard(0) if is_of_latents else Replicate()]
        local = tensor.detach().contiguous()
        whole = DTensor.from_local(local, layout.mesh, places).full_tensor()
        return whole.cpu() if layout.is_first else whole.new_empty(whole.shape, device="meta")

    d_sae = sae.d_sae * layout.parts("latents")
    moved = _moved(sae, state, config, join, d_sae, Layout())
    return moved if layout.is_first else None


def check_split(sae: SAEConfig, config: TrainConfig, parts: int) -> None:
    """Check that a training can go on with the latents in so many parts.

    Raises:
        UserError: see ``shard_of``.
    """
    if sae.d_sae % parts:
        raise UserError(f"Expected d_sae to be a multiple of {parts} parts, got {sae.d_sae}.")
    if sae.kind in RANKED and sae.d_sae // parts < sae.k:
        raise UserError(
            f"Expected at least k={sae.k} latents in each of {parts} parts, "
            f"got {sae.d_sae // parts}."
        )
    if parts > 1 and config.weights.kind == "frobenius":
        raise UserError(
            f"The weights frobenius need all latents on each process: expected 1 part, got {parts}."
        )


@torch.no_grad()
def _moved(
    sae: SAE, state: TrainState, config: TrainConfig, move: Move, d_sae: int, layout: Layout
) -> tuple[SAE, TrainState]:
    """SAE and state of d_sae latents, each tensor moved by move(tensor, has it a latents' axis)."""
    parameters = dict(sae.named_parameters())
    moved = {name: move(p, name != WHOLE) for name, p in parameters.items()}
    device = moved[WHOLE].device
    with torch.device("meta"):
        new = SAE(replace(sae.config, d_sae=d_sae))
    new = new.to_empty(device=device).train(sae.training)
    for name, parameter in new.named_parameters():
        parameter.copy_(moved.pop(name))
    if not state.started:
        return new, replace(state, layout=layout)
    firing = FiringStats(d_sae, device)
    firing.count, firing.peak = (move(t, True) for t in (state.firing.count, state.firing.peak))
    firing.n_tokens = state.firing.n_tokens
    found = replace(
        state, layout=layout, firing=firing, tokens_since=move(state.tokens_since, True),
        group=_if_any(state.group, move), demand=_if_any(state.demand, move),
        taf=state.taf.to(device), weights=_weights(state.weights, move),
        optimizer=make_optimizer(new, config, state.spread),
    )  # fmt: skip
    _move_moments(sae, state, new, found, move)
    return new, found


def _if_any(tensor: Tensor, move: Move) -> Tensor:
    """Moved, unless this kind or this step has no such numbers yet."""
    return move(tensor, True) if len(tensor) else tensor


def _weights(weights: Weights | None, move: Move) -> Weights | None:
    if weights is None:
        return None
    squared, variance = move(weights.squared, False), move(weights.variance, False)
    return Weights(squared, variance, move(weights.energy, True))


def _move_moments(sae: SAE, state: TrainState, new: SAE, found: TrainState, move: Move) -> None:
    assert state.optimizer is not None and found.optimizer is not None
    into = dict(new.named_parameters())
    for name, parameter in sae.named_parameters():
        if parameter in state.optimizer.state:
            values = state.optimizer.state[parameter]
            moved = {
                key: move(value, value.ndim > 0 and name != WHOLE) for key, value in values.items()
            }
            found.optimizer.state[into[name]] = moved
