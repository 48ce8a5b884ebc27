"""Tables of selection for the docs: picks, training on them, exact scores, the index."""

from typing import Any

from benchmarks.common import table
from benchmarks.selection_table import SELECTIONS

Result = dict[str, Any]


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
    """Held-out loss after training on the picks, a budget and method a row, a target a column."""
    cells = {
        (r["share"], r["method"], r["target"]): r for r in result["rows"] if r["kind"] == "loss"
    }
    differences = {
        (r["share"], r["other"], r["target"]): r
        for r in result["rows"]
        if r["kind"] == "difference"
    }

    def one(share: float, method: str, target: str) -> str:
        row = cells.get((share, method, target))
        if row is None:
            return ""
        text = f"{row['loss']:.3f}"
        if method != "untrained":
            text += f", {row['hits']:.0%} hits"
        if gap := differences.get((share, method, target)):
            text += (
                f"; ours {gap['difference']:+.3f} [{gap['rows_low']:+.3f}, {gap['rows_high']:+.3f}]"
            )
        return text

    pairs = sorted(dict.fromkeys(key[:2] for key in cells), key=lambda pair: pair[0])
    targets = dict.fromkeys(key[2] for key in cells)
    seeds = {pair: max(r["seeds"] for key, r in cells.items() if key[:2] == pair) for pair in pairs}
    return table([
        {
            "budget": f"{share:.0%}" if share else "–",
            "picks": method,
            "seeds": seeds[share, method] if share else "–",
        }
        | {target: one(share, method, target) for target in targets}
        for share, method in pairs
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
    """Codes for FAISS over the same rows, and the default index at scale.

    Rows of one thread show processor time, which others on the machine do not stretch.
    """

    def measured(row: dict[str, Any], name: str) -> float:
        return row[f"{name}_cpu"] if row["threads"] == 1 else row[name]

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    return table([
        {
            "codes": row["name"], "rows": f"{row['rows']:,}",
            "bytes a row": f"{row['bytes_a_row']:.0f}",
            "recall of 10 in 100": share(row["recall_100"]), "in 1,000": share(row["recall_1000"]),
            "after re-ranking": share(row["recall"]),
            "encoded rows/s": f"{measured(row, 'encode_rows_s'):,.0f}",
            "ms a target": f"{measured(row, 'search_ms'):.2f}",
            "times faster than exact": "" if row["speedup"] is None else f"{row['speedup']:.1f}",
        }
        for row in result["rows"]
        if row["bytes_a_row"] is not None
    ])  # fmt: skip
