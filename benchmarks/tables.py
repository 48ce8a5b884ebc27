"""Write the README's tables from benchmarks/results, so that no number in it is typed by hand.

    python -m benchmarks.tables            rewrite README.md
    python -m benchmarks.tables --check    exit 1 where the README is not what the results say

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is one of `TABLES`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common import RESULTS, ROOT, cell, table
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


def goals(result: Result) -> str:
    """Every goal of a suite, kept or not."""
    return table([
        {
            "goal": goal["name"], "wanted": goal["goal"], "measured": f"{goal['value']:.3f}",
            "met": "yes" if goal["met"] else "**no**", "note": goal["note"],
        }
        for goal in result["goals"]
    ])  # fmt: skip


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "quality": ("sae_quality", quality),
    "quality_goals": ("sae_quality", goals),
    "ablation": ("gba_ablation", ablation),
    "throughput": ("throughput", throughput),
    "throughput_goals": ("throughput", goals),
}


def render(name: str) -> str:
    """One table with the line that says where its numbers come from."""
    file, make = TABLES[name]
    result = json.loads((RESULTS / f"{file}.json").read_text())
    origin = (
        f"`{result['command']}`, {result['date']}, commit {result['commit']}, "
        f"{result['machine']}, {result['seconds'] / 60:.0f} minutes."
    )
    return f"{make(result)}\n\n{origin}\n"


def main() -> None:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description="Write the README's tables.")
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = BLOCK.sub(lambda m: m.group(1) + render(m.group(2)) + m.group(3), old)
    if parser.parse_args().check:
        sys.exit(f"{readme.name} is not what benchmarks/results says" if old != new else 0)
    atomic_write_text(readme, new)


if __name__ == "__main__":
    main()
