"""Does a selection find the pool rows that are like a target? Precision against every baseline.

    python -m benchmarks.selection [--size full] [--only gba rds bm25]
    python -m benchmarks.selection --part fresh
    python -m benchmarks.selection --part ablation [--representations gba topk hidden]
    python -m benchmarks.selection --part gradients

Pool, targets and embeddings are those of benchmarks.selection_data; a hit is a pool row of the
target's own data set; the precisions are those of benchmarks.selection_table. Each target is
searched for with ten draws of 32 of its rows (at most two thirds of them, so that draws differ),
seeds 0-9, the same for every method. At the 5% budget: mean tokens of the picks, `distinct2`, the
share of distinct word pairs among the picks' first 20,000, and `sources`, the effective number of
data sources exp(entropy).

Intervals are 95% Student t over the ten draws of the mean over targets: what other examples of the
same targets would change, not other targets; the draws overlap, so they are a little narrow.
`over_best` is the paired difference to the baseline that is best on average, with the interval over
draws; `over_best_t` has the one over targets (each the mean of its draws).

Mixtures (kind "mixture") take three examples of each member target and count hits of any: there one
prototype and one a group differ. They do not enter the averages, and BBH, T0, GSM8K and MBPP also
stand alone (`r_bbh` ...), because 27 of the 41 targets are BBH tasks.

The measures were chosen on these targets. The part "fresh" takes others: they were looked at for
the choice of presence over a fourth root and for the strength of the damping, not for other steps.
The part "gradients" compares on a sub-pool, since a gradient costs several times a forward pass.

results/selection.json holds a row per method, selection_targets.json one per method of the README
and target.
"""

import argparse
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from scipy import sparse

from benchmarks import rivals
from benchmarks.common import cell, table, write_result
from benchmarks.gradients import gradient_features
from benchmarks.minilm import embed_minilm
from benchmarks.rivals import Draws
from benchmarks.selection_measures import (
    Measure,
    scores,
)
from benchmarks.selection_table import (
    FAMILIES,
    PRECISIONS,
    Bench,
    Method,
    evaluate,
    goals,
    make_aims,
    method_rows,
    of_table,
    target_rows,
)
from sae_apps.selection.presence import background_of, presence
from sae_apps.selection.presence import score as presence_score
from sae_apps.selection.ranking import NEAREST
from sae_core.disk import disk_errors
from sae_core.download import scratch_folder

LOG = logging.getLogger(__name__)
# which latents a row has at all, each with one vote, less what any row of the pool has
PRESENCE = ("binary", "unit", "centre")
# the same with the pool's correlations taken out; 30 was the best of 1, 10, 30, 100, 300
WHITE_PRESENCE = ("binary", "unit", "whiten:30")


# ---- the measures of the table ----


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


# ---- data ----


def cut_texts(data: Any) -> tuple[str, ...]:
    """What every method reads: each row's text, cut as selection_data cuts it."""
    from benchmarks.selection_data import cut
    from sae_core.models import load_model

    lm = load_model("smollm2-135m")
    return tuple(cut(lm, row.text) for row in data.rows)


def kept(
    folder: Path, name: str, texts: Sequence[str], make: Callable[[], np.ndarray]
) -> np.ndarray:
    """An array of features from its file, which is made where these texts have none."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.npy"
    if not path.exists():
        made = make()
        with disk_errors(path), scratch_folder(path.parent) as temp:
            np.save(temp / path.name, made)
            (temp / path.name).replace(path)
    return np.load(path)


def _progress(what: str, n: int) -> Callable[[int], None]:
    """Logs every thousandth row."""
    started, told = time.time(), [0]

    def tell(done: int) -> None:
        if done // 1000 > told[0] or done == n:
            told[0] = done // 1000
            LOG.info("%s: %d of %d rows, %.0f s", what, done, n, time.time() - started)

    return tell


def make_bench(data: Any, texts: tuple[str, ...]) -> Bench:
    """The benchmark on its data; sentence embeddings are made once and kept beside the others."""
    last: dict[str, Any] = {}

    def matrix(name: str) -> Any:
        if name not in last:
            last.clear()  # one at a time: a large pool's features fill the memory
            if name == "minilm":
                embed = partial(
                    embed_minilm, texts, progress=_progress("MiniLM", len(texts))
                )
                last[name] = kept(data.folder, "minilm", texts, embed)
            elif name == "ngrams":
                last[name] = rivals.dsir_counts(texts)
            else:
                last[name] = data.representation(name)
        return last[name]

    return Bench(data, texts, make_aims(data), matrix)


# ---- gradients, on a sub-pool ----

SUB_POOL = {"reduced": 1500, "full": 6000}
SUB_TARGETS = ("gsm8k", "mbpp", "t0:samsum", "t0:trec", "t0:common_gen", "bbh:snarks",
               "bbh:date_understanding", "bbh:boolean_expressions")  # fmt: skip


def sub_bench(bench: Bench, n_pool: int, names: Sequence[str] = SUB_TARGETS) -> Bench:
    """The same on every hit of a few targets and a random part of the other pool rows."""
    targets = {name: t for name, t in bench.data.targets.items() if name in names}
    hits = np.unique(np.concatenate([t.relevant for t in targets.values()]))
    if len(hits) > n_pool // 2:
        hits = np.random.default_rng(0).choice(hits, n_pool // 2, replace=False)
    wanted = np.concatenate([t.relevant for t in targets.values()])
    others = np.setdiff1d(bench.data.pool, wanted)
    n_others = min(len(others), n_pool - len(hits))
    rest = np.random.default_rng(1).choice(others, n_others, replace=False)
    data = replace(bench.data, pool=np.sort(np.concatenate([hits, rest])), targets=targets)
    aims = tuple(aim for aim in make_aims(data) if aim.kind == "target")
    return replace(bench, data=data, aims=aims)


def needed_rows(bench: Bench) -> Int64[np.ndarray, " n"]:
    """Places of the pool's rows and of all drawn examples."""
    examples = [draw for aim in bench.aims for draw in aim.draws]
    return np.unique(np.concatenate([bench.data.pool, *examples]))


