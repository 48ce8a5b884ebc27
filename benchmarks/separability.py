"""How separable concepts are in residual dimensions, MLP neurons, GBA and TopK latents.

SmolLM2-135M, layer 15; the SAEs of benchmarks.selection_data (1M tokens of other text). Every kind
of unit reads the same tokens, has the same bins and the same permutations, so that the debiased
scores compare; the raw score does not: its bias depends on tokens and firing rate, and the column
``null`` shows how much of it identical distributions would reach.

    python -m benchmarks.separability --size reduced
    python -m benchmarks.separability --size reduced --data paradetox --limit 100 --dry
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.common import Goal, table, write_result
from benchmarks.concept_data import NAMES, load, load_words
from benchmarks.sae_quality import HOOK
from benchmarks.selection_data import saes
from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.measure import MeasureConfig, Stream, measure
from sae_apps.suppression.permuted import Permuted, permuted_labels
from sae_apps.suppression.polysemanticity import polysemanticity
from sae_apps.suppression.separability import separability
from sae_apps.suppression.stream import unit_stream
from sae_apps.suppression.units import Units, open_units
from sae_core.errors import UserError
from sae_core.models import LanguageModel, load_model

TEXTS = {"reduced": 200, "full": 2000}  # of each concept, or fewer where there are fewer
BINS = {"reduced": 16, "full": 64}
PERMUTATIONS = 50
CONTROL = "paradetox"  # its labels are also shuffled once: what must vanish


def units_by_name(lm: LanguageModel) -> dict[str, Units]:
    """Four kinds of units of one layer."""
    found = {kind: open_units(lm, None, HOOK, kind) for kind in ("residual", "neurons")}
    return found | {name: open_units(lm, sae, HOOK) for name, sae in saes().items()}


def prepared(
    lm: LanguageModel, units: dict[str, Units], name: str, n: int, seed: int
) -> tuple[LabelledTexts, dict[str, Stream]]:
    """Balanced texts, and a stream for every kind of unit."""
    if name == "pos":
        words = load_words()
        words = words.balanced(min(n, *words.data.counts.values()), seed)
        return words.data, {kind: words.stream(lm, one) for kind, one in units.items()}
    data = load(name)
    data = data.balanced(min(n, *data.counts.values()), seed)
    return data, {kind: unit_stream(lm, one, data) for kind, one in units.items()}


def shuffled(data: LabelledTexts, seed: int) -> LabelledTexts:
    """The same texts with labels that mean nothing."""
    codes = permuted_labels(data.codes, data.groups, 1, seed + 1)[0]
    labels = tuple(data.classes[i] for i in codes)
    return LabelledTexts(f"{data.name} (shuffled)", data.texts, labels, data.group, data.source)


def record(
    data: LabelledTexts, kind: str, counts: Histogram, permuted: Permuted, seconds: float
) -> dict[str, Any]:
    """One row of the result."""
    found = separability(counts, permuted)
    scores, mixed = found.summary(), polysemanticity(counts, permuted)
    null = np.sqrt(found.column("null_jsd") / np.log2(len(counts.classes)))
    live = found.column("status") == "ok"
    return {
        "name": f"{data.name} {kind}",
        "data": data.name,
        "units": kind,
        "concepts": len(counts.classes),
        "texts_per_class": min(data.counts.values()),
        "tokens_least": int(counts.n.min()),
        "tokens_most": int(counts.n.max()),
        "n_units": scores["units"],
        "live": scores["live"],
        "rate": float(found.column("rate")[live].mean()) if live.any() else 0.0,
        "raw": scores["raw"],
        "raw_live": scores["raw_live"],
        "null": float(null[live].mean()) if live.any() else 0.0,
        "debiased": scores["debiased"],
        "debiased_live": scores["debiased_live"],
        "debiased_top50": scores["debiased_top50"],
        "best": scores["best"],
        "passing": scores["passing"],
        "passing_frac": scores["passing"] / max(1, scores["live"]),
        "overlap": mixed["overlap"],
        "chance": mixed["chance"],
        "shared": mixed["shared"],
        "seconds": round(seconds, 1),
    }


def rows_of(
    lm: LanguageModel, kinds: dict[str, Units], name: str, size: str, n: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Every kind of unit on one data set."""
    data, streams = prepared(lm, kinds, name, n, seed)
    config = MeasureConfig(BINS[size], PERMUTATIONS, seed=seed)
    for kind, units in kinds.items():
        labelled = [data, shuffled(data, seed)] if name == CONTROL else [data]
        for one in labelled:
            start = time.monotonic()
            counts, permuted = measure(
                streams[kind], one, units.n_units, has_atom=not units.two_sided, config=config
            )
            yield record(one, kind, counts, permuted, time.monotonic() - start)


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Shuffled labels must leave nothing; the SAE's best units must beat the base model's."""
    found = []
    for row in rows:
        if "shuffled" in row["data"]:
            value = row["passing_frac"]
            note = f"raw {row['raw_live']:.3f}, debiased {row['debiased_live']:.3f}"
            name = f"shuffled labels: share of live units that pass, {row['units']}"
            found.append(Goal(name, value, "<= 0.01", value <= 0.01, note))
    for name in dict.fromkeys(row["data"] for row in rows if "shuffled" not in row["data"]):
        best = {row["units"]: row["debiased_top50"] for row in rows if row["data"] == name}
        if "gba" not in best or len(best) < 2:
            continue
        rival = max((kind for kind in best if kind != "gba"), key=best.__getitem__)
        gain = best["gba"] - best[rival]
        note = f"debiased mean of the 50 best: gba {best['gba']:.3f}, {rival} {best[rival]:.3f}"
        found.append(Goal(f"GBA over the best other units, {name}", gain, "> 0", gain > 0, note))
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description="How separable concepts are, by kind of unit.")
    parser.add_argument("--size", choices=TEXTS, default="reduced")
    parser.add_argument("--data", choices=NAMES, nargs="*", default=list(NAMES))
    parser.add_argument("--limit", type=int, help="at most so many texts of a concept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="print, write no result")
    args = parser.parse_args()
    started, rows = time.time(), []
    lm = load_model("smollm2-135m", dtype=torch.bfloat16)
    kinds, n = units_by_name(lm), args.limit or TEXTS[args.size]
    for name in args.data:
        try:
            for row in rows_of(lm, kinds, name, args.size, n, args.seed):
                rows.append(row)
                print(f"{row['name']}: {row['seconds']} s", flush=True)
        except UserError as error:
            print(f"{name} is left out: {error}", flush=True)
    if args.dry:
        print(table(rows))
        for goal in goals(rows):
            print(goal)
        return
    write_result("separability", rows, goals, started, merge=args.data != list(NAMES))


if __name__ == "__main__":
    main()
