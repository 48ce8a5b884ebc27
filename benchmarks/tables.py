"""Write the tables of README and docs from benchmarks/results: none of their numbers is typed.

    python -m benchmarks.tables            rewrite README.md and docs/*.md
    python -m benchmarks.tables --check    exit 1 where a page is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, cell, table
from benchmarks.geography_table import GEOGRAPHY, moran
from benchmarks.recovery import BASELINES, chosen
from benchmarks.selection_table import SELECTIONS
from benchmarks.suppression_table import alignment, published, separability, suppression
from sae_core.store import atomic_write_text

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Result = dict[str, Any]


def quality(result: Result) -> str:
    """Held-out quality of every kind at its best learning rate."""
    return table([
        {
            "SAE": row["kind"], "L0": f"{row['l0']:.1f}", "FVU": f"{row['fvu']:.4f}",
            "loss recovered": f"{row['loss_recovered']:.3f}",
            "alive": f"{1 - row['dead_fraction']:.1%}", "learning rate": cell(row["lr"]),
        }
        for row in sorted(result["rows"], key=lambda r: r["k"])
        if row["loss_recovered"] is not None
    ])  # fmt: skip


def ablation(result: Result) -> str:
    """One choice of GBA changed at a time."""
    return table([
        {
            "change": row["name"], "L0": f"{row['l0']:.1f}", "FVU": f"{row['fvu']:.4f}",
            "alive": f"{1 - row['dead_fraction']:.1%}",
            "above 1.1 × ceiling": row["latents_above_1.1_ceiling"],
            "worst / ceiling": f"{row['worst_over_ceiling']:.2f}",
        }
        for row in result["rows"]
    ])  # fmt: skip


def throughput(result: Result) -> str:
    """Rates beside the floor of each."""
    return table([
        {
            "what": row["what"], "d_sae": cell(row["d_sae"]),
            "tokens/s": cell(row["tokens_per_s"] and round(row["tokens_per_s"])),
            "× floor": f"{row['times_floor']:.2f}", "peak MiB": cell(row["peak_MiB"]),
        }
        for row in result["rows"]
    ])  # fmt: skip


def recovery(result: Result) -> str:
    """Share of planted features found at cosine 0.9: mean (and worst seed) of every kind."""
    rows = result["rows"]

    def one(setting: str, kind: str) -> str:
        same = chosen(rows, setting, kind)
        rates = [row["frr_9"] for row in same]
        config = "" if kind == "gba" else f" [{same[0]['config']}]"
        return f"{sum(rates) / len(rates):.3f} ({min(rates):.3f}){config}"

    return table([
        {"setting": f"{name}*" if fresh else name}
        | {kind: one(name, kind) for kind in ("gba", *BASELINES)}
        for name, fresh in dict.fromkeys((row["setting"], row["fresh"]) for row in rows)
    ])  # fmt: skip


def recovery_ablation(result: Result) -> str:
    """FRR on the mixture, change by change: mean of the seeds."""
    by_change: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_change.setdefault(row["change"], []).append(row)

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return table([
        {
            "change": change, "FRR .8": f"{mean(rows, 'frr_8'):.3f}",
            "FRR .9": f"{mean(rows, 'frr_9'):.3f}",
            "mean max cosine": f"{mean(rows, 'mean_max_cosine'):.3f}",
            "L0": f"{mean(rows, 'l0'):.1f}", "FVU": f"{mean(rows, 'fvu'):.3f}",
        }
        for change, rows in by_change.items()
    ])  # fmt: skip


def agreement(result: Result) -> str:
    """Agreement across seeds with intervals, chance beside it."""

    def interval(row: dict[str, Any], name: str) -> str:
        if row[f"{name}_low"] is None:
            return f"{row[name]:.3f}"
        return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"

    return table([
        {
            "SAE": row["kind"] + ("" if row["variant"] == "default" else f", {row['variant']}"),
            "L0": f"{row['l0']:.1f}", "FVU": f"{row['fvu']:.4f}",
            "PW-MCC": interval(row, "pw_mcc"), "by chance": f"{row['chance_matched_pw_mcc']:.2f}",
            "MCS > .7": f"{row['mcs_.7']:.3f}", "MCS > .9": f"{row['mcs_.9']:.3f}",
            "top 0.3% > .7": f"{row['top03_mcs_.7']:.2f}",
            "top 0.05% > .7": f"{row['top005_mcs_.7']:.2f}",
            "parts of speech": f"{row['pos_share']:.3f} (+{row['pos_excess']:.3f})",
            "emotions": f"{row['emotion_share']:.3f} (+{row['emotion_excess']:.3f})",
            "seeds": row["seeds"],
        }
        for row in sorted(result["rows"], key=lambda r: -r["pw_mcc"])
    ])  # fmt: skip


def reweighting(result: Result) -> str:
    """Mean max cosine of weighted losses: gain over plain, and over the permuted control."""
    cells = {(row["setting"], row["kind"], row["arm"]): row for row in result["rows"]}

    def change(row: dict[str, Any], name: str) -> str:
        return f"{row[name]:+.3f} ± {row[f'{name}_pm']:.3f}"

    return table([
        {"setting": f"{setting}, {kind}", "plain": f"{row['mmc']:.3f}"}
        | {
            f"{arm}: {what}": change(cells[setting, kind, arm], name)
            for arm in ("variance 0.5", "variance 1")
            for what, name in (("gain", "mmc_gain"), ("over control", "mmc_over"))
        }
        | {"frobenius: gain": change(cells[setting, kind, "frobenius"], "mmc_gain")}
        for (setting, kind, arm), row in cells.items()
        if arm == "plain"
    ])  # fmt: skip


def selection(result: Result, size: str = "reduced") -> str:
    """Precision of picks, one method a row, the best first."""
    rows = [r for r in result["rows"] if r["size"] == size and r["method"] in SELECTIONS]

    def more(row: dict[str, Any]) -> dict[str, str]:
        if "r_bbh" not in row:
            return {}
        names = {"GSM8K": "r_gsm8k", "MBPP": "r_mbpp", "BBH": "r_bbh", "T0": "r_t0"}
        return {label: f"{row[name]:.2f}" for label, name in names.items()}

    return table([
        {
            "method": row["method"], "R-precision": f"{row['r_precision']:.3f}",
            "over the best baseline": ""
            if row["family"] == "baseline"
            else f"{row['r_precision_over_best']:+.3f} [{row['r_precision_over_best_t_low']:+.3f}, "
            f"{row['r_precision_over_best_t_high']:+.3f}]",
            "at 1%": f"{row['p1']:.3f}", "5%": f"{row['p5']:.3f}", "10%": f"{row['p10']:.4f}",
        }
        | more(row)
        | {
            "worst target over chance": f"{row['r_precision_worst_over_chance']:+.2f}",
            "length": f"{row['tokens_over_examples']:.2f}",
        }
        for row in sorted(rows, key=lambda r: -r["r_precision"])
    ])  # fmt: skip


def selection_fresh(result: Result) -> str:
    """The same on targets that had no part in the choice of the measure."""
    return selection(result, "reduced-fresh")


def finetune(result: Result) -> str:
    """Held-out loss after training on the picks, a target a column; hits among the picks."""
    cells = {(r["method"], r["target"]): r for r in result["rows"] if r["kind"] == "loss"}
    differences = {
        (r["other"], r["target"]): r for r in result["rows"] if r["kind"] == "difference"
    }

    def one(method: str, target: str) -> str:
        row = cells[method, target]
        text = f"{row['loss']:.3f}"
        if method != "untrained":
            text += f", {row['hits']:.0%} hits"
        if gap := differences.get((method, target)):
            text += (
                f"; ours {gap['difference']:+.3f} [{gap['rows_low']:+.3f}, {gap['rows_high']:+.3f}]"
            )
        return text

    methods, targets = (dict.fromkeys(pair[i] for pair in cells) for i in (0, 1))
    return table([
        {"picks": method} | {target: one(method, target) for target in targets}
        for method in methods
    ])  # fmt: skip


def similarity_exact(result: Result) -> str:
    """Exact scores of a million rows, beside reading as many bytes."""
    return table([
        {
            "what": row["what"], "d_sae": row["d_sae"], "prototypes": row["p"],
            "threads": row["threads"], "s for 1M rows": f"{row['seconds_1m_rows']:.2f}",
            "ns a nonzero": f"{row['ns_per_nonzero']:.2f}", "GB/s": f"{row['gb_s']:.1f}",
            "share of reading": f"{row['share_of_read']:.2f}",
        }
        for row in result["rows"]
        if row["share_of_read"] is not None
    ])  # fmt: skip


def similarity(result: Result) -> str:
    """Codes for FAISS over the same rows, and the default index at scale."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    return table([
        {
            "codes": row["name"], "rows": f"{row['rows']:,}",
            "bytes a row": f"{row['bytes_a_row']:.0f}",
            "recall of 10 in 100": share(row["recall_100"]), "in 1,000": share(row["recall_1000"]),
            "after re-ranking": share(row["recall"]),
            "encoded rows/s": f"{row['encode_rows_s']:,.0f}",
            "ms a target": f"{row['search_ms']:.2f}",
            "times faster than exact": "" if row["speedup"] is None else f"{row['speedup']:.1f}",
        }
        for row in result["rows"]
        if row["bytes_a_row"] is not None
    ])  # fmt: skip


