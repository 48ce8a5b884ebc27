"""Hungarian matching of two large dictionaries: time, memory, and whether the pairs are found.

    python -m benchmarks.matching [--rows 65536] [--width 1536]

Dictionary b is a permutation of a, each coordinate moved by Gaussian noise of .02 and the rows at
unit norm again, so the pairs and their mean cosine are known. The score matrix of 65,536 rows
would take 16 GiB; ``pw_mcc`` never holds it, and certifies how far its mean may lie below the best.
One thread.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.common import Goal, write_result
from sae_apps.tasks.evaluation import peak_memory
from sae_core.identifiability import pw_mcc

NOISE = 0.02
CERTIFIED = 1e-6
MEMORY_GIB = 8.0  # half of what the score matrix alone would take


def main() -> None:
    """Match once, write results/matching.json."""
    parser = argparse.ArgumentParser(description="Match two large dictionaries.")
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=1_536)
    args = parser.parse_args()
    started = time.time()
    torch.set_num_threads(1)
    write_result("matching", [matched_row(args.rows, args.width)], goals, started)


def matched_row(rows: int, width: int, seed: int = 0) -> dict[str, Any]:
    """One comparison of a dictionary with its noisy permutation."""
    generator = torch.Generator().manual_seed(seed)
    a = _unit(torch.randn(rows, width, generator=generator))
    b = a[torch.randperm(rows, generator=generator)]
    true = b.clone()
    b = _unit(b + NOISE * torch.randn(rows, width, generator=generator))
    started, wall = time.process_time(), time.time()
    found = pw_mcc(a, b)
    return {
        "name": f"{rows} x {width}", "pw_mcc": found.mean, "true": float((true * b).sum(1).mean()),
        "gap": found.gap, "cpu_s": time.process_time() - started, "wall_s": time.time() - wall,
        "peak_gib": peak_memory() / 2**30,
    }  # fmt: skip


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Bounded memory, a certified mean, the planted pairs found."""
    found = []
    for row in rows:
        error = abs(row["pw_mcc"] - row["true"])
        found += [
            Goal(f"{row['name']}: peak memory, GiB", row["peak_gib"], f"<= {MEMORY_GIB:g}",
                 row["peak_gib"] <= MEMORY_GIB, "both dictionaries included"),
            Goal(f"{row['name']}: certified gap", row["gap"], f"<= {CERTIFIED:g}",
                 row["gap"] <= CERTIFIED),
            Goal(f"{row['name']}: distance from the planted mean", error, f"<= {CERTIFIED:g}",
                 error <= CERTIFIED),
        ]  # fmt: skip
    return found


if __name__ == "__main__":
    main()
