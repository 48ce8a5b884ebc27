"""The selection suite's sums: targets and their draws, precision, rows of results, goals.

A hit is a pool row of the target's own data set. With n pool rows, R of them hits and the pool
sorted by score:

    p1, p5, p10      hits among the first 1%, 5%, 10% of n; at most R / k (`ceiling_`)
    r_precision      hits among the first R

`chance` is R / n, what a random order has in expectation. Ties are broken by the place in the pool.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64
from scipy.stats import t as student

from benchmarks.rivals import Draws
from benchmarks.selection_measures import Setting

LOG = logging.getLogger(__name__)
BUDGETS = {"p1": 0.01, "p5": 0.05, "p10": 0.10}
PRECISIONS = (*BUDGETS, "r_precision")
N_SEEDS, N_EXAMPLES = 10, 32
N_PAIRS = 20_000
FAMILIES = ("gsm8k", "mbpp", "bbh", "t0")
# the methods that a user would compare: in the README, and target by target in a file
SELECTIONS = (
    "gba-select", "topk-select", "gba-select-one", "gba-presence-max", "gba-presence", "gba-cosine",
    "gba-jaccard", "topk-jaccard", "gba-jaccard-idf", "gba-jaccard-strata", "gba-jaccard-each-rr",
    "random", "bm25-mean", "dsir", "dsir-tuned", "minilm-mean", "minilm-max", "rds+",
    "hidden-centred", "hidden-whiten", "hidden-whiten-max", "mlp-jaccard", "mlp-topk-presence-max",
    "mlp-topk-presence-whiten-max", "ngrams-presence-max",
)  # fmt: skip
Score = Callable[["Bench", Draws], Float32[np.ndarray, "n_draws n_pool"]]


@dataclass(frozen=True)
class Method:
    """Anything that ranks the pool."""

    name: str
    """Names the rows of results."""
    family: str
    """published, ours, baseline or ablation."""
    score: Score
    """(bench, draws of places) to a score a pool row."""
    representation: str = ""
    """What it reads; methods that share one run one after the other."""


@dataclass(frozen=True)
class Aim:
    """A target as the suite sees it."""

    name: str
    kind: str
    """target, or mixture."""
    is_hit: Bool[np.ndarray, " n_pool"]
    draws: tuple[Int64[np.ndarray, " n_examples"], ...]


@dataclass(frozen=True, eq=False)
class Bench:
    """Data with the draws of every target, and the texts that lexical methods read."""

    data: Any
    """benchmarks.selection_data.Data, or what looks like it."""
    texts: tuple[str, ...]
    """Text of every row, cut as the model's input is."""
    aims: tuple[Aim, ...]
    """Targets and mixtures."""
    matrix: Callable[[str], Any]
    """Features of all rows by name of the representation."""

    @property
    def depth(self) -> int:
        """Deepest rank looked at."""
        n = len(self.data.pool)
        return max(int(n * max(BUDGETS.values())), *(int(aim.is_hit.sum()) for aim in self.aims))

    def setting(self, representation: str) -> Setting:
        """What the measures read."""
        labels = np.array([row.label for row in self.data.rows])
        lengths = np.asarray(self.data.n_tokens)
        return Setting(self.matrix(representation), self.data.pool, labels, lengths, self.depth)


# ---- targets and draws ----


