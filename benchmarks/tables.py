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
from benchmarks.identifiability_table import (
    agreement,
    recovery,
    recovery_ablation,
    reweighting,
)
from benchmarks.interop_table import interop
from benchmarks.monet_table import monet_domains, monet_losses, monet_speed
from benchmarks.peers_table import peers
from benchmarks.scale_table import longrun, scaling, start, store_scale
from benchmarks.selection_pages import (
    finetune,
    selection,
    selection_fresh,
    similarity,
    similarity_exact,
)
from benchmarks.suppression_table import alignment, published, separability, suppression
from benchmarks.trust_table import faults_disk, faults_flip, faults_kill, fuzz
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


def cpu_kernels(result: Result) -> str:
    """Milliseconds beside the product, entries lost, and what an optimiser costs in memory."""
    return table([
        {
            "what": row["what"], "d_sae": cell(row["d_sae"]),
            "ms": "–" if row["ms"] is None else f"{row['ms']:.1f}",
            "range": "–" if row["ms"] is None else f"{row['low']:.1f}–{row['high']:.1f}",
            "× product": cell(row["times"] and round(row["times"], 2)),
            "L0": cell(row["l0"] and round(row["l0"], 1)),
            "passed over": "–" if row["passed over"] is None else f"{row['passed over']:.3%}",
            "MiB": cell(row["MiB"] and round(row["MiB"])),
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


def sweep(result: Result) -> str:
    """Seconds of what is done once for several SAEs, beside its alternative."""
    return table([
        {
            "what": row["name"], "turns": row["turns"], "seconds": f"{row['wall_s']:.4g}",
            "range": f"{row['wall_low']:.4g}–{row['wall_high']:.4g}",
            "of the processor": f"{row['cpu_s']:.4g}", "× line above": f"{row['times']:.3f}",
        }
        for row in result["rows"]
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
    "scaling": ("scaling", scaling),
    "scaling_goals": ("scaling", goals),
    "sweep": ("sweep", sweep),
    "sweep_goals": ("sweep", goals),
    "cpu_kernels": ("cpu_kernels", cpu_kernels),
    "cpu_kernels_goals": ("cpu_kernels", goals),
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
    "monet_losses": ("monet", monet_losses),
    "monet_domains": ("monet", monet_domains),
    "monet_speed": ("monet", monet_speed),
    "monet_goals": ("monet", goals),
    "interop": ("interop", interop),
    "interop_goals": ("interop", goals),
    "faults_kill": ("faults", faults_kill),
    "faults_flip": ("faults", faults_flip),
    "faults_disk": ("faults", faults_disk),
    "faults_goals": ("faults", goals),
    "fuzz": ("fuzz", fuzz),
    "fuzz_goals": ("fuzz", goals),
    "matching_goals": ("matching", goals),
    "peers": ("peers", peers),
    "peers_goals": ("peers", goals),
    "longrun": ("longrun", longrun),
    "longrun_goals": ("longrun", goals),
    "store_scale": ("store_scale", store_scale),
    "store_scale_goals": ("store_scale", goals),
    "start": ("start", start),
    "start_goals": ("start", goals),
    "moran_exact_goals": ("moran_exact", goals),
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
    if not (RESULTS / f"{file}.json").exists():
        return "Not run yet.\n"
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
