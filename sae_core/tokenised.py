"""Activations of rows that are tokenised already, at the tokens that the caller chose.

An application that decides itself which tokens a row has and which of them count (a chat template,
the name of a place within a prompt) streams them through the same pass as any text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int

from sae_core.activations import Activations, HarvestConfig, stream_activations
from sae_core.errors import UserError
from sae_core.models import LanguageModel
from sae_core.text import TextRow


class TokenisedRow(NamedTuple):
    """The tokens of one row, and those whose activations are wanted."""

    ids: Int[np.ndarray, " t"]
    """What the model reads, special tokens included, [t] int64."""
    keep: Bool[np.ndarray, " t"]
    """Tokens whose activations are wanted, [t]."""


def stream_kept(
    lm: LanguageModel,
    rows: Sequence[TokenisedRow],
    hook_points: Sequence[str],
    *,
    context_size: int,
    batch_tokens: int = 4096,
    window_rows: int = 256,
) -> Iterator[dict[str, Activations]]:
    """Activations of the kept tokens at several hook points, one dictionary a forward pass.

    ``row_id`` is the place in ``rows``, ``position`` the place in its ``ids``. Rows that keep
    nothing are not read. Batches change an activation by rounding alone.

    Args:
        rows: of at most ``context_size`` tokens each.
        context_size: longest row; with ``window_rows`` it bounds the memory.
        batch_tokens: tokens a forward pass at most, padding counted; one row always fits.
        window_rows: rows that are sorted by length together.
    Raises:
        UserError: at the first value: a row longer than context_size, or whose keep has another
            length; and see ``stream_activations``.
    """
    _check(rows, context_size)
    keep = np.concatenate([np.empty(0, dtype=bool), *(row.keep for row in rows)])
    starts = np.cumsum([0, *(len(row.ids) for row in rows)])
    stand_in = replace(lm, tokenizer=_Tokenised(rows, len(lm.tokenizer)))
    texts = [TextRow(place, str(place), {}) for place, row in enumerate(rows) if row.keep.any()]
    config = HarvestConfig(
        context_size=context_size,
        batch_tokens=max(batch_tokens, context_size),
        window_rows=window_rows,
        include_special=True,
        include_first=True,
    )
    for found in stream_activations(stand_in, texts, hook_points, config, prefetch=0):
        batch = next(iter(found.values()))
        wanted = np.flatnonzero(keep[starts[batch.row_id.numpy()] + batch.position.numpy()])
        if len(wanted):
            index = torch.from_numpy(wanted)
            yield {name: one.select(index) for name, one in found.items()}


class _Tokenised:
    """Stands in for a tokenizer where the rows are tokenised already: a text is a row's number."""

    bos_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def __init__(self, rows: Sequence[TokenisedRow], size: int) -> None:
        self._ids = {str(place): row.ids for place, row in enumerate(rows)}
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[Int[np.ndarray, " t"]]]:
        nothing = np.empty(0, dtype=np.int64)
        return {"input_ids": [self._ids.get(text, nothing) for text in texts]}


def _check(rows: Sequence[TokenisedRow], context_size: int) -> None:
    for place, row in enumerate(rows):
        if len(row.ids) > context_size:
            raise UserError(
                f"Expected rows of at most {context_size} tokens, got {len(row.ids)} in row "
                f"{place}: what follows would not see what went before."
            )
        if len(row.keep) != len(row.ids):
            raise UserError(
                f"Expected one mark for each of the {len(row.ids)} tokens of row {place}, "
                f"got {len(row.keep)}."
            )
