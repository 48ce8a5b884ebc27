"""The fine-tuning suite's sums: losses with their scores, paired differences, goals.

Losses are ratios of sums over the held-out rows, nats a response token and bits a character. The
difference of two methods is taken row by row and seed by seed,

    D = sum_r mean_s (nll_ours[s, r] - nll_other[s, r]) / sum_r |y_r|,

negative where ours is better. `rows_`: percentiles 2.5 and 97.5 of D over 2,000 samples of the rows
with replacement, seeds averaged. `seeds_`: 95% Student t of the D of single seeds. With three seeds
the second is wide; neither speaks of other targets.
"""

from collections.abc import Mapping, Sequence
from math import log as ln
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student_t

from benchmarks.common import Goal
from benchmarks.tuning import Example

UNTRAINED = "untrained"
N_RESAMPLES = 2000
Records = Sequence[dict[str, Any]]


def paired(
    ours: Float[np.ndarray, "n_seeds n_rows"],
    other: Float[np.ndarray, "n_seeds n_rows"],
    n_tokens: Int[np.ndarray, " n_rows"],
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """D and its two intervals.

    Args:
        ours: nats of each held-out row, summed over its tokens, by seed.
        other: the same of the other method, on the same rows and seeds.
        n_tokens: response tokens of each row.
        n_resamples: samples of the rows.
        seed: of the samples.

    Returns:
        difference, rows_low, rows_high, seeds_low, seeds_high (None with one seed), seeds_better.
    """
    gap = ours - other
    by_seed = gap.sum(1) / n_tokens.sum()
    row = gap.mean(0)
    drawn = np.random.default_rng(seed).integers(len(row), size=(n_resamples, len(row)))
    low, high = np.percentile(row[drawn].sum(1) / n_tokens[drawn].sum(1), [2.5, 97.5])
    n, mean = len(by_seed), float(by_seed.mean())
    half = student_t.ppf(0.975, n - 1) * by_seed.std(ddof=1) / n**0.5 if n > 1 else None
    return {
        "difference": mean, "rows_low": float(low), "rows_high": float(high),
        "seeds_low": None if half is None else float(mean - half),
        "seeds_high": None if half is None else float(mean + half),
        "seeds_better": int((by_seed < 0).sum()),
    }  # fmt: skip


def score(records: Records, target: str) -> tuple[str | None, float | None]:
    """(name, value) of the target's score, mean over seeds and rows; None where it has none."""
    if target == "gsm8k":
        name, key = "ranked", "is_ranked"
    elif target == "mbpp":
        return None, None
    else:
        name, key = "exact", "is_exact"
    found = [value for record in records for value in record[key]]
    return (name, float(np.mean(found))) if found else (None, None)


def loss_rows(
    records: Records, held: Mapping[str, Sequence[Example]], size: str
) -> list[dict[str, Any]]:
    """A row for each target, budget and method, mean over seeds.

    Args:
        held: held-out rows by target.
        size: names the rows.
    """
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["target"], record["share"], record["method"]), []).append(record)
    rows = []
    for (target, share, method), some in groups.items():
        n_tokens = sum(one.stop - one.start for one in held[target])
        n_chars = sum(one.n_chars for one in held[target])
        totals = np.array([sum(record["nll"]) for record in some])
        name, value = score(some, target)
        picks = sum(record["n_rows"] for record in some)
        rows.append({
            "name": f"{size} {target} {share:g} {method}", "kind": "loss", "size": size,
            "target": target, "share": share, "method": method, "seeds": len(some),
            "loss": float(totals.mean() / n_tokens),
            "loss_sd": float(totals.std(ddof=1) / n_tokens) if len(some) > 1 else None,
            "bits_per_char": float(totals.mean() / (n_chars * ln(2))),
            "score_name": name, "score": value,
            "tokens": round(float(np.mean([record["tokens"] for record in some]))),
            "response_tokens": round(float(np.mean([r["response_tokens"] for r in some]))),
            "picks": picks / len(some),
            "hits": sum(record["n_hits"] for record in some) / picks if picks else None,
            "steps": round(float(np.mean([record["steps"] for record in some]))),
            "held_rows": len(held[target]), "held_tokens": n_tokens,
            "seconds": round(sum(record["seconds"] for record in some), 1),
        })  # fmt: skip
    return rows


def difference_rows(
    records: Records, held: Mapping[str, Sequence[Example]], size: str, ours: str
) -> list[dict[str, Any]]:
    """A row for each target, budget and other method: ours less the other."""
    nll: dict[tuple[str, float, str], dict[int, list[float]]] = {}
    for record in records:
        key = (record["target"], record["share"], record["method"])
        nll.setdefault(key, {})[record["seed"]] = record["nll"]
    rows = []
    for (target, share, method), other in nll.items():
        mine = nll.get((target, share, ours))
        if method == ours or mine is None:
            continue
        seeds = sorted(mine.keys() & other.keys())
        n_tokens = np.array([one.stop - one.start for one in held[target]])
        found = paired(
            np.array([mine[s] for s in seeds]), np.array([other[s] for s in seeds]), n_tokens
        )
        rows.append({
            "name": f"{size} {target} {share:g} {ours} - {method}", "kind": "difference",
            "size": size, "target": target, "share": share, "method": ours, "other": method,
            "seeds": len(seeds), **found,
        })  # fmt: skip
    return rows


def goals(rows: Records) -> list[Goal]:
    """Of each size and budget: the targets on which ours has a lower loss than every other."""
    found = []
    compared = [row for row in rows if row["kind"] == "difference"]
    for key in dict.fromkeys((row["size"], row["share"], row["method"]) for row in compared):
        size, share, ours = key
        some = [row for row in compared if (row["size"], row["share"], row["method"]) == key]
        targets = list(dict.fromkeys(row["target"] for row in some))
        by_target = {name: [row for row in some if row["target"] == name] for name in targets}
        won = [n for n, all_ in by_target.items() if all(r["difference"] < 0 for r in all_)]
        clear = [n for n, all_ in by_target.items() if all(r["rows_high"] < 0 for r in all_)]
        wanted = min(2, len(targets))
        hardest = [max(all_, key=lambda row: row["difference"]) for all_ in by_target.values()]
        nearest = "; ".join(
            f"{row['target']} {row['difference']:+.4f} "
            f"[{row['rows_low']:+.4f}, {row['rows_high']:+.4f}] against {row['other']}"
            for row in hardest
        )
        found.append(
            Goal(
                f"targets where {ours} has the lowest loss, {share:.0%}, {size}", len(won),
                f">= {wanted} of {len(targets)}", len(won) >= wanted,
                f"interval over rows below 0 on {len(clear)}; strongest baselines: {nearest}",
            )
        )  # fmt: skip
    return found
