"""Whether picked rows hold the items of an evaluation set.

As for GPT-3 (Brown et al. 2020, appendix C) a row and an item overlap where they share a run of 13
words; an item of fewer words overlaps where the row holds all of them in a row. Beyond the yes or
no, the share of the item's n-grams that the row holds tells a copied item (1) from a common phrase:

    share(item, pick) = |grams(item) n grams(pick)| / |grams(item)|.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64, UInt64

from sae_apps.selection.duplicates import text_of
from sae_apps.selection.instructions import InstructionRow
from sae_apps.selection.shingles import Ragged, blocks, ngrams, word_hashes
from sae_core.errors import UserError


@dataclass(frozen=True, eq=False)
class Contamination:
    """Pairs of a pick and an evaluation item that overlap, by pick, then by falling share."""

    pick: Int64[np.ndarray, " m"]
    """``row_id`` of the pick."""
    item: Int64[np.ndarray, " m"]
    """``row_id`` of the item."""
    share: Float32[np.ndarray, " m"]
    """Share of the item's n-grams that the pick holds, in (0, 1]."""
    n_picks: int
    n_items: int
    n_untested: int
    """Items of too few words, or of nothing but phrases common to many items."""
    n: int
    """Words of an n-gram."""

    @property
    def picks(self) -> Int64[np.ndarray, " p"]:
        """The picks that overlap with an item, each once."""
        return np.unique(self.pick)

    @property
    def items(self) -> Int64[np.ndarray, " i"]:
        """The items that a pick holds, each once."""
        return np.unique(self.item)


@dataclass(frozen=True, eq=False)
class _Grams:
    """The n-grams of the items, of one length."""

    n: int
    value: UInt64[np.ndarray, " g"]
    """Distinct n-grams, rising."""
    start: Int64[np.ndarray, " g_plus_1"]
    """The items with n-gram g are ``item[start[g] : start[g + 1]]``."""
    item: Int64[np.ndarray, " l"]


def contamination(
    picks: Iterable[InstructionRow],
    evaluation: Iterable[InstructionRow],
    *,
    n: int = 13,
    min_share: float = 0.0,
    min_words: int = 5,
    max_items: int = 10,
    pick_span: str = "all",
    item_span: str = "prompt",
) -> Contamination:
    """Pairs of picks and items that share n-grams of words.

    One pass over each; memory: the evaluation set's n-grams, 24 bytes each, and the pairs found.

    Args:
        picks: the rows picked from the pool.
        evaluation: the items.
        n: words of an n-gram.
        min_share: only pairs with at least this share; 0 reports any common n-gram.
        min_words: items of fewer words are not tested: too many texts hold them by chance.
        max_items: n-grams of more items than this are a phrase, such as a common instruction, and
            do not count; GPT-3's filter does the same with n-grams of more than ten documents.
        pick_span: text of a pick that is searched: ``all``, ``prompt`` or ``response``.
        item_span: text of an item that is looked for. A copied question with another answer is
            contamination, hence ``prompt``.
    Raises:
        UserError: an argument out of range, or an evaluation set without rows.
    """
    if not 0 <= min_share <= 1 or not 1 <= min_words <= n or max_items < 1:
        raise UserError(
            "Expected min_share in [0, 1], min_words from 1 to n and max_items of at least 1, got "
            f"{min_share}, {min_words} of n = {n}, and {max_items}."
        )
    item_ids, tables, n_grams = _index(evaluation, n, min_words, max_items, item_span)
    if not len(item_ids):
        raise UserError("Expected an evaluation set with at least one row, got none.")
    pick, item, share, n_picks = [], [], [], 0
    for block in blocks(picks):
        n_picks += len(block)
        words = word_hashes([text_of(row, pick_span) for row in block])
        for table in tables:
            row, which, count = _matches(ngrams(words, table.n, short=False), table)
            part = count / n_grams[which]
            keep = part >= min_share
            ids = np.array([one.row_id for one in block], dtype=np.int64)
            pick.append(ids[row[keep]])
            item.append(item_ids[which[keep]])
            share.append(part[keep].astype(np.float32))
    return _report(pick, item, share, n_picks, n_grams, n)


def _report(
    pick: list[np.ndarray],
    item: list[np.ndarray],
    share: list[np.ndarray],
    n_picks: int,
    n_grams: Int64[np.ndarray, " items"],
    n: int,
) -> Contamination:
    empty = np.empty(0, np.int64)
    picks, items = np.concatenate([empty, *pick]), np.concatenate([empty, *item])
    shares = np.concatenate([np.empty(0, np.float32), *share])
    order = np.lexsort((items, -shares, picks))
    untested = int((n_grams == 0).sum())
    return Contamination(
        picks[order], items[order], shares[order], n_picks, len(n_grams), untested, n
    )


def _index(
    evaluation: Iterable[InstructionRow], n: int, min_words: int, max_items: int, span: str
) -> tuple[Int64[np.ndarray, " items"], list[_Grams], Int64[np.ndarray, " items"]]:
    """Row ids of the items, their n-grams by length, and how many of each item count."""
    ids: list[int] = []
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for block in blocks(evaluation):
        words = word_hashes([text_of(row, span) for row in block])
        n_words = np.diff(words.start)
        # a short item is one n-gram of its own length
        for length in np.unique(np.minimum(n_words[n_words >= min_words], n)).tolist():
            grams = ngrams(words, length, short=False)
            item = np.repeat(np.arange(len(block)), np.diff(grams.start))
            mine = (n_words[item] == length) | (length == n)
            found.setdefault(length, []).append((grams.values[mine], item[mine] + len(ids)))
        ids += [row.row_id for row in block]
    n_grams = np.zeros(len(ids), dtype=np.int64)
    tables = []
    for length in sorted(found):
        value, item = (np.concatenate(one) for one in zip(*found[length], strict=True))
        tables.append(_table(length, value, item, max_items))
        n_grams += np.bincount(tables[-1].item, minlength=len(ids))
    return np.array(ids, dtype=np.int64), tables, n_grams


def _table(
    n: int, value: UInt64[np.ndarray, " l"], item: Int64[np.ndarray, " l"], max_items: int
) -> _Grams:
    """Each n-gram of an item once; without those of more than ``max_items`` items."""
    order = np.lexsort((item, value))
    value, item = value[order], item[order]
    again = (value[1:] == value[:-1]) & (item[1:] == item[:-1])
    keep = np.concatenate([np.ones(min(1, len(value)), bool), ~again])
    distinct, count = np.unique(value[keep], return_counts=True)
    common = np.repeat(count > max_items, count)
    start = np.concatenate([[0], np.cumsum(count[count <= max_items])])
    return _Grams(n, distinct[count <= max_items], start, item[keep][~common])


def _matches(
    grams: Ragged, table: _Grams
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """(text, item, number of distinct n-grams in common) of the pairs that have any."""
    if not len(table.value):
        nothing = np.empty(0, np.int64)
        return nothing, nothing, nothing
    text = np.repeat(np.arange(len(grams.start) - 1), np.diff(grams.start))
    place = np.minimum(np.searchsorted(table.value, grams.values), len(table.value) - 1)
    hit = table.value[place] == grams.values
    # each n-gram of a text once
    pair = np.unique(np.stack([text[hit], place[hit]]), axis=1)
    count = np.diff(table.start)[pair[1]]
    first = np.repeat(table.start[pair[1]], count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    both = np.stack([np.repeat(pair[0], count), table.item[first + within]])
    distinct, common = np.unique(both, axis=1, return_counts=True)
    return distinct[0], distinct[1], common
