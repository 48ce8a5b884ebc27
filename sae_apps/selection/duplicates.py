"""Repeated rows: exact ones by a hash of the text, near ones by MinHash and the true Jaccard.

With A, B the sets of word 5-grams of two rows, they are near duplicates where

    J(A, B) = |A n B| / |A u B| >= threshold        (Broder 1997).

``minhash`` proposes pairs, and each is compared by the true J of its n-grams, so what is found is
exact and only what is overlooked is left to chance. A row is dropped for an earlier row that is
itself kept: the first of its kind always stays.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt64

from sae_apps.selection.instructions import (
    InstructionRow,
    InstructionSource,
    RowReader,
)
from sae_apps.selection.minhash import band_keys, bands_for, chance, previous_in_band
from sae_apps.selection.shingles import blocks, normalise, shingle_sets
from sae_core.errors import UserError

SPANS = ("all", "prompt", "response")
_PIECE = 1 << 12
_MAX_COMPARED = 256  # rows of one band that a row is compared with, the latest ones


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Rows that repeat an earlier one, in the order of the data."""

    row_id: Int64[np.ndarray, " k"]
    """The rows to drop."""
    kept: Int64[np.ndarray, " k"]
    """The earlier row that each of them repeats; none of these is dropped itself."""
    similarity: Float32[np.ndarray, " k"]
    """Jaccard of the two; 1 for exact duplicates."""
    n_rows: int
    """Rows that were read."""
    n_wordless: int = 0
    """Rows without a word, which are like no other."""
    n_capped: int = 0
    """Rows that were compared with some, not all, of the rows that share a band with them."""
    recall: float = 1.0
    """P(J) at the threshold: the chance that a pair there is compared at all, if none is capped."""


def text_of(row: InstructionRow, span: str = "all") -> str:
    """Prompt and response with a newline between, or one of them."""
    if span not in SPANS:
        raise UserError(f"Expected the span 'all', 'prompt' or 'response', got {span!r}.")
    if span == "all":
        return f"{row.prompt}\n{row.response}"
    return row.prompt if span == "prompt" else row.response


def without(
    source: InstructionSource, row_ids: Iterable[int] | Int64[np.ndarray, " k"]
) -> InstructionSource:
    """The source without some rows; the others keep their ids.

    The id of the result ends in the number of rows dropped and a hash of them.
    """
    dropped = np.unique(np.fromiter(row_ids, dtype=np.int64))
    digest = hashlib.sha256(dropped.tobytes()).hexdigest()[:12]
    name = f"{source.id}-{len(dropped)}@{digest}"
    return InstructionSource(name, partial(_start_without, source, dropped))


def _start_without(source: InstructionSource, dropped: Int64[np.ndarray, " k"]) -> RowReader:
    gone = set(dropped.tolist())
    reader = source.open()
    reader.rows = (row for row in reader.rows if row is None or row.row_id not in gone)
    return reader


# Exact


def exact_duplicates(rows: Iterable[InstructionRow], *, span: str = "all") -> Duplicates:
    """Rows whose normalised text (NFKC, case folded, white space) is that of an earlier row.

    One pass. Texts are compared by 128 bits of BLAKE2b: two different texts among a million are
    taken for one with a chance of 10^-27. Memory: 24 bytes a row, at the end about 50 to sort them
    (measured on a million rows).

    Args:
        rows: in the order in which the first is kept, with unique row ids.
        span: the text to compare: ``all``, ``prompt`` or ``response``.
    Raises:
        UserError: an unknown span.
    """
    row_ids, keys = array("q"), array("Q")
    for row in rows:
        text = normalise(text_of(row, span)).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=16).digest()
        keys.frombytes(digest)
        row_ids.append(row.row_id)
    ids = np.frombuffer(row_ids, dtype=np.int64)
    key = np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)
    repeat, first = _repeats(key)
    return Duplicates(ids[repeat], ids[first], np.ones(len(repeat), np.float32), len(ids))


