"""MinHash signatures in bands: which rows may be near duplicates.

For a random order of all n-grams, the first elements of two sets are the same with the chance
J = |A n B| / |A u B| (Broder 1997, "On the resemblance and containment of documents"). The first
elements of b * r random orders, in b bands of r, agree in a whole band with the chance

    P(J) = 1 - (1 - J^r)^b     (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4.2).

An order is given by (s h(g) + t) mod 2^32 with random odd s and random t, h(g) being the upper 32
bits of the n-gram's hash.
"""

from array import array
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt32

from sae_apps.selection.shingles import Ragged, blocks, ngrams, word_hashes
from sae_core.errors import UserError

N_HASHES = 128
_RECALL = 0.99  # of a pair that lies exactly at the threshold; above it P(J) is larger


def bands_for(threshold: float, n_hashes: int = N_HASHES) -> tuple[int, int]:
    """(bands, hashes a band): the longest bands that leave P(threshold) >= 0.99."""
    fitting = [
        (n_hashes // r, r)
        for r in range(1, n_hashes + 1)
        if chance(threshold, n_hashes // r, r) >= _RECALL
    ]
    if not fitting:
        lowest = 1 - (1 - _RECALL) ** (1 / n_hashes)
        raise UserError(f"Expected a threshold of at least {lowest:.3f}, got {threshold}.")
    return fitting[-1]


def chance(jaccard: float, n_bands: int, band: int) -> float:
    """P(J), the chance that two rows of this Jaccard agree in at least one band."""
    return 1 - (1 - jaccard**band) ** n_bands


def minhash(
    grams: Ragged, scale: UInt32[np.ndarray, " k"], shift: UInt32[np.ndarray, " k"]
) -> UInt32[np.ndarray, "k t"]:
    """min over the n-grams g of a text of (scale_k h(g) + shift_k) mod 2^32, h the upper 32 bits.

    All ones for a text without n-grams.
    """
    x = (grams.values >> np.uint64(32)).astype(np.uint32)
    filled = np.flatnonzero(np.diff(grams.start))
    found = np.full((len(scale), len(grams.start) - 1), 0xFFFFFFFF, dtype=np.uint32)
    if len(filled):
        value = np.empty_like(x)
        start = grams.start[filled]
        for k in range(len(scale)):
            np.multiply(x, scale[k], out=value)
            value += shift[k]
            found[k, filled] = np.minimum.reduceat(value, start)
    return found


def random_orders(k: int, seed: int) -> tuple[UInt32[np.ndarray, " k"], UInt32[np.ndarray, " k"]]:
    """(odd factors, summands) of k orders of the 32-bit numbers."""
    rng = np.random.default_rng(seed)
    scale, shift = rng.integers(0, 1 << 32, size=(2, k), dtype=np.uint32)
    return scale | np.uint32(1), shift


def band_keys(
    texts: Iterable[tuple[int, str]], n: int, seed: int, n_bands: int, band: int
) -> tuple[Int64[np.ndarray, " t"], list[UInt32[np.ndarray, "b _"]], Bool[np.ndarray, " t"]]:
    """Row ids, blocks with one number for each band of each row, and whether the row has a word.

    Args:
        texts: (row id, text) pairs.
        n: words of an n-gram.
        seed: of the random orders.
        n_bands: bands, b.
        band: orders in each, r.
    """
    scale, shift = random_orders(n_bands * band, seed)
    weights = np.random.default_rng(seed + 1).integers(1, 1 << 63, band, dtype=np.uint64) | 1
    ids, keys, filled = array("q"), [], []
    for block in blocks(texts):
        grams = ngrams(word_hashes([text for _, text in block]), n, short=True)
        signature = minhash(grams, scale, shift).reshape(n_bands, band, -1)
        mixed = (signature * weights[:, None]).sum(axis=1, dtype=np.uint64)
        keys.append((mixed >> np.uint64(32)).astype(np.uint32))
        filled.append(np.diff(grams.start) > 0)
        ids.extend(row_id for row_id, _ in block)
    has_words = np.concatenate([np.empty(0, bool), *filled])
    return np.array(ids, dtype=np.int64), keys, has_words


def previous_in_band(
    keys: list[UInt32[np.ndarray, "b _"]], has_words: Bool[np.ndarray, " t"]
) -> tuple[Int32[np.ndarray, "b t"], Bool[np.ndarray, " t"]]:
    """For each band and row the row before it with the same key (-1: none), and who has any."""
    n_bands = len(keys[0]) if keys else 0
    previous = np.full((n_bands, len(has_words)), -1, dtype=np.int32)
    has_partner = np.zeros(len(has_words), dtype=bool)
    worded = np.flatnonzero(has_words)
    for number in range(n_bands):
        key = np.concatenate([block[number] for block in keys])
        order = worded[np.argsort(key[worded], kind="stable")]
        same = key[order[1:]] == key[order[:-1]]
        later, earlier = order[1:][same], order[:-1][same]
        previous[number, later] = earlier
        has_partner[later] = has_partner[earlier] = True
    return previous, has_partner
