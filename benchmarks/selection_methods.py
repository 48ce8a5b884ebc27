"""The methods of the selection suite: measures on every representation, words, the default."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks import rivals
from benchmarks.rivals import Draws
from benchmarks.selection_measures import Measure, scores
from benchmarks.selection_table import Bench, Method
from sae_apps.selection.presence import background_of, presence
from sae_apps.selection.presence import score as presence_score
from sae_apps.selection.ranking import NEAREST

# which latents a row has at all, each with one vote, less what any row of the pool has
PRESENCE = ("binary", "unit", "centre")
# the same with the pool's correlations taken out; 30 was the best of 1, 10, 30, 100, 300
WHITE_PRESENCE = ("binary", "unit", "whiten:30")


def own_measures(kinds: Sequence[str] = ("gba", "topk")) -> list[Measure]:
    """The published method and its alternatives on SAE codes."""
    found = []
    for kind in kinds:

        def add(suffix: str, kind: str = kind, **settings: Any) -> None:
            found.append(Measure(f"{kind}-{suffix}", kind, **settings))

        add("jaccard", metric="jaccard", family="published")
        add("cosine")
        add("l2", metric="l2")
        add("jaccard-idf", metric="jaccard", steps=("idf",))
        add("cosine-idf", steps=("idf",))
        add("jaccard-l1", metric="jaccard", steps=("l1",))
        add("hellinger", steps=("sqrt",))
        add("cosine-centre", steps=("centre",))
        add("hellinger-centre", steps=("sqrt", "unit", "centre"))
        add("cosine-standardise-centre", steps=("standardise", "centre"))
        add("log-odds", metric="log_odds", steps=("l1",))
        add("jaccard-strata", metric="jaccard", strata=True)
        add("jaccard-each-rr", metric="jaccard", groups="each", strategy="round_robin")
        add("jaccard-label-rr", metric="jaccard", groups="label", strategy="round_robin")
        add("cosine-each-max", groups="each")
        add("cosine-label-rr", groups="label", strategy="round_robin")
        add("presence", steps=PRESENCE)
        add("presence-idf", steps=("binary", "idf", "unit", "centre"))
        add("presence-log-odds", metric="log_odds", steps=("binary", "l1"))
        add("presence-label-rr", steps=PRESENCE, groups="label", strategy="round_robin")
        add("presence-kmeans8-max", steps=PRESENCE, groups="kmeans8")
        add("presence-each-rr", steps=PRESENCE, groups="each", strategy="round_robin")
        add("presence-max", steps=PRESENCE, groups="each")
        add("presence-whiten", steps=WHITE_PRESENCE)
        add("presence-whiten-max", steps=WHITE_PRESENCE, groups="each")
    return found


def rival_measures() -> list[Measure]:
    """Baselines that are a representation and a metric, as published and with what helps here."""
    white = ("unit", "whiten:3")  # the best of 0.01, 0.1, 1, 3, 10, 30 for hidden-whiten-max
    found = [
        Measure("hidden-centred", "hidden", steps=("centre",)),
        Measure("hidden-max", "hidden", groups="each"),
        Measure("hidden-whiten", "hidden", steps=white),
        Measure("hidden-whiten-max", "hidden", steps=white, groups="each"),
        Measure("rds+", "rds", groups="each", strategy="round_robin"),
        Measure("rds-max", "rds", groups="each"),
        Measure("rds-mean", "rds", steps=("unit",)),
        Measure("rds-whiten", "rds", steps=("unit", "whiten:1")),
        Measure("mlp-jaccard", "mlp", metric="jaccard"),
        Measure("mlp-topk-jaccard", "mlp_topk", metric="jaccard"),
        Measure("mlp-topk-presence-max", "mlp_topk", steps=PRESENCE, groups="each"),
        Measure("mlp-topk-presence-whiten-max", "mlp_topk", steps=WHITE_PRESENCE, groups="each"),
        Measure("minilm-mean", "minilm"),
        Measure("minilm-centred", "minilm", steps=("centre",)),
        Measure("minilm-max", "minilm", groups="each"),
        Measure("ngrams-tfidf", "ngrams", steps=("idf",)),
        Measure("ngrams-presence", "ngrams", steps=PRESENCE),
        Measure("ngrams-presence-max", "ngrams", steps=PRESENCE, groups="each"),
    ]
    return [replace(measure, family="baseline") for measure in found]


def ablation_measures(representations: Sequence[str]) -> list[Measure]:
    """Every metric on every representation, plain and centred; signed features are split."""
    found = []
    for name in representations:
        is_signed = name in ("hidden", "hidden_last", "rds", "minilm")
        for metric in ("jaccard", "cosine", "l2"):
            steps = ("split",) if metric == "jaccard" and is_signed else ()
            found.append(Measure(f"{name}-{metric}", name, metric, steps, family="ablation"))
        found.append(Measure(f"{name}-cosine-centre", name, steps=("centre",), family="ablation"))
    return found


def from_measure(measure: Measure) -> Method:
    """A measure as a method."""
    return Method(
        measure.name, measure.family,
        lambda bench, draws: scores(measure, bench.setting(measure.representation), draws),
        measure.representation,
    )  # fmt: skip


GROUPS = {"": "each", "-one": "one"}


def select_method(kind: str, suffix: str) -> Method:
    """What `sae_apps.selection.select` does by default, and with one prototype."""

    def score(bench: Bench, draws: Draws) -> np.ndarray:
        setting = bench.setting(kind)
        pool = sparse.csr_array(setting.matrix[setting.pool])
        background = background_of([pool])
        found = np.empty((len(draws), len(setting.pool)), dtype=np.float32)
        for place, draw in enumerate(draws):
            examples = presence(sparse.csr_array(setting.matrix[draw])).toarray()
            if GROUPS[suffix] == "one":
                examples = examples.mean(axis=0, keepdims=True)
            scores = presence_score(pool, examples, background)
            n = min(NEAREST, scores.shape[1])
            found[place] = np.partition(scores, -n, axis=1)[:, -n:].mean(axis=1)
        return found

    return Method(f"{kind}-select{suffix}", "ours", score, kind)


def lexical_methods(bench: Bench) -> list[Method]:
    """Random, BM25 and DSIR."""
    pool = bench.data.pool
    bm25 = rivals.BM25(bench.texts, pool)
    counts = rivals.dsir_counts(bench.texts)

    def method(name: str, score: Callable[[Draws], Any]) -> Method:
        return Method(name, "baseline", lambda _, draws: score(draws))

    return [
        method("random", lambda draws: rivals.random_scores(len(draws), len(pool))),
        *(method(f"bm25-{mode}", partial(bm25.scores, mode=mode, k=bench.depth))
          for mode in ("mean", "set", "round_robin")),
        method("dsir", lambda draws: rivals.dsir_scores(counts, pool, draws)),
        method("dsir-tuned", lambda draws: rivals.dsir_scores(counts, pool, draws, is_tuned=True)),
    ]  # fmt: skip
