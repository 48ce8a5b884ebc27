"""Rows of text to batches of tokens: chunked, sorted by length, padded or packed."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from sae_core.errors import UserError
from sae_core.text import TextRow

# Text tokenised in one call: enough to use every core, small enough that a corpus of whole novels
# does not fill the memory with the tokenizer's own records (about 100 bytes a token).
_GROUP_CHARS = 1 << 20


@dataclass(frozen=True)
class HarvestConfig:
    """How text becomes activations. Every field changes which tokens come, or in which order."""

    context_size: int = 128
    """Tokens a sequence at most; longer rows are cut into chunks that do not see each other."""
    batch_tokens: int = 2048
    """Tokens a forward pass at most, padding counted."""
    batching: str = "pad"
    """``pad``: one chunk a sequence; ``pack``: several, hidden from each other."""
    include_special: bool = False
    """Whether special tokens of the tokenizer are kept."""
    include_first: bool = False
    """Whether the first token of a chunk is kept: an attention sink, whose norm dwarfs the rest."""
    window_rows: int = 256
    """Rows that are sorted by length together."""
    max_tokens: int | None = None
    """Stop at exactly so many kept tokens; None: the whole text."""

    def __post_init__(self) -> None:
        for name in ("context_size", "batch_tokens", "window_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_tokens < self.context_size:
            raise UserError(
                "batch_tokens must hold at least one sequence of context_size "
                f"{self.context_size}, got {self.batch_tokens}."
            )
        if self.batching not in ("pad", "pack"):
            raise UserError(f"batching must be 'pad' or 'pack', got {self.batching!r}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1 or None, got {self.max_tokens}.")


class Cursor(NamedTuple):
    """A place in the text from which tokenisation can start again."""

    rows: int = 0
    """Rows of the source that are done."""
    chunks: int = 0
    """Chunks of the next row that are done."""


START = Cursor()


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One forward pass: sequences of chunks, and the tokens whose activations are kept."""

    input_ids: Int64[Tensor, "b t"]
    position_ids: Int64[Tensor, "b t"]
    """Index of each token in its chunk."""
    chunk: Int64[Tensor, "b t"]
    """Number of the chunk in its sequence; -1 on padding."""
    keep: Int64[Tensor, " n"]
    """Kept tokens, as indices into the flattened [b * t]."""
    row_id: Int64[Tensor, " n"]
    position: Int32[Tensor, " n"]


class Window(NamedTuple):
    """Batches of consecutive rows, and the place behind them."""

    batches: list[TokenBatch]
    end: Cursor


class _Chunk(NamedTuple):
    row_id: int
    ids: NDArray[np.int64]
    keep: NDArray[np.int64]
    """Indices of the kept tokens in ``ids``."""
    first_position: int
    """Position in the row of ``ids[0]``."""
    end: Cursor


def token_windows(
    tokenizer: Any, rows: Iterable[TextRow], config: HarvestConfig, start: Cursor = START
) -> Iterator[Window]:
    """Cut rows into chunks and arrange them, window by window.

    A window ends when ``window_rows`` rows or ``window_rows * context_size`` tokens are in it, so
    memory does not depend on the text. What follows ``start`` does not depend on what precedes it.
    ``config.max_tokens`` counts from ``start`` here.

    Args:
        tokenizer: of transformers; fast ones tokenise on all cores.
        rows: the whole text, whatever ``start`` is.
        config: sizes and what is kept.
        start: from a ``Window.end``.

    Raises:
        UserError: the text holds fewer kept tokens than ``max_tokens``.
    """
    pending: list[_Chunk] = []
    n_rows = n_tokens = 0
    for chunk in _limited(_chunks(tokenizer, rows, config, start), config.max_tokens):
        pending.append(chunk)
        n_tokens += chunk.ids.size
        n_rows += chunk.end.chunks == 0
        if n_rows >= config.window_rows or n_tokens >= config.window_rows * config.context_size:
            yield Window(_arrange(pending, config), chunk.end)
            pending, n_rows, n_tokens = [], 0, 0
    if pending:
        yield Window(_arrange(pending, config), pending[-1].end)


def count_tokens(
    tokenizer: Any, rows: Iterable[TextRow], config: HarvestConfig, limit: int | None = None
) -> int:
    """Kept tokens of the text without running a model; counting ends once ``limit`` is reached."""
    total = 0
    for chunk in _chunks(tokenizer, rows, config, Cursor()):
        total += chunk.keep.size
        if limit is not None and total >= limit:
            return limit
    return total


def too_few_tokens(asked: int, available: int) -> UserError:
    """The error for a text with fewer tokens than ``max_tokens``."""
    return UserError(
        f"max_tokens asked for {asked} tokens, the text has only {available} that are kept."
    )


def _limited(chunks: Iterator[_Chunk], max_tokens: int | None) -> Iterator[_Chunk]:
    total = 0
    for chunk in chunks:
        if max_tokens is not None and total + chunk.keep.size >= max_tokens:
            yield chunk._replace(keep=chunk.keep[: max_tokens - total])
            return
        total += chunk.keep.size
        yield chunk
    if max_tokens is not None:
        raise too_few_tokens(max_tokens, total)


