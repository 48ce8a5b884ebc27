"""Does training on the picks help? SmolLM2-135M fine-tuned on rows chosen by several methods.

    python -m benchmarks.finetune --size cpu
    python -m benchmarks.finetune --size full --device cuda

Every method ranks the same pool for the same target examples; its ranking is read from the top
until an equal number of tokens is spent, the model is trained on these rows, and the loss is
measured on rows of the target that were neither target examples nor in the pool:

    loss = - sum_r sum_t log p(y_rt | x_r, y_r<t) / sum_r |y_r|        (nats a response token)

and the same sum over ln 2 times the characters of the responses (bits a character); the end of the
turn is trained, but not counted here. Methods are compared on the same rows and seeds, with the
paired intervals of benchmarks.finetune_table. No source for the protocol; baselines and targets
follow MONA (arXiv 2503.15573).

A seed draws the target examples, as benchmarks.selection does, and the order of the batches.
Targets: gsm8k, mbpp, and mix:bbh (three examples of each of 27 tasks; nothing of BBH is ever
trained on, so no row of the pool is a hit). Scores beside the loss: `exact`, for targets with short
answers: the most probable token at every place of the answer and of the end of the turn is the
right one, hence greedy decoding gives exactly the answer. `ranked`, for gsm8k: the true solution is
more probable than three in which the final number is replaced, by one with as many digits, wherever
it stands (chance 0.25). MBPP has the loss alone.

Sizes: `full` and `reduced` train the whole model on rows of up to 1,024 tokens, with 1% and 5% of
the pool's tokens, on the full and the reduced pool of benchmarks.selection_data. `cpu` takes the
reduced pool and leaves out: training of blocks 0-14 and of the embeddings (their states, computed
once in bfloat16, are the input); tokens of a row beyond 256, in training and in measuring; the two
budgets, of which one of 2% stands between (`--shares 0.01 0.05` has them back); and all but 48
held-out rows a target, 16 of them ranked. Learning rate and batch are the best of four (0.00005,
0.0002 at 1,024 tokens a batch; 0.0002, 0.0005 at 512) on 12,000 tokens of random rows and of
hits of gsm8k at the `cpu` size, the same for every method; at other sizes they are unsearched.

Each finished cell (method, target, budget, seed) is a line of the cache folder's cells.jsonl under
a hash of its settings and of the tokens that it is trained and measured on: a run that was killed
goes on with the next one, and a method whose picks changed is trained anew.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import read_cells, table, write_result
from benchmarks.finetune_rows import MAX_SEEDS, SIZES, Cell, Held, held_out, make_cells
from benchmarks.finetune_table import difference_rows, goals, loss_rows
from benchmarks.tuning import Example, Setting, encode, entering, evaluate, make_student, train
from sae_core.download import cache_dir
from sae_core.models import DEFAULT_MODEL, LanguageModel, load_model
from sae_core.store import append_jsonl

METHODS = ("random", "bm25-mean", "minilm-max", "hidden-centred", "gba-select")
OURS = "gba-select"
TARGETS = ("gsm8k", "mbpp", "mix:bbh")


# ---- running them ----


def cell_key(cell: Cell, held: Held, setting: Setting, revision: str) -> str:
    """Hash of everything that the cell's result depends on, machine and threads aside."""
    about = [asdict(setting), revision, cell.seed, len(cell.picks), len(held.rows)]
    digest = hashlib.sha256(json.dumps(about).encode())
    for one in (*cell.picks, *held.rows, *(e for group in held.ranked for e in group)):
        digest.update(np.array([len(one.ids), one.start, one.stop]).tobytes() + one.ids.tobytes())
    return digest.hexdigest()[:24]


