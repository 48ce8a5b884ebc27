"""Score a pool shard by shard, rank it, and say what made up the scores of the picks.

Of the scores [N, groups] one column's worth is kept, the best of each row; for round robin also
the top of each group. Rows without an active latent come last in every ranking.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sae_apps.selection import presence, similarity
from sae_apps.selection.budget import Room, TopLists, in_turns, length_bins, quotas
from sae_apps.selection.pool import PoolFeatures
from sae_apps.selection.prototypes import Prototypes

NEAREST = 3
"""Prototypes whose scores the strategy ``nearest`` averages."""
_FIRST_LIST = 1024  # rows of a group's ranking that are kept at first; more where they run out


@dataclass(frozen=True, eq=False)
class Measure:
    """What a row is compared with, and how."""

    prototypes: Prototypes
    metric: str
    weights: Float[np.ndarray, " d_sae"] | None = None
    """Of the latents, for the metrics of ``similarity``."""
    background: presence.Background | None = None
    """Of the pool, for the metric presence."""
    n_nearest: int = 1
    """A row's score is the mean over so many prototypes, those that are most similar to it."""

    def score(self, acts: sparse.csr_array) -> Float[np.ndarray, "n p"]:
        """Scores of rows against every prototype."""
        vectors = self.prototypes.vectors
        if self.background is not None:
            return presence.score(acts, vectors, self.background)
        return similarity.score(acts, vectors, self.metric, weights=self.weights)

    def of_rows(self, scores: Float[np.ndarray, "n p"]) -> Float[np.ndarray, " n"]:
        """One score a row: the largest, or the mean of the ``n_nearest`` largest."""
        n = min(self.n_nearest, scores.shape[1])
        if n == 1:
            return scores.max(axis=1)
        largest = np.partition(scores, scores.shape[1] - n, axis=1)[:, -n:]
        return largest.mean(axis=1, dtype=np.float64).astype(np.float32)

    def explain(
        self, acts: sparse.csr_array, group: Int[np.ndarray, " n"], top: int
    ) -> list[similarity.Share]:
        """The latents behind the score of each row, which was picked for its ``group``.

        Presence: behind the mean over the nearest prototypes, exactly; else behind the score
        against the group's prototype.
        """
        if self.background is not None:
            aims = presence.directions(self.prototypes.vectors, self.background)
            n = min(self.n_nearest, len(aims))
            best = group[:, None]
            if n > 1:
                best = np.argsort(-self.score(acts), axis=1, kind="stable")[:, :n]
            return [
                presence.explain(
                    acts[[i]], aims[places].mean(axis=0)[None], self.background, top=top
                )[0]
                for i, places in enumerate(best)
            ]
        found: list[similarity.Share] = [similarity.NOTHING] * len(group)
        for one in np.unique(group):
            mine = np.flatnonzero(group == one)
            vector = self.prototypes.vectors[one]
            shares = similarity.explain(
                acts[mine], vector, self.metric, weights=self.weights, top=top
            )
            for place, share in zip(mine, shares, strict=True):
                found[place] = share
        return found


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of all rows of a pool, in its order."""

    score: Float[np.ndarray, " n"]
    """The best over the groups, or the mean of the nearest, float32."""
    group: Int[np.ndarray, " n"]
    """Whose it is; the first of equals."""
    is_empty: Bool[np.ndarray, " n"]
    """Rows without an active latent."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Which rows may be picked, and how much of them."""

    may: Bool[np.ndarray, " n"]
    """Rows that may be picked."""
    tokens: Int[np.ndarray, " n"]
    """Tokens of each row."""
    amount: int
    """Rows or tokens in all."""
    in_tokens: bool
    """What ``amount`` counts."""
    strata: Int[np.ndarray, " m"] | None = None
    """Tokens of the rows whose histogram of lengths shares out the budget; None: no strata."""

    @property
    def cost(self) -> Int[np.ndarray, " n"]:
        """What each row takes of ``amount``."""
        return self.tokens if self.in_tokens else np.ones_like(self.tokens)

    @property
    def most(self) -> int:
        """At most so many rows can be picked."""
        if not self.in_tokens:
            return self.amount
        return int(np.searchsorted(np.cumsum(np.sort(self.tokens[self.may])), self.amount, "right"))


@dataclass(frozen=True, eq=False)
class Picks:
    """Rows in the order of picking."""

    row: Int[np.ndarray, " n_picks"]
    """Places in the pool."""
    group: Int[np.ndarray, " n_picks"]
    """The prototype that each was picked for."""
    score: Float[np.ndarray, " n_picks"]
    """Against that prototype."""


def idf_weights(pool: PoolFeatures) -> Float[np.ndarray, " d_sae"]:
    """log((N + 1) / (df + 1)) over the rows of the pool, in one pass."""
    df: Int[np.ndarray, " d_sae"] | None = None
    n_rows = 0
    for shard in pool:
        counted = np.bincount(shard.acts.indices, minlength=shard.d_sae)
        df = counted if df is None else df + counted
        n_rows += shard.n_rows
    assert df is not None  # a pool has a shard
    return similarity.idf(df, n_rows)


