"""What ``sae-apps select`` says: the numbers of a selection, and an estimate before it."""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .common import size
from .inspect import printable
from .progress import duration

if TYPE_CHECKING:
    from sae_apps.selection.embed import Encoder
    from sae_apps.selection.instructions import InstructionSource
    from sae_apps.selection.result import SelectionResult

QUANTILES = (0.1, 0.5, 0.9)
SHOWN_GROUPS, SHOWN_LATENTS = 12, 8
PROBE_SECONDS, PROBE_ROWS, PROBE_BATCH = 3.0, 256, 16
BYTES_AN_ENTRY = 8  # latent and activation of a stored code
BYTES_A_ROW = 48  # row pointer, row table, score
BASE_BYTES = 500 * 2**20  # the interpreter with torch and transformers loaded


def summarise(
    result: "SelectionResult", tokens: Mapping[int, Sequence[str]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of a selection, as JSON types.

    Args:
        tokens: latent to the tokens on which it fires most.
        facts: what else belongs into the summary: method, files, folder of the features.
    """
    scores = result.scores["score"].to_numpy()
    picked = result.picks["score"].to_numpy()
    groups = result.picks["group"].to_pylist()
    if result.config["prototypes"] == "each":  # named GROUP:ROW_ID
        groups = [name.rpartition(":")[0] for name in groups]
    return {
        **facts,
        "counts": dict(result.counts),
        "picked_score": {"min": float(picked.min()), "max": float(picked.max())},
        "pool_score": quantiles(scores),
        "picked_length": quantiles(result.picks["n_tokens"].to_numpy()),
        "pool_length": quantiles(result.scores["n_tokens"].to_numpy()),
        "groups": {name: groups.count(name) for name in dict.fromkeys(groups)},
        "reasons": [
            {"latent": latent, "share": share, "n_picks": n, "tokens": list(tokens.get(latent, ()))}
            for latent, share, n in top_latents(result)
        ],
        "provenance": dict(result.provenance),
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Mean and the quantiles that are shown."""
    found = {f"q{100 * q:.0f}": float(np.quantile(values, q)) for q in QUANTILES}
    return {"mean": float(values.mean()), **found}


def top_latents(result: "SelectionResult", n: int = SHOWN_LATENTS) -> list[tuple[int, float, int]]:
    """(latent, its mean share of the score of the picks that name it, number of these picks).

    The latents with the largest sum of shares over all picks, see ``n_reasons``, come first.
    """
    shares: dict[int, list[float]] = {}
    for row in result.reasons.to_pylist():
        for latent, share in zip(row["latents"], row["shares"], strict=True):
            shares.setdefault(latent, []).append(share)
    total = {latent: sum(found) for latent, found in shares.items()}
    best = sorted(total, key=lambda latent: (-total[latent], latent))[:n]
    counts = [len(shares[latent]) for latent in best]
    return [(one, total[one] / count, count) for one, count in zip(best, counts, strict=True)]


def as_text(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    counts, score = summary["counts"], summary["picked_score"]
    lines = [
        f"{counts['picked']:,} of {counts['rows']:,} rows picked "
        f"({counts['picked_tokens']:,} tokens), method {summary['method']}"
    ]
    dropped = [
        f"{counts[name]:,} {words}"
        for name, words in (
            ("without_text", "without text"),
            ("empty", "with no active latent (score 0)"),
            ("exact_duplicates", "exact duplicates"),
            ("near_duplicates", "near duplicates"),
            ("contaminated", "that share text with the evaluation set"),
        )
        if counts.get(name)
    ]
    if dropped:
        lines.append(f"rows {', '.join(dropped)}")
    pool = summary["pool_score"]
    lines.append(
        f"score   picks {score['max']:.4f} to {score['min']:.4f}; pool median {pool['q50']:.4f}, "
        f"best tenth above {pool['q90']:.4f}"
    )
    lines.append(
        "tokens  "
        + "; ".join(
            f"{name} median {found['q50']:,.0f}, mean {found['mean']:,.0f} "
            f"(tenths {found['q10']:,.0f} to {found['q90']:,.0f})"
            for name, found in (
                ("picks", summary["picked_length"]),
                ("pool", summary["pool_length"]),
            )
        )
    )
    if len(summary["groups"]) > 1:
        named = [f"{printable(name)} {n:,}" for name, n in summary["groups"].items()]
        more = len(named) - SHOWN_GROUPS
        lines.append(
            "groups  " + ", ".join(named[:SHOWN_GROUPS]) + (f" and {more} more" if more > 0 else "")
        )
    if summary["reasons"]:
        lines.append("latents that make the picks similar, with their share of the score there:")
    for one in summary["reasons"]:
        words = ", ".join(repr(printable(token)) for token in one["tokens"])
        lines.append(
            f"  {one['share']:7.2%}  latent {one['latent']:>6} in {one['n_picks']:,} picks"
            + (f": {words}" if words else "")
        )
    lines += [f"written to {path}" for path in summary["files"]]
    lines.append(f"features of the pool in {summary['features']}: other targets need no model pass")
    return "\n".join(lines)


def estimate(
    encoder: "Encoder", pool: "InstructionSource", folder: Path, shard_rows: int
) -> dict[str, Any]:
    """Time, disk and memory, from the first rows of the pool; rows encoded before count as done."""
    from sae_apps.selection.embed import encode

    n_rows = sum(1 for _ in pool)
    n_done = min(n_rows, shard_rows * len(list(folder.glob("shard-*"))))
    rows = list(islice(iter(pool), PROBE_ROWS))
    encode(encoder, rows[:1])  # pays for the library's set-up, not timed
    n = tokens = entries = 0
    start = time.monotonic()
    while n < len(rows) and (not n or time.monotonic() - start < PROBE_SECONDS):
        found = encode(encoder, rows[n : n + PROBE_BATCH])
        n += found.n_rows
        tokens += int(found.rows["length"].to_numpy().sum())
        entries += found.acts.nnz
    seconds = time.monotonic() - start
    row_bytes = BYTES_AN_ENTRY * entries / n + BYTES_A_ROW
    weights = encoder.parameters()
    return {
        "n_rows": n_rows,
        "n_encoded": n_done,
        "tokens": round(n_rows * tokens / n),
        "tokens_per_second": tokens / seconds,
        "probe_rows": n,
        "seconds": (n_rows - n_done) * seconds / n,
        "disk_bytes": int(n_rows * row_bytes),
        "memory_bytes": int(
            BASE_BYTES
            + sum(p.numel() * p.element_size() for p in weights)
            + 3 * min(shard_rows, n_rows) * row_bytes  # a shard, its parts and their sum
            + n_rows * BYTES_A_ROW
        ),
        "missing": [],
    }


def estimate_text(report: Mapping[str, Any]) -> str:
    """The estimate as lines for people."""
    lines = []
    if "n_rows" in report:
        lines = [
            f"rows    {report['n_rows']:,}, of which {report['n_encoded']:,} are encoded already",
            f"tokens  about {report['tokens']:,}",
            f"time    about {duration(report['seconds'])} to encode the rest, at "
            f"{report['tokens_per_second']:,.0f} tokens/s, by one process",
            f"disk    about {size(report['disk_bytes'])} of features",
            f"memory  about {size(report['memory_bytes'])}",
            f"measured here on the first {report['probe_rows']:,} rows; memory is computed",
        ]
    lines += [f"not estimated: {note}" for note in report["missing"]]
    return "\n".join([*lines, "nothing was written"])
