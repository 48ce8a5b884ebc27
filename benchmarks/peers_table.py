"""What the comparison with the peers promised, and its table for the README.

    python -m benchmarks.peers_table      print it
"""

import json
from typing import Any

from benchmarks.common import RESULTS, Goal, cell, table

TIMES = {"sparsify": 2.0, "sae_lens": 5.0, "dictionary_learning": 5.0}  # goals: ours is so quick


def measure(threads: int) -> str:
    """The column that tells: seconds of two threads add up, and waiting for one another counts."""
    return "cpu_ms" if threads == 1 else "wall_ms"


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Each comparison's promises; ours is the quicker of the two kinds."""
    found = []
    speeds = [one for one in rows if one["part"] == "speed"]
    for d_sae, threads in dict.fromkeys((one["d_sae"], one["threads"]) for one in speeds):
        same = [one for one in speeds if (one["d_sae"], one["threads"]) == (d_sae, threads)]
        by, where = measure(threads), f"d_sae {d_sae}, {threads} thread{'s' * (threads > 1)}"
        mine = min((r for r in same if r["trainer"].startswith("ours")), key=lambda r: r[by])
        peers = [one for one in same if one["trainer"] in TIMES]
        load = f"; load average {mine['load']:.1f}" if threads > 1 else ""
        note = f"{mine['trainer']} {mine['setting']}{load}"
        for peer in peers:
            ratio, bound = peer[by] / mine[by], TIMES[peer["trainer"]]
            name = f"times as quick as {peer['trainer']} ({peer['setting']}), {where}"
            found.append(Goal(name, ratio, f">= {bound:g}", ratio >= bound, note))
        floor = mine["times_floor"]
        name = f"step over the bfloat16 encoder product, {where}"
        found.append(Goal(name, floor, "<= 2", floor <= 2, note))
        if peers:
            share = mine["peak_MiB"] / min(peer["peak_MiB"] for peer in peers)
            name = f"peak memory over the leanest peer's, {where}"
            found.append(Goal(name, share, "< 1", share < 1, note))
    qualities = [one for one in rows if one["part"] == "quality"]
    kinds = dict.fromkeys(
        (q["trainer"], q["d_sae"]) for q in qualities if q["trainer"].startswith("ours")
    )
    for kind in kinds:
        same = [q for q in qualities if (q["trainer"], q["d_sae"]) == kind]
        one = min(same, key=lambda q: q["fvu"])
        others = [q for q in qualities if q["trainer"] in TIMES and q["d_sae"] == one["d_sae"]]
        if others:
            best = min(others, key=lambda q: q["fvu"])
            note = f"L0 {one['l0']:.1f}, {one['lr_times']:g} times the rate; {best['trainer']} "
            note += f"{best['fvu']:.4f} at {best['l0']:.1f}, {best['lr_times']:g} times"
            name = f"FVU of {one['trainer']} {one['setting']} over the best peer's"
            ratio = one["fvu"] / best["fvu"]
            found.append(Goal(name, ratio, "<= 1", ratio <= 1, note))
    return found


def peers(result: dict[str, Any]) -> str:
    """Each trainer at its quickest setting: a step's time, as a multiple of the floor, and memory.

    Processor milliseconds on one thread, wall milliseconds on two; the FVU is the better one of
    the learning rates tried, where quality was measured.
    """
    rows = result["rows"]
    kept = []
    for one in (r for r in rows if r["part"] == "speed" and r["trainer"] != "floor"):
        by = measure(one["threads"])
        fvus = [
            r["fvu"] for r in rows
            if (r["part"], r["trainer"], r["d_sae"]) == ("quality", one["trainer"], one["d_sae"])
        ]  # fmt: skip
        kept.append({
            "trainer": one["trainer"], "setting": one["setting"], "latents": one["d_sae"],
            "threads": one["threads"], "ms a step": round(one[by]),
            "range": f"{one[by + '_low']:.0f}–{one[by + '_high']:.0f}",
            "times the product": round(one["times_floor"], 2), "L0": cell(one["l0"]),
            "peak MiB": round(one["peak_MiB"]), "FVU": min(fvus) if fvus else None,
        })  # fmt: skip
    return table(kept)


if __name__ == "__main__":
    print(peers(json.loads((RESULTS / "peers.json").read_text())))