def gradient_matrix(bench: Bench, lm: Any) -> np.ndarray:
    """Gradient features of the rows that the bench reads, zeros for the others."""
    needed = needed_rows(bench)
    examples = []
    for place in needed:
        prompt = lm.tokenizer(f"{bench.data.rows[place].prompt}\n")["input_ids"]
        ids = lm.tokenizer(bench.texts[place])["input_ids"]
        # where the cut leaves no response, the gradient is that of the prompt
        examples.append((ids, len(prompt) if len(prompt) < len(ids) else 1))
    told = _progress("gradients", len(examples))
    found = gradient_features(lm, examples, progress=told)
    out = np.zeros((len(bench.data.rows), found.shape[1]), dtype=np.float32)
    out[needed] = found
    return out


def with_gradients(bench: Bench, size: str) -> tuple[Bench, list[Method]]:
    """(sub-pool, all methods on it and the gradients)."""
    from sae_core.models import load_model

    small = sub_bench(bench, SUB_POOL[size])

    def make() -> np.ndarray:
        return gradient_matrix(small, load_model("smollm2-135m", dtype=torch.bfloat16))

    needed = [bench.texts[place] for place in needed_rows(small)]
    features = kept(bench.data.folder, "gradients", needed, make)
    plain = bench.matrix
    small = replace(small, matrix=lambda name: features if name == "gradients" else plain(name))
    less = [
        Measure("less", "gradients", "dot", ("unit",), family="baseline"),
        Measure("less-max", "gradients", "dot", ("unit",), groups="each", family="baseline"),
    ]
    return small, [*main_methods(small), *map(from_measure, less)]


def main_methods(bench: Bench) -> list[Method]:
    """The table."""
    measures = map(from_measure, [*rival_measures(), *own_measures()])
    product = [select_method(kind, groups) for kind in ("gba", "topk") for groups in GROUPS]
    return [*lexical_methods(bench), *measures, *product]


# ---- command ----

SHOWN = ("name", *PRECISIONS, "r_precision_over_best", "r_precision_worst_over_chance",
         *(f"r_{name}" for name in FAMILIES), "r_mix:bbh", "r_mix:t0", "r_mix:all",
         "tokens", "tokens_over_examples", "distinct2", "sources")  # fmt: skip


def write(bench: Bench, methods: Sequence[Method], prefix: str, started: float) -> None:
    """Measure and put the rows into the two result files."""
    found = evaluate(bench, methods)
    rows = method_rows(bench, methods, found, prefix)
    with redirect_stdout(StringIO()):  # hundreds of columns, better read in the files
        write_result("selection", rows, goals, started, merge=True)
        per_target = of_table(target_rows(bench, methods, found, prefix))
        write_result("selection_targets", per_target, lambda _: [], started, merge=True)
    rows.sort(key=lambda row: -row["r_precision"])
    print(table([{name: row.get(name) for name in SHOWN} for row in rows]))
    for goal in goals(rows):
        print(f"{'met    ' if goal.met else 'NOT MET'} {goal.name}: {cell(goal.value)}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Retrieval of target-like rows from a pool.")
    parser.add_argument("--size", choices=("reduced", "full"), default="reduced")
    parser.add_argument(
        "--part", choices=("main", "fresh", "ablation", "gradients"), default="main"
    )
    parser.add_argument("--only", nargs="*", help="methods whose names start with these")
    parser.add_argument(
        "--representations", nargs="*", help="of the ablation, as selection_data names them",
        default=["gba", "gba_max", "topk", "topk_max", "mlp", "mlp_topk", "hidden", "hidden_last",
                 "rds"],
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    """Measure the part asked for."""
    from benchmarks import selection_data

    args, started = arguments(), time.time()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data = selection_data.load(args.size)
    if args.part == "fresh":
        data = selection_data.fresh(data)
    bench, prefix = make_bench(data, cut_texts(data)), args.size
    if args.part == "gradients":
        bench, methods = with_gradients(bench, args.size)
        prefix = f"{args.size}-gradients"
    elif args.part == "ablation":
        methods = [from_measure(m) for m in ablation_measures(args.representations)]
        prefix = f"{args.size}-ablation"
    else:
        methods = main_methods(bench)
        prefix = f"{args.size}-fresh" if args.part == "fresh" else prefix
    if args.only:
        methods = [m for m in methods if m.name.startswith(tuple(args.only))]
    write(bench, methods, prefix, started)


if __name__ == "__main__":
    main()
