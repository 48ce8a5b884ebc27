"""Tables of identifiability for the docs: recovery, its ablation, agreement, the weighted loss."""

from typing import Any

from benchmarks.common import table
from benchmarks.recovery import BASELINES, chosen

Result = dict[str, Any]


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
