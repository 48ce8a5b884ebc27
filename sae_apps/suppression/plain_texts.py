"""Texts as the plain model reads them once: tokens in batches, and the states at one place.

What edits make of the texts (``likelihood``) starts from these states wherever the edit acts there
and a pass can be resumed behind them (``sae_core.resume``). Scored are the tokens of a text without
special ones and without its first, which no text of its own goes before.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.errors import UserError
from sae_core.hooks import HookPoint, decoder_blocks, read_and_stop, resolve_hook_point
from sae_core.models import LanguageModel
from sae_core.resume import layer_of, resume_from

_LOGIT_BYTES = 1 << 28  # float32 logits of a batch


@dataclass(frozen=True)
class ReadConfig:
    """How texts are read."""

    context_size: int = 128
    """Tokens of a text at most, an instruction not counted; what is longer is cut."""
    batch_tokens: int = 2048
    """Tokens a forward pass at most, padding counted."""

    def __post_init__(self) -> None:
        if self.context_size < 2 or self.batch_tokens < 1:
            raise UserError(
                "Expected context_size of at least 2 and batch_tokens of at least 1, got "
                f"{self.context_size} and {self.batch_tokens}."
            )


class Line(NamedTuple):
    """Tokens of one text."""

    place: int
    ids: list[int]
    first: int
    """Where the text begins in ids."""
    is_scored: list[bool]


class Batch(NamedTuple):
    """Texts of similar length."""

    lines: list[Line]
    ids: Int[Tensor, "b t"]
    mask: Int[Tensor, "b t"]
    scored: Bool[Tensor, "b t"]
    state: Float[Tensor, "b t d"]
    """At the place of the reading."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """As the model takes them."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


@dataclass(frozen=True, eq=False)
class PlainTexts:
    """Texts with the plain model's states at one place; made by ``read_plain``."""

    point: HookPoint
    """The place."""
    config: ReadConfig
    """How they were read."""
    n_tokens: Int[np.ndarray, " n"]
    """Scored tokens of each text."""
    batches: list[Batch]
    """Texts of similar length together."""
    can_resume: bool
    """Whether a pass may start behind the place."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """Of the plain model at the scored tokens, by number of the batch, as far as they are kept."""


def read_plain(
    lm: LanguageModel, texts: Sequence[str], read_at: str, config: ReadConfig | None = None
) -> PlainTexts:
    """Read texts up to a place; memory grows with the tokens.

    Args:
        texts: n texts of at least two tokens each.
        read_at: hook point whose activations are pooled, after the edit where it is the edited
            one.
    Raises:
        UserError: no texts, a text of fewer than two tokens, or an unknown hook point.
    """
    config = config or ReadConfig()
    if not texts:
        raise UserError("Expected at least one text to read, got none.")
    point = resolve_hook_point(lm.model, read_at)
    rows = _tokenised(lm, texts, config)
    batches = []
    for lines in _batches(lm, rows, config):
        ids, mask, scored = padded(lm, lines, [])
        inputs = {"input_ids": ids, "attention_mask": mask}
        state = read_and_stop(lm.model, [point], inputs)[point.name]
        batches.append(Batch(lines, ids, mask, scored, state))
    n_tokens = np.array([sum(row.is_scored) for row in rows])
    return PlainTexts(point, config, n_tokens, batches, _can_resume(lm, point, batches[0]))


@torch.no_grad()
def _can_resume(lm: LanguageModel, point: HookPoint, batch: Batch) -> bool:
    """A pass that starts from the plain states must end where a whole pass does."""
    if layer_of(point, decoder_blocks(lm.model)[0]) is None:
        return False
    inputs = {name: one[:1] for name, one in batch.inputs.items()}
    whole = lm.model(**inputs, use_cache=False).logits
    try:
        with resume_from(lm.model, point, batch.state[:1]):
            again = lm.model(**inputs, use_cache=False).logits
    except (TypeError, ValueError, IndexError, AttributeError):  # blocks of another kind
        return False
    return again.shape == whole.shape and bool(torch.allclose(again, whole, rtol=1e-3, atol=1e-3))


def _tokenised(lm: LanguageModel, texts: Sequence[str], config: ReadConfig) -> list[Line]:
    special = set(lm.tokenizer.all_special_ids)
    rows = []
    for place, text in enumerate(texts):
        ids = list(lm.tokenizer(text)["input_ids"])[: config.context_size]
        first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
        scored = [i > first and token not in special for i, token in enumerate(ids)]
        if not any(scored):
            raise UserError(f"Expected texts of at least two tokens, got {len(ids)} in {text!r}.")
        rows.append(Line(place, ids, first, scored))
    return rows


def _batches(lm: LanguageModel, rows: Sequence[Line], config: ReadConfig) -> Iterator[list[Line]]:
    """Lines of similar length together."""
    most = max(1, min(config.batch_tokens, _LOGIT_BYTES // (4 * len(lm.tokenizer))))
    batch: list[Line] = []
    for row in sorted(rows, key=lambda row: (len(row.ids), row.place)):
        if batch and len(row.ids) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def padded(
    lm: LanguageModel, lines: Sequence[Line], before: list[int]
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Token ids, attention mask and scored tokens, padded on the right."""
    rows = [[*line.ids[: line.first], *before, *line.ids[line.first :]] for line in lines]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, scored = torch.zeros_like(ids), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, line) in enumerate(zip(rows, lines, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        start = line.first + len(before)
        scored[i, start : len(row)] = torch.tensor(line.is_scored[line.first :])
    return ids.to(lm.device), mask.to(lm.device), scored.to(lm.device)
