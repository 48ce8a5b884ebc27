"""Removing a concept from SmolLM2 at layer 15: what each method costs where it removes as much.

    python -m benchmarks.suppression --size cpu --seeds 1    (every method)
    python -m benchmarks.suppression --size cpu --units gba residual --methods app app_joint \\
        app_direction mask_d direction leace                 (three seeds; the goals)

For every concept of benchmarks.concept_data: APP and its rivals are fitted on one part of the
documents, on latents (of the GBA and the TopK SAE of benchmarks.selection_data) and on the model's
own residual dimensions, and judged on another part (``sae_apps.suppression.evaluate``): removal by
a fixed and by a refitted probe at layer 15, likelihood of concept texts against their rewrites
where there are pairs, perplexity and KL on Wikipedia passages, accuracy of probes of the other
concepts. Another half of the passages is APP's background class.

Equal removal, not equal strength: on the kept states of layer 15 the erasure of a strength costs no
pass through the model, so each method's strength is searched for the least one (of a grid up to
``MOST``, then by halving) that erases 60% and 80% by the fixed probe; the damage is measured there,
and for APP at strength 1, as published. Intervals resample the passages (damage) and the test
documents (removal) at that strength. A method that never reaches a level has a reason instead.
Search and measurement share the test texts, alike for all methods. Seeds draw texts and split.

Methods on latents: app (posterior of each unit), app_joint (one for the token), rivals of
``lineup``. On residual dimensions: direction, leace, and app_direction, the direction gated by the
posterior of the whole activation (``gated``). instruction: a request in the prompt, which has one
strength only.

Each finished cell (method on one concept, units and seed) is a line of the cache folder's
cells.jsonl under a hash of its settings, texts and weights, with its seconds and the commit: a run
that was killed goes on with the next cell; after a change of a method's code the file has to go.
Parts of speech are words, whose texts are whole sentences, and are left out here.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit, read_cells, write_result
from benchmarks.suppression_cells import CONCEPTS, SIZES, TOLD, Bench, Cell, Size, parts
from benchmarks.suppression_goals import goals
from sae_core.download import cache_dir
from sae_core.models import DEFAULT_MODEL, load_model
from sae_core.store import append_jsonl

METHODS = {
    "gba": ("app", "app_joint", "mask_d", "range_d", "aura", "direction", "leace", "random"),
    "topk": ("app", "mask_d"),
    "residual": ("app_direction", "direction", "leace", TOLD),
}


def cell_key(cell: Cell, size: Size, about: Sequence[str]) -> str:
    """Hash of everything that a cell's result depends on, machine and threads aside."""
    facts = [list(cell), asdict(size), list(about)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def run_cells(
    cells: Sequence[Cell],
    key: Callable[[Cell], str],
    path: Path,
    run: Callable[[Cell], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Rows of all cells; those that the file lacks are run and added to it one by one."""
    done, rows = read_cells(path), []
    for number, cell in enumerate(cells, 1):
        name = key(cell)
        if name not in done:
            start = time.perf_counter()
            made = run(cell)
            seconds = time.perf_counter() - start
            how = {"seconds": round(seconds, 1), "commit": commit()}
            done[name] = {"key": name, "rows": [row | how for row in made]}
            append_jsonl(path, done[name])
            print(f"{number}/{len(cells)} {' '.join(map(str, cell))}: {seconds:.0f} s", flush=True)
        rows += done[name]["rows"]
    return rows


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What suppression removes, and what it costs.")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--units", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Run what is not yet in the cache and write results/suppression.json."""
    from benchmarks.selection_data import saes

    args, started = arguments(), time.time()
    size = SIZES[args.size]
    lm = load_model(DEFAULT_MODEL, device=args.device, dtype=torch.bfloat16)
    bench = Bench(lm, size, {name: sae.to(args.device) for name, sae in saes().items()})
    cells = [
        Cell(concept, units, method, seed)
        for seed in range(args.seeds)
        for concept in args.concepts
        for units in args.units
        for method in METHODS[units]
        if not args.methods or method in args.methods
    ]
    digests = {
        (name, seed): [part.digest() for part in parts(name, size, seed)]
        for name in args.concepts
        for seed in range(args.seeds)
    }
    hashes = {name: sae.hash() for name, sae in bench.saes.items()}

    def key(cell: Cell) -> str:
        text = digests[cell.concept, cell.seed]
        return cell_key(cell, size, [lm.revision, *hashes.values(), *text])

    path = cache_dir() / "benchmarks" / "suppression" / "cells.jsonl"
    rows = run_cells(cells, key, path, bench.run)
    shown = [{name: value for name, value in row.items() if name != "draws"} for row in rows]
    write_result("suppression", shown, lambda _: goals(rows), started, merge=True)


if __name__ == "__main__":
    main()
