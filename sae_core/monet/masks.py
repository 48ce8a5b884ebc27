"""Deleted experts: sets of them by router, applied while a block runs, saved and loaded.

Deleting expert (i, j) sets its weight sum_h g_1[h, i] g_2[h, j] to zero in every layer that the
router serves (arXiv 2412.04139, section 5). The weights that are left are not scaled up: the paper
mentions no such step. Exact either way it is computed (``mixing``): over all pairs, or, where few
experts are deleted, as the whole output less what those add.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from sae_core.disk import disk_errors, fsync, owner_tag, replaced_file
from sae_core.errors import UserError
from sae_core.hooks import decoder_blocks
from sae_core.monet.experts import Experts
from sae_core.monet.mixing import Factored, Kept, Pairs, Without
from sae_core.untrusted import reading

FORMAT = "sae-apps-expert-mask-1"
_ENTRIES = 1 << 24  # weights in memory at once: 64 MiB
_FEW = 16  # a pair costs so much more by gathering than one entry of the whole table (one thread)


@dataclass(frozen=True, eq=False)
class ExpertMask:
    """Experts that are deleted, by the layer of their router."""

    n: int
    """Halves a side; experts are numbered i * n + j."""
    removed: dict[int, Int[np.ndarray, " e"]]
    """Layer of a router: numbers of its deleted experts, ascending, each once."""
    note: str = ""
    """What the mask is for, e.g. the domain."""

    def __post_init__(self) -> None:
        for layer, experts in self.removed.items():
            if experts.ndim != 1 or not np.issubdtype(experts.dtype, np.integer):
                raise UserError(
                    f"Expected the experts of layer {layer} as a list of integers, got "
                    f"{experts.dtype} of shape {list(experts.shape)}."
                )
            if len(experts) and not 0 <= experts.min() <= experts.max() < self.n**2:
                raise UserError(
                    f"Expected experts in 0..{self.n**2 - 1} in layer {layer}, "
                    f"got {experts.min()}..{experts.max()}."
                )
            if (np.diff(experts) <= 0).any():
                raise UserError(f"Expected experts of layer {layer} ascending, each once.")

    @classmethod
    def from_keep(cls, keep: Mapping[int, np.ndarray], note: str = "") -> "ExpertMask":
        """From a 0/1 table [n, n] of the experts that stay, by layer of the router.

        Raises:
            UserError: no table, one that is not square, tables of different sizes, other values.
        """
        shapes = {np.shape(table) for table in keep.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2 or len(set(next(iter(shapes)))) != 1:
            raise UserError(f"Expected masks [n, n] of one size, got {sorted(shapes)}.")
        removed = {}
        for layer, table in keep.items():
            if not np.isin(table, (0, 1)).all():
                raise UserError(f"Expected a mask of 0 and 1 in layer {layer}, got other values.")
            removed[layer] = np.flatnonzero(~np.asarray(table, dtype=bool))
        return cls(next(iter(shapes))[0], removed, note)

    @property
    def size(self) -> int:
        """Deleted experts of all routers."""
        return sum(len(experts) for experts in self.removed.values())

    def __or__(self, other: "ExpertMask") -> "ExpertMask":
        """Both masks at once.

        Raises:
            UserError: masks over different numbers of experts.
        """
        if self.n != other.n:
            raise UserError(f"Expected masks of one size, got n = {self.n} and {other.n}.")
        layers = {**self.removed, **other.removed}
        none = np.empty(0, dtype=np.int64)
        joined = {
            layer: np.union1d(self.removed.get(layer, none), other.removed.get(layer, none))
            for layer in layers
        }
        return ExpertMask(self.n, joined, " + ".join(n for n in (self.note, other.note) if n))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; a file of that name is replaced."""
        path = Path(path)
        tensors = {
            f"layers.{layer}.removed": experts.astype(np.int64)
            for layer, experts in self.removed.items()
        }
        content = save(tensors, {"format": FORMAT, "n": str(self.n), "note": self.note})
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path, path.with_name(f".{path.name}.{owner_tag('tmp')}")) as file:
                file.write(content)
            fsync(path.parent)

    @classmethod
    def load(cls, path: str | Path) -> "ExpertMask":
        """Read what ``save`` wrote.

        Raises:
            UserError: no such file, or a file of something else; CorruptFileError: a damaged one.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"Expected a mask of experts at {path}, got nothing.")
        with reading("a mask of experts", path), safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") != FORMAT or not facts.get("n", "").isdigit():
            found = facts.get("format") or "no format"
            raise UserError(f"Expected a mask of format {FORMAT} in {path}, got {found}.")
        with reading("a mask of experts", path):
            removed = {_layer(name, tensor): tensor for name, tensor in tensors.items()}
            return cls(int(facts["n"]), removed, facts.get("note", ""))


def _layer(name: str, experts: np.ndarray) -> int:
    """The layer in a tensor's name; int64 only, since torch reads bytes as a mask, not as numbers.

    Raises:
        ValueError: another name or type than ``ExpertMask.save`` writes.
    """
    found = re.fullmatch(r"layers\.(0|[1-9][0-9]{0,5})\.removed", name)
    if found is None or experts.dtype != np.int64:
        raise ValueError(f"{experts.dtype} under {name!r:.80}")
    return int(found[1])


@contextmanager
def masked_experts(model: nn.Module, mask: ExpertMask) -> Iterator[None]:
    """While the block runs, the experts of the mask are deleted from every forward pass.

    The forward of the experts is another one meanwhile, also where the block ends by an error; no
    weight is touched, and hooks on the layers run as before.

    Args:
        model: a ``MonetForCausalLM``.
        mask: the experts.
    Raises:
        UserError: a mask for another number of experts, or for a layer without router; a mask that
            is on already (join the two: ``mask | other``), or layers that another library wraps.
    """
    blocks: Any = decoder_blocks(model)[1]
    leaders = router_layers(model)
    n = blocks[leaders[0]].router.n
    if mask.n != n:
        raise UserError(f"Expected a mask over {n} x {n} experts, got {mask.n} x {mask.n}.")
    if unknown := sorted(set(mask.removed) - set(leaders)):
        raise UserError(f"Expected masks for the routers of layers {leaders}, got {unknown}.")
    with ExitStack() as stack:
        for place, block in enumerate(blocks):
            leader = max(layer for layer in leaders if layer <= place)
            experts = mask.removed.get(leader)
            if experts is not None and len(experts):
                stack.enter_context(_replaced(block.moe, torch.from_numpy(experts)))
        yield


@contextmanager
def _replaced(moe: Any, removed: Int[Tensor, " e"]) -> Iterator[None]:
    """The layer's forward is another one meanwhile: a hook would let it run in vain first."""
    if "forward" in vars(moe):
        is_ours = getattr(moe.forward, "func", None) is masked_forward
        found = "one with (join the two: mask | other)" if is_ours else "one of another library"
        raise UserError(f"Expected experts with a forward of their own and no mask, got {found}.")
    moe.forward = partial(masked_forward, moe, removed)
    try:
        yield
    finally:
        del moe.forward


