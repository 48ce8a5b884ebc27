"""Texts as hashed word n-grams, many texts at a time.

A word is a run of letters and digits of the normalised text (NFKC, case folded), an operator or
currency sign ("3 + 4" is not "3 * 4"), or one character of a script that is written without
spaces; other punctuation separates. For the bytes c_i of a word, a table T of 64-bit random
numbers and odd numbers p, q,

    word    w = mix(sum_i T[c_i] q^i),          n-gram    g = mix(sum_j w_j p^j)    (modulo 2^64).

Both sums are differences of running sums, times a power of the inverse of q or p, so nothing in
Python runs once a word. mix is SplitMix64 (Steele, Lea, Flood 2014). Two different n-grams get the
same hash with a chance of about 2^-64.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from sae_core.text import splitmix64

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_SIGNS = "£€¥√≤≥≠×÷∈∪∩"
# Beyond ASCII the words are made here; a bare r" \1 " is blanks where the group did not match.
_APART = re.compile(rf"([{_UNSPACED}{_SIGNS}])|[^\w\x00-\x7f]")
_ASCII_SIGNS = b"+-*/=<>%^&|~@#$"
_P, _Q = 0xD1342543DE82EF95, 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
BLOCK_ROWS = 256
"""Texts that are hashed together: enough to make numpy's own cost small, few enough for a cache."""


class Ragged(NamedTuple):
    """Lists of numbers of different lengths: list t is ``values[start[t] : start[t + 1]]``."""

    values: UInt64[np.ndarray, " n"]
    start: Int64[np.ndarray, " t_plus_1"]


def normalise(text: str) -> str:
    """NFKC, case folded, white space runs as one blank; applying it again changes nothing."""
    return " ".join(_folded(text).split())


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    # Folding can undo the normal form and the reverse (Unicode, section 3.13): hence both sides.
    text = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", text).casefold()


def blocks(items: Iterable[object], size: int = BLOCK_ROWS) -> Iterator[list]:
    """The items in lists of ``size``, the last one shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


@cache
def _byte_tables() -> tuple[UInt64[np.ndarray, " 256"], np.ndarray, np.ndarray]:
    """(random numbers, whether a byte belongs to a word, whether it is a word by itself)."""
    byte = np.arange(256)
    is_sign = np.isin(byte, list(_ASCII_SIGNS))
    is_word = np.array([chr(b).isalnum() or chr(b) == "_" or b >= 0x80 for b in byte])
    return splitmix64(byte.astype(np.uint64)), is_word, is_sign


def _powers(base: int, n: int) -> UInt64[np.ndarray, " n"]:
    powers = np.full(n, base & _MASK, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _running(values: UInt64[np.ndarray, " n"], base: int) -> UInt64[np.ndarray, " n_plus_1"]:
    """R[i] = sum of values[j] base^j over j < i."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(base, len(values)), out=sums[1:])
    return sums


def word_hashes(texts: Sequence[str]) -> Ragged:
    """The hash of each word of each text, in order."""
    parts = [t if t.isascii() else _APART.sub(r" \1 ", _folded(t)) for t in texts]
    encoded = [part.encode("utf-8", "replace") for part in parts]
    data = np.frombuffer(b"\n".join([*encoded, b""]).lower(), dtype=np.uint8)
    if not len(data):
        return Ragged(np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64))
    table, in_word, alone = _byte_tables()
    is_word, is_sign = in_word[data], alone[data]
    before = np.concatenate([[False], is_word[:-1]])
    behind = np.concatenate([is_word[1:], [False]])
    first = np.flatnonzero((is_word & ~before) | is_sign)
    stop = np.flatnonzero((is_word & ~behind) | is_sign) + 1
    sums = _running(table[data], _Q)
    inverse = _powers(pow(_Q, -1, 1 << 64), len(data))
    hashes = splitmix64((sums[stop] - sums[first]) * inverse[first])
    ends = np.cumsum([0, *(len(one) + 1 for one in encoded)])
    return Ragged(hashes, np.searchsorted(first, ends).astype(np.int64))


def ngrams(words: Ragged, n: int, *, short: bool) -> Ragged:
    """The hash of each n consecutive words of each text, in order.

    Args:
        words: from ``word_hashes``.
        n: words of an n-gram.
        short: whether a text of fewer than n words has one n-gram, all its words, or none.
    """
    n_words = np.diff(words.start)
    count = np.maximum(n_words - n + 1, np.minimum(n_words, 1) if short else 0)
    start = np.concatenate([[0], np.cumsum(count)])
    text = np.repeat(np.arange(len(count)), count)
    first = words.start[text] + np.arange(start[-1]) - start[text]
    stop = first + np.minimum(n, n_words)[text]
    sums = _running(words.values, _P)
    inverse = _powers(pow(_P, -1, 1 << 64), len(words.values))
    return Ragged(splitmix64((sums[stop] - sums[first]) * inverse[first]), start)


def shingle_sets(texts: Sequence[str], n: int) -> list[UInt64[np.ndarray, " _"]]:
    """The distinct n-grams of each text, in rising order."""
    grams = ngrams(word_hashes(texts), n, short=True)
    bounds = zip(grams.start[:-1], grams.start[1:], strict=True)
    return [np.unique(grams.values[a:b]) for a, b in bounds]
