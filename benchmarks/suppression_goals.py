"""What the suppression suite promises, and whether it holds: APP variants against their rivals.

Methods are compared on each concept at 80% erasure, on the seeds that all of them have. Wanted
are intervals of the perplexity increase that do not overlap; passages differ more than
methods, so the interval of the paired difference and KL, which is less noisy, stand beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import Goal

APPS = ("app", "app_joint", "app_direction")
LEVELS = (0.6, 0.8)


def by_method(rows: Sequence[dict[str, Any]], concept: str, at: str) -> dict[str, list[dict]]:
    """Rows of every method at a level, those that reach it at every seed; without controls."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["concept"] == concept and row["at"] == at and row["method"] != "random":
            found.setdefault(f"{row['method']} {row['units']}", []).append(row)
    return {
        name: same for name, same in found.items() if all(r["strength"] is not None for r in same)
    }


def mean(rows: Sequence[dict[str, Any]], name: str = "perplexity_increase") -> float:
    """Of a column over seeds."""
    return sum(row[name] for row in rows) / len(rows)


def below(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, bool]:
    """Whether ours costs less: by intervals that do not overlap, by that of the difference."""
    high = np.quantile(np.array(ours["draws"]) - np.array(other["draws"]), 0.975)
    return {
        "apart": ours["perplexity_increase_high"] < other["perplexity_increase_low"],
        "paired": bool(high < 0),
        "kl": ours["kl_high"] < other["kl_low"],
    }


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """At 80%: an APP variant costs least on the mean of seeds; its interval apart at every seed."""
    won, notes = {"least": 0, "apart": 0, "paired": 0, "kl": 0}, []
    seen = list(dict.fromkeys(row["concept"] for row in rows))
    for concept in seen:
        cells = by_method(rows, concept, f"{LEVELS[-1]:.0%}")
        ours = {name: same for name, same in cells.items() if same[0]["method"] in APPS}
        rest = {name: same for name, same in cells.items() if same[0]["method"] not in APPS}
        if not ours or not rest:
            notes.append(f"{concept}: {'no rival' if ours else 'no variant'} gets there")
            won = {name: n + bool(ours) for name, n in won.items()}
            continue
        best = min(ours, key=lambda name: mean(ours[name]))
        rival = min(rest, key=lambda name: mean(rest[name]))
        is_least = mean(ours[best]) < mean(rest[rival])
        by_seed = {row["seed"]: row for row in rest[rival]}
        pairs = [below(row, by_seed[row["seed"]]) for row in ours[best] if row["seed"] in by_seed]
        won["least"] += is_least
        for name in ("apart", "paired", "kl"):
            won[name] += is_least and all(pair[name] for pair in pairs)
        notes.append(
            f"{concept}: {best} {mean(ours[best]):+.3f}, {rival} {mean(rest[rival]):+.3f}"
        )
    wanted = max(1, round(len(seen) * 4 / 6))
    first = "concepts on which an APP variant costs least perplexity at 80% erasure"
    names = {
        "apart": f"{first}, its interval below the next rival's at every seed",
        "paired": f"{first}, the interval of the difference below 0 at every seed",
        "kl": f"{first}, and its KL lies below the rival's, intervals apart, at every seed",
        "least": f"{first}, mean of the seeds",
    }
    return [
        Goal(name, won[key], f">= {wanted} of {len(seen)}", won[key] >= wanted,
             "; ".join(notes) if key == "apart" else "")
        for key, name in names.items()
    ]  # fmt: skip
