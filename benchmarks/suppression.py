"""Removing a concept from SmolLM2 at layer 15: what each method costs where it removes as much.

    python -m benchmarks.suppression --size reduced
    python -m benchmarks.suppression --size full --device cuda

For every concept of benchmarks.concept_data and every kind of units (latents of the GBA and of the
TopK SAE of benchmarks.selection_data, residual dimensions): APP and its rivals are fitted on one
part of the documents, and judged on another over strengths (``sae_apps.suppression.evaluate``):
removal by a fixed and by a refitted probe at layer 15, likelihood of concept texts against their
rewrites where there are pairs, perplexity and KL on Wikipedia passages, accuracy of probes of the
other concepts. The rows give perplexity, KL and the rest at 60% and 80% erasure by interpolation,
with intervals over documents; a method that never gets there has a reason instead. Another half of
the passages is APP's background class. Seeds draw the texts, the split, the fit and the resamples.

Each finished cell (concept, units, method, seed) is a line of the cache folder's cells.jsonl under
a hash of its settings, texts and weights: a run that was killed goes on with the next cell; after
a change of a method's code the file has to go. Parts of speech are words, whose texts are whole
sentences, and are left out here.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import Goal, read_cells, write_result
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.curves import matched
from sae_apps.suppression.evaluate import EvaluationConfig, Trial, evaluate
from sae_apps.suppression.likelihood import ReadConfig
from sae_apps.suppression.trial import make_trial
from sae_apps.tasks.text import open_text
from sae_core.download import cache_dir
from sae_core.errors import UserError
from sae_core.models import DEFAULT_MODEL, LanguageModel, load_model
from sae_core.store import append_jsonl

HOOK = "layers.15.out"
CONCEPTS = {
    "paradetox": "toxic",
    "hate_offensive": "hate",
    "goemotions": "anger",
    "reviews": "negative",
    "languages": "fra",
    "novels": "fra",
}
UNITS = ("gba", "topk", "residual")
APPS = ("app", "app_joint")
RIVALS = ("mask", "mask_d", "range", "range_d", "aura", "direction", "leace", "random")
TOLD = "instruction"
METHODS = (*APPS, *RIVALS, TOLD)
LEVELS = (0.6, 0.8)


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    n_per_class: int
    """Texts of each label, of which 40% are for testing."""
    n_neutral: int
    """Wikipedia passages, of which half are background."""
    n_units: int
    """Units that are edited."""
    strengths: tuple[float, ...]
    """Ascending from 0."""
    context_size: int
    """Tokens of a text at most."""
    n_draws: int = 1000
    """Resamples of the documents."""


SIZES = {
    "reduced": Size(100, 60, 64, (0.0, 0.5, 1.0, 2.0, 4.0), 48),
    "full": Size(1000, 400, 64, (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 128),
}


class Cell(NamedTuple):
    """One method on one concept."""

    concept: str
    """Name of the data set."""
    units: str
    method: str
    seed: int


def wikipedia(n: int) -> list[str]:
    """Passages of the demo's text, Wikipedia only."""
    found = []
    for row in open_text("demo"):
        if "wikipedia" in str(row.meta.get("domain", "")).lower():
            found.append(row.text)
            if len(found) == n:
                return found
    raise UserError(f"Expected {n} Wikipedia passages in the demo's text, got {len(found)}.")