def goals(result: Result) -> str:
    """Every goal of a suite, kept or not."""
    return table([
        {
            "goal": goal["name"].replace("|", "\\|"), "wanted": goal["goal"],
            "measured": f"{goal['value']:.3f}", "met": "yes" if goal["met"] else "**no**",
            "note": goal["note"].replace("|", "\\|"),
        }
        for goal in result["goals"]
    ])  # fmt: skip


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "quality": ("sae_quality", quality),
    "quality_goals": ("sae_quality", goals),
    "ablation": ("gba_ablation", ablation),
    "recovery": ("recovery", recovery),
    "recovery_goals": ("recovery", goals),
    "recovery_ablation": ("recovery_ablation", recovery_ablation),
    "agreement": ("agreement", agreement),
    "agreement_goals": ("agreement", goals),
    "verdict_goals": ("verdict", goals),
    "reweighting": ("reweighting", reweighting),
    "selection": ("selection", selection),
    "selection_fresh": ("selection", selection_fresh),
    "selection_goals": ("selection", goals),
    "finetune": ("finetune", finetune),
    "finetune_goals": ("finetune", goals),
    "similarity_exact": ("similarity_exact", similarity_exact),
    "similarity_exact_goals": ("similarity_exact", goals),
    "similarity": ("similarity", similarity),
    "similarity_goals": ("similarity", goals),
    "throughput": ("throughput", throughput),
    "throughput_goals": ("throughput", goals),
    "geography_goals_gemma": ("geography_gemma", goals),
    "geography_goals_smollm2": ("geography_smollm2", goals),
    "moran": ("moran", moran),
    "moran_goals": ("moran", goals),
    "suppression": ("suppression", suppression),
    "suppression_published": ("suppression", published),
    "suppression_goals": ("suppression", goals),
    "suppression_cost_goals": ("suppression_cost", goals),
    "separability": ("separability", separability),
    "separability_goals": ("separability", goals),
    "alignment": ("alignment", alignment),
    "alignment_goals": ("alignment", goals),
    **GEOGRAPHY,
}


