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

from benchmarks import rivals
from benchmarks.common import cell, table, write_result
from benchmarks.gradients import gradient_features
from benchmarks.minilm import embed_minilm
from benchmarks.selection_goals import goals, of_table, target_rows
from benchmarks.selection_measures import Measure
from benchmarks.selection_methods import (
    GROUPS,
    ablation_measures,
    from_measure,
    lexical_methods,
    own_measures,
    rival_measures,
    select_method,
)
from benchmarks.selection_table import (
    FAMILIES,
    PRECISIONS,
    Bench,
    Method,
    evaluate,
    make_aims,
    method_rows,
)
from sae_core.disk import disk_errors
from sae_core.download import scratch_folder

LOG = logging.getLogger(__name__)


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