def run_cell(
    lm: LanguageModel,
    cell: Cell,
    held: Held,
    setting: Setting,
    states: Callable[[Sequence[Example]], list[Tensor]],
) -> dict[str, Any]:
    """Train on the picks and measure.

    Args:
        lm: what the student is a copy of, on the device to train on.
        states: the states that enter the first trained block.

    Returns:
        A record of plain numbers and lists: `nll`, `is_exact` a held-out row, `is_ranked` a group.
    """
    begin = time.perf_counter()
    student = make_student(lm, setting.first)
    steps = train(student, states(cell.picks), cell.picks, setting, cell.seed) if cell.picks else []
    loss = evaluate(student, states(held.rows), held.rows, setting)
    flat = [one for group in held.ranked for one in group]
    nll = iter(evaluate(student, states(flat), flat, setting).nll if flat else ())
    ranked = [int(np.argmin([next(nll) for _ in group]) == 0) for group in held.ranked]
    return {
        "n_rows": len(cell.picks), "tokens": sum(len(e.ids) for e in cell.picks),
        "response_tokens": sum(len(e.ids) - e.start for e in cell.picks), "steps": len(steps),
        "nll": [round(v, 5) for v in loss.nll.tolist()], "is_exact": loss.is_exact.tolist(),
        "is_ranked": ranked, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def run_cells(
    cells: Sequence[Cell],
    held: dict[str, Held],
    setting: Setting,
    revision: str,
    path: Path,
    run: Callable[[Cell, Held], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Records of all cells; those that the file lacks are run and added to it one by one."""
    done, records = read_cells(path), []
    for number, cell in enumerate(cells, 1):
        rows = held[cell.target]
        key = cell_key(cell, rows, setting, revision)
        if key not in done:
            done[key] = {"key": key} | run(cell, rows)
            append_jsonl(path, done[key])
            mean = sum(done[key]["nll"]) / sum(e.stop - e.start for e in rows.rows)
            print(f"{number}/{len(cells)} {cell.target} {cell.method} {cell.share:.1%} seed "
                  f"{cell.seed}: {mean:.4f}, {done[key]['seconds']:.0f} s", flush=True)  # fmt: skip
        # two methods that choose the same rows in the same order share one training run
        about = {"method": cell.method, "target": cell.target, "share": cell.share,
                 "seed": cell.seed, "n_hits": cell.n_hits}  # fmt: skip
        records.append(done[key] | about)
    return records


def remembered(lm: LanguageModel, first: int) -> Callable[[Sequence[Example]], list[Tensor]]:
    """States entering block `first`, each row computed once; on lm's device."""
    kept: dict[bytes, Tensor] = {}

    def states(examples: Sequence[Example]) -> list[Tensor]:
        missing = {one.ids.tobytes(): one for one in examples if one.ids.tobytes() not in kept}
        kept.update(zip(missing, entering(lm, first, list(missing.values())), strict=True))
        return [kept[one.ids.tobytes()] for one in examples]

    return states


# ---- command ----


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune on picks of several methods.")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of benchmarks.selection")
    parser.add_argument("--ours", default=OURS, help="the method that the others are compared with")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="of benchmarks.selection")
    parser.add_argument("--shares", nargs="+", type=float, help="budgets instead of the size's own")
    parser.add_argument("--seeds", type=int, choices=range(1, MAX_SEEDS + 1), default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Run what is not yet in the cache and write results/finetune.json."""
    from benchmarks.selection import cut_texts, make_bench
    from benchmarks.selection_data import load
    from benchmarks.selection_sources import make_rows

    args, started = arguments(), time.time()
    size = SIZES[args.size]
    methods = list(dict.fromkeys([*args.methods, args.ours]))
    data, setting = load(size.pool), size.setting
    bench = make_bench(data, cut_texts(data))
    lm = load_model(DEFAULT_MODEL, device=args.device)
    examples = {
        place: encode(lm.tokenizer, row.prompt, row.response, setting.max_len)
        for place, row in ((place, data.rows[place]) for place in data.pool.tolist())
        if row.source != "bbh"
    }
    shares = args.shares or size.shares
    cells = make_cells(bench, examples, methods, args.targets, shares, args.seeds)
    # what any method may have seen: the pool, and the target rows that some seed draws
    used = {int(p) for aim in bench.aims for draw in aim.draws[:MAX_SEEDS] for p in draw}
    seen = {data.rows[place].text for place in used | set(data.pool.tolist())}
    every = make_rows("full")
    held = {name: held_out(lm.tokenizer, every, name, size, seen) for name in args.targets}
    lower = load_model(DEFAULT_MODEL, dtype=torch.bfloat16, device=args.device)
    states = remembered(lower, setting.first)
    path = cache_dir() / "benchmarks" / "finetune" / "cells.jsonl"
    records = run_cells(
        cells, held, setting, lm.revision, path,
        lambda cell, rows: run_cell(lm, cell, rows, setting, states),
    )  # fmt: skip
    rows_of = {name: some.rows for name, some in held.items()}
    rows = loss_rows(records, rows_of, args.size)
    compared = difference_rows(records, rows_of, args.size, args.ours)
    write_result("finetune", rows + compared, goals, started, merge=True)
    print(table(compared))


if __name__ == "__main__":
    main()
