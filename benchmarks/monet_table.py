"""The tables of Monet's page."""

from typing import Any

from benchmarks.common import table

Result = dict[str, Any]


def monet_losses(result: Result) -> str:
    """Held-out loss of the models of one size, and how their halves are used."""
    return table([
        {
            "model": row["kind"], "parameters": f"{row['parameters']:,}",
            "nats a token": f"{row['nats']:.3f}",
            "uniformity (least)": _pair(row, "uniformity", "log_n"),
            "ambiguity": _number(row, "ambiguity", 2),
            "halves a head": _number(row, "active_a_head", 1),
            "halves never used": _share(row, "unused"),
        }
        for row in result["rows"] if row["what"] == "loss"
    ])  # fmt: skip


def monet_domains(result: Result) -> str:
    """What deleting the experts of a domain does to it and to the others."""
    return table([
        {
            "model": row["kind"], "deleted": row["domain"],
            "experts (by chance)": f"{row['experts']:,} ({row['by_chance']:.0f})",
            "weight": f"{row['weight']:.0%}", "perplexity": f"{row['plain']:.0f}",
            "own rise": f"{row['own_rise']:+.1f} [{row['own_low']:+.1f}, {row['own_high']:+.1f}]",
            "others": f"{row['others_rise']:+.1f}",
            "own / others": "others fell" if row["ratio"] is None else f"{row['ratio']:.1f}",
            "random experts": f"{row['random_own']:+.1f} / {row['random_others']:+.1f}",
        }
        for row in result["rows"] if row["what"] == "domain"
    ])  # fmt: skip


def monet_speed(result: Result) -> str:
    """One layer: tokens a second, and what a mask costs."""
    rows = [
        {
            "layer": row["kind"], "parameters": f"{row['parameters']:,}",
            "forward, tokens/s": f"{row['forward_tokens_s']:.0f}",
            "with gradients": f"{row['step_tokens_s']:.0f}", "time / plain": "",
            "peak GiB": f"{row['peak_gib']:.2f}",
        }
        for row in result["rows"] if row["what"] == "speed"
    ]  # fmt: skip
    rows += [
        {
            "layer": f"{row['kind']}, {row['share']:.1%} deleted", "parameters": "",
            "forward, tokens/s": f"{row['forward_tokens_s']:.0f}", "with gradients": "",
            "time / plain": f"{row['relative']:.2f}", "peak GiB": f"{row['peak_gib']:.2f}",
        }
        for row in result["rows"] if row["what"] == "masked"
    ]  # fmt: skip
    return table(rows)


def _number(row: dict[str, Any], name: str, digits: int) -> str:
    return f"{row[name]:.{digits}f}" if name in row else ""


def _share(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.0%}" if name in row else ""


def _pair(row: dict[str, Any], name: str, least: str) -> str:
    return f"{row[name]:.2f} ({row[least]:.2f})" if name in row else ""