def _chunks(
    tokenizer: Any, rows: Iterable[TextRow], config: HarvestConfig, start: Cursor
) -> Iterator[_Chunk]:
    bos = _prepended_bos(tokenizer)
    special = np.zeros(len(tokenizer) + 1, dtype=bool)
    if not config.include_special:
        special[[i for i in tokenizer.all_special_ids if i is not None]] = True
    number, skip = start.rows, start.chunks
    for group in _groups(islice(rows, start.rows, None), config.window_rows):
        encoded = tokenizer(
            [row.text for row in group],
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about rows longer than the model: they are cut here
        )["input_ids"]
        for row, ids in zip(group, encoded, strict=True):
            cut = _cut(row.row_id, np.asarray(ids, dtype=np.int64), number, bos, special, config)
            yield from cut[skip:]
            number, skip = number + 1, 0


def _prepended_bos(tokenizer: Any) -> int | None:
    """The id that the tokenizer puts before every text, if it does."""
    bos = tokenizer.bos_token_id
    probe = tokenizer("a")["input_ids"]
    return bos if bos is not None and probe and probe[0] == bos else None


def _groups(rows: Iterable[TextRow], size: int) -> Iterator[list[TextRow]]:
    group: list[TextRow] = []
    chars = 0
    for row in rows:
        group.append(row)
        chars += len(row.text)
        if len(group) >= size or chars >= _GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _cut(
    row_id: int,
    ids: NDArray[np.int64],
    row_number: int,
    bos: int | None,
    special: NDArray[np.bool_],
    config: HarvestConfig,
) -> list[_Chunk]:
    """Chunks of one row. A prepended BOS is repeated on each: the model never runs without."""
    wanted = ~special[ids]
    size, chunks = config.context_size, []
    start = 0
    while start < ids.size:
        # A copy of the BOS at position 0: never kept, it is there for the others.
        head = [bos] if bos is not None and start > 0 and size > 1 else []
        stop = min(start + size - len(head), ids.size)
        part, keep = ids[start:stop], wanted[start:stop].copy()
        if head:
            part, keep = np.insert(part, 0, head), np.insert(keep, 0, False)
        if not config.include_first:
            keep[0] = False
        end = Cursor(row_number, len(chunks) + 1) if stop < ids.size else Cursor(row_number + 1, 0)
        chunks.append(_Chunk(row_id, part, np.flatnonzero(keep), start - len(head), end))
        start = stop
    return chunks


def _arrange(chunks: list[_Chunk], config: HarvestConfig) -> list[TokenBatch]:
    """Batches of sequences by falling length, so that too little memory shows at once."""
    useful = [chunk for chunk in chunks if chunk.keep.size]
    useful.sort(key=lambda chunk: -chunk.ids.size)  # stable: equal lengths keep the text's order
    pack = config.batching == "pack"
    sequences = _pack(useful, config.context_size) if pack else [[chunk] for chunk in useful]
    lengths = [sum(chunk.ids.size for chunk in sequence) for sequence in sequences]
    order = np.argsort([-n for n in lengths], kind="stable")
    batches, first = [], 0
    while first < len(order):
        count = max(1, config.batch_tokens // lengths[order[first]])
        batches.append(_batch([sequences[i] for i in order[first : first + count]]))
        first += count
    return batches


def _pack(chunks: list[_Chunk], size: int) -> list[list[_Chunk]]:
    """Best fit, longest first: each chunk goes where the least room would be left."""
    sequences: list[list[_Chunk]] = []
    room: list[tuple[int, int]] = []  # sorted (tokens left, sequence)
    for chunk in chunks:
        place = bisect_left(room, (chunk.ids.size, 0))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = size, len(sequences)
            sequences.append([])
        sequences[number].append(chunk)
        insort(room, (left - chunk.ids.size, number))
    return sequences


def _batch(sequences: list[list[_Chunk]]) -> TokenBatch:
    width = max(sum(chunk.ids.size for chunk in sequence) for sequence in sequences)
    # 0 is a token of every model; a tokenizer's own padding id need not be. What stands on padding
    # does not matter: nothing real attends to it, and it is never kept.
    ids = np.zeros((len(sequences), width), dtype=np.int64)
    inside = np.zeros_like(ids)
    number = np.full_like(ids, -1)
    keep, row_id, position = [], [], []
    for line, sequence in enumerate(sequences):
        at = 0
        for n, chunk in enumerate(sequence):
            size = chunk.ids.size
            ids[line, at : at + size] = chunk.ids
            inside[line, at : at + size] = np.arange(size)
            number[line, at : at + size] = n
            keep.append(line * width + at + chunk.keep)
            row_id.append(np.full(chunk.keep.size, chunk.row_id, dtype=np.int64))
            position.append((chunk.first_position + chunk.keep).astype(np.int32))
            at += size
    return TokenBatch(
        *(torch.from_numpy(array) for array in (ids, inside, number)),
        *(torch.from_numpy(np.concatenate(parts)) for parts in (keep, row_id, position)),
    )
