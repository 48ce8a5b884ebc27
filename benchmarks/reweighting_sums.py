"""Means, intervals and goals of the reweighting suite."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from scipy.stats import t as student

from benchmarks.common import Goal

BASELINE = "plain"
PUBLISHED = ("variance 0.5", "variance 1")


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95% Student t interval (None for one value)."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1)) * deviation / sqrt(n)


def summarise(
    runs: Sequence[dict[str, Any]], measures: Sequence[str], outcome: dict[str, int]
) -> list[dict[str, Any]]:
    """A row for each setting, kind and arm: means, and paired gains of the outcomes.

    Args:
        measures: columns to average over seeds, each with its half width in `_pm`.
        outcome: column -> 1 where more is better, -1 where less is; gains are signed so that
            positive is better: `_gain` over the plain loss, `_over` over the permuted control.
    """
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for run in runs:
        cell = cells.setdefault((run["setting"], run["kind"], run["arm"]), {})
        for name in measures:
            if name in run:
                cell.setdefault(name, []).append(float(run[name]))
    rows = []
    for (setting, kind, arm), cell in cells.items():
        row: dict[str, Any] = {
            "name": f"{setting}-{kind}-{arm}", "setting": setting, "kind": kind, "arm": arm,
        }  # fmt: skip
        for name in measures:
            mean, half = interval(cell[name]) if name in cell else (None, None)
            row |= {name: mean, f"{name}_pm": half}
        for name, sign in outcome.items():
            for suffix, other in (("gain", BASELINE), ("over", f"{arm} permuted")):
                values = cells.get((setting, kind, other), {}).get(name)
                difference = (None, None)
                if values and name in cell and other != arm and len(values) == len(cell[name]):
                    paired = zip(cell[name], values, strict=True)
                    difference = interval([sign * (a - b) for a, b in paired])
                row |= dict(zip((f"{name}_{suffix}", f"{name}_{suffix}_pm"), difference,
                                strict=True))  # fmt: skip
        rows.append(row)
    return rows


def goals(rows: list[dict[str, Any]], outcome: dict[str, int]) -> list[Goal]:
    """The published weights better than the plain loss and than their control, by outcome."""
    found = []
    for row in rows:
        if row["arm"] not in PUBLISHED:
            continue
        for name in outcome:
            gain, over = row[f"{name}_gain"], row[f"{name}_over"]
            if gain is None or over is None:
                continue
            gain_pm, over_pm = row[f"{name}_gain_pm"], row[f"{name}_over_pm"]
            title = f"{name} of {row['arm']} ({row['setting']}, {row['kind']})"
            if gain_pm is None or over_pm is None:
                note = f"gain {gain:.4f}, over its control {over:.4f}; one value, no interval"
                found.append(Goal(title, min(gain, over), "> 0", False, note))
                continue
            low = min(gain - gain_pm, over - over_pm)
            note = f"gain {gain:.4f} ± {gain_pm:.4f}, over its control {over:.4f} ± {over_pm:.4f}"
            found.append(Goal(f"{title}: lower bound", low, "> 0", low > 0, note))
    return found
