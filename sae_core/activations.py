"""Activations of a language model with the token each one belongs to, and their stream."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from sae_core.dealer import Dealer
from sae_core.errors import UserError
from sae_core.hooks import HookPoint, read_and_stop, replace_value, resolve_hook_point
from sae_core.models import LanguageModel
from sae_core.prefetch import prefetch as run_ahead
from sae_core.text import TextRow
from sae_core.tokens import START, Cursor, HarvestConfig, TokenBatch, token_windows

__all__ = [
    "Activations",
    "HarvestConfig",
    "HookPoint",
    "replace_activations",
    "resolve_hook_point",
    "stream_activations",
]

# Attention implementations that take an explicit [b, 1, t, t] mask, which packing needs.
_MASKED_ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True, eq=False)
class Activations:
    """Activation vectors, one per token. Finite, of equal lengths; checked on construction.

    ``x`` may live on an accelerator while ``row_id`` and ``position`` stay on the CPU.
    """

    x: Float[Tensor, "n d_in"]
    """Activation vectors, in the units of the model."""
    row_id: Int64[Tensor, " n"]
    """The row of the text source that the token belongs to."""
    position: Int32[Tensor, " n"]
    """Index of the token in the row's own tokenisation (special tokens counted)."""

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or not self.x.is_floating_point():
            raise UserError(
                "Activations.x must be a floating-point matrix [n, d_in], "
                f"got {self.x.dtype} of shape {tuple(self.x.shape)}."
            )
        n = self.x.shape[0]
        if self.row_id.shape != (n,) or self.position.shape != (n,):
            raise UserError(
                f"Activations need one row_id and one position for each of the {n} vectors, got "
                f"{tuple(self.row_id.shape)} row ids and {tuple(self.position.shape)} positions."
            )
        # A sum of finite numbers may overflow, but a sum with NaN or inf in it is never finite,
        # so one pass without a mask is enough unless something is suspicious.
        if not torch.isfinite(self.x.sum(dtype=torch.float32)):
            self._refuse_non_finite()

    def _refuse_non_finite(self) -> None:
        bad = (~torch.isfinite(self.x)).nonzero()
        if bad.numel():
            token, column = (int(i) for i in bad[0])
            raise UserError(
                f"Activations must be finite, got {float(self.x[token, column])} ({self.x.dtype}) "
                f"in row_id {int(self.row_id[token])} at token position "
                f"{int(self.position[token])} (dimension {column})."
            )

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def d_in(self) -> int:
        return self.x.shape[1]

    def select(self, index: Int64[Tensor, " m"]) -> "Activations":
        """The tokens at ``index`` (on the CPU), in that order."""
        x = self.x.index_select(0, index.to(self.x.device))
        return Activations(x, self.row_id[index], self.position[index])


def stream_activations(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    hook_points: Sequence[str],
    config: HarvestConfig,
    *,
    prefetch: int = 2,
    dtype: torch.dtype | None = None,
) -> Iterator[dict[str, Activations]]:
    """Activations of a text at several hook points, one dictionary a forward pass.

    Each pass ends behind the deepest hook point. A thread tokenises ahead of the model. The order
    is the same in every run: windows in the order of the text, longest sequences first within a
    window, so all tokens of a row lie in consecutive windows, not always in one dictionary.
    Neither padding, packing, batch size nor the tokenizer's padding side changes an activation
    beyond rounding, and the kept tokens are the same in all of them.

    Args:
        lm: model and tokenizer.
        rows: the text.
        hook_points: see ``resolve_hook_point``; the keys of what is yielded.
        config: chunks, batches, which tokens are kept.
        prefetch: windows tokenised ahead; 0 for no thread.
        dtype: of the vectors; None leaves that of the model.

    Raises:
        UserError: at the call: unknown hook point, a context longer than the model's. While
            iterating: fewer tokens than ``config.max_tokens``; NaN or inf.
    """
    harvest = harvest_batches(lm, rows, hook_points, config, prefetch=prefetch, dtype=dtype)
    return (values for values, _ in harvest)