def _repeats(
    key: UInt64[np.ndarray, "n 2"],
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"]]:
    """Rows, rising, whose key an earlier row has, and the first row that has it."""
    order = np.lexsort((key[:, 1], key[:, 0]))  # stable: equal keys stay in the data's order
    same = np.zeros(len(order), dtype=bool)  # whether a place holds the key of the place before
    for start in range(1, len(order), _PIECE):  # a sorted copy would double the memory
        here = order[start : start + _PIECE]
        before = order[start - 1 : start - 1 + len(here)]
        same[start : start + len(here)] = (key[here] == key[before]).all(axis=1)
    place = np.flatnonzero(same)
    new_run = np.diff(place, prepend=-1) != 1
    new_run[:1] = True
    head = place[new_run][np.cumsum(new_run) - 1] - 1
    repeat, first = order[place], order[head]
    rising = np.argsort(repeat)
    return repeat[rising], first[rising]


# Near


def near_duplicates(
    rows: Iterable[InstructionRow],
    *,
    threshold: float = 0.8,
    n: int = 5,
    span: str = "all",
    seed: int = 0,
    max_compared: int = _MAX_COMPARED,
) -> Duplicates:
    """Rows whose word n-grams have a Jaccard >= threshold with those of an earlier row.

    Two passes: the first keeps 8 bytes a band and row (at 0.8: 21 bands, 170 bytes), the second
    reads again those rows that share a band with another, and keeps the n-grams of those that stay
    (8 bytes each). A row of fewer than n words has one n-gram: all its words. Rows that ask other
    questions about one long passage are alike by this measure; a higher threshold keeps more of
    them.

    Args:
        rows: in the order in which the first is kept; read twice, so not an iterator.
        threshold: in (0, 1].
        n: words of an n-gram.
        span: the text to compare: ``all``, ``prompt`` or ``response``.
        seed: of the random orders.
        max_compared: rows of one band that a row is compared with at most, the latest ones; rows
            that share a long passage and differ in the rest would else cost their number squared.
    Returns:
        The duplicates, ``similarity`` being exact, with the chance that a pair was overlooked.
    Raises:
        UserError: a threshold, n or span that cannot be, an iterator, data that changed in between.
    """
    if not 0 < threshold <= 1 or n < 1 or max_compared < 1:
        raise UserError(
            "Expected a threshold in (0, 1] and n and max_compared of at least 1, got "
            f"{threshold}, {n} and {max_compared}."
        )
    if iter(rows) is rows:
        raise UserError("Expected rows that can be read twice, got an iterator: make it a list.")
    n_bands, band = bands_for(threshold)
    ids, keys, has_words = band_keys(
        ((row.row_id, text_of(row, span)) for row in rows), n, seed, n_bands, band
    )
    previous, has_partner = previous_in_band(keys, has_words)
    del keys
    found, n_capped = _verified(rows, ids, previous, has_partner, n, span, threshold, max_compared)
    position, kept, similarity = found
    return Duplicates(
        ids[position],
        ids[kept],
        similarity,
        len(ids),
        int((~has_words).sum()),
        n_capped,
        chance(threshold, n_bands, band),
    )


_Found = tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Float32[np.ndarray, " k"]]


def _verified(
    rows: Iterable[InstructionRow],
    ids: Int64[np.ndarray, " t"],
    previous: Int32[np.ndarray, "b t"],
    has_partner: Bool[np.ndarray, " t"],
    n: int,
    span: str,
    threshold: float,
    max_compared: int,
) -> tuple[_Found, int]:
    """(dropped, kept, Jaccard) of the second pass, by position, and the number of capped rows."""
    sets: dict[int, UInt64[np.ndarray, " _"]] = {}  # of the rows that stay
    dropped, kept, jaccard, n_capped = array("q"), array("q"), array("f"), 0
    flagged = compress(enumerate(rows), has_partner)
    for block in blocks(flagged):
        grams = shingle_sets([text_of(row, span) for _, row in block], n)
        for (position, row), mine in zip(block, grams, strict=True):
            if row.row_id != ids[position]:
                raise UserError(
                    f"Expected row {ids[position]} again at place {position}, got {row.row_id}: "
                    "the rows changed between two readings."
                )
            earlier, capped = _walk(previous[:, position], previous, sets, max_compared)
            n_capped += capped
            best, similarity = _most_alike(mine, earlier, sets)
            if best >= 0 and similarity >= threshold:
                dropped.append(position)
                kept.append(best)
                jaccard.append(similarity)
            else:
                sets[position] = mine
    found = (np.array(dropped, np.int64), np.array(kept, np.int64), np.array(jaccard, np.float32))
    return found, n_capped


def _walk(
    heads: Int32[np.ndarray, " b"],
    previous: Int32[np.ndarray, "b t"],
    sets: dict[int, UInt64[np.ndarray, " _"]],
    limit: int,
) -> tuple[list[int], bool]:
    """Kept rows before this one that share a band with it, and whether there were more.

    Leaves in ``heads`` the last kept row of each band, so that a later walk skips those dropped.
    """
    earlier: set[int] = set()
    capped = False
    for number in np.flatnonzero(heads >= 0):
        chain = previous[number]
        at = int(heads[number])
        if at not in sets:
            at = heads[number] = int(chain[at])
        steps = 0
        while at >= 0:
            if steps == limit:
                capped = True
                break
            earlier.add(at)
            steps += 1
            at = int(chain[at])
    return sorted(earlier), capped


def _most_alike(
    mine: UInt64[np.ndarray, " m"],
    earlier: Sequence[int],
    sets: dict[int, UInt64[np.ndarray, " _"]],
) -> tuple[int, float]:
    """The row with the highest Jaccard, the first of equals; (-1, 0) where there is none."""
    if not earlier:
        return -1, 0.0
    theirs = [sets[one] for one in earlier]
    size = np.array([len(one) for one in theirs])
    every = np.concatenate(theirs)
    place = np.minimum(np.searchsorted(mine, every), len(mine) - 1)
    common = np.add.reduceat(mine[place] == every, np.cumsum([0, *size[:-1]]), dtype=np.int64)
    jaccard = common / (len(mine) + size - common)
    best = int(np.argmax(jaccard))
    return earlier[best], float(jaccard[best])