def drawn(members: Int[np.ndarray, " m"], n: int, key: Sequence[int]) -> Int64[np.ndarray, " n"]:
    """At most n of the members, at most two thirds of them, without replacement."""
    n = max(1, min(n, 2 * len(members) // 3))
    chosen = np.random.default_rng(key).choice(len(members), n, replace=False)
    return np.sort(np.asarray(members)[chosen]).astype(np.int64)


def make_aims(data: Any, n_seeds: int = N_SEEDS, n_examples: int = N_EXAMPLES) -> tuple[Aim, ...]:
    """Every target, then a mixture of each family that has several, and one of all."""
    aims = []
    for number, (name, target) in enumerate(data.targets.items()):
        seeds = range(n_seeds)
        draws = tuple(drawn(target.members, n_examples, (seed, number)) for seed in seeds)
        aims.append(Aim(name, "target", np.isin(data.pool, target.relevant), draws))
    return tuple(aims + list(_mixtures(aims, data)))


def _mixtures(aims: Sequence[Aim], data: Any, each: int = 3) -> Iterator[Aim]:
    families = {name: [a for a in aims if family(a.name) == name] for name in FAMILIES}
    families["all"] = list(aims)
    for name, members in families.items():
        if len(members) < 2:
            continue
        draws = tuple(
            np.concatenate([m.draws[i][:: max(1, len(m.draws[i]) // each)][:each] for m in members])
            for i in range(len(members[0].draws))
        )
        yield Aim(f"mix:{name}", "mixture", np.any([m.is_hit for m in members], axis=0), draws)


def family(name: str) -> str:
    """bbh of bbh:snarks."""
    return name.partition(":")[0]


# ---- measuring ----


def pair_ids(texts: Sequence[str]) -> list[Int[np.ndarray, " n_pairs"]]:
    """Word pairs of each text as numbers."""
    known: dict[tuple[str, str], int] = {}
    found = []
    for text in texts:
        words = text.lower().split()
        pairs = zip(words, words[1:], strict=False)
        found.append(np.array([known.setdefault(p, len(known)) for p in pairs], dtype=np.int64))
    return found


def distinct_share(pairs: Iterable[Int[np.ndarray, " n_pairs"]], n: int = N_PAIRS) -> float:
    """Share of distinct ones among the first n pairs; with fewer, among all."""
    some, total = [], 0
    for one in pairs:
        some.append(one)
        total += len(one)
        if total >= n:
            break
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *some])[:n]
    return len(np.unique(joined)) / max(len(joined), 1)


def effective_number(labels: np.ndarray) -> float:
    """exp of the entropy of the labels' shares."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(np.exp(-(share * np.log(share)).sum()))


def precision(order: Int[np.ndarray, " n"], is_hit: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """The four precisions of one ranking (places in the pool, best first)."""
    n, n_hits = len(is_hit), int(is_hit.sum())
    found = is_hit[order].cumsum()
    ks = {name: max(1, round(n * share)) for name, share in BUDGETS.items()}
    ks["r_precision"] = max(1, n_hits)
    return {name: float(found[k - 1] / k) for name, k in ks.items()}


def ceilings(is_hit: Bool[np.ndarray, " n"]) -> dict[str, float]:
    """The best precision that any ranking can have at each budget."""
    n, n_hits = len(is_hit), int(is_hit.sum())
    return {
        f"ceiling_{name}": min(1.0, n_hits / max(1, round(n * share)))
        for name, share in BUDGETS.items()
    }


def measured(bench: Bench, method: Method, pairs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every measure of a method as [n_aims, n_seeds]."""
    draws = [draw for aim in bench.aims for draw in aim.draws]
    scored = method.score(bench, draws)
    if scored.shape != (len(draws), len(bench.data.pool)) or np.isnan(scored).any():
        raise ValueError(f"{method.name} gave scores {scored.shape} or not a number.")
    n_seeds, k = len(bench.aims[0].draws), max(1, round(len(bench.data.pool) * BUDGETS["p5"]))
    lengths = np.asarray(bench.data.n_tokens)[bench.data.pool]
    sources = np.array([row.source for row in bench.data.rows])[bench.data.pool]
    found: dict[str, list[float]] = {}
    for number, one in enumerate(scored):
        order = np.argsort(-one, kind="stable")
        picks = order[:k]
        values = precision(order, bench.aims[number // n_seeds].is_hit) | {
            "tokens": float(lengths[picks].mean()),
            "distinct2": distinct_share(pairs[i] for i in picks),
            "sources": effective_number(sources[picks]),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: np.array(v).reshape(len(bench.aims), n_seeds) for name, v in found.items()}


def evaluate(bench: Bench, methods: Sequence[Method]) -> dict[str, dict[str, np.ndarray]]:
    """Measures of all methods, those of one representation one after the other."""
    pairs = pair_ids([bench.texts[place] for place in bench.data.pool])
    found = {}
    for method in sorted(methods, key=lambda m: m.representation):
        started = time.time()
        found[method.name] = measured(bench, method, pairs)
        at = [i for i, aim in enumerate(bench.aims) if aim.kind == "target"]
        mean = found[method.name]["r_precision"][at].mean()
        LOG.info("%-32s %.4f  %5.1f s", method.name, mean, time.time() - started)
    return {method.name: found[method.name] for method in methods}


# ---- rows ----


def interval(values: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    """(mean, low, high): 95% Student t."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def triple(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float]:
    mean, low, high = interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def best_baseline(
    found: dict[str, dict[str, np.ndarray]], baselines: Sequence[str], at: Any, name: str
) -> str:
    """The baseline with the highest mean over these aims (and all draws)."""
    return max(baselines, key=lambda method: found[method][name][at].mean())


def method_rows(
    bench: Bench, methods: Sequence[Method], found: dict[str, dict[str, np.ndarray]], prefix: str
) -> list[dict[str, Any]]:
    """A flat row per method: means over the targets."""
    at = np.array([aim.kind == "target" for aim in bench.aims])
    names = np.array([family(aim.name) for aim in bench.aims])
    chance = np.array([aim.is_hit.mean() for aim in bench.aims])[at]
    lengths = np.asarray(bench.data.n_tokens)
    example_tokens = np.array([lengths[np.concatenate(aim.draws)].mean() for aim in bench.aims])
    baselines = [m.name for m in methods if m.family == "baseline" and m.name != "random"]
    rows = []
    for method in methods:
        mine = found[method.name]
        row: dict[str, Any] = {"name": f"{prefix}-{method.name}", "method": method.name,
                               "family": method.family, "representation": method.representation,
                               "size": prefix, "targets": int(at.sum())}  # fmt: skip
        for name in PRECISIONS:
            row |= triple(name, mine[name][at].mean(0))
            if not baselines:
                continue
            rival = best_baseline(found, baselines, at, name)
            gap = mine[name][at] - found[rival][name][at]
            row |= {f"{name}_best": rival} | triple(f"{name}_over_best", gap.mean(0))
            row |= triple(f"{name}_over_best_t", gap.mean(1))
        for one in FAMILIES:
            if (at & (names == one)).any():
                row |= {f"r_{one}": float(mine["r_precision"][at & (names == one)].mean())}
        for i in np.flatnonzero(~at):
            row |= {f"r_{bench.aims[i].name}": float(mine["r_precision"][i].mean())}
        for name in PRECISIONS:
            over = mine[name][at].mean(1) - chance
            row |= {f"{name}_worst_over_chance": float(over.min()),
                    f"{name}_below_chance": int((over < 0).sum())}  # fmt: skip
        row |= {name: float(mine[name][at].mean()) for name in ("tokens", "distinct2", "sources")}
        row["tokens_over_examples"] = float(
            (mine["tokens"][at].mean(1) / example_tokens[at]).mean()
        )
        rows.append(row)
    return rows
