"""Do runs that differ in nothing but their seed find the same latents? Every kind, on SmolLM2.

    python -m benchmarks.agreement [--size full] [--kinds gba topk] [--seeds 3]
    python -m benchmarks.agreement --kinds gba topk --variant wide --d-sae 9216
    python -m benchmarks.agreement --kinds gba --variant ratio100 --set gba.ratio=100

The activations are those of benchmarks.sae_quality; a seed decides the initial weights and the
order of the batches, the data is the same. Every SAE is kept in the cache folder under a hash of
its settings and data, so that a run that was killed goes on with the next SAE; `--fresh` trains
anew (after a change of the code, which the hash does not see).

For each pair of seeds, on decoder directions of the latents alive (active on the held-out tokens)
in each run, with signed cosines:

    pw_mcc    mean cosine of the best one-to-one matching (arXiv 2505.20254)
    mean_mcs  mean of MCS_m = max_m' cos(w_m, w'_m'), both directions
    mcs_.9    share of latents with MCS > .9; top03_ and top005_ of the 0.3% and 0.05% with the
              largest activation on the held-out tokens (14 and 3 of 4,608)

and by chance the same for as many random directions: uniform on the sphere (chance_), and Gaussian
with the second moments of the two dictionaries (chance_matched_), which share what the data's
anisotropy alone would make alike.

Intervals are 95% Student t intervals on the jackknife that leaves out one seed at a time. Pairs
that share a seed are not independent: the jackknife allows for that, an interval over pairs would
not. With three seeds it has two degrees of freedom and is wide.

results/agreement.json holds a row per kind and variant, agreement_seeds.json one per SAE,
agreement_pairs.json one per pair, agreement_curve.json the shares at every threshold.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import combinations
from typing import Any

import numpy as np
import torch

from benchmarks.agreement_compare import CURVE, Run, compared, curve, jackknife, random_pair
from benchmarks.agreement_saes import Variant, make_variant, trained
from benchmarks.common import Goal, table, write_result
from benchmarks.sae_quality import D_SAE, HOOK, KINDS, TOKENS, prepare
from benchmarks.semantics import item_activations, label_consistency
from benchmarks.semantics_data import Labelled, prepare_labelled
from sae_core.download import cache_dir
from sae_core.metrics import evaluate
from sae_core.sae import SAE

GOAL = 0.80  # reported for well-trained TopK SAEs, arXiv 2505.20254
TOP_ITEMS = 20
SHOWN = (
    "name", "l0", "fvu", "dead_fraction", "pw_mcc", "pw_mcc_low", "pw_mcc_high",
    "chance_matched_pw_mcc", "mean_mcs", "mcs_.9", "top03_mcs_.9", "seeds", "epochs",
)  # fmt: skip


def measured(sae: SAE, seed: int, held_out: Iterator[Any], labelled: Sequence[Labelled]) -> Run:
    """What one run shows by itself; the labelled texts may be none."""
    result = evaluate(sae, held_out)
    alive = torch.from_numpy(result.freq > 0)
    measures = {
        "fvu": result.fvu, "fvu_raw": result.fvu_raw, "l0": result.l0,
        "dead_fraction": result.dead_fraction, "n_alive": float(alive.sum()),
    }  # fmt: skip
    for text in labelled:
        acts = item_activations(sae, text)
        for top, suffix in ((None, ""), (TOP_ITEMS, f"_top{TOP_ITEMS}")):
            found = label_consistency(acts, text.label, top=top)
            measures[f"{text.name}{suffix}_share"] = found.mean_share
            measures[f"{text.name}{suffix}_excess"] = found.mean_excess
        measures[f"{text.name}_base_rate"] = found.base_rate
    directions = sae.W_dec.detach()[alive]
    return Run(seed, directions, torch.from_numpy(result.peak)[alive], sae.d_sae, measures)


def summary(
    variant: Variant, n_tokens: int, runs: Sequence[Run], pairs: dict[tuple[int, int], dict]
) -> dict[str, Any]:
    """The flat row of one variant: means over seeds and pairs, with intervals.

    Args:
        n_tokens: distinct training tokens.
        pairs: what `compared` found, by places of the two runs.
    """
    tokens = variant.train.steps * variant.train.batch_size
    row: dict[str, Any] = {
        "name": variant.row_name, "kind": variant.kind, "variant": variant.name,
        "size": variant.size, "d_sae": variant.sae.d_sae, "k": variant.sae.k,
        "lr": variant.train.lr, "tokens": tokens, "epochs": tokens / n_tokens, "seeds": len(runs),
    }  # fmt: skip

    def add(name: str, value: tuple[float, float | None, float | None]) -> None:
        row[name], row[f"{name}_low"], row[f"{name}_high"] = value

    def over_pairs(name: str) -> Callable[[tuple[int, ...]], float]:
        return lambda who: float(np.mean([pairs[pair][name] for pair in combinations(who, 2)]))

    for name in next(iter(pairs.values())):
        if name != "pw_mcc_gap":
            add(name, jackknife(len(runs), over_pairs(name)))
    row["pw_mcc_gap"] = max(found["pw_mcc_gap"] for found in pairs.values())
    for name in runs[0].measures:
        if name.endswith("base_rate"):  # of the text, the same in every run
            row[name] = runs[0].measures[name]
            continue
        values = [run.measures[name] for run in runs]
        add(name, jackknife(len(runs), lambda who, v=values: float(np.mean([v[i] for i in who]))))
    for matched in (False, True):
        by_chance = compared(*random_pair(runs[0], runs[1], matched=matched))
        prefix = "chance_matched_" if matched else "chance_"
        row |= {f"{prefix}{name}": by_chance[name] for name in ("pw_mcc", "mean_mcs")}
    return row


@dataclass(frozen=True)
class Found:
    """Rows of the four result files."""

    summary: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    curve: list[dict[str, Any]]


def agreement_rows(variant: Variant, n_tokens: int, runs: Sequence[Run]) -> Found:
    """Compare all pairs of runs of one variant."""
    who = {"kind": variant.kind, "variant": variant.name, "size": variant.size}
    places = list(combinations(range(len(runs)), 2))
    pairs = {(i, j): compared(runs[i], runs[j]) for i, j in places}
    both = [(runs[i], runs[j]) for i, j in places]
    drawn = {"": both, "random-": [random_pair(*both[0], matched=False)]}
    curves = [
        {"name": f"{variant.row_name}-{origin}{label}-{threshold:g}"} | who
        | {"subset": label, "directions": "random" if origin else "trained",
           "threshold": threshold, "share": mean, "low": low, "high": high}
        for origin, couples in drawn.items()
        for label, fraction in (("all alive", 1.0), ("top 0.3%", 0.003))
        for threshold, (mean, low, high) in zip(CURVE, curve(couples, fraction), strict=True)
    ]  # fmt: skip
    return Found(
        [summary(variant, n_tokens, runs, pairs)],
        [{"name": f"{variant.row_name}-{r.seed}"} | who | {"seed": r.seed} | r.measures
         for r in runs],
        [{"name": f"{variant.row_name}-{runs[i].seed}-{runs[j].seed}"} | who
         | {"seed_a": runs[i].seed, "seed_b": runs[j].seed} | found
         for (i, j), found in pairs.items()],
        curves,
    )  # fmt: skip


# ---- goals and command ----


def at_fvu(rows: Sequence[dict[str, Any]], fvu: float) -> tuple[float, bool]:
    """PW-MCC of rows of one kind at this FVU: (value, is it between two measured rows).

    Linear in FVU between the two rows around it; outside, that of the row with the nearest FVU.
    """
    points = sorted((row["fvu"], row["pw_mcc"]) for row in rows)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= fvu <= x1:
            return (y0 + (y1 - y0) * (fvu - x0) / (x1 - x0) if x1 > x0 else max(y0, y1)), True
    nearest = min(points, key=lambda point: abs(point[0] - fvu))
    return nearest[1], nearest[0] == fvu


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """GBA against 0.80 and against every other kind at GBA's FVU.

    Judged are the default settings, and each variant that all kinds were trained in. Another kind's
    rows of the same data, width and length count as its line, whatever their k or learning rate.
    """
    found = []
    for gba in (row for row in rows if row["kind"] == "gba" and _is_judged(row, rows)):
        value, size = gba["pw_mcc"], f"{gba['variant']}, {gba['size']}"
        interval = _interval(gba)
        found.append(
            Goal(f"PW-MCC of GBA, {size}", value, f">= {GOAL}", value >= GOAL,
                 f"{interval}; FVU {gba['fvu']:.4f}, L0 {gba['l0']:.1f}")
        )  # fmt: skip
        for kind in (kind for kind in KINDS if kind != "gba"):
            same = ("size", "d_sae", "tokens")
            line = [r for r in rows if r["kind"] == kind and all(r[n] == gba[n] for n in same)]
            if not line:
                continue
            bar, is_between = at_fvu(line, gba["fvu"])
            where = ", ".join(
                f"{r['pw_mcc']:.3f} {_interval(r)} at FVU {r['fvu']:.4f}" for r in line
            )
            note = "" if is_between else "not at equal FVU, its nearest point; "
            found.append(
                Goal(f"PW-MCC of GBA over {kind} at GBA's FVU, {size}", value - bar, "> 0",
                     value > bar, f"{note}{kind}: {where}")
            )  # fmt: skip
    return found


def _is_judged(gba: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
    alike = [r for r in rows if all(r[key] == gba[key] for key in ("variant", "size"))]
    return gba["variant"] == "default" or {r["kind"] for r in alike} == set(KINDS)


def _interval(row: dict[str, Any]) -> str:
    low, high = row["pw_mcc_low"], row["pw_mcc_high"]
    return "[no interval]" if low is None else f"[{low:.3f}, {high:.3f}]"


def write(found: Found, started: float) -> None:
    """Put the rows into the four result files, beside those of other variants; print the main."""
    with redirect_stdout(StringIO()):  # hundreds of lines or columns, better read in the files
        path = write_result("agreement", found.summary, goals, started, merge=True)
        for name in ("seeds", "pairs", "curve"):
            rows = getattr(found, name)
            write_result(f"agreement_{name}", rows, lambda _: [], started, merge=True)
    result = json.loads(path.read_text())
    print(table([{name: row[name] for name in SHOWN} for row in result["rows"]]))
    for goal in result["goals"]:
        print(f"{'met    ' if goal['met'] else 'NOT MET'} {goal['name']}: {goal['value']:.4g}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Agreement of SAEs across seeds.")
    parser.add_argument("--size", choices=TOKENS, default="reduced", help="data (reduced)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, at least 2 (3)")
    parser.add_argument("--variant", default="default", help="names the rows of these settings")
    parser.add_argument("--tokens", type=int, help="presented in training (the data once)")
    parser.add_argument("--d-sae", type=int, default=D_SAE, help=f"latents ({D_SAE})")
    parser.add_argument("--k", type=int, default=64, help="active latents a token (64)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OWNER.FIELD=VALUE",
        help="gba.ratio=100, gba.n_groups=1, sae.tied=true, lr=0.004, sparsity.auxk=0",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="train anew what is in the cache")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"Agreement needs at least 2 seeds, got {args.seeds}.")
    usual = args.d_sae == D_SAE and args.k == 64 and args.tokens is None and not args.set
    if args.variant == "default" and not usual:
        parser.error("Settings other than the default need a name of their own: --variant NAME.")
    return args


def main() -> None:
    """Train, measure and compare the kinds asked for."""
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants = [
        make_variant(
            kind,
            args.variant,
            args.size,
            d_sae=args.d_sae,
            k=args.k,
            tokens=args.tokens,
            settings=args.set,
        )  # fmt: skip
        for kind in args.kinds
    ]
    data = prepare(args.size)
    cache = cache_dir() / "benchmarks"
    labelled = prepare_labelled(data.lm, HOOK, args.size, cache / f"semantics-{args.size}")
    for variant in variants:
        started = time.time()
        runs = []
        for seed in range(args.seeds):
            sae = trained(data.train, variant, seed, cache / "agreement", fresh=args.fresh)
            runs.append(measured(sae, seed, data.held_out.iter_sequential(8192), labelled))
        write(agreement_rows(variant, len(data.train), runs), started)


if __name__ == "__main__":
    main()
