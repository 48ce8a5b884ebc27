"""Tables of suppression, its cost and alignment for the docs."""

from typing import Any

from benchmarks.common import table

Result = dict[str, Any]


def suppression(result: Result, at: str = "80%") -> str:
    """Perplexity increase and KL at a level of erasure, mean of the seeds; one concept a column."""
    rows = [row for row in result["rows"] if row["at"] == at]
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    methods = list(dict.fromkeys((row["method"], row["units"]) for row in rows))

    def cell(same: list[dict[str, Any]]) -> str:
        there = [row for row in same if row["strength"] is not None]
        if not same:
            return ""
        if len(there) < len(same):
            return "not reached" if not there else f"reached at {len(there)} of {len(same)} seeds"
        rise, kl = (sum(row[name] for row in same) / len(same) for name in
                    ("perplexity_increase", "kl"))  # fmt: skip
        return f"{rise:+.2f} ({kl:.4f})"

    def mean_kl(method: tuple[str, str]) -> tuple[int, float]:
        mine = [row for row in rows if (row["method"], row["units"]) == method]
        there = [row["kl"] for row in mine if row["strength"] is not None]
        return len(mine) > len(there), sum(there) / max(1, len(there))

    def title(concept: str) -> str:
        seeds = len({row["seed"] for row in rows if row["concept"] == concept})
        return f"{concept}, {seeds} seeds"

    def name(method: tuple[str, str]) -> str:
        mine = [row for row in rows if (row["method"], row["units"]) == method]
        is_once = len({row["seed"] for row in mine}) == 1
        return f"{method[0]}, {method[1]}{' (1 seed)' if is_once else ''}"

    return table([
        {"method": name(method)}
        | {
            title(concept): cell([r for r in rows if r["concept"] == concept
                                  and (r["method"], r["units"]) == method])
            for concept in concepts
        }
        for method in sorted(methods, key=mean_kl)
    ])  # fmt: skip


def published(result: Result) -> str:
    """APP and the instruction at strength 1: what is erased, and what it costs."""
    rows = [row for row in result["rows"] if row["at"] == "strength 1"]
    concepts = list(dict.fromkeys(row["concept"] for row in rows))
    methods = list(dict.fromkeys((row["method"], row["units"]) for row in rows))

    def cell(same: list[dict[str, Any]]) -> str:
        if not same:
            return ""
        erased, rise = (sum(row[name] for row in same) / len(same) for name in
                        ("erased_fixed", "perplexity_increase"))  # fmt: skip
        return f"{erased:.0%}, {rise:+.2f}"

    return table([
        {"method": f"{method[0]}, {method[1]}"}
        | {
            concept: cell([r for r in rows if r["concept"] == concept
                           and (r["method"], r["units"]) == method])
            for concept in concepts
        }
        for method in methods
    ])  # fmt: skip


def alignment(result: Result) -> str:
    """rho of every kind of code with its interval, and the difference from the activations."""

    def span(row: dict[str, Any], name: str, low: str, high: str) -> str:
        if row[name] is None:
            return ""
        return f"{row[name]:+.3f} [{row[low]:+.3f}, {row[high]:+.3f}]"

    return table([
        {
            "items": row["items"], "codes": row["codes"], "n": row["n_items"],
            "rho": span(row, "rho", "rho_low", "rho_high"), "p": f"{row['p']:.2g}",
            "over the centred units": span(row, "delta", "delta_low", "delta_high"),
        }
        for row in result["rows"]
        if row["rejected"] is None
    ])  # fmt: skip


def separability(result: Result) -> str:
    """Debiased distance of every kind of unit on every data set."""
    return table([
        {
            "data": row["data"], "units": row["units"], "live": row["live"],
            "raw, live": f"{row['raw_live']:.3f}", "debiased, live": f"{row['debiased_live']:.3f}",
            "50 best": f"{row['debiased_top50']:.3f}", "best": f"{row['best']:.3f}",
            "pass": f"{row['passing_frac']:.0%}",
            "overlap (chance)": f"{row['overlap']:.2f} ({row['chance']:.2f})",
            "texts a class": row["texts_per_class"],
        }
        for row in result["rows"]
    ])  # fmt: skip
