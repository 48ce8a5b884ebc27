"""Hook points of a transformers decoder: name them, read them and stop, or replace their value.

Canonical names are ``layers.<n>.in|out`` (the residual stream before and after a block),
``layers.<n>.mlp.in|out`` and ``layers.<n>.attn.in|out``, whatever the architecture calls its
modules. A full module path with ``.in`` or ``.out`` behind it names any other place.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_core.errors import UserError

_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
_CANONICAL = re.compile(r"layers\.(\d+)\.(?:(mlp|attn)\.)?(in|out)")
_SUGGESTIONS = 4


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: the input or the output of one module."""

    name: str
    """The name that was asked for."""
    path: str
    """Dotted path of the module in the model."""
    side: str
    """``in`` or ``out``."""


class _StopForward(Exception):  # noqa: N818 - not an error: everything that was asked for is there
    """Ends a forward pass behind the last requested hook point."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder blocks: the longest list of modules with attention.

    Raises:
        UserError: the model has no such list.
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(_attention(block) is not None for block in module)
        # towers for pictures and sound are transformers too
        and not re.search(r"vision|visual|audio|encoder", path)
    ]
    if not found:
        raise UserError(
            "Expected a decoder: a list of blocks that each have one of the children "
            f"{', '.join(_ATTENTION_NAMES)}; {type(model).__name__} has none."
        )
    return max(found, key=lambda item: len(item[1]))


def _attention(block: nn.Module) -> str | None:
    return next((name for name in _ATTENTION_NAMES if hasattr(block, name)), None)


def hook_point_names(model: nn.Module) -> list[str]:
    """The canonical names of all hook points of ``model``, in the order of the layers."""
    _, blocks = decoder_blocks(model)
    names = []
    for layer, block in enumerate(blocks):
        parts = ["", "attn.", *(["mlp."] if hasattr(block, "mlp") else [])]
        names += [f"layers.{layer}.{part}{side}" for part in parts for side in ("in", "out")]
    return names


def resolve_hook_point(model: nn.Module, name: str) -> HookPoint:
    """Find the module that ``name`` means.

    Args:
        model: a transformers causal language model.
        name: canonical (``layers.15.mlp.out``) or a module path (``model.layers.1.mlp.act_fn.in``).

    Raises:
        UserError: the layer is out of range, or there is no such place; the nearest are named.
    """
    canonical = _CANONICAL.fullmatch(name)
    if canonical:
        blocks_path, blocks = decoder_blocks(model)
        layer, part, side = int(canonical[1]), canonical[2], canonical[3]
        if layer >= len(blocks):
            raise UserError(
                f"Hook point {name!r}: layer must be in 0..{len(blocks) - 1}, got {layer}."
            )
        child = _attention(blocks[layer]) if part == "attn" else part
        if child is None or hasattr(blocks[layer], child):
            return HookPoint(name, f"{blocks_path}.{layer}" + (f".{child}" if child else ""), side)
    path, _, side = name.rpartition(".")
    if side in ("in", "out") and path in dict(model.named_modules()) and path:
        return HookPoint(name, path, side)
    raise UserError(f"Unknown hook point {name!r}: {_nearest(model, name)}")


def _nearest(model: nn.Module, name: str) -> str:
    known = hook_point_names(model)
    if name.split(".")[0] in dict(model.named_children()):  # the beginning of a module path
        paths = [path for path, _ in model.named_modules() if path]
        known += [f"{path}.{side}" for path in paths for side in ("in", "out")]
    near = difflib.get_close_matches(name, known, _SUGGESTIONS, cutoff=0.5)
    return f"the nearest that exist are {', '.join(near or [known[1], known[-1]])}."


def _attach(
    model: nn.Module, point: HookPoint, fn: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Call ``fn`` on every value at ``point``; what it returns, unless None, takes its place.

    Inputs come as the first argument or as the keyword ``hidden_states``; outputs are a tensor or
    a tuple that begins with it, depending on the module and the version of transformers.
    """

    def tensor(value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise UserError(
                f"Hook point {point.name!r} must carry a tensor, got {type(value).__name__}."
            )
        return value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = fn(tensor(args[0] if args else kwargs.get("hidden_states")))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, (tuple, list)):
            return fn(tensor(output))
        new = fn(tensor(output[0]))
        return None if new is None else type(output)((new, *output[1:]))

    module = model.get_submodule(point.path)
    if point.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def capture(
    model: nn.Module,
    points: Sequence[HookPoint],
    read: Callable[[Tensor], Tensor],
) -> Iterator[dict[str, Tensor]]:
    """Collect ``read(value)`` of every point; the pass in the block ends when all are there.

    The end is silent: the code behind the model's call inside the block does not run. Hooks are
    removed in every case.

    Args:
        model: the model that the points were resolved in.
        points: where to read.
        read: called on the value [b, t, d] at once, before later layers could write into it.

    Yields:
        The values by name of the hook point; complete when the block has ended.
    """
    values: dict[str, Tensor] = {}

    def take(point: HookPoint, value: Tensor) -> None:
        values[point.name] = read(value)
        if len(values) == len(points):
            raise _StopForward

    with ExitStack() as stack:
        for point in points:
            stack.callback(_attach(model, point, partial(take, point)).remove)
        try:
            yield values
        except _StopForward:
            return


@torch.no_grad()  # not inference_mode: a later backward pass may save these tensors
def read_and_stop(
    model: nn.Module,
    points: Sequence[HookPoint],
    inputs: Mapping[str, Tensor],
    read: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, Tensor]:
    """One forward pass that ends behind the deepest of the points and never computes logits.

    Args:
        model: a transformers causal language model.
        points: where to read; two of the same name are one.
        inputs: tensors for the base decoder (``input_ids`` and so on).
        read: what to keep of each value [b, t, d].

    Returns:
        ``read(value)`` by name of the hook point.

    Raises:
        UserError: a hook point is not on the way of the pass (e.g. the head of the model).
    """
    base = getattr(model, "base_model", model)
    with capture(model, points, read) as values:
        base(**inputs, use_cache=False, output_hidden_states=False, output_attentions=False)
    missing = [point.name for point in points if point.name not in values]
    if missing:
        raise UserError(
            f"Hook point {missing[0]!r} exists, but a forward pass of the decoder never reaches "
            f"it; reached: {', '.join(values) or 'none'}."
        )
    return values


@contextmanager
def replace_value(
    model: nn.Module, point: HookPoint, fn: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While the block runs, the value at ``point`` becomes ``fn(value)`` in every forward pass.

    Blocks may be nested; on one point the outer ``fn`` is applied first. ``fn``'s result is cast
    to the dtype of the value, so that a float32 SAE fits a bfloat16 model.

    Args:
        model: the model that the point was resolved in.
        point: the place.
        fn: from [b, t, d] to the same shape; may be differentiable.

    Raises:
        UserError: (from the forward pass) ``fn`` changed the shape.
    """

    def new_value(old: Tensor) -> Tensor:
        new = fn(old)
        if new.shape != old.shape:
            raise UserError(
                f"The replacement at {point.name!r} must keep the shape {tuple(old.shape)}, "
                f"got {tuple(new.shape)}."
            )
        return new.to(old.dtype)

    handle = _attach(model, point, new_value)
    try:
        yield
    finally:
        handle.remove()