def parts(name: str, size: Size, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    """Balanced texts of a data set: for fitting and for judging, no document in both."""
    from benchmarks.concept_data import load

    data = load(name)
    n = min(size.n_per_class, min(data.counts.values()))
    return data.balanced(n, seed).split(0.4, seed)


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
            done[name] = {"key": name, "rows": run(cell)}
            append_jsonl(path, done[name])
            seconds = time.perf_counter() - start
            print(f"{number}/{len(cells)} {' '.join(map(str, cell))}: {seconds:.0f} s", flush=True)
        rows += done[name]["rows"]
    return rows


class Bench:
    """Model, SAEs and passages, opened once; edits of one (concept, units, seed) fitted once."""

    def __init__(self, lm: LanguageModel, size: Size, saes: dict[str, Any]) -> None:
        self.lm, self.size, self.saes = lm, size, saes
        self.passages = wikipedia(size.n_neutral)
        self._fitted: tuple[Any, ...] = ()

    def open(self, cell: Cell) -> tuple[Trial, dict[str, Callable[[], Any]]]:
        """The trial and how each method is fitted; the last one is remembered."""
        about = (cell.concept, cell.units, cell.seed)
        if not self._fitted or self._fitted[0] != about:
            self._fitted = (about, *self._open(cell))
        return self._fitted[1], self._fitted[2]

    def _open(self, cell: Cell) -> tuple[Trial, dict[str, Callable[[], Any]]]:
        from sae_apps.suppression.fit import FitConfig, fit_app
        from sae_apps.suppression.lineup import fit_rivals, instruction, token_sample
        from sae_apps.suppression.units import open_units

        lm, size, concept = self.lm, self.size, CONCEPTS[cell.concept]
        train, test = parts(cell.concept, size, cell.seed)
        half = len(self.passages) // 2
        trial = make_trial(train, test, concept, self.passages[half:])
        sae = self.saes.get(cell.units)
        kind = "residual" if sae is None else "latents"
        units = open_units(lm, sae, HOOK, kind)
        sample = token_sample(
            lm, HOOK, trial.train.texts, trial.train.is_concept, context_size=size.context_size
        )
        config = FitConfig(n_units=size.n_units, seed=cell.seed)

        def app(gate: str) -> Any:
            return fit_app(
                lm, sae, train.texts, train.labels, concept, self.passages[:half],
                hook_point=HOOK, kind=kind, config=replace(config, gate=gate),
            )  # fmt: skip

        def rival(name: str) -> Any:
            found = fit_rivals(units, sample, n_units=size.n_units, seed=cell.seed, names=[name])
            return found[name]

        fits: dict[str, Callable[[], Any]] = {
            "app": lambda: app("unit"),
            "app_joint": lambda: app("joint"),
            TOLD: lambda: instruction(concept),
        }
        fits |= {name: lambda name=name: rival(name) for name in RIVALS}
        return trial, fits

    def run(self, cell: Cell) -> list[dict[str, Any]]:
        """Rows of one cell, one for each level of erasure."""
        trial, fits = self.open(cell)
        size = self.size
        strengths = (0.0, 1.0) if cell.method == TOLD else size.strengths
        config = EvaluationConfig(
            strengths, HOOK, size.n_draws, cell.seed, read=ReadConfig(size.context_size)
        )
        curve = evaluate(self.lm, fits[cell.method](), trial, config, method=cell.method)
        whole = {name: values.tolist() for name, values in curve.columns.items()}
        rows = []
        for at in LEVELS:
            record = matched(curve, at).record()
            name = f"{cell.concept} {cell.units} {cell.method} seed {cell.seed} at {at:.0%}"
            rows.append(
                {"name": name, **record, "concept": cell.concept, "units": cell.units,
                 "seed": cell.seed, "n_test": curve.how["n_test"],
                 "n_neutral": curve.how["n_neutral"], "strengths": list(strengths),
                 "curve": whole}
            )  # fmt: skip
        return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """An APP variant has the smallest perplexity increase at 80%, its interval below the next."""
    won, seen = 0, sorted({row["concept"] for row in rows})
    notes = []
    for concept in seen:
        found = [
            row for row in rows
            if row["concept"] == concept and row["at"] == LEVELS[-1]
            and row["strength"] is not None and row["method"] != "random"
        ]  # fmt: skip
        ours = [row for row in found if row["method"] in APPS]
        rest = [row for row in found if row["method"] not in APPS]
        best = min(ours, key=lambda row: row["perplexity_increase"], default=None)
        high = best and best["perplexity_increase_high"]
        lows = [row["perplexity_increase_low"] for row in rest]
        is_won = high is not None and all(low is not None and high < low for low in lows)
        won += is_won
        notes.append(f"{concept} {'won' if is_won else 'not won'}")
    name = "concepts on which an APP variant costs least at 80% erasure, intervals apart"
    return [Goal(name, won, ">= 4", won >= 4, ", ".join(notes))]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What suppression removes, and what it costs.")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Run what is not yet in the cache and write results/suppression.json."""
    from benchmarks.selection_data import saes

    args, started = arguments(), time.time()
    size = SIZES[args.size]
    lm = load_model(DEFAULT_MODEL, device=args.device)
    opened = saes() if set(args.units) - {"residual"} else {}
    bench = Bench(lm, size, {name: sae.to(args.device) for name, sae in opened.items()})
    cells = [
        Cell(concept, units, method, seed)
        for concept in args.concepts
        for seed in range(args.seeds)
        for units in args.units
        for method in args.methods
        if method != TOLD or units == args.units[0]  # an instruction has no units
    ]
    digests = {
        (name, seed): [part.digest() for part in parts(name, size, seed)]
        for name in args.concepts
        for seed in range(args.seeds)
    }
    hashes = {name: sae.hash() for name, sae in opened.items()}

    def key(cell: Cell) -> str:
        text = digests[cell.concept, cell.seed]
        return cell_key(cell, size, [lm.revision, hashes.get(cell.units, "none"), *text])

    path = cache_dir() / "benchmarks" / "suppression" / "cells.jsonl"
    write_result("suppression", run_cells(cells, key, path, bench.run), goals, started, merge=True)


if __name__ == "__main__":
    main()
