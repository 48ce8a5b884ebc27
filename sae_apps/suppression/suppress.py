"""Edit the activations of a model while a block runs: one door for every method of suppression.

    x'_t = edit(x_t)     for the tokens t in scope, x'_t = x_t for the others

An edit sees one token at a time and keeps nothing, so that padding, batching, the KV cache and the
reordering of beams cannot change it: the cache holds what was computed from edited tokens, and each
token passes the hook once.
"""

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_core.activations import resolve_hook_point
from sae_core.errors import UserError
from sae_core.hooks import replace_value
from sae_core.models import LanguageModel

SCOPES = ("text", "all")


class Edit(Protocol):
    """A frozen dataclass that changes activations of one hook point.

    It may also have ``model_id`` and ``model_revision`` (then ``suppress`` refuses another model),
    ``special_ids`` (token ids that the scope text leaves out) and ``to(device)``.
    """

    @property
    def hook_point(self) -> str:
        """Where it works, e.g. ``layers.15.out``."""
        ...

    @property
    def strength(self) -> float:
        """0 leaves everything as it is, 1 is the method as published, more goes on."""
        ...

    def apply(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Edited tokens; x comes in float32, on the device of the model."""
        ...


@contextmanager
def suppress(
    model: Any,
    edit: Edit | Sequence[Edit],
    strength: float | None = None,
    *,
    scope: str = "text",
) -> Iterator[None]:
    """While the block runs, every forward pass of the model has its activations edited.

    The hooks are on the model, not on a thread: a thread that generates in the background inside
    the block is edited too. They are gone when the block ends, whatever ended it. Blocks may be
    nested; on one hook point the outer edit comes first. Strength 0 sets no hook at all.

    Args:
        model: a ``LanguageModel``, a transformers model, or what holds one as ``.model`` (a
            pipeline, or HFLM of lm-evaluation-harness).
        edit: an ``App`` or any other edit, or several, applied in order.
        strength: replaces the strength of the edits; None keeps their own.
        scope: text leaves out special tokens and the first token of each sequence, an attention
            sink, as fitting does; all edits every token.
    Raises:
        UserError: unknown hook point or scope, a negative or infinite strength, another model than
            the edit was fitted on; in the forward pass: another width.
    """
    bare, lm = _bare(model)
    if scope not in SCOPES:
        raise UserError(f"Expected a scope of {SCOPES}, got {scope!r}.")
    edits = list(edit) if isinstance(edit, Sequence) else [edit]
    if strength is not None:
        edits = [cast(Edit, replace(cast(Any, one), strength=strength)) for one in edits]
    with ExitStack() as stack:
        for one in edits:
            _check(one, lm)
            point = resolve_hook_point(bare, one.hook_point)
            if one.strength == 0:
                continue
            tokens = _Scope(_special_ids(one, bare, lm))
            if scope == "text":
                stack.enter_context(_watching(bare, tokens))
            stack.enter_context(replace_value(bare, point, _Hook(one, tokens)))
        yield


def edited(
    lm: LanguageModel, edit: Edit, value: Float[Tensor, "b t d_in"], inputs: dict[str, Any]
) -> Float[Tensor, "b t d_in"]:
    """What ``suppress`` makes of a value at the hook point of the edit, without a forward pass.

    Args:
        value: at ``edit.hook_point``, of a pass over the inputs.
        inputs: input_ids [b, t] and attention_mask, as for the model.
    """
    if edit.strength == 0:
        return value
    tokens = _Scope(_special_ids(edit, lm.model, lm))
    tokens.note(inputs)
    return _Hook(edit, tokens)(value)


def _bare(model: Any) -> tuple[nn.Module, LanguageModel | None]:
    if isinstance(model, LanguageModel):
        return model.model, model
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise UserError(
            "Expected a LanguageModel, a transformers model or a pipeline, "
            f"got {type(model).__name__}."
        )
    return inner, None


def _check(edit: Edit, lm: LanguageModel | None) -> None:
    if not (0 <= edit.strength < float("inf")):
        raise UserError(f"Expected a strength of at least 0, got {edit.strength}.")
    revision = getattr(edit, "model_revision", None) or "unknown"
    if lm is None or "unknown" in (revision, lm.revision):
        return
    if revision != lm.revision:
        raise UserError(
            f"Expected the model that the edit was fitted on, {getattr(edit, 'model_id', '?')} "
            f"({revision[:12]}), got {lm.model_id} ({lm.revision[:12]})."
        )


def _special_ids(edit: Edit, model: nn.Module, lm: LanguageModel | None) -> tuple[int, ...]:
    own = getattr(edit, "special_ids", None)
    if own is not None:
        return tuple(own)
    if lm is not None:
        return tuple(i for i in lm.tokenizer.all_special_ids if i is not None)
    config: Any = getattr(model, "config", None)
    found = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    flat = [i for one in found for i in (one if isinstance(one, (list, tuple)) else [one])]
    return tuple(i for i in flat if i is not None)


class _Scope:
    """The tokens in scope of the running forward pass, for each thread its own."""

    def __init__(self, special_ids: Sequence[int]) -> None:
        self._special = torch.tensor(sorted(set(special_ids)), dtype=torch.int64)
        self._local = threading.local()

    def note(self, inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids")
        shaped = ids if ids is not None else inputs.get("inputs_embeds")
        if shaped is None:
            self._local.mask = None
            return
        wanted = ~_first(inputs, shaped.shape[0], shaped.shape[1], shaped.device)
        if ids is not None and len(self._special):
            if self._special.device != ids.device:
                self._special = self._special.to(ids.device)
            wanted = wanted & ~torch.isin(ids, self._special)
        self._local.mask = wanted

    def mask(self) -> Bool[Tensor, "b t"] | None:
        return getattr(self._local, "mask", None)


def _first(
    inputs: dict[str, Any], b: int, t: int, device: torch.device
) -> Bool[Tensor, "b t"] | Bool[Tensor, "1 t"]:
    """Where the first real token of each sequence is; behind a cache there is none."""
    mask, position = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[0] == b:
        start = mask.to(device).to(torch.int64).argmax(dim=1, keepdim=True)
        return torch.arange(mask.shape[1] - t, mask.shape[1], device=device) == start
    if isinstance(position, Tensor) and position.ndim == 2:
        return (position == 0).expand(b, t)
    cache: Any = inputs.get("past_key_values")
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return (torch.arange(t, device=device) + past == 0)[None]


@contextmanager
def _watching(model: nn.Module, scope: _Scope) -> Iterator[None]:
    """Note the tokens of every forward pass of the decoder, which all callers reach."""
    base = getattr(model, "base_model", model)
    signature = inspect.signature(base.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope.note(dict(signature.bind_partial(*args).arguments) | kwargs if args else kwargs)

    handle = base.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Hook:
    """From the value [b, t, d_in] of a hook point to the edited one, computed in float32."""

    def __init__(self, edit: Edit, scope: _Scope) -> None:
        self._edit, self._scope = edit, scope
        self._on: dict[torch.device, Edit] = {}

    def __call__(self, value: Float[Tensor, "b t d_in"]) -> Float[Tensor, "b t d_in"]:
        edit = self._on.get(value.device)
        if edit is None:
            move = getattr(self._edit, "to", None)
            edit = cast(Edit, move(value.device)) if move else self._edit
            self._on[value.device] = edit
        # outside autocast: a bfloat16 product would move tokens that no unit of the edit is on
        with torch.autocast(value.device.type, enabled=False):
            new = edit.apply(value.flatten(0, -2).float()).view(value.shape).to(value.dtype)
        wanted = self._scope.mask()
        if wanted is None:
            return new
        return torch.where(wanted[..., None], new, value)
