"""Which tokens of a rendered row count, by the characters that they stand for.

``render`` says which characters are a row's own and where its response begins; the offsets of a
fast tokenizer say which characters a token stands for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from sae_apps.selection.instructions import InstructionRow, Rendered, render
from sae_core.errors import UserError

if TYPE_CHECKING:
    from sae_apps.selection.embed import EmbedConfig

Encoded = tuple[Int[np.ndarray, " t"], Int[np.ndarray, "t 2"]]
"""Ids and [start, stop) characters of the tokens of a text."""


class Tokens(NamedTuple):
    """The tokens of one row."""

    ids: Int[np.ndarray, " t"]
    """Those that the model reads: the head of the row, [t] int64."""
    keep: Bool[np.ndarray, " t"]
    """Those that are pooled, [t]."""
    length: int
    """Tokens of the whole row, template and special tokens included; 0 where there is no text."""


def tokenise(
    tokenizer: Any, rows: Sequence[InstructionRow], config: "EmbedConfig", context: int
) -> list[Tokens]:
    """Render and tokenise rows, and mark the tokens that count.

    A rendered chat brings its special tokens along, so the tokenizer adds none of its own there.

    Args:
        tokenizer: a fast one of transformers.
        config: which tokens count.
        context: tokens of a row at most; the head is kept.
    Raises:
        UserError: the tokenizer gives no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "Expected a fast tokenizer, which tells the characters of each token, "
            f"got {type(tokenizer).__name__}."
        )
    texts = [render(row, tokenizer, config.form) for row in rows]
    special = special_ids(tokenizer)
    return [
        _marked(text, encoded, special, config, context)
        for text, encoded in zip(texts, _encoded(tokenizer, texts), strict=True)
    ]


def special_ids(tokenizer: Any) -> Int[np.ndarray, " k"]:
    """Ids of all special tokens, those that only the vocabulary marks as such included."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {i for i, token in added.items() if getattr(token, "special", False)}
    ids |= {i for i in tokenizer.all_special_ids if i is not None}
    return np.array(sorted(ids), dtype=np.int64)


def touches(
    offsets: Int[np.ndarray, "t 2"], spans: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, " t"]:
    """Tokens that share a character with one of the spans; a token without characters has none."""
    start, stop = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), dtype=bool)
    for first, last in spans:
        found |= np.maximum(start, first) < np.minimum(stop, last)
    return found


def _marked(
    text: Rendered,
    encoded: Encoded,
    special: Int[np.ndarray, " k"],
    config: "EmbedConfig",
    context: int,
) -> Tokens:
    if not any(text.text[first:last].strip() for first, last in text.spans):
        nothing = np.empty(0, dtype=np.int64)
        return Tokens(nothing, nothing.astype(bool), 0)
    ids, offsets = (part[:context] for part in encoded)
    keep = _in_span(offsets, text.prompt_end, config.span)
    if not config.special:
        keep &= touches(offsets, text.spans) & ~np.isin(ids, special)
        keep[0] = False  # an attention sink, whatever it stands for
    return Tokens(ids, keep, len(encoded[0]))


def _in_span(offsets: Int[np.ndarray, "t 2"], prompt_end: int, span: str) -> Bool[np.ndarray, " t"]:
    """The response is what begins with the first token that reaches into it, its end included."""
    if span == "all":
        return np.ones(len(offsets), dtype=bool)
    in_response = np.logical_or.accumulate(offsets[:, 1] > prompt_end)
    return in_response if span == "response" else ~in_response


def _encoded(tokenizer: Any, texts: Sequence[Rendered]) -> list[Encoded]:
    options = {
        "add_special_tokens": texts[0].form != "chat",
        "return_offsets_mapping": True,
        "truncation": False,
        "padding": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,  # no warning about rows longer than the model: they are cut here
    }
    encoded = tokenizer([text.text for text in texts], **options)
    return [
        (np.asarray(ids, dtype=np.int64), np.asarray(places, dtype=np.int64).reshape(-1, 2))
        for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