def harvest_batches(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    hook_points: Sequence[str],
    config: HarvestConfig,
    *,
    start: Cursor = START,
    prefetch: int = 2,
    dtype: torch.dtype | None = None,
    dealer: Dealer | None = None,
) -> Generator[tuple[dict[str, Activations], Cursor | None], None, None]:
    """``stream_activations`` from a place in the text, with the place behind each window.

    The place comes with the last forward pass of the window, None with the others.
    What comes after ``start`` is the same, bit for bit, as in a run from the beginning;
    ``config.max_tokens`` counts from ``start``. With a dealer several processes share the passes:
    the first one yields all, the others nothing.
    """
    points = _resolve_all(lm, hook_points)
    _check_fits(lm, config)
    return _harvest(lm, rows, points, config, start, prefetch, dtype, dealer)


def _harvest(
    lm: LanguageModel,
    rows: Iterable[TextRow],
    points: list[HookPoint],
    config: HarvestConfig,
    start: Cursor,
    ahead: int,
    dtype: torch.dtype | None,
    dealer: Dealer | None,
) -> Generator[tuple[dict[str, Activations], Cursor | None], None, None]:
    def run(batch: TokenBatch) -> dict[str, Tensor]:
        keep = batch.keep.to(lm.device)

        def kept(value: Tensor) -> Tensor:
            return value.flatten(0, 1).index_select(0, keep)

        values = read_and_stop(lm.model, points, _inputs(lm, batch, config), kept)
        return {name: x if dtype is None else x.to(dtype) for name, x in values.items()}

    for window in run_ahead(token_windows(lm.tokenizer, rows, config, start), ahead):
        for number, batch in enumerate(window.batches, start=1):
            values = dealer.values(batch, run) if dealer else run(batch)
            if values is not None:
                found = {
                    name: Activations(x, batch.row_id, batch.position)
                    for name, x in values.items()
                }
                yield found, window.end if number == len(window.batches) else None


def _inputs(lm: LanguageModel, batch: TokenBatch, config: HarvestConfig) -> dict[str, Tensor]:
    chunk = batch.chunk.to(lm.device)
    inputs = {
        "input_ids": batch.input_ids.to(lm.device),
        "position_ids": batch.position_ids.to(lm.device),
    }
    if config.batching == "pad":
        return inputs | {"attention_mask": (chunk >= 0).long()}
    t = chunk.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=lm.device).tril()
    sees = (chunk[:, :, None] == chunk[:, None, :]) & causal
    # Added to the scores: the form that eager attention and SDPA both take.
    dtype = lm.model.dtype
    mask = torch.zeros(sees.shape, dtype=dtype, device=lm.device)
    mask.masked_fill_(~sees, torch.finfo(dtype).min)
    return inputs | {"attention_mask": mask[:, None]}


def _resolve_all(lm: LanguageModel, hook_points: Sequence[str]) -> list[HookPoint]:
    if isinstance(hook_points, str) or not hook_points:
        raise UserError(f"Expected a list of at least one hook point, got {hook_points!r}.")
    return [resolve_hook_point(lm.model, name) for name in dict.fromkeys(hook_points)]


def _check_fits(lm: LanguageModel, config: HarvestConfig) -> None:
    text = lm.model.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest and config.context_size > longest:
        raise UserError(
            f"context_size must be at most the model's {longest} positions, "
            f"got {config.context_size}."
        )
    if config.batching == "pad":
        return
    attention = lm.model.config._attn_implementation
    if attention not in _MASKED_ATTENTION:
        raise UserError(
            f"batching 'pack' needs attention {' or '.join(_MASKED_ATTENTION)}, the model uses "
            f"{attention!r}: use batching 'pad'."
        )
    window = getattr(text, "sliding_window", None)
    if window and config.context_size > window:
        raise UserError(
            f"batching 'pack' needs a context_size of at most the model's sliding window of "
            f"{window} tokens, got {config.context_size}: use batching 'pad'."
        )


def replace_activations(
    lm: LanguageModel,
    hook_point: str,
    fn: Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]],
) -> AbstractContextManager[None]:
    """Context manager: the value at ``hook_point`` becomes ``fn(value)`` in every forward pass.

    Blocks may be nested, on one point or several. The old behaviour is back when the block ends,
    also by an exception. ``fn``'s result is cast to the dtype of the value.

    Raises:
        UserError: unknown hook point; in the forward pass: ``fn`` changed the shape.
    """
    return replace_value(lm.model, resolve_hook_point(lm.model, hook_point), fn)
