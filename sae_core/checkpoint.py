"""Checkpoints of a training run: atomic folders, the newest whole one wins.

A checkpoint holds the weights (biases among them), Adam's moments, the controller's counters, the
L1 weight, and the position in the data: a step number, since `buffer.batches` finds the batch of
any step by itself. Nothing in training draws random numbers after the first step but the batch
order, which is keyed by seed and step; a resumed run therefore repeats an unbroken one bit by bit
on the CPU.
"""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.errors import CorruptFileError, UserError
from sae_core.firing import FiringStats
from sae_core.reweighting import Weights
from sae_core.sae import SAE, SAEConfig
from sae_core.start import make_optimizer
from sae_core.state import TrainConfig, TrainState
from sae_core.store import atomic_folder, recover_folder, verify_folder
from sae_core.untrusted import read_object, reading

log = logging.getLogger(__name__)
KEEP = 2  # the newest, and one to fall back on


def save_checkpoint(folder: Path | str, sae: SAE, state: TrainState, config: TrainConfig) -> Path:
    """Write folder/step-00000123, then drop all but the newest two.

    Raises:
        UserError: the run has not started, or the disk is full (older checkpoints stay).
    """
    if not state.started:
        raise UserError("Expected a run with at least one step to save, got one that never began.")
    folder = Path(folder)
    target = folder / f"step-{state.step:08d}"
    scalars = {"step": state.step, "tokens": state.tokens, "variance": state.variance}
    scalars |= {"spread": state.spread}
    scalars |= {"l1": state.l1, "threshold": state.threshold}
    scalars |= {"firing_tokens": state.firing.n_tokens}
    meta = {"sae": asdict(sae.config), "train": asdict(config), "scalars": scalars}
    with atomic_folder(target, overwrite=True) as tmp:
        save_file(_tensors(sae, state), tmp / "state.safetensors")
        (tmp / "state.json").write_text(json.dumps(meta, indent=2, sort_keys=True))
    for old in _found(folder)[KEEP:]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    folder: Path | str, config: TrainConfig, device: torch.device | str = "cpu"
) -> tuple[SAE, TrainState] | None:
    """The newest whole checkpoint below `folder`, or None where there is none.

    A damaged one is named in a warning and left where it is; an older whole one is used instead.

    Raises:
        CorruptFileError: every checkpoint is damaged (the message names the newest's file).
        UserError: the checkpoint was made with another training configuration.
    """
    damage: CorruptFileError | None = None
    found = _found(Path(folder))
    for number, path in enumerate(found):
        try:
            verify_folder(path)
        except CorruptFileError as error:
            log.warning("%s Using an older checkpoint.", error)
            damage = damage or error
            continue
        state = _read(path, config, device)
        for old in found[max(KEEP, number + 2) :]:  # half of one, where a kill came while it went
            shutil.rmtree(old)
        return state
    if damage is not None:
        raise damage
    return None


def _found(folder: Path) -> list[Path]:
    """Checkpoints, newest first; one that a kill left moved aside is put back."""
    if not folder.is_dir():
        return []
    for aside in list(folder.glob(".step-*")):
        recover_folder(folder / aside.name[1 : len(".step-00000000")])
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _tensors(sae: SAE, state: TrainState) -> dict[str, Tensor]:
    assert state.optimizer is not None
    tensors = {f"sae.{name}": tensor for name, tensor in sae.tensors().items()}
    tensors |= {"group": state.group, "taf": state.taf, "tokens_since": state.tokens_since}
    tensors |= {"demand": state.demand}
    tensors |= {"firing.count": state.firing.count, "firing.peak": state.firing.peak}
    if state.weights is not None:
        tensors |= {f"weights.{name}": tensor for name, tensor in vars(state.weights).items()}
    names = {id(p): name for name, p in sae.named_parameters()}
    for parameter, values in state.optimizer.state.items():
        for key, value in values.items():
            tensors[f"adam.{key}.{names[id(parameter)]}"] = value
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, config: TrainConfig, device: torch.device | str) -> tuple[SAE, TrainState]:
    meta = read_object(path / "state.json")
    with reading("a checkpoint", path):
        saved, asked = dict(meta["train"]), json.loads(json.dumps(asdict(config)))
    for key in asked:
        if saved.get(key) != asked[key]:
            raise UserError(
                f"{path} was made with {key}={saved.get(key)}, this run asks for {asked[key]}."
            )
    with reading("a checkpoint", path):
        return _restored(meta, load_file(path / "state.safetensors", device=str(device)), config)


def _restored(
    meta: dict[str, Any], tensors: dict[str, Tensor], config: TrainConfig
) -> tuple[SAE, TrainState]:
    asked, device = SAEConfig(**meta["sae"]), tensors["sae.W_enc"].device
    if tensors["sae.W_enc"].shape != (asked.d_in, asked.d_sae):  # before memory is asked for
        raise ValueError(f"W_enc {list(tensors['sae.W_enc'].shape)} for {asked}")
    sae = SAE(asked).to(device)
    sae.set_tensors(_part(tensors, "sae."))
    scalars = meta["scalars"]
    firing = FiringStats(sae.d_sae, device)
    firing.count, firing.peak = tensors["firing.count"], tensors["firing.peak"]
    firing.n_tokens = scalars.pop("firing_tokens")
    state = TrainState(**scalars, firing=firing, optimizer=None)
    state.optimizer = make_optimizer(sae, config, state.spread)
    state.group, state.taf = tensors["group"], tensors["taf"]
    state.tokens_since, state.demand = tensors["tokens_since"], tensors["demand"]
    if weights := _part(tensors, "weights."):
        state.weights = Weights(**weights)
    _restore_adam(sae, state, tensors)
    return sae, state


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _restore_adam(sae: SAE, state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Put Adam's moments back; a moment of what is no parameter here is refused."""
    assert state.optimizer is not None
    owned = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in sae.named_parameters() if id(p) in owned}
    steps = _part(tensors, "adam.step.")
    if strange := sorted(set(steps) - set(parameters)):
        raise ValueError(f"moments of {strange}")
    for name, step in steps.items():
        values: dict[str, Any] = {"step": step}
        for key in ("exp_avg", "exp_avg_sq"):
            values[key] = torch.empty_like(parameters[name], requires_grad=False)
            values[key].copy_(tensors[f"adam.{key}.{name}"])
        state.optimizer.state[parameters[name]] = values