def overview() -> str:
    """Goals of every suite: how many are met, and which are not."""
    rows = []
    for file in dict.fromkeys(file for file, make in TABLES.values() if make is goals):
        if not (RESULTS / f"{file}.json").exists():
            continue  # not run yet
        stated = json.loads((RESULTS / f"{file}.json").read_text())["goals"]
        missed = [f"{g['name']} ({cell(g['value'])}, wanted {g['goal']})" for g in stated
                  if not g["met"]]  # fmt: skip
        rows.append({
            "suite": file, "goals met": f"{len(stated) - len(missed)} of {len(stated)}",
            "not met": _first(missed, 2).replace("|", "\\|") or "–",
        })  # fmt: skip
    return table(rows)


def _first(texts: Sequence[str], n: int) -> str:
    more = f"; and {len(texts) - n} more" if len(texts) > n else ""
    return "; ".join(texts[:n]) + more


def render(name: str) -> str:
    """One table with the line that says where its numbers come from."""
    if name == "overview":
        return f"{overview()}\n"
    file, make = TABLES[name]
    result = json.loads((RESULTS / f"{file}.json").read_text())
    origin = (
        f"`{result['command']}`, {result['date']}, commit {result['commit']}, "
        f"{result['machine']}, {result['seconds'] / 60:.0f} minutes."
    )
    return f"{make(result)}\n\n{origin}\n"


def pages() -> list[Path]:
    """README and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Rewrite or check all pages."""
    parser = argparse.ArgumentParser(description="Write the tables of README and docs.")
    parser.add_argument("--check", action="store_true")
    is_check, stale = parser.parse_args().check, []
    for page in pages():
        old = page.read_text()
        new = BLOCK.sub(lambda m: m.group(1) + render(m.group(2)) + m.group(3), old)
        if old != new:
            stale.append(page.name)
            if not is_check:
                atomic_write_text(page, new)
    if is_check and stale:
        sys.exit(f"{', '.join(stale)}: not what benchmarks/results says")


if __name__ == "__main__":
    main()
