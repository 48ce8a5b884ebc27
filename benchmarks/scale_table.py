"""Tables of long runs, of ten million rows and of starting, for the docs."""

from typing import Any

from benchmarks.common import cell, table

Result = dict[str, Any]


def longrun(result: Result) -> str:
    """Memory of every phase behind its warm-up."""
    return table([
        {
            "run": row["name"], "minutes": f"{row['minutes']:.0f}", "tokens": f"{row['tokens']:,}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "anonymous MiB, after warm-up": f"{row['after_warm_up_MiB']:.0f}",
            "at the end": f"{row['end_MiB']:.0f}", "largest": f"{row['max_MiB']:.0f}",
            "slope of all samples, MiB/h": f"{row['slope_MiB_per_hour']:+.0f}",
            "growth of the peaks": f"{row['growth']:+.2%}",
            "RSS at the end": f"{row['rss_end_MiB']:.0f}",
        }
        for row in result["rows"]
    ])  # fmt: skip


def store_scale(result: Result) -> str:
    """Every step over the rows: time and memory."""
    return table([
        {
            "step": row["name"], "seconds": f"{row['seconds']:.2f}",
            "rows/s": "–" if row["rows_per_s"] is None else f"{row['rows_per_s']:,.0f}",
            "peak MiB": f"{row['peak_MiB']:.0f}", "of these imports": f"{row['imports_MiB']:.0f}",
            "answer": cell(row["answer"]),
        }
        for row in result["rows"]
    ])  # fmt: skip


def scaling(result: Result) -> str:
    """Steps in several processes, measured and on paper."""
    return table([
        {
            "what": row["what"], "latents": f"{row['d_sae']:,}",
            "tokens a step": f"{row['batch']:,}",
            "ms": f"{row['ms']:.1f}",
            "range": "–" if row["low"] is None else f"{row['low']:.0f}–{row['high']:.0f}",
            "tokens/s": f"{row['tokens_s']:,.0f}", "× one": f"{row['speedup']:.2f}",
            "exchanged, MiB": f"{row['exchange_MiB']:,.0f}",
            "MiB a process": f"{row['MiB']:,.0f}",
            "FVU": "–" if row["fvu"] is None else f"{row['fvu']:.4f}",
            "of the ms": row["parts_ms"] or "–",
        }
        for row in result["rows"]
    ])  # fmt: skip


def start(result: Result) -> str:
    """Every import and command: seconds, beside torch, modules and memory."""
    return table([
        {
            "what": row["name"] + (f" {row['version']}" if row["version"] else ""),
            "seconds": f"{row['seconds']:.2f}",
            "range": f"{row['seconds_low']:.2f}–{row['seconds_high']:.2f}",
            "processor seconds": f"{row['cpu_seconds']:.2f}",
            "× import torch": f"{row['times_torch']:.2f}",
            "modules": row["modules"], "peak MiB": f"{row['peak_MiB']:.0f}",
        }
        for row in result["rows"]
    ])  # fmt: skip
