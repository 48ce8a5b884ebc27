"""Rows of single targets, and the goals of the selection suite."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import Goal
from benchmarks.selection_table import (
    PRECISIONS,
    SELECTIONS,
    Bench,
    Method,
    best_baseline,
    ceilings,
    triple,
)

# the published method, and what is recommended here
HEADLINE = ("gba-jaccard", "gba-select")


def of_table(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of SELECTIONS, shortened: all methods and columns would fill megabytes."""
    left_out = ("ceiling_", "p1_", "p5_", "p10_", "example_tokens", "distinct2", "sources", "kind")
    return [
        {
            key: round(v, 4) if isinstance(v, float) else v
            for key, v in row.items()
            if not key.startswith(left_out)
        }
        for row in rows
        if row["method"] in SELECTIONS
    ]


def target_rows(
    bench: Bench, methods: Sequence[Method], found: dict[str, dict[str, np.ndarray]], prefix: str
) -> list[dict[str, Any]]:
    """A flat row per method and target; `over_best`: the best baseline of that very target."""
    baselines = [m.name for m in methods if m.family == "baseline" and m.name != "random"]
    rows = []
    for method in methods:
        for i, aim in enumerate(bench.aims):
            row: dict[str, Any] = {
                "name": f"{prefix}-{method.name}-{aim.name}", "method": method.name,
                "family": method.family, "target": aim.name, "kind": aim.kind,
                "hits": int(aim.is_hit.sum()), "chance": float(aim.is_hit.mean()),
                "examples": len(aim.draws[0]),
                "example_tokens": float(np.asarray(bench.data.n_tokens)[aim.draws[0]].mean()),
            } | ceilings(aim.is_hit)  # fmt: skip
            for name in PRECISIONS:
                row |= triple(name, found[method.name][name][i])
            if baselines:
                rival = best_baseline(found, baselines, i, "r_precision")
                gap = found[method.name]["r_precision"][i] - found[rival]["r_precision"][i]
                row |= {"best": rival} | triple("over_best", gap)
            for name in ("tokens", "distinct2", "sources"):
                row[name] = float(found[method.name][name][i].mean())
            rows.append(row)
    return rows


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """First on average against all baselines, and never below chance, for the headline methods."""
    found = []
    for row in (r for r in rows if r["method"] in HEADLINE and "r_precision_best" in r):
        for name in PRECISIONS:
            gap, low, high = (row[f"{name}_over_best{end}"] for end in ("", "_low", "_high"))
            t_low, t_high = (row[f"{name}_over_best_t{end}"] for end in ("_low", "_high"))
            note = (
                f"best baseline {row[f'{name}_best']}; 95% over draws [{low:.4f}, {high:.4f}], "
                f"over targets [{t_low:.4f}, {t_high:.4f}]"
            )
            title = f"{name} of {row['method']} over the best baseline, mean of targets"
            found.append(Goal(f"{title}, {row['size']}", gap, "> 0", gap > 0, note))
        worst = row["r_precision_worst_over_chance"]
        title = f"r_precision of {row['method']} over chance, worst target, {row['size']}"
        note = f"{row['r_precision_below_chance']} targets below"
        found.append(Goal(title, worst, ">= 0", worst >= 0, note))
    return found