def score_pool(
    pool: PoolFeatures,
    measure: Measure,
    *,
    may: Bool[np.ndarray, " n"] | None = None,
    tops: TopLists | None = None,
) -> Scored:
    """Score every row, in one pass.

    Args:
        may: rows that ``tops`` may hold.
        tops: filled with the best rows of each group.
    """
    best, group, empty = [], [], []
    start = 0
    for shard in pool:
        scores = measure.score(shard.acts)
        nothing = np.diff(shard.acts.indptr) == 0
        best.append(measure.of_rows(scores))
        group.append(scores.argmax(axis=1))
        empty.append(nothing)
        if tops is not None and may is not None:
            inside = np.flatnonzero(may[start : start + shard.n_rows])
            ranked = np.where(nothing[:, None], -np.inf, scores)[inside]
            tops.update(ranked.astype(np.float32), start + inside)
        start += shard.n_rows
    return Scored(np.concatenate(best), np.concatenate(group), np.concatenate(empty))


def pick(
    pool: PoolFeatures, measure: Measure, limits: Limits, strategy: str
) -> tuple[Scored, Picks]:
    """Score a pool and pick by one ranking, or with ``round_robin`` by one a group."""
    if strategy != "round_robin" or len(measure.prototypes.names) == 1:
        scored = score_pool(pool, measure)
        allowed = np.flatnonzero(limits.may)
        key = np.where(scored.is_empty, -np.inf, scored.score)[allowed]
        ranking = allowed[np.argsort(-key, kind="stable")]
        turns = _filled([ranking], limits, is_whole=True)
        assert turns is not None  # a whole ranking does not end early
        turns.sort(key=lambda turn: turn[2])
        row = np.array([turn[0] for turn in turns], dtype=np.int64)
        return scored, Picks(row, scored.group[row], scored.score[row])
    n_groups, n_rows = len(measure.prototypes.names), int(limits.may.sum())
    size = max(_FIRST_LIST, 4 * -(-limits.most // n_groups))
    while True:
        tops = TopLists(n_groups, size)
        scored = score_pool(pool, measure, may=limits.may, tops=tops)
        turns = _filled(tops.rankings(), limits, is_whole=size >= n_rows)
        if turns is not None:
            break
        size *= 4  # a list ran out: too many of its rows went to other groups or bins
    row, group, place = (np.array([t[i] for t in turns], dtype=np.int64) for i in range(3))
    held = tops.scores()
    found = np.array([held[g][i] for g, i in zip(group, place, strict=True)], dtype=np.float32)
    # -inf marks a row without an active latent; its score is what the table of all rows says
    return scored, Picks(row, group, np.where(np.isfinite(found), found, scored.score[row]))


def _filled(
    rankings: list[Int[np.ndarray, " l"]], limits: Limits, *, is_whole: bool
) -> list[tuple[int, int, int]] | None:
    """Picks within the strata; what they leave of the budget goes to the best of the others."""
    cost = limits.cost
    if limits.strata is None:
        room = Room(cost, np.zeros(len(cost), dtype=np.int64), np.array([limits.amount]))
        return in_turns(rankings, room, is_whole=is_whole)
    bins = length_bins(limits.tokens)
    shares = np.maximum(limits.strata, 1) if limits.in_tokens else np.ones_like(limits.strata)
    quota = quotas(limits.amount, length_bins(limits.strata), shares, int(bins.max()) + 1)
    room = Room(cost, bins, quota)
    turns = in_turns(rankings, room, is_whole=is_whole)
    if turns is None:
        return None
    taken = ~room.is_free
    left = limits.amount - int(cost[taken].sum())
    if not left:
        return turns
    rest = Room(cost, np.zeros_like(bins), np.array([left]))
    rest.is_free = room.is_free
    more = in_turns(rankings, rest, is_whole=is_whole)
    return None if more is None else turns + more


def reasons_of(
    pool: PoolFeatures, measure: Measure, picks: Picks, row_ids: Int[np.ndarray, " n"], top: int
) -> pa.Table:
    """row_id, latents and shares of each pick, in the order of picking.

    Only the shards that hold picks are read. Empty lists for l2, whose score is no sum over
    latents, and for ``top`` 0.
    """
    found: dict[int, tuple[list[int], list[float]]] = {}
    if measure.metric != "l2" and top > 0:
        for number, inside, at in _by_shard(pool, picks.row):
            shard = pool.load(number)
            explained = measure.explain(shard.acts[inside], picks.group[at], top)
            for place, (latents, shares) in zip(at, explained, strict=True):
                found[int(place)] = (latents.tolist(), shares.tolist())
    whys = [found.get(place, ([], [])) for place in range(len(picks.row))]
    return pa.table(
        {
            "row_id": pa.array(row_ids[picks.row], pa.int64()),
            "latents": pa.array([latents for latents, _ in whys], pa.list_(pa.int64())),
            "shares": pa.array([shares for _, shares in whys], pa.list_(pa.float64())),
        }
    )


def _by_shard(
    pool: PoolFeatures, row: Int[np.ndarray, " n_picks"]
) -> Iterator[tuple[int, Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
    """(shard, places in it, places among the picks) of picked rows."""
    ends = np.cumsum(pool.sizes())
    shard = np.searchsorted(ends, row, side="right")
    for number in np.unique(shard):
        at = np.flatnonzero(shard == number)
        start = ends[number - 1] if number else 0
        yield int(number), row[at] - start, at
