"""Similarity measures of the selection suite: steps on the features, a metric, groups, a strategy.

    steps       applied to every row, fitted on the pool alone, one after the other
    prototypes  the mean of the stepped features over the examples of a group
    metric      of each pool row to each prototype; larger is nearer
    groups      one prototype a target ("one"), one a label ("label"), one an example ("each"),
                or k-means of the examples ("kmeans4": four)
    strategy    how several prototypes make one ranking: "max", "mean", "round_robin"

The published method (MONA, arXiv 2503.15573) is no step, "jaccard", "one". Everything is dense in
blocks of rows, so that the pool itself may be sparse and large.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int64

from benchmarks.rivals import Draws, averaging, round_robin
from benchmarks.selection_steps import BLOCK, METRICS, Block, Step, dense, fit_step, pool_mean, unit
from sae_core.errors import UserError

MAX_KEPT = 1 << 28  # numbers of a pool kept after its steps, 1 GiB
MAX_PROTOTYPES = 1024  # scored at a time where a target has many


@dataclass(frozen=True)
class Measure:
    """One way to rank a pool by likeness to target examples."""

    name: str
    """Names the rows of results."""
    representation: str
    """As benchmarks.selection_data names it."""
    metric: str = "cosine"
    """A key of METRICS."""
    steps: tuple[str, ...] = ()
    """Of `fit_step`, in order."""
    groups: str = "one"
    """one, label, each, or kmeansN."""
    strategy: str = "max"
    """max, mean or round_robin; of no effect with one prototype."""
    strata: bool = False
    """Rank within log2-length bins, with the quotas of the target examples' lengths."""
    family: str = "ours"
    """published, ours, baseline or ablation."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What a measure needs to know of the benchmark."""

    matrix: Any
    """[n_rows, d] features of all rows, ndarray or csr_array."""
    pool: Int[np.ndarray, " n_pool"]
    """Places of the pool's rows."""
    labels: np.ndarray
    """Label of each row, for groups."""
    lengths: Int[np.ndarray, " n_rows"]
    """Tokens of each row, for strata."""
    k: int
    """Deepest rank that anyone looks at."""


# ---- a measure on all draws ----


def scores(
    measure: Measure, setting: Setting, draws: Draws
) -> Float32[np.ndarray, "n_draws n_pool"]:
    """Score of every pool row for every draw of examples."""
    if measure.metric not in METRICS:
        raise UserError(f"Expected a metric of {', '.join(METRICS)}, got {measure.metric!r}.")
    matrix, pool = setting.matrix, setting.pool
    fitted: list[Step] = []

    def stepped(places: Int[np.ndarray, " n"]) -> Block:
        block = dense(matrix, places)
        for step in fitted:
            block = step(block)
        return np.asarray(block, dtype=np.float32)

    def blocks() -> Iterator[Block]:
        for start in range(0, len(pool), BLOCK):
            yield stepped(pool[start : start + BLOCK])

    for name in measure.steps:
        fitted.append(fit_step(name, blocks))
    mean = pool_mean(blocks) if measure.metric == "log_odds" else None
    metric = METRICS[measure.metric]
    # steps such as whitening cost more than the metric: a pool that fits is stepped once
    kept = list(blocks()) if len(pool) * matrix.shape[1] <= MAX_KEPT else None
    out = np.empty((len(draws), len(pool)), dtype=np.float32)
    for some in _chunks(draws, measure.groups):
        members, groups, owner = _groups(measure.groups, stepped, setting, [draws[i] for i in some])
        features = stepped(members)
        prototypes = (averaging(groups, len(members)) @ features).astype(np.float32)
        parts = [metric(block, prototypes, mean) for block in (kept or blocks())]
        likeness = np.ascontiguousarray(np.concatenate(parts).T, dtype=np.float32)
        out[some] = combined(likeness, owner, measure.strategy, setting.k)
    return stratified(out, setting, draws) if measure.strata else out


def _chunks(draws: Draws, groups: str) -> Iterator[list[int]]:
    """Draws to score together: all, or so many that their examples stay few."""
    if groups == "one":
        yield list(range(len(draws)))
        return
    some: list[int] = []
    n = 0
    for number, draw in enumerate(draws):
        if some and n + len(draw) > MAX_PROTOTYPES:
            yield some
            some, n = [], 0
        some.append(number)
        n += len(draw)
    yield some


def _groups(
    kind: str, stepped: Callable[[Any], Block], setting: Setting, draws: Draws
) -> tuple[Int[np.ndarray, " m"], list[Int64[np.ndarray, " n"]], list[Int64[np.ndarray, " p"]]]:
    """(places of the examples, members of each prototype among them, prototypes of each draw)."""
    members = np.unique(np.concatenate([np.asarray(draw) for draw in draws]))
    local = [np.searchsorted(members, draw) for draw in draws]
    if kind == "one":
        return members, local, [np.array([i]) for i in range(len(draws))]
    if kind == "each":
        return members, [np.array([i]) for i in range(len(members))], local
    groups: list[Int64[np.ndarray, " n"]] = []
    owner: list[Int64[np.ndarray, " p"]] = []
    for places in local:
        if kind == "label":
            which = setting.labels[members[places]]
        elif kind.startswith("kmeans"):
            which = _clusters(stepped(members[places]), int(kind[6:]))
        else:
            raise UserError(f"Expected groups one, label, each or kmeansN, got {kind!r}.")
        found = [places[which == value] for value in np.unique(which)]
        owner.append(np.arange(len(groups), len(groups) + len(found)))
        groups += found
    return members, groups, owner


def _clusters(x: Block, n: int) -> Int[np.ndarray, " m"]:
    from sklearn.cluster import KMeans

    n = min(n, len(np.unique(x, axis=0)))
    return KMeans(n, n_init="auto", random_state=0).fit_predict(unit(x))


def combined(
    likeness: Float32[np.ndarray, "p n"], owner: Draws, strategy: str, k: int
) -> Float32[np.ndarray, "n_draws n"]:
    """One score a pool row and draw from those of the draw's prototypes."""
    if strategy == "round_robin":
        return round_robin(likeness, owner, k)
    if strategy not in ("max", "mean"):
        raise UserError(f"Expected a strategy max, mean or round_robin, got {strategy!r}.")
    merge = np.max if strategy == "max" else np.mean
    return np.stack([merge(likeness[mine], axis=0) for mine in owner])


def stratified(
    scored: Float32[np.ndarray, "n_draws n"], setting: Setting, draws: Draws
) -> Float32[np.ndarray, "n_draws n"]:
    """Scores whose order keeps the target's shares of log2-length bins at every depth.

    The i-th best row of a bin with quota q stands at (i + 1/2) / q: sorted by that, the first n
    rows hold about n q of the bin. Bins that no example falls into come last.
    """
    bins = np.log2(np.maximum(setting.lengths, 1)).astype(int)
    mine = bins[setting.pool]
    out = np.empty_like(scored)
    for row, draw in enumerate(draws):
        quota = np.bincount(bins[np.asarray(draw)], minlength=bins.max() + 1) / len(draw)
        order = np.argsort(-scored[row], kind="stable")
        rank = np.empty(len(order))
        for value in np.unique(mine):
            inside = order[mine[order] == value]
            rank[inside] = (np.arange(len(inside)) + 0.5) / max(quota[value], 1e-9)
        out[row] = -rank
    return out