def router_layers(model: nn.Module) -> list[int]:
    """The layers that have a router of their own; the layers behind each use it too.

    Raises:
        UserError: the model is no Monet.
    """
    _, blocks = decoder_blocks(model)
    found = [i for i, block in enumerate(blocks) if hasattr(block, "router")]
    if not found or not all(hasattr(block, "moe") for block in blocks):
        raise UserError(f"Expected a Monet model with routers, got {type(model).__name__}.")
    return found


def masked_forward(
    moe: Experts, removed: Int[Tensor, " e"], x: Tensor, g1: Tensor, g2: Tensor
) -> Tensor:
    """The layer's output without some experts.

    Args:
        moe: the layer.
        removed: numbers i * n + j of the deleted experts.
        x, g1, g2: what the layer is called with, [*b, d] and [*b, heads, n].
    """
    removed = removed.to(x.device)
    flat = [value.flatten(0, x.ndim - 2) for value in (x, g1.to(x.dtype), g2.to(x.dtype))]
    is_few = len(removed) * _FEW < moe.n**2
    keep = torch.ones(moe.n**2, dtype=torch.bool, device=x.device)
    keep[removed] = False
    step = max(1, _ENTRIES // (len(removed) * 16 if is_few else moe.n**2))
    parts = []
    for start in range(0, len(flat[0]), step):
        part, first, second = (value[start : start + step] for value in flat)
        if is_few:
            by = Without(Factored(first, second), Pairs.of((first, second), removed))
        else:
            by = Kept.of((first, second), keep.view(moe.n, moe.n))
        parts.append(moe.mixed(part, by))
    return torch.cat(parts).view(x.shape)
