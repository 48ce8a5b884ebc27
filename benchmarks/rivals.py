"""What a user would reach for instead: baselines of the selection suite, in one shape.

Each baseline turns draws of target rows (places in the benchmark's rows) into one score per pool
row, all draws at once. The pool is scored through matrix products, so that hundreds of draws cost
little more than one.

    bm25     sum over query terms of the Lucene BM25 weight (bm25s)
    dsir     sum_g count_g (log(p_target_g + 1e-8) - log(p_pool_g + 1e-8)) over hashed 1-2-grams
             (arXiv 2302.03169; the package data-selection 1.0.3)

Sentence embeddings and gradients are in ``minilm`` and ``gradients``.

Deviations. DSIR ranks by the log weight (`top_k=True` in the package) instead of sampling with
Gumbel noise, because precision at k asks for the best k, and takes examples of any length (the
package's default drops those under 100 tokens, which most instructions are).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse

Draws = Sequence[Int64[np.ndarray, " n_examples"]]
N_BUCKETS = 10_000  # of the package
EPSILON = 1e-8  # of the package


def averaging(draws: Draws, n_rows: int) -> sparse.csr_array:
    """[n_draws, n_rows] matrix whose product with row features is the mean over each draw."""
    places = np.concatenate([np.asarray(draw) for draw in draws])
    sizes = np.array([len(draw) for draw in draws])
    values = np.repeat(1 / sizes, sizes)
    starts = np.concatenate([[0], sizes.cumsum()])
    return sparse.csr_array((values, places, starts), shape=(len(draws), n_rows))


def random_scores(n_draws: int, n_pool: int, seed: int = 0) -> Float32[np.ndarray, "n_draws n"]:
    """Independent uniform scores."""
    return np.random.default_rng(seed).random((n_draws, n_pool), dtype=np.float32)


def round_robin(
    similarity: Float[np.ndarray, "p n"], groups: Draws, k: int
) -> Float32[np.ndarray, "n_groups n"]:
    """Prototypes of a group take turns, each with its best row not yet taken (as RDS+ does).

    Args:
        similarity: of each prototype to each pool row.
        groups: rows of `similarity` that take turns.
        k: picks to make in turns; the rest is ranked by the best similarity of the group.

    Returns:
        Scores that sort the pool in the order of picking.
    """
    n = similarity.shape[1]
    k = min(k, n)
    used = np.unique(np.concatenate([np.asarray(group) for group in groups]))
    orders = {int(p): np.argsort(-similarity[p], kind="stable").tolist() for p in used}
    scores = np.empty((len(groups), n), dtype=np.float32)
    for number, group in enumerate(groups):
        best = similarity[group].max(0)
        rest = np.argsort(-best, kind="stable")
        picked = list(_turns([orders[int(p)] for p in group], k))
        is_picked = np.zeros(n, dtype=bool)
        is_picked[picked] = True
        order = np.concatenate([np.array(picked, dtype=np.int64), rest[~is_picked[rest]]])
        scores[number, order] = -np.arange(n)
    return scores


def _turns(orders: Sequence[list[int]], k: int) -> Iterator[int]:
    """The first k picks of lists that take turns."""
    taken: set[int] = set()
    streams = [iter(order) for order in orders]
    while True:
        for stream in streams:
            if len(taken) == k:
                return
            pick = next(row for row in stream if row not in taken)
            taken.add(pick)
            yield pick


# ---- BM25 ----


class BM25:
    """The pool's BM25 weights as a matrix, and the rows' term counts as queries.

    A BM25 score adds over the query's terms, so the mean over target queries and one concatenated
    query rank alike: both are `mode="mean"`. `set` counts each term of the concatenation once,
    `round_robin` lets the queries take turns.
    """

    def __init__(self, texts: Sequence[str], pool: Int[np.ndarray, " n_pool"]) -> None:
        """Index the pool with the settings of bm25s (k1 1.5, b 0.75, English stop words).

        Args:
            texts: of all rows.
            pool: places of the pool's rows.
        """
        import bm25s

        words: Any = bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
        index = bm25s.BM25()
        index.index([words[place] for place in pool], show_progress=False)
        held: Any = index.scores
        vocabulary: Any = index.vocab_dict
        shape: Any = (len(pool), len(held["indptr"]) - 1)
        self.weights = sparse.csc_array((held["data"], held["indices"], held["indptr"]), shape)
        known = [[vocabulary[w] for w in row if w in vocabulary] for row in words]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in known])])
        terms = np.array([term for row in known for term in row], dtype=np.int64)
        ones = np.ones(len(terms), dtype=np.float32)
        self.counts = sparse.csr_array((ones, terms, starts), shape=(len(texts), shape[1]))
        self.counts.sum_duplicates()

    def scores(
        self, draws: Draws, mode: str = "mean", k: int = 1000
    ) -> Float32[np.ndarray, "n_draws n_pool"]:
        """Score of each pool row for each draw of target rows; `k` as in `round_robin`."""
        if mode == "round_robin":
            rows = np.unique(np.concatenate([np.asarray(draw) for draw in draws]))
            single = (self.counts[rows] @ self.weights.T).toarray()
            return round_robin(single, [np.searchsorted(rows, draw) for draw in draws], k)
        queries = sparse.csr_array(averaging(draws, len(np.diff(self.counts.indptr))) @ self.counts)
        if mode == "set":
            queries.data[:] = 1
        return (queries @ self.weights.T).toarray().astype(np.float32)


# ---- DSIR ----


@lru_cache(maxsize=1 << 20)
def _bucket(ngram: str) -> int:
    from data_selection.hashed_ngram_dsir import hash_buckets

    return hash_buckets(ngram, N_BUCKETS)


def dsir_counts(texts: Sequence[str]) -> sparse.csr_array:
    """Counts of hashed 1-2-grams, [n_texts, 10,000], as `get_ngram_counts` of the package."""
    from data_selection.hashed_ngram_dsir import wpt

    starts, buckets = [0], []
    for text in texts:
        words = wpt.tokenize(text.lower())
        buckets += [_bucket(word) for word in words]
        buckets += [_bucket(f"{a} {b}") for a, b in pairwise(words)]
        starts.append(len(buckets))
    ones = np.ones(len(buckets), dtype=np.float32)
    counts = sparse.csr_array((ones, buckets, starts), shape=(len(texts), N_BUCKETS))
    counts.sum_duplicates()
    return counts


def dsir_scores(
    counts: sparse.csr_array,
    pool: Int[np.ndarray, " n_pool"],
    draws: Draws,
    *,
    is_tuned: bool = False,
) -> Float32[np.ndarray, "n_draws n_pool"]:
    """Log importance weights of the pool's rows.

    Args:
        is_tuned: with a few tens of targets most n-grams of the pool are unseen and weigh
            log(1e-8), so that the sum prefers the shortest rows. The tuned form mixes the target
            distribution half and half with the pool's and divides by the row's n-grams.
    """
    mine = sparse.csr_array(counts[pool])
    raw = np.asarray(mine.sum(0), dtype=np.float64)
    raw /= raw.sum()
    sizes = np.array([len(draw) for draw in draws])
    mean: Any = averaging(draws, len(np.diff(counts.indptr))) @ counts
    target = mean.toarray() * sizes[:, None]
    target /= np.maximum(target.sum(1, keepdims=True), 1)
    if is_tuned:
        target = (target + raw) / 2
    log_ratio = np.log(target + EPSILON) - np.log(raw + EPSILON)
    scores = mine @ log_ratio.T
    if is_tuned:
        scores = scores / np.maximum(np.asarray(mine.sum(1)), 1)[:, None]
    return np.ascontiguousarray(scores.T, dtype=np.float32)
